"""Every coding gives the values that the package which writes it gives, bit for bit, whole or in ranges."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthofast.scan import decoders
from orthofast.scan.decoders import block_scaled, decode, decoded_bytes, decoded_dtype
from tests.scan.quantised import GOLDEN, Golden, catalog_of, found, golden, parts_of

# where a package rounds more than once: NVFP4 in bfloat16, three times; int8 by a float32 reciprocal of 127
TOLERANCES = {"nvfp4-pack-quantized": 3 * 2**-9, "bitsandbytes int8": 2**-22}


def weight_of(case: Golden) -> decoders.Weight:
    gguf = {case.weight: case.gguf} if case.gguf else {}
    weights, every = found(catalog_of(case.stored, case.quantization, **gguf))
    assert every.faults == []
    assert list(weights) == [case.weight]
    return weights[case.weight]


@pytest.mark.parametrize("name", GOLDEN)
def test_values_are_those_of_the_package(name: str) -> None:
    case = golden(name)
    weight = weight_of(case)
    values = decode(weight, parts_of(weight, case.stored))
    assert tuple(values.shape) == weight.shape == tuple(case.values.shape)
    assert values.dtype == decoded_dtype(weight)
    assert decoded_bytes(weight) == values.numel() * values.element_size()
    torch.testing.assert_close(values.float(), case.values.float(), rtol=TOLERANCES.get(name, 0), atol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_range_of_the_first_axis_is_decoded_alone_and_from_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden(name)
    weight = weight_of(case)
    parts = parts_of(weight, case.stored)
    values = decode(weight, parts)
    count = weight.shape[0]
    octets = {role: part.contiguous().reshape(-1).view(torch.uint8) for role, part in parts.items()}
    for first, last in ((0, 1), (1, count), (count // 2, count // 2 + 1), (count, count)):
        assert torch.equal(decode(weight, octets, slice(first, last)), values[first:last])
    monkeypatch.setattr(decoders, "CPU_VALUES", 2 * values[0].numel())  # two rows at a time
    assert torch.equal(decode(weight, octets), values)


@pytest.mark.parametrize("name", GOLDEN)
def test_decoding_stays_on_the_device_of_the_parts(name: str) -> None:
    """Without values and on a device that is not the processor: every operation checks that devices agree."""
    case = golden(name)
    weight = weight_of(case)
    stored = parts_of(weight, case.stored)
    with FakeTensorMode():
        parts = {role: torch.empty(part.shape, dtype=part.dtype, device="meta") for role, part in stored.items()}
        values = decode(weight, parts)
        blocks = block_scaled(weight, parts)
    assert values.device.type == "meta"
    assert tuple(values.shape) == weight.shape
    assert blocks is None or blocks.device.type == "meta"
