"""conditioning of models as transformers has them: keywords in, logits as a field, weights stored the other way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.training.analysis import conditioning


class Stored(nn.Module):
    """A weight stored (in, out), as of transformers' Conv1D, by whose name it goes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


Stored.__module__, Stored.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Named(nn.Module):
    """Takes keywords and returns an object with logits, as models of transformers do."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, values: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(
            logits=self.body(input=values) if isinstance(self.body, nn.Linear) else self.body(values)
        )


@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", nn.CrossEntropyLoss(), lambda out, batch: functional.cross_entropy(out.logits, batch["labels"])],
)
def test_models_that_take_and_return_dictionaries(loss: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    data = [(torch.randn(n, 6).double(), torch.randint(4, (n,))) for n in (9, 5)]
    named = [{"values": x, "labels": y} for x, y in data]
    plain = conditioning(linear, data, loss="cross_entropy", labels="empirical")
    for body in (linear, Stored(linear)):
        found = conditioning(Named(body), named, loss=loss, labels="empirical")
        got, true = found.layers["body"], plain.layers[""]
        assert not got.error
        for side in ("spectrum_x", "spectrum_g"):
            torch.testing.assert_close(getattr(got, side), getattr(true, side), rtol=1e-12, atol=1e-15)
        assert got.weight_domination == pytest.approx(cast(float, true.weight_domination))
