"""What only the numba backend does: loads late, compiles where nothing can be kept, shares the machine's threads."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import orthofast
from orthofast.kernels import gram_stats, gram_stats_many

pytest.importorskip("numba")
pytest.importorskip("scipy")

ROOT = Path(orthofast.__file__).parent.parent


def run_python(code: str, root: Path = ROOT, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def random_vectors(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))


def abs_sum(x: torch.Tensor) -> torch.Tensor:
    found = gram_stats(x, backend="numba_cpu").abs_sum
    assert found is not None
    return found


def test_asking_whether_it_serves_imports_neither_numba_nor_scipy() -> None:
    code = (
        "import sys, torch, orthofast.kernels.numba_cpu as backend;"
        "from orthofast.kernels.contract import make_request;"
        "reason = backend.supports(make_request(torch.ones(2, 2)));"
        "print(reason, [name for name in ('numba', 'scipy') if name in sys.modules])"
    )
    assert run_python(code) == "None []"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("orthofast.kernels.numba_cpu")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    backend._missing.cache_clear()
    try:
        with pytest.raises(orthofast.OrthofastError, match="scipy, which is not installed"):
            gram_stats(torch.ones(2, 2), backend="numba_cpu")
    finally:
        backend._missing.cache_clear()


def test_torch_and_blas_keep_their_threads() -> None:
    threads = importlib.import_module("orthofast.kernels.numba_threads")
    setting = threads._blas_setting()
    if setting is None:
        pytest.skip("SciPy's BLAS has no setting known here")
    write, read = setting
    before, torch_before = read(), torch.get_num_threads()
    try:
        write(2)
        torch.set_num_threads(2)
        abs_sum(random_vectors(1500, 64))
        assert (read(), torch.get_num_threads()) == (2, 2)
    finally:
        write(before)
        torch.set_num_threads(torch_before)


def test_several_python_threads_get_the_same_bits() -> None:
    x = random_vectors(1100, 130)
    expected, found = abs_sum(x), []
    callers = [threading.Thread(target=lambda: found.append(abs_sum(x))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_folds_after_its_parent_did() -> None:
    code = """
import os, torch
from orthofast.kernels import gram_stats
torch.set_num_threads(2)
x = torch.arange(1100 * 64, dtype=torch.float32).reshape(1100, 64).sin()
expected = gram_stats(x, backend="numba_cpu").abs_sum
child = os.fork()
if child == 0:
    same = torch.equal(gram_stats(x, backend="numba_cpu").abs_sum, expected)
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(code) == "0"


def test_no_writable_cache_is_no_obstacle(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "orthofast", tmp_path / "orthofast", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # a file where the folder of the cache should be: unwritable for every user, root too
    (tmp_path / "orthofast" / "kernels" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    code = (
        "import torch; from orthofast.kernels import gram_stats;"
        "print(gram_stats(torch.ones(3, 2), backend='numba_cpu').pairs.item())"
    )
    home = str(tmp_path / "home")
    assert run_python(code, tmp_path, HOME=home, XDG_CACHE_HOME=home, NUMBA_CACHE_DIR="") == "3"


def test_many_are_folded_as_each_alone() -> None:
    shapes = [(64, 576), (1, 3), (0, 4), (1030, 40), (300, 20)]
    xs = [random_vectors(n, d).to(dtype) for n, d in shapes for dtype in (torch.float32, torch.bfloat16)]
    for x, record in zip(xs, gram_stats_many(xs, want=["sum", "row_abs"], backend="numba_cpu"), strict=True):
        alone = gram_stats(x, want=["sum", "row_abs"], backend="numba_cpu")
        for name in ("pairs", "sum", "row_abs"):
            assert torch.equal(getattr(record, name), getattr(alone, name)), name
