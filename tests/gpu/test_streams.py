"""Calls fit into a CUDA program: no synchronisation, any stream, graph capture, the tensor's device, MIG slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import orthofast
from orthofast.kernels import dispatch, gram_stats, gram_stats_many
from orthofast.kernels.contract import make_request
from orthofast.records import GramStats
from tests.gpu.conftest import Fold, landed, served
from tests.kernels.cases import ALL, gaussian, same_bits

pytestmark = pytest.mark.gpu
SETS = ((768, 96), (96, 768), (64, 576), (300, 72), (1, 8))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any call that waits for the device is an error inside the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sets(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [gaussian((1, n, d), n, dtype).to(device) for n, d in SETS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_call_waits_for_the_device(gpu_backend: str, cuda: torch.device, dtype: torch.dtype) -> None:
    if gpu_backend == "reference":
        pytest.skip("plain torch may wait; nothing is promised of it")
    xs = sets(cuda, dtype)
    weight = xs[0][0]
    served(gpu_backend, weight, want=ALL)
    histogram = dispatch.load(gpu_backend).supports(make_request(weight, want=ALL, bins=8)) is None
    bins = 8 if histogram else 0  # not every backend has one
    for _ in range(2):  # the first call compiles
        gram_stats(weight, want=ALL, bins=bins, backend=gpu_backend)
        gram_stats_many(xs, backend=gpu_backend)
        orthofast.pii(weight, backend=gpu_backend)
        orthofast.pii(weight, vectors="cols", backend=gpu_backend)
    with no_synchronisation():
        gram_stats(weight, want=ALL, bins=bins, backend=gpu_backend)
        gram_stats(weight, weight[:40], want=ALL, backend=gpu_backend)
        gram_stats_many(xs, backend=gpu_backend)
        value = orthofast.pii(weight, backend=gpu_backend)
        orthofast.pii(weight, vectors="cols", backend=gpu_backend)
    assert value.device == cuda


def test_the_debug_mode_does_notice_a_wait(cuda: torch.device) -> None:
    x = torch.ones(4, device=cuda)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        x.sum().item()


def test_a_side_stream_sees_what_was_written_on_it(gpu_backend: str, fold: Fold, cuda: torch.device) -> None:
    source = gaussian((1, 900, 136), 5, torch.bfloat16)
    truth = fold(source, want=ALL)
    x = torch.zeros_like(source, device=cuda)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: work on another stream would read zeros
        x.copy_(source.to(cuda, non_blocking=True))
        record = gram_stats(x, want=ALL, backend=gpu_backend)
    side.synchronize()
    assert same_bits(landed(record), truth)


def test_two_streams_at_once_do_not_share_memory(gpu_backend: str, fold: Fold, cuda: torch.device) -> None:
    inputs = [gaussian((1, 1500, 136), seed, torch.bfloat16) for seed in range(4)]
    truth = [fold(x, want=ALL) for x in inputs]
    there = [x.to(cuda) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    records: list[GramStats] = []
    for _ in range(5):
        records = []
        for x, stream in zip(there, streams, strict=True):
            with torch.cuda.stream(stream):
                records.append(gram_stats(x, want=ALL, backend=gpu_backend))
    torch.cuda.synchronize()
    for record, true in zip(records, truth, strict=True):
        assert same_bits(landed(record), true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_graph_replays_on_new_data(
    gpu_backend: str, fold: Fold, cuda: torch.device, dtype: torch.dtype
) -> None:
    if gpu_backend == "reference":
        pytest.skip("plain torch may wait; nothing is promised of it")
    fixed = sets(cuda, dtype)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        gram_stats_many(fixed, want=ALL, backend=gpu_backend)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        records = gram_stats_many(fixed, want=ALL, backend=gpu_backend)
    for seed in (100, 200):
        fresh = [gaussian((1, n, d), seed + n, dtype) for n, d in SETS]
        for into, x in zip(fixed, fresh, strict=True):
            into.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        for record, x in zip(records, fresh, strict=True):
            assert same_bits(landed(clone(record)), fold(x, want=ALL))


def clone(record: GramStats) -> GramStats:
    tensors: dict[str, Any] = {n: v.clone() for n in GramStats.__slots__ if isinstance(v := getattr(record, n), Tensor)}
    return replace(record, **tensors)


def test_the_tensor_names_the_device_not_the_current_one(gpu_backend: str, cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = gaussian((1, 300, 72), 0, torch.bfloat16)
    truth = landed(gram_stats(x.to("cuda:0"), want=ALL, backend=gpu_backend))
    with torch.cuda.device(0):
        other = gram_stats(x.to("cuda:1"), want=ALL, backend=gpu_backend)
        assert torch.cuda.current_device() == 0
    assert other.pairs.device == torch.device("cuda", 1)
    assert same_bits(landed(other), truth)


def test_torch_compile_and_autocast_give_the_same_value(gpu_backend: str, cuda: torch.device) -> None:
    weight = gaussian((300, 136), 0, torch.bfloat16).to(cuda)
    plain = orthofast.pii(weight, backend=gpu_backend)

    def loss(w: Tensor) -> Tensor:
        return orthofast.pii(w, backend=gpu_backend) * 2

    compiled = torch.compile(loss, fullgraph=True)(weight)
    assert float(compiled) == pytest.approx(2 * float(plain), rel=1e-12)
    with torch.autocast("cuda", dtype=torch.float16):
        assert float(orthofast.pii(weight, backend=gpu_backend)) == float(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_the_gradient_matches_float64(gpu_backend: str, device: torch.device, dtype: torch.dtype, side: str) -> None:
    weight = gaussian((300, 136), 1, dtype)
    wide = weight.double().requires_grad_()
    orthofast.pii(wide, vectors=side, backend="reference").backward()
    leaf = weight.to(device).requires_grad_()
    orthofast.pii(leaf, vectors=side, backend=gpu_backend).backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    error = float((leaf.grad.cpu().double() - wide.grad).norm() / wide.grad.norm())
    # a cosine within rounding of 0 may take either sign; bfloat16 gradients are stored in 8 bits
    assert error < (1e-2 if dtype == torch.bfloat16 else 5e-3)
