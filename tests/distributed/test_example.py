"""The example of the manual runs under torchrun and finds what one process finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ring

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_example_trains_as_one_process_does() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "docs/examples/sharded_training.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    apart = re.search(r"from one process: (\S+)", done.stdout)
    assert apart is not None, done.stdout
    assert float(apart[1]) < 1e-6
    values = [float(value) for value in re.findall(r"\d\.\d{5}", done.stdout)]
    assert len(values) == 5
    assert values[-1] < values[0], "the penalty has no effect"


def test_the_benchmark_judges_medians(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(slow: float) -> list[dict[str, object]]:
        walls = {"ring": [slow, slow, 9.0], "gather": [1.0, 1.0, 1.0], "dtensor": [2.0, 2.0, 2.0]}
        return [{"n": 8, "d": 4, "gradient": False, "ranks": 2, "wall_s": walls, "cpu_s": walls}]

    for slow, verdict, code in ((0.5, "met", 0), (0.7, "not met", 1)):
        monkeypatch.setattr(ring, "measure", lambda ranks, rounds, slow=slow: measured(slow))
        assert ring.main([]) == code
        line = capsys.readouterr().out.splitlines()[1]
        assert line.endswith(f"  {verdict}")
        assert f"{slow:.2f}" in line
    assert ring.main(["--ranks", "1"]) == 2
