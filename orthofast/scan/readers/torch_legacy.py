"""Torch files whose bytes cannot be read where they lie: loaded whole, weights only, up to a size."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from orthofast.errors import CheckpointError
from orthofast.scan.readers.files import file_size, shown
from orthofast.scan.readers.torch_file import refusal

LIMIT_BYTES = 4 << 30  # of the file, and of what it unpacks to
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # magic number of torch before 1.6


def is_legacy(start: bytes) -> bool:
    """Whether a file starts as torch wrote it before version 1.6."""
    return start.startswith(LEGACY_START)


def load(file: Path, why: str, nbytes: int = 0) -> object:
    """What a torch file holds, in memory; by ``torch.load(weights_only=True)``, which runs no code of the file.

    Args:
        file: the torch file.
        why: why it has to be loaded, for the sentence.
        nbytes: what it unpacks to.

    Raises:
        CheckpointError: if it is too large, broken, or needs code to be understood.
    """
    size = max(file_size(file), nbytes)
    if size > LIMIT_BYTES:
        raise CheckpointError(
            f"{file.name} has to be loaded whole because {why}, and {size} bytes are over the limit of {LIMIT_BYTES}; "
            "convert the checkpoint to safetensors"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) was not", str(error))
        reason = refusal(named[1]) if named else None
        raise CheckpointError(f"{file.name} {reason or 'is no torch file that holds tensors only'}") from None
    except (
        AssertionError,
        AttributeError,
        EOFError,
        KeyError,
        IndexError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        OverflowError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{file.name} is truncated or corrupt: {shown(first)}; fetch the file again") from None
