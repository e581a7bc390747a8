"""Lu et al. 2024, Table 5, last rows: what low-rank fine-tuning (LoRA) does to PII, and what its size explains.

A small transformer is trained on a Markov chain and fine-tuned on one that differs in a tenth of its transitions, by
LoRA and, as the control, in full; by LoRA also on a wholly different chain.
Owns the package peft.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import MissingPackageError
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.independence_parts import TinyTransformer, fit_text, markov_text
from orthofast.lab.missing import distance, largest, mean, over
from orthofast.lab.verdict import Verdict, above, below, judge, less, shown
from orthofast.metrics import isotropic_baseline, pii
from orthofast.scan import scan_checkpoint

TOKENS, LENGTH, BATCH = 32, 24, 16
RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
ROLES = ("Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight")
TUNED = {"lora": "LoRA", "full": "full fine-tuning", "far": "LoRA, wholly different chain"}
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of a random update of rank 8, relative to the weight
# Qwen before and after LoRA
PUBLISHED = {
    "Query": (0.022, 0.022),
    "Keys": (0.021, 0.021),
    "Values": (0.015, 0.017),
    "Atten_Output": (0.015, 0.024),
    "Linear_1.weight": (0.009, 0.012),
    "Linear_2.weight": (0.014, 0.019),
}
SMALL_CHANGE = 0.1  # of PII, relative
NEAR_CHAIN, RATE = 0.1, 1e-3  # fraction of transitions that differ; of all optimisers


def run(settings: Settings) -> Raw:
    """Train, fine-tune both ways, measure before and after; random updates of known size beside."""
    small = settings.scale == "small"
    width, inner, steps = (64, 256, 600) if small else (512, 2048, 5000)
    return fine_tuned(
        blocks=2, width=width, inner=inner, steps=steps, tuning=steps // 2, seed=settings.seed, device=settings.device
    ) | {"random": random_updates(512, 8, settings.seed)}


def fine_tuned(
    *, blocks: int, width: int, inner: int, steps: int, tuning: int, seed: int, device: str = "cpu"
) -> dict[str, object]:
    """A transformer before and after fine-tuning on another chain.

    Args:
        blocks: how many.
        width: of the residual stream.
        inner: of the feed-forward layers.
        steps: updates before.
        tuning: updates of each fine-tuning.
        seed: of weights, chains and batches.
        device: where it trains.

    Returns:
        For "base", "lora", "full" and "far" (LoRA on a wholly different chain): "pii", role -> mean row PII over the
        blocks. For the last three "relative_change", the mean over matrices of the update's Frobenius norm over the
        weight's; "loss_before" and "loss" on the new chain, nats. "delta_pii": row PII of LoRA's updates alone.

    Raises:
        MissingPackageError: if peft is not installed.
    """
    torch.manual_seed(seed)
    base = TinyTransformer(TOKENS, width, inner, blocks, 4, LENGTH).to(device)

    def train(model: Any, changed_frac: float, updates: int) -> list[float]:
        text = markov_text(TOKENS, 60_000, seed=seed, changed_frac=changed_frac)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=RATE)
        return fit_text(model, text, optimizer, steps=updates, batch=BATCH, length=LENGTH, seed=seed)

    train(base, 0.0, steps)
    found: dict[str, Any] = {"base": {"pii": row_pii(base)}}
    for name, changed_frac in (("lora", NEAR_CHAIN), ("full", NEAR_CHAIN), ("far", 1.0)):
        model: Any = copy.deepcopy(base)
        if name != "full":
            model = adapt(model)
        losses = train(model, changed_frac, tuning)
        if name != "full":
            model = model.merge_and_unload()
        updates = _updates(base, model)
        found[name] = {
            "pii": row_pii(model),
            "loss_before": losses[0],
            "loss": _mean(losses[-50:]),
            "relative_change": _mean([float((update.norm() / weight.norm()).item()) for weight, update in updates]),
        }
        if name == "lora":
            found["delta_pii"] = _mean([pii(update).item() for _, update in updates])
    return found | {"delta_baseline": isotropic_baseline(RANK)}


def adapt(model: nn.Module) -> Any:
    """The model with LoRA on all projections; only the adapters are trained.

    Raises:
        MissingPackageError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingPackageError("S0-M2 needs the package peft: pip install 'orthofast[lab]'") from None
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))


