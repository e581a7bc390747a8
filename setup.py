"""Decide whether the native modules are built; everything else about the package stands in pyproject.toml.

ORTHOFAST_EXT=auto (the default) builds it where a C++ compiler and the Python headers are found, 1 always (and fails
where they are missing), 0 never. Without it the package is pure Python and the numba backend serves.
ORTHOFAST_CUDA=auto|1|0 says the same of the Hopper module, which needs nvcc beside; CMakeLists.txt reads it.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

COMPILERS = ("c++", "g++", "clang++", "cl")


def missing() -> str | None:
    """What the native module would need and this machine lacks; None if nothing."""
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (named[:1] or COMPILERS)):
        return f"a C++ compiler ({named[0] if named else ', '.join(COMPILERS)})"
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        return f"Python.h in {include} (Debian: python3-dev)"
    return None


def wants_native() -> bool:
    """Read ORTHOFAST_EXT, and check ORTHOFAST_CUDA."""
    choice, cuda = (os.environ.get(name) or "auto" for name in ("ORTHOFAST_EXT", "ORTHOFAST_CUDA"))
    for name, value in (("ORTHOFAST_EXT", choice), ("ORTHOFAST_CUDA", cuda)):
        if value not in ("auto", "0", "1"):
            raise SystemExit(f"{name} needs auto, 0 or 1, got {value!r}")
    if choice == "0" and cuda == "1":
        raise SystemExit("ORTHOFAST_CUDA=1 asks for a native module, ORTHOFAST_EXT=0 for none; set one of them to auto")
    if choice != "auto" or cuda == "1":
        return choice != "0"
    lack = missing()
    if lack is not None:
        print(f"orthofast: no native module, for want of {lack}; the numba backend will serve", file=sys.stderr)
    return lack is None


if wants_native():
    setup(cmake_source_dir=".")
else:
    setup()
