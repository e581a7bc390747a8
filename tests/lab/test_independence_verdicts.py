"""Verdicts on Lu et al. 2024: numbers as the paper's hold, numbers that must fail fail, each claim by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orthofast.lab import (
    independence_ablation,
    independence_beyond,
    independence_convolutions,
    independence_lora,
    independence_optimizers,
    independence_pictures,
    independence_residual,
    independence_transformer,
    table5,
)
from orthofast.lab.experiment import Settings
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED, Verdict

Raw = dict[str, Any]
Place = tuple[str | int, ...]


def trained(initial: Sequence[float], final: Sequence[float], accuracy: float, rate: float = 0.1) -> Raw:
    return {"initial": list(initial), "final": list(final), "accuracy": accuracy, "rate": rate}


def table1() -> Raw:
    start = (1.0, 0.035, 0.035)
    raw = {
        name: [trained(start, printed[:3], printed[3] / 100)]
        for name, printed in independence_optimizers.PUBLISHED1.items()
    }
    return raw | {"momentum": [trained(start, (0.99, 0.05, 0.05), 0.94)]}


def rates() -> Raw:
    raw = table1()
    return {
        name: [trained((1.0, 0.035, 0.035), (0.5, 0.9, 0.9), 0.2), *raw[name]] for name in independence_optimizers.GRID
    }


def table2() -> Raw:
    start = (1.0, 0.070, 0.050)
    runs = {
        name: [trained(start, printed[:3], printed[3] / 100)]
        for name, printed in independence_convolutions.PUBLISHED2.items()
    }
    return {"text": runs, "script": copy.deepcopy(runs)}


def table3() -> Raw:
    return {
        name: {
            arm: {"pii": pii, "initial": 0.036, "layers": [pii], "accuracy": percent / 100}
            for arm, (pii, percent) in row.printed.items()
        }
        for name, row in independence_ablation.ROWS3.items()
    }


def table4() -> Raw:
    return {
        name: {
            arm: {"layers": [pii, pii, pii], "initial": [0.2, 0.2, 0.2], "accuracy": percent / 100}
            for arm, (pii, percent) in row.printed.items()
        }
        for name, row in independence_residual.ROWS4.items()
    }


def appendix4() -> Raw:
    own = {
        arm: {"pii": sum(layers) / 3, "layers": list(layers), "accuracy": 0.98}
        for arm, layers in independence_ablation.ABLATION.items()
    }
    shared = independence_ablation.NORMALIZED
    return own | {independence_ablation.shared_name(arm): copy.deepcopy(own[arm]) for arm in shared}


def figure2() -> Raw:
    one = {"pii": 0.1, "diagonal": 0.4, "off_diagonal": 0.04, "cosine": [[1.0]], "gram": [[0.4]]}
    other = one | {"pii": 0.06, "diagonal": 0.5}
    return {"Original": {"rows": one, "cols": dict(one)}, "Norm_Res": {"rows": other, "cols": dict(other)}}


def figure1() -> Raw:
    return {
        "pii": {"rows": 0.0353, "cols": 0.0352},
        "dominant_frac": 1.0,
        "dominance_mean": 0.5,
        "dominance_least": 0.4,
        "dominance_largest": 0.6,
        "cosine": [[1.0]],
        "gram": [[1.0]],
        "cosines": [0.0],
        "share": [1.0],
    }


def transformer() -> Raw:
    def arm(last: float) -> Raw:
        rows = {name: [0.05, 0.06, 0.07] for name in independence_transformer.MATRICES}
        rows["Linear_2"] = [0.06, 0.07, last]
        return {"rows": rows, "baselines": dict.fromkeys(rows, 0.05), "loss": 1.5}

    return {"wrapped": arm(0.08), "unwrapped": arm(0.16)}


def lora() -> Raw:
    base = dict.fromkeys(independence_lora.ROLES, 0.1)
    tuned = {
        "pii": dict.fromkeys(base, 0.105),
        "loss_before": 2.5,
        "loss": 2.1,
        "relative_change": 0.1,
    }
    return {
        "base": {"pii": base},
        **{name: copy.deepcopy(tuned) for name in independence_lora.TUNED},
        "delta_pii": 0.45,
        "delta_baseline": 0.4244,
        "random": {"base": 0.035, "sizes": [], "merged": [0.035, 0.035, 0.0351, 0.04, 0.14], "update": 0.3},
    }


def models() -> Raw:
    return {"bert": {"paper": {"Query": [0.046, 1.6]}, "all": {"Query": [0.045, 1.56]}, "largest": 1.6}}


def drift() -> Raw:
    def one(turned: float) -> Raw:
        return {
            "steps": 100,
            "loss": 0.09,
            "drift": [turned] * 3,
            "pii": [0.05, 0.1],
            "relative_change": 0.4,
            "accuracy": 0.96,
        }

    return {name: one(0.04 if "sgd" in name or name == "momentum" else 0.09) for name in independence_beyond.RATES}


def widths() -> Raw:
    return {
        "widths": [50, 100, 200, 400],
        "initial": [0.1, 0.08, 0.06, 0.04],
        "final": [0.2, 0.1, 0.05, 0.02],
        "ratio": [2.0, 1.5, 1.2, 1.1],
    }


def penalty() -> Raw:
    runs = [{"cols": pii, "rows": 0.1, "loss": 0.01, "accuracy": 0.98} for pii in (0.12, 0.06, 0.03, 0.003)]
    return {"runs": runs, "baseline": 0.056}


def changed(raw: Raw, place: Place, value: object) -> Raw:
    raw = copy.deepcopy(raw)
    inner: Any = raw
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return raw


Judge = Callable[[Sequence[Raw]], Verdict]
# a verdict, numbers that hold, and changes each of which must fail
CASES: list[tuple[Judge, Callable[[], Raw], list[tuple[Place, object]]]] = [
    (
        independence_optimizers.verdict1,
        table1,
        [
            (("sgd", 0, "final", 0), 0.85),
            (("adam", 0, "final", 0), 0.95),
            (("rmsprop", 0, "final", 0), 0.92),
            (("rmsprop", 0, "final"), [0.43, 0.153, 0.109]),  # closer to Adam than AdamW is
            (("sgd", 0, "accuracy"), 0.71),
            (("sgd", 0, "final", 0), math.nan),
        ],
    ),
    (
        independence_optimizers.verdict_rates,
        rates,
        [(("sgd", 1, "final", 1), 0.3), (("sgd", 1, "accuracy"), 0.5), (("adam", 1, "final", 2), 0.036)],
    ),
    (
        independence_convolutions.verdict2,
        table2,
        [
            (("text", "sgd", 0, "final", 0), 0.3),
            (("text", "sgd", 0, "final", 2), 0.3),
            (("text", "sgd", 0, "accuracy"), 0.79),
            (("text", "adamw", 0, "final", 1), 0.4),
        ],
    ),
    (
        independence_ablation.verdict3,
        table3,
        [
            (("Tanh, Adam", "Norm_Res", "pii"), 0.2),
            (("ReLU, Adam", "Norm_Res", "accuracy"), 0.9),
            (("GELU, SGD", "Original", "pii"), 0.2),
            (("GELU, Adam", "Norm_Res", "pii"), 0.03),
        ],
    ),
    (
        independence_ablation.verdict_appendix4,
        appendix4,
        [(("Norm_Res", "pii"), 0.12), (("Residual", "pii"), 0.2), (("Normalization", "pii"), 0.14)],
    ),
    (
        independence_residual.verdict4,
        table4,
        [
            (("GELU, Adam", "Norm_Res", "layers", 2), 0.5),
            (("GELU, Adam", "Norm_Res", "accuracy"), 0.9),
            (("GELU, Adam", "Original", "accuracy"), 0.1),
            (("GELU, SGD", "Norm_Res", "layers", 0), 0.5),
        ],
    ),
    (independence_pictures.verdict1, figure1, [(("pii", "rows"), 0.036), (("pii", "cols"), 0.2)]),
    (independence_pictures.verdict_dominance, figure1, [(("dominant_frac",), 0.99)]),
    (
        independence_pictures.verdict2,
        figure2,
        [(("Norm_Res", "rows", "pii"), 0.2), (("Norm_Res", "cols", "diagonal"), 0.3)],
    ),
    (
        independence_transformer.verdict,
        transformer,
        [(("wrapped", "rows", "Linear_2", 2), 0.15), (("unwrapped", "rows", "Linear_2", 0), 0.3)],
    ),
    (
        independence_lora.verdict,
        lora,
        [
            (("lora", "pii", "Values"), 0.12),
            (("lora", "loss"), 2.6),
            (("random", "merged", 2), 0.05),
            (("random", "merged", 4), 0.05),
        ],
    ),
    (
        table5.verdict,
        models,
        [(("bert", "largest"), 3.0), (("bert", "largest"), None), (("bert", "paper", "Query", 1), 0.2)],
    ),
    (
        independence_beyond.verdict_drift,
        drift,
        [
            (("sgd", "drift"), [0.2] * 3),
            (("fast sgd", "drift"), [0.2] * 3),
            (("slow adam", "drift"), [0.01] * 3),
            (("adamw", "loss"), 0.2),
            (("muon", "loss"), 0.2),
            (("rmsprop", "loss"), None),
        ],
    ),
    (independence_beyond.verdict_widths, widths, [(("ratio", 3), 2.5), (("final", 3), 0.3)]),
    (
        independence_beyond.verdict_penalty,
        penalty,
        [
            (("runs", 0, "accuracy"), 1.0),
            (("runs", 0, "cols"), 0.001),
            (("runs",), [penalty()["runs"][0], penalty()["runs"][1]] * 2),  # none below the baseline
        ],
    ),
]


@pytest.mark.parametrize(("judged", "good", "bad"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_a_verdict_holds_for_the_claim_and_fails_for_each_thing_that_breaks_it(
    judged: Judge, good: Callable[[], Raw], bad: list[tuple[Place, object]]
) -> None:
    verdict = judged([good(), good()])
    assert verdict.status == REPRODUCED, [check for check in verdict.checks if check.holds is False]
    for place, value in bad:
        spoiled = judged([good(), changed(good(), place, value)])  # one seed is enough
        assert spoiled.status == NOT_REPRODUCED, (place, value)


def test_the_rate_at_which_sgd_is_unstable_may_diverge() -> None:
    diverged = {"loss": None, "drift": [None] * 3, "pii": [0.05, None]}
    lost = drift() | {independence_beyond.UNSTABLE: drift()["sgd"] | diverged}
    verdict = independence_beyond.verdict_drift([drift(), lost])
    assert verdict.status == REPRODUCED
    assert independence_beyond.EXPERIMENTS[0].figure([drift(), lost]).panels


def test_a_row_whose_network_did_not_train_says_nothing() -> None:
    raw = changed(
        changed(table4(), ("GELU, SGD", "Original", "accuracy"), 0.1), ("GELU, SGD", "Norm_Res", "layers", 0), 0.9
    )
    verdict = independence_residual.verdict4([raw])
    assert verdict.status == REPRODUCED
    assert "GELU, SGD: Original did not train" in verdict.note
    lost = changed(table4(), ("GELU, SGD", "Norm_Res", "accuracy"), 0.1)  # here the claim itself fails
    assert independence_residual.verdict4([lost]).status == NOT_REPRODUCED


def test_a_rate_that_learns_less_does_not_stand_for_its_optimiser() -> None:
    raw = table2()
    idle = trained((1.0, 0.07, 0.05), (1.0, 0.07, 0.05), 0.1, 1e-5)
    raw["text"]["sgd"].append(idle)
    assert independence_optimizers.matched(raw["text"])["sgd"] is raw["text"]["sgd"][0]
    assert independence_convolutions.verdict2([raw]).status == REPRODUCED
    alone = raw | {"text": raw["text"] | {"sgd": [idle]}}
    assert independence_convolutions.verdict2([alone]).status == NOT_REPRODUCED


def test_the_ablation_is_judged_on_layers_with_their_own_normalisation() -> None:
    raw = appendix4()
    turned = changed(raw, ("Normalization, shared", "pii"), 0.05)
    verdict = independence_ablation.verdict_appendix4([raw, turned])
    assert verdict.status == REPRODUCED
    own, shared, layers = verdict.checks[:3]
    assert own.measured == pytest.approx(0.0123, abs=1e-4)
    assert shared.holds is None
    assert shared.measured == pytest.approx((0.0123 + 0.05 - 0.092) / 2, abs=1e-4)
    assert layers.measured == 1
    inverted = changed(raw, ("Residual", "layers", 1), 0.2)
    assert independence_ablation.verdict_appendix4([inverted]).checks[2].measured == pytest.approx(2 / 3)


def test_wins_over_learning_rates_count_accurate_rates_only() -> None:
    verdict = independence_optimizers.verdict_rates([rates()])
    wins = [check.measured for check in verdict.checks if "pairs of accurate rates" in check.what]
    assert wins == [1, 1, 1]
    raw = rates()
    raw["adam"][1]["final"] = [1.0, 0.036, 0.109]
    wins = [check.measured for check in independence_optimizers.verdict_rates([raw]).checks if "pairs of" in check.what]
    assert wins == [0.5, 0.5, 1]


def test_printed_numbers_of_large_models_are_those_of_their_width() -> None:
    raw = table5.width_run(Settings())
    verdict = table5.width_verdict([raw])
    assert verdict.status == NOT_REPRODUCED
    lower, divided = verdict.checks[:2]
    assert lower.holds
    assert lower.measured == pytest.approx(0.44, abs=0.01)
    assert not divided.holds
    assert divided.measured == pytest.approx(0.99, abs=0.01)
    for model in table5.LARGE_MODELS:  # were they really lower, the verdict would say so
        raw[model]["ratio"] = 0.5
    assert table5.width_verdict([raw]).status == REPRODUCED


def test_all_experiments_of_the_paper_are_in_the_registry() -> None:
    ids = {key for key in RUNNABLE if key.startswith("S0-")}
    assert ids >= {f"S0-{key}" for key in ("T1", "T2", "T3", "T4", "T5", "A2", "A3", "A4", "M1", "M2", "F1", "F2")}
    assert ids >= {f"S0-{key}" for key in ("T1b", "T5b", "F1b", "X1", "X2", "X3")}
