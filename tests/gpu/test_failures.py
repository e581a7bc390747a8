"""What goes wrong on a device is one clear sentence, and the next good call works."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import orthofast
from orthofast.errors import BackendError, InputError, OrthofastError
from orthofast.kernels import gram_stats, gram_stats_many
from tests.gpu.conftest import Fold, landed
from tests.kernels.cases import ALL, assert_record, gaussian

pytestmark = pytest.mark.gpu


def good_call_works(backend: str, device: torch.device) -> None:
    x = gaussian((1, 200, 72), 0, torch.bfloat16)
    assert_record(landed(gram_stats(x.to(device), want=ALL, backend=backend)), x)


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    assert not re.search(r"0x[0-9a-f]{6,}|Traceback", text)


def test_mixed_devices_are_refused(gpu_backend: str, cuda: torch.device) -> None:
    x = gaussian((20, 8), 0, torch.bfloat16)
    with pytest.raises(InputError, match="y needs the dtype and device of x") as caught:
        gram_stats(x.to(cuda), x, backend=gpu_backend)
    one_sentence(caught.value)
    good_call_works(gpu_backend, cuda)


def test_a_group_over_cpu_and_gpu_goes_to_both_or_is_refused(gpu_backend: str, cuda: torch.device) -> None:
    x = gaussian((20, 8), 0, torch.bfloat16)
    found = gram_stats_many([x, x.to(cuda)])
    assert [record.pairs.device.type for record in found] == ["cpu", "cuda"]
    if gpu_backend != "reference":
        with pytest.raises(BackendError) as caught:
            gram_stats_many([x.to(cuda), x], backend=gpu_backend)
        one_sentence(caught.value)
    good_call_works(gpu_backend, cuda)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_are_no_numbers_of_ours(gpu_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="floating-point dtype") as caught:
        gram_stats(torch.ones(4, 4, dtype=dtype, device=device), backend=gpu_backend)
    one_sentence(caught.value)
    good_call_works(gpu_backend, device)


@pytest.mark.parametrize("bad", ["shape", "layout", "want", "bins", "precision"])
def test_bad_arguments_leave_the_device_usable(gpu_backend: str, device: torch.device, bad: str) -> None:
    x: Tensor = gaussian((20, 8), 0, torch.bfloat16).to(device)
    calls = {
        "shape": lambda: gram_stats(x[0], backend=gpu_backend),
        "layout": lambda: gram_stats(x.float().to_sparse(), backend=gpu_backend),
        "want": lambda: gram_stats(x, want=("all",), backend=gpu_backend),
        "bins": lambda: gram_stats(x, bins=-1, backend=gpu_backend),
        "precision": lambda: gram_stats(x, precision="exact", backend=gpu_backend),
    }
    with pytest.raises(OrthofastError) as caught:
        calls[bad]()
    one_sentence(caught.value)
    good_call_works(gpu_backend, device)


def test_out_of_memory_leaves_the_context_usable(gpu_backend: str, fold: Fold, cuda: torch.device) -> None:
    small = gaussian((1, 200, 72), 0, torch.bfloat16)
    fold(small, want=ALL)
    x = torch.ones((1, 2, 1), device=cuda, dtype=torch.bfloat16).expand(1 << 22, 2, 1)  # a view: four bytes
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    used = torch.cuda.memory_reserved(cuda)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (used + (16 << 20)) / total), cuda)
    try:
        # 64 MiB of squared lengths alone
        with pytest.raises((BackendError, torch.OutOfMemoryError)) as caught:
            gram_stats(x, want=("row_abs",), backend=gpu_backend)
        if isinstance(caught.value, BackendError):
            one_sentence(caught.value)
            assert "memory" in str(caught.value)
        del caught
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
        torch.cuda.empty_cache()
    good_call_works(gpu_backend, cuda)


def test_numbers_that_are_not_finite_do_no_harm(gpu_backend: str, device: torch.device) -> None:
    x = torch.full((130, 72), float("nan"), device=device, dtype=torch.bfloat16)
    assert torch.isnan(orthofast.pii(x, backend=gpu_backend)).item()
    good_call_works(gpu_backend, device)