def row_pii(model: nn.Module) -> dict[str, float]:
    """Role -> row PII, the mean over the blocks, as a scan of the model finds it."""
    rows = scan_checkpoint(model, vectors="rows").rows
    return {role: _mean([row.pii for row in rows if row.role == role and row.pii is not None]) for role in ROLES}


def random_updates(n: int, rank: int, seed: int) -> dict[str, object]:
    """Row PII of a random weight plus random updates of one rank, by their size relative to the weight.

    Args:
        n: rows and columns.
        rank: of the updates.
        seed: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, n, generator=generator)
    update = torch.randn(n, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    update *= weight.norm() / update.norm()
    return {
        "base": pii(weight).item(),
        "sizes": list(SIZES),
        "merged": [pii(weight + size * update).item() for size in SIZES],
        "update": pii(update).item(),
    }


def verdict(raws: Sequence[Raw]) -> Verdict:
    """LoRA changes PII of every matrix by less than a tenth; random updates change it only when they are large."""
    checks = []
    for role in ROLES:
        before, after = PUBLISHED[role]
        theirs = round(after / before - 1, 2)
        change = [_change(raw, "lora", role) for raw in raws]
        checks.append(below(f"{role}: relative change of PII by LoRA", change, SMALL_CHANGE, theirs))
    first, last = ([raw["lora"][field] for raw in raws] for field in ("loss_before", "loss"))
    checks.append(less("loss on the new chain (nats): after LoRA minus before", last, first))
    for name, label in TUNED.items():
        sizes = [raw[name]["relative_change"] for raw in raws]
        checks.append(shown(f"{label}: size of the update over the weight's", sizes))
        checks.append(shown(f"{label}: loss on the new chain (nats)", [raw[name]["loss"] for raw in raws]))
        if name != "lora":
            change = [_largest_change(raw, name) for raw in raws]
            checks.append(shown(f"{label}: largest relative change of PII", change))
    checks.append(shown("row PII of LoRA's updates alone", [raw["delta_pii"] for raw in raws]))
    checks.append(shown(f"isotropic baseline of length {RANK}", [raw["delta_baseline"] for raw in raws]))
    at = {
        size: [over(raw["random"]["merged"][place], raw["random"]["base"]) for raw in raws]
        for place, size in enumerate(SIZES)
    }
    checks.append(below("random update a tenth of the weight: PII over before", at[0.1], 1.02))
    checks.append(above("random update as large as the weight: PII over before", at[1.0], 2.0))
    return judge(
        checks,
        "Judged on a chain that differs in a tenth of its transitions. That LoRA keeps PII is a statement about small "
        "updates; of Qwen the paper prints changes of up to 60 %.",
    )


def _drawn(raws: Sequence[Raw]) -> Figure:
    models = {"base": "before"} | TUNED
    roles = [
        Series(label, list(ROLES), [[raw[name]["pii"][role] for role in ROLES] for raw in raws])
        for name, label in models.items()
    ]
    sizes = [Series("weight + update", SIZES, [raw["random"]["merged"] for raw in raws])]
    levels = [("weight alone", mean([raw["random"]["base"] for raw in raws]))]
    return Figure(
        [
            Panel("matrix", "row PII", roles, "fine-tuned transformer", "bars"),
            Panel(
                "size of the update over the weight's", "row PII", sizes, "random, rank 8", x_log=True, levels=levels
            ),
        ],
        f"LoRA of rank {RANK} on all projections, merged. Right: 512 x 512 normal weight plus random update.",
    )


def _updates(base: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight before, what was added) of every projection."""
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    names = [name for name in before if name.endswith(tuple(f"{target}.weight" for target in TARGETS))]
    return [(before[name].detach(), (after[name] - before[name]).detach()) for name in names]


def _largest_change(raw: Raw, name: str) -> float | None:
    return largest([_change(raw, name, role) for role in ROLES])


def _change(raw: Raw, name: str, role: str) -> float | None:
    """Relative, of PII by fine-tuning."""
    return distance(over(raw[name]["pii"][role], raw["base"]["pii"][role]), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan  # nothing is known of a network that diverged


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-M2",
        "Table 5, last rows: before and after LoRA",
        "Fine-tuning by LoRA hardly changes PII.",
        run,
        verdict,
        _drawn,
        size="two blocks of width 64 trained and fine-tuned on Markov chains instead of Qwen-7B.",
    ),
)
