"""Scans in processes of their own: as a script it imports everything once and forks a child for each line it reads."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAUSE_S = 0.01  # before each fold, so that there is time to kill


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks the others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(Path(__file__))]
    found = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(found.communicate)  # closes its input, which ends it
    return found


def start(target: str, *arguments: object) -> int:
    """Number of a new process that runs ``target(*arguments)``."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([target, *arguments], default=str) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def end(number: int) -> None:
    """End a process at once, without a word to it."""
    if is_alive(number):
        os.kill(number, signal.SIGKILL)
    wait(number)


def wait(number: int, seconds: float = 60) -> bool:
    """Whether a process ended in time."""
    deadline = time.monotonic() + seconds
    while is_alive(number):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def slowly(pause_s: float) -> None:
    """One fold a call, and a pause before each."""
    from orthofast.scan import folding

    fold = folding.Folder.start
    folding.CALL_FLOPS = 1.0

    def start_later(self: Any, *arguments: Any) -> Any:
        time.sleep(pause_s)
        return fold(self, *arguments)

    folding.Folder.start = start_later  # type: ignore[method-assign]


def scan_slowly(model: str, journal: str) -> None:
    """A scan with all there is to journal."""
    from orthofast.scan import ScanOptions, scan_checkpoint

    slowly(PAUSE_S)
    scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True, detail=True), heads=True)


def scan_as_rank(model: str, out: str, port: int, rank: int, size: int, pause_s: float, patience_s: float) -> None:
    """One rank of a team; writes what it got to a file with its number."""
    import torch.distributed as dist

    from orthofast.scan import ScanOptions
    from orthofast.scan.plan import make_plan
    from orthofast.scan.provenance import measure
    from orthofast.scan.ranks import Team
    from orthofast.scan.readers.checkpoint import open_checkpoint

    slowly(pause_s)
    team = Team(dist.TCPStore("127.0.0.1", port, is_master=False), rank, size, patience_s=patience_s)
    options = ScanOptions(journal=f"{out}/scan.journal")
    text = measure(make_plan(open_checkpoint(model)), options=options, team=team).to_json()
    part = Path(out) / f"result{rank}.part"
    part.write_text(text)
    part.rename(Path(out) / f"result{rank}.json")


def command_as_rank(folder: str, port: int, rank: int, size: int, *arguments: str) -> None:
    """The command as a launcher starts it; what it prints goes to files with its number."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the launcher's
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(Path(folder) / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    os.chdir(folder)
    sys.argv = ["orthofast", *arguments]
    from orthofast.cli import main

    try:
        main()
    except SystemExit as end:
        (Path(folder) / f"code{rank}").write_text(str(end.code))
    sys.stdout.flush()


def serve() -> None:
    """Fork a child for each line; a child ends with its call."""
    import torch

    import orthofast.scan  # noqa: F401 - what all children share

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's business
    for line in sys.stdin:
        target, *arguments = json.loads(line)
        number = os.fork()
        if number:
            print(number, flush=True)  # noqa: T201
            continue
        try:
            globals()[target](*arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    serve()
