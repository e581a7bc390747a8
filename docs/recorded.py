"""Recorded runs of the lab: made from a folder of results, kept in the repository, judged again when they are read.

``python -m docs.recorded lab docs/results/lab-digits.json`` records the folder that ``orthofast lab --out lab`` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthofast.errors import InputError
from orthofast.lab.experiment import DATA, Experiment
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED, Verdict

RESULTS = Path(__file__).parent / "results"
NAMES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
WHOLE = "digits"  # this record holds the experiments that take no data too
DIGITS = 7  # significant; where they would turn a condition, all are kept
# what makes two runs one: the folder of the data is the machine's own affair
ALIKE = ("commit", "versions", "machine")
SETTINGS = ("data", "scale", "device")
ABSOLUTE = re.compile(r"(?<![\w.])(?:/[\w.-]+){2,}|[A-Za-z]:\\")


@dataclass(frozen=True)
class Run:
    """What one experiment left.

    Attributes:
        seeds: that were run.
        cpu_s: CPU seconds of all seeds.
        size: what was run, in words.
        status: the verdict when it was recorded.
        raws: what each seed measured, in the order of the seeds.
    """

    seeds: list[int]
    cpu_s: float
    size: str
    status: str
    raws: list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """A run of the lab.

    Attributes:
        about: commit, versions and machine, and the settings data, scale and device.
        runs: by the experiment's identifier.
    """

    about: dict[str, Any]
    runs: dict[str, Run]

    @property
    def data(self) -> str:
        """The data set, such as "mnist"."""
        return str(self.about["data"])

    @property
    def whole(self) -> bool:
        """Whether it holds what takes no data too."""
        return self.data == WHOLE

    @property
    def key(self) -> str:
        """The data set, with the scale where it is not the default, for names of files."""
        return self.data + ("" if self.about["scale"] == "small" else f"-{self.about['scale']}")

    @property
    def name(self) -> str:
        """The data set for people, with the scale where it is not the default."""
        return NAMES[self.data] + ("" if self.about["scale"] == "small" else f", {self.about['scale']} scale")


@dataclass(frozen=True)
class Judged:
    """A recorded experiment under the verdict of today's code.

    Attributes:
        experiment: of the registry.
        run: its numbers.
        verdict: on them.
    """

    experiment: Experiment
    run: Run
    verdict: Verdict


def expected(data: str) -> list[Experiment]:
    """The experiments that a record of a data set holds: what runs on it, and with digits what takes no data."""
    return [one for one in RUNNABLE.values() if data in one.needs or (data == WHOLE and not one.needs)]


def collect(folder: Path) -> Record:
    """A record from a folder that ``orthofast lab --out`` wrote, numbers rounded where that turns no condition.

    Raises:
        InputError: if the run is not complete, or not one run: other commits, settings, versions or seeds.
    """
    manifests = {one: _read(folder / one / "manifest.json") for one in _folders(folder)}
    if not manifests:
        raise InputError(f"{folder} holds no results; `orthofast lab --out {folder}` writes them")
    about = _alike(manifests)
    wanted = expected(about["data"])
    missing = [one.id for one in wanted if one.id not in manifests]
    if missing:
        raise InputError(f"{folder} is not complete, it lacks {', '.join(missing)}; `orthofast lab` goes on with it")
    runs = {one.id: _run(one, folder / one.id, manifests[one.id]) for one in wanted}
    seeds = {tuple(runs[one.id].seeds) for one in wanted if one.statistical}
    if len(seeds) > 1:
        raise InputError(f"{folder} mixes seeds {' and '.join(str(list(one)) for one in sorted(seeds))}; run all alike")
    return Record(about, runs)


def text_of(record: Record) -> str:
    """The record as JSON, one experiment a line.

    Raises:
        InputError: if a number is not finite, or a text names a place on this machine.
    """
    lines = [f'"about": {_compact(record.about)},', '"experiments": {']
    for identifier, run in sorted(record.runs.items()):
        kept = {"verdict": run.status, "seeds": run.seeds, "cpu_s": run.cpu_s, "size": run.size, "raw": run.raws}
        try:
            lines.append(f'"{identifier}": {_compact(kept)},')
        except ValueError:
            raise InputError(f"{identifier} holds a number that is not finite; JSON has none") from None
        place = next((found for text in _texts(kept) if (found := ABSOLUTE.search(text))), None)
        if place:
            raise InputError(f"{identifier} names {place.group()!r}, a place on a machine; leave it out of the numbers")
    lines[-1] = lines[-1].removesuffix(",")
    return "{\n" + "\n".join(lines) + "\n}\n}\n"


def read(file: Path) -> Record:
    """A record as :func:`text_of` wrote it.

    Raises:
        InputError: if it cannot be read.
    """
    kept = _read(file)
    try:
        runs = {
            key: Run(one["seeds"], one["cpu_s"], one["size"], one["verdict"], one["raw"])
            for key, one in kept["experiments"].items()
        }
        record = Record(kept["about"], runs)
        known = {*ALIKE, *SETTINGS} == record.about.keys() and record.data in DATA
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise InputError(f"{file} is no record of the lab; python -m docs.recorded FOLDER {file} writes one")
    return record


def judge(record: Record) -> dict[str, Judged]:
    """Every experiment of a record under the lab's own verdict.

    Raises:
        InputError: if the record no longer fits the code, with the identifier.
    """
    again = "record a new run: python -m docs.recorded FOLDER FILE"
    found = {}
    for identifier, run in record.runs.items():
        experiment = RUNNABLE.get(identifier)
        if experiment is None:
            raise InputError(f"{identifier} is recorded on {record.name}, but no experiment of the lab; {again}")
        try:
            found[identifier] = Judged(experiment, run, experiment.verdict(run.raws))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{identifier} as recorded on {record.name} cannot be judged ({what}); {again}") from error
    return found


def records(folder: Path = RESULTS) -> list[Record]:
    """All records of a folder, digits first.

    Raises:
        InputError: if one cannot be read.
    """
    found = [read(file) for file in sorted(folder.glob("lab-*.json"))]
    return sorted(found, key=lambda one: (DATA.index(one.data), one.about["scale"] != "small"))


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Every float with so many significant digits.

    >>> rounded({"loss": [0.123456789, 12, None]}, 3)
    {'loss': [0.123, 12, None]}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits - 1}e}")
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    return [rounded(one, digits) for one in value] if isinstance(value, list) else value


def _folders(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/manifest.json")):
        if path.parent.name not in RUNNABLE:
            raise InputError(f"{path.parent} holds no experiment of this lab; move it away, or record a new run")
        yield path.parent.name


def _alike(manifests: dict[str, Any]) -> dict[str, Any]:
    """What all manifests share."""
    first, about = next(iter(manifests)), {}
    for name in (*ALIKE, *SETTINGS, "options"):
        values = {one: held[name] if name in ALIKE else held["settings"][name] for one, held in manifests.items()}
        about[name] = values[first]
        other = next((one for one, value in values.items() if value != values[first]), None)
        if other is not None:
            raise InputError(
                f"{first} and {other} are of two runs: {name} {values[first]!r} and {values[other]!r}; "
                "run `orthofast lab` again into this folder, finished seeds are kept"
            )
    if about.pop("options"):
        raise InputError("the run was made with options, such as checkpoints of its own; record one without")
    if not re.fullmatch(r"[0-9a-f]+", about["commit"]):
        raise InputError(
            f"the run's commit is {about['commit']!r}, which names no state of the source; commit all changes and run "
            "`orthofast lab` again into this folder, finished seeds are kept"
        )
    return about


def _run(experiment: Experiment, folder: Path, manifest: dict[str, Any]) -> Run:
    kept, by_seed = _read(folder / "verdict.json"), _read(folder / "raw.json")
    if kept["status"] not in (REPRODUCED, NOT_REPRODUCED):
        raise InputError(f"{experiment.id} is {kept['status']!r}: {kept['note']}")
    if list(by_seed) != [str(seed) for seed in manifest["seeds"]]:
        raise InputError(f"{folder} holds seeds {', '.join(by_seed)} of {manifest['seeds']}; run it again")
    exact = list(by_seed.values())
    try:
        verdict = experiment.verdict(exact)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{experiment.id} cannot be judged ({what}); run `orthofast lab` again into {folder.parent}"
        ) from error
    if [verdict.status, _held(verdict)] != [kept["status"], [check["holds"] for check in kept["checks"]]]:
        raise InputError(
            f"{experiment.id} was judged by other conditions than today's; run `orthofast lab` again into "
            f"{folder.parent}, finished seeds are kept"
        )
    short = rounded(exact)
    raws = short if _held(experiment.verdict(short)) == _held(verdict) else exact
    seconds = round(sum(one["cpu_s"] for one in manifest["seconds"]), 1)
    return Run(manifest["seeds"], seconds, manifest["size"], verdict.status, raws)


def _held(verdict: Verdict) -> list[bool | None]:
    return [check.holds for check in verdict.checks]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)


def _compact(value: Any) -> str:
    # keys stay in the run's order, which is that of rows and series
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the record is written, 2 when it cannot be."""
    made = argparse.ArgumentParser(prog="python -m docs.recorded", description=__doc__)
    made.add_argument("source", type=Path, help="folder of results, or a record whose verdicts are to be today's")
    made.add_argument("record", type=Path, help="file to write, such as docs/results/lab-digits.json")
    options = made.parse_args(arguments)
    try:
        record = collect(options.source) if options.source.is_dir() else _judged_again(read(options.source))
        if options.record.name != f"lab-{record.key}.json":
            raise InputError(f"the run is one of {record.name}; its record is called lab-{record.key}.json")
        content = text_of(record)
        options.record.write_text(content, encoding="utf-8")
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    seeds = sorted({len(run.seeds) for run in record.runs.values()})
    sys.stdout.write(
        f"{options.record}: {len(record.runs)} experiments on {record.name}, {seeds[-1]} seeds at most, "
        f"commit {record.about['commit']}, {len(content.encode()) // 1000} kB\n"
    )
    return 0


def _judged_again(record: Record) -> Record:
    runs = {
        key: Run(one.run.seeds, one.run.cpu_s, one.run.size, one.verdict.status, one.run.raws)
        for key, one in judge(record).items()
    }
    return Record(record.about, runs)


if __name__ == "__main__":
    sys.exit(main())
