"""The table of layers: which parameters, which orientation, which of them, each once, and why not the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from orthofast.errors import InputError
from orthofast.training.layers import RULES, Layers, Part, Select, find_layers


def shapes(found: Layers) -> dict[str, tuple[int, ...]]:
    return {layer.name: tuple(layer.vectors().shape) for layer in found.found}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, 6, 4))
        self.norm = nn.LayerNorm(4)


MODULES: dict[str, tuple[nn.Module, dict[str, tuple[int, ...]]]] = {
    "linear": (nn.Linear(5, 7), {"weight": (1, 7, 5)}),
    "bilinear": (nn.Bilinear(3, 4, 6), {"weight": (1, 6, 12)}),
    "conv1d": (nn.Conv1d(4, 6, 3), {"weight": (1, 6, 12)}),
    "conv2d_grouped": (nn.Conv2d(4, 6, 3, groups=2), {"weight": (1, 6, 18)}),
    "conv3d": (nn.Conv3d(2, 5, 2), {"weight": (1, 5, 16)}),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), {"weight": (1, 6, 36)}),
    "embedding": (nn.Embedding(9, 4), {"weight": (1, 9, 4)}),
    "embedding_bag": (nn.EmbeddingBag(9, 4), {"weight": (1, 9, 4)}),
    "attention": (
        nn.MultiheadAttention(8, 2),
        {**{f"in_proj_weight[{part}]": (1, 8, 8) for part in "qkv"}, "out_proj.weight": (1, 8, 8)},
    ),
    "cross_attention": (
        nn.MultiheadAttention(8, 2, kdim=5, vdim=3),
        {
            "q_proj_weight": (1, 8, 8),
            "k_proj_weight": (1, 8, 5),
            "v_proj_weight": (1, 8, 3),
            "out_proj.weight": (1, 8, 8),
        },
    ),
    "lstm": (
        nn.LSTM(3, 5, proj_size=4),
        {
            **{f"weight_ih_l0[{gate}]": (1, 5, 3) for gate in "ifgo"},
            **{f"weight_hh_l0[{gate}]": (1, 5, 4) for gate in "ifgo"},
            "weight_hr_l0": (1, 4, 5),
        },
    ),
    "gru": (
        nn.GRU(3, 5),
        {
            **{f"weight_ih_l0[{gate}]": (1, 5, 3) for gate in "rzn"},
            **{f"weight_hh_l0[{gate}]": (1, 5, 5) for gate in "rzn"},
        },
    ),
    "rnn": (nn.RNN(3, 5), {"weight_ih_l0": (1, 5, 3), "weight_hh_l0": (1, 5, 5)}),
}


@pytest.mark.parametrize(("module", "expected"), MODULES.values(), ids=list(MODULES))
def test_every_module_of_the_table_gives_its_vectors(module: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    found = find_layers(module)
    assert shapes(found) == expected
    assert found.skipped == ()


def test_one_output_is_one_vector_also_where_weights_are_stored_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    stored = pytorch_utils.Conv1D(6, 4)  # 6 outputs of 4 inputs, stored (4, 6)
    plain, turned = nn.Linear(4, 6), nn.ConvTranspose2d(4, 6, 3)
    with torch.no_grad():
        plain.weight.copy_(stored.weight.T)
    same = [find_layers(module).found[0].vectors() for module in (stored, plain)]
    assert torch.equal(*same)
    assert torch.equal(find_layers(turned).found[0].vectors()[0, 2], turned.weight[:, 2].flatten())


def test_parts_are_read_from_the_right_rows_and_of_any_tensor() -> None:
    module = nn.MultiheadAttention(4, 2)
    layer = find_layers(module).found[1]
    assert layer.name == "in_proj_weight[k]"
    assert torch.equal(layer.vectors()[0], module.in_proj_weight[4:8])
    other = torch.randn(12, 4)
    assert torch.equal(layer.vectors(other)[0], other[4:8])


def test_vectors_share_memory_carry_gradients_and_follow_a_replaced_parameter() -> None:
    module = nn.Linear(3, 4)
    layer = find_layers(module).found[0]
    assert layer.vectors().data_ptr() == module.weight.data_ptr()
    layer.vectors().sum().backward()
    assert module.weight.grad is not None
    module.weight = nn.Parameter(torch.zeros(4, 3))
    assert not layer.vectors().any()


def test_a_parametrised_weight_is_found_as_it_is_computed() -> None:
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 5))
    )
    found = find_layers(module)
    assert shapes(found) == {"0.weight": (1, 4, 3), "1.weight": (1, 5, 4)}
    assert found.skipped == ()
    found.found[0].vectors().sum().backward()
    assert module[0].parametrizations.weight.original1.grad is not None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.experts = nn.Embedding(9, 4), nn.Linear(4, 9), Experts()
        self.head.weight = self.embed.weight
        self.score = nn.Linear(4, 1)


def test_what_is_not_measured_is_listed_with_its_reason() -> None:
    found, skipped = find_layers(Tied())
    assert [layer.name for layer in found] == ["embed.weight"]
    assert dict(skipped) == {
        "head.weight": "is the same parameter as embed.weight, which is measured",
        "experts.w1": "belongs to a Experts, which has no rule",
        "score.weight": "holds 1 vector, and a pair needs two",
    }


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 4, device="meta"), "is on the meta device and holds no values"),
        (nn.LazyLinear(4), "is lazy and has no shape yet; run the model once on data first"),
        (nn.ConvTranspose1d(4, 4, 3, groups=2), "is a grouped transposed convolution"),
    ],
    ids=["meta", "lazy", "grouped"],
)
def test_a_parameter_without_measurable_values_says_why(module: nn.Module, reason: str) -> None:
    found, skipped = find_layers(module)
    assert found == ()
    assert skipped[0].name == "weight"
    assert skipped[0].reason.startswith(reason)


def test_a_quantised_weight_is_no_number_to_measure() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert find_layers(module).skipped[0].reason == "holds torch.int8, no floating-point values"


def transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("select", "count"),
    [
        (None, 12),
        ("layers.0.*", 6),
        ("layers.0.linear1", 1),
        ("*.in_proj_weight", 6),
        (["layers.0.linear?", "*out_proj*"], 4),
        (re.compile(r"linear[12]\.weight$"), 4),
        (nn.MultiheadAttention, 6),
        ([nn.MultiheadAttention, re.compile("linear1")], 8),
        (lambda name, module: name.endswith("[v]") and isinstance(module, nn.MultiheadAttention), 2),
    ],
    ids=["all", "glob", "module", "parameter", "globs", "regex", "type", "mixed", "callable"],
)
def test_select_takes_globs_patterns_types_and_callables(select: Select, count: int) -> None:
    assert len(find_layers(transformer(), select).found) == count


@pytest.mark.parametrize(
    ("source", "select", "message"),
    [
        (nn.Linear(2, 3), "encoder.*", r"select='encoder.\*' chooses none of the 1 layers; there are weight"),
        (nn.Linear(2, 3), [], "select is an empty list"),
        (nn.Linear(2, 3), [3], "select needs globs.*got int"),
        (torch.ones(3, 2), None, "source needs a model.*got Tensor; put a tensor in a list"),
        ([3], None, r"source\[0\] needs a module or a tensor, got int"),
    ],
    ids=["nothing", "empty", "number", "tensor", "entries"],
)
def test_bad_arguments_are_refused_with_a_sentence(source: Any, select: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_layers(source, select)


def test_wrappers_leave_no_trace_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inner = nn.Sequential(nn.Linear(3, 4), checkpoint_wrapper(nn.Linear(4, 5)))
    compiled = torch.compile(inner, backend="eager")
    for model in (inner, compiled, nn.DataParallel(inner)):
        assert list(shapes(find_layers(model))) == ["0.weight", "1.weight"]


def test_tensors_modules_and_named_pairs_are_sources_too() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 5))
    assert shapes(find_layers(model.named_parameters())) == {"0.weight": (1, 3, 6), "1.weight": (1, 5, 4)}
    assert shapes(find_layers(model.parameters())) == {"0": (1, 3, 6), "2": (1, 5, 4)}
    assert shapes(find_layers([model[0], torch.ones(6, 2)])) == {"0.weight": (1, 3, 6), "1": (1, 6, 2)}
    assert shapes(find_layers([model[1].weight, model[1].weight])) == {"0": (1, 5, 4)}


def test_a_type_of_ones_own_joins_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, Experts, lambda module: [Part("w1", "rows", f"{i}", 2, i) for i in range(2)])
    model = nn.Sequential(Experts())
    model[0].w1 = nn.Parameter(model[0].w1.flatten(0, 1))
    assert shapes(find_layers(model)) == {"0.w1[0]": (1, 6, 4), "0.w1[1]": (1, 6, 4)}
