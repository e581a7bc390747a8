"""The errors orthofast raises: one clear sentence each, and nothing else inherits from them."""

from __future__ import annotations


class OrthofastError(Exception):
    """Parent of every error orthofast raises on purpose."""


class InputError(OrthofastError, ValueError):
    """An argument cannot be used; the message says which, what was needed, what came and what to do."""


class BackendError(OrthofastError, RuntimeError):
    """The backend asked for cannot serve this call; the message says why."""


class CheckpointError(OrthofastError):
    """A checkpoint cannot be read; the message names the file."""


class MissingPackageError(OrthofastError, ImportError):
    """An optional package is needed and not installed; the message says which and how to install it."""
