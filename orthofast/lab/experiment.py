"""What an experiment of the lab is: one table or figure of a paper, run per seed, judged and drawn from raw numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from orthofast.errors import InputError
from orthofast.lab.figures import Figure
from orthofast.lab.verdict import Verdict

Raw: TypeAlias = "dict[str, Any]"  # what one seed measured: numbers, text, lists and dictionaries of them

PAPERS = {
    "S0": "Lu et al. 2024",
    "S1": "Daneshmand et al. 2021",
    "S2": "Huang et al. 2020",
    "S3": "Annamalai et al. 2022",
}
SCALES = ("small", "paper")
DATA = ("digits", "mnist", "cifar10", "cifar100")


@dataclass(frozen=True, slots=True)
class Settings:
    """How one run is made; equal settings give equal numbers on one machine.

    Attributes:
        seed: of everything random.
        scale: "small" for two CPU cores, "paper" for the sizes that the paper states.
        data: "digits", "mnist", "cifar10" or "cifar100".
        data_folder: where the files of the last three lie.
        device: where networks train, such as "cpu" or "cuda".
        options: more of single experiments, such as checkpoints, as text by name.
    """

    seed: int = 0
    scale: str = "small"
    data: str = "digits"
    data_folder: str | None = None
    device: str = "cpu"
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (("scale", self.scale, SCALES), ("data", self.data, DATA)):
            if value not in known:
                raise InputError(f"{name} needs one of {', '.join(known)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
        id: such as "S1-F2a": the paper, then figure or table.
        title: what the paper calls it, and what it shows.
        claim: what must hold, in a sentence.
        run: measures with the settings of one seed; returns what JSON can hold.
        verdict: judges what all seeds measured, in the order of the seeds.
        figure: draws it, on the paper's axes.
        needs: data sets that it can run on; empty where it takes none.
        statistical: whether seeds differ; otherwise the first one is enough.
        size: in words, what "small" runs instead of the paper's setup.
    """

    id: str
    title: str
    claim: str
    run: Callable[[Settings], Raw]
    verdict: Callable[[Sequence[Raw]], Verdict]
    figure: Callable[[Sequence[Raw]], Figure]
    needs: tuple[str, ...] = ()
    statistical: bool = True
    size: str = ""

    @property
    def paper(self) -> str:
        """Who wrote it, such as "Daneshmand et al. 2021"."""
        return PAPERS[self.id.split("-")[0]]


@dataclass(frozen=True)
class Absent:
    """A table or figure that is not run here.

    Attributes:
        id: as of :class:`Experiment`, like title and claim.
        title: see there.
        claim: see there.
        reason: what is missing.
        published: the paper's numbers by what they are of, as printed.
    """

    id: str
    title: str
    claim: str
    reason: str
    published: dict[str, str] = field(default_factory=dict)

    @property
    def paper(self) -> str:
        """Who wrote it."""
        return PAPERS[self.id.split("-")[0]]
