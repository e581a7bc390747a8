"""Which tensors of a nested dictionary are the model's: wrappers opened, optimizer states left out, names joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orthofast.scan.readers.files import encodable, listed

# keys under which programs keep the model, looked for in this order
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")
OPTIMIZER = frozenset(
    ("optim", "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optimizer_state")
)
LEFT_OUT = OPTIMIZER | frozenset(
    (
        *("lr_scheduler", "lr_schedulers", "scheduler", "scaler", "grad_scaler", "loops", "callbacks", "train_state"),
        *("hyper_parameters", "rng", "rng_state", "torch_rng_state", "cuda_rng_state", "random_rng_state"),
    )
)
MAX_DEPTH = 32
MAX_WRAPPERS = 4


def model_tensors(
    found: object, leaf: type | tuple[type, ...], notes: list[str] | None = None
) -> Iterator[tuple[str, object]]:
    """Names and tensors of the model inside what a file holds.

    A dictionary under one of :data:`WRAPPERS` that holds tensors is the model; what stands beside it is left out with a
    note, as are optimizer states. Without a wrapper every tensor counts, named by its path.

    Args:
        found: a mapping, sequence or tensor.
        leaf: the types of a tensor.
        notes: where remarks go.
    """
    notes = [] if notes is None else notes
    empty: set[int] = set()  # containers known to hold no tensor
    for _ in range(MAX_WRAPPERS):
        if not isinstance(found, Mapping):
            break
        key = next((key for key in WRAPPERS if _holds_tensors(found.get(key), leaf, empty)), None)
        if key is None:
            break
        others = [
            _word(other)
            for other, value in found.items()
            if other != key and (isinstance(value, leaf) or _holds_tensors(value, leaf, empty))
        ]
        if others:
            notes.append(f"the tensors under {key!r} are the model; left out: {listed(others)}")
        found = found[key]
    seen: set[int] = set()
    left: list[str] = []
    if isinstance(found, leaf):
        yield "tensor", found
    else:
        yield from _walk(found, (), leaf, seen, left, empty)
    if left:
        notes.append(f"left out as no part of the model: {listed(left)}")


def _is_left_out(word: str) -> bool:
    """Whether a key holds the training's state and not the model's; a dotted one only where it names an optimizer."""
    return word.lower() in LEFT_OUT or word.lower().split(".")[0] in OPTIMIZER


def _walk(
    value: object,
    path: tuple[str, ...],
    leaf: type | tuple[type, ...],
    seen: set[int],
    left: list[str],
    empty: set[int],
) -> Iterator[tuple[str, object]]:
    """Depth first, in the order of the file; a container that is met again is passed over."""
    if id(value) in seen or len(path) > MAX_DEPTH:
        return
    seen.add(id(value))
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        word = _word(key)
        if isinstance(inner, leaf):
            if path or not _is_left_out(word):
                yield ".".join((*path, word)), inner
            else:
                left.append(word)
        elif not path and _is_left_out(word):
            if _holds_tensors(inner, leaf, empty):
                left.append(word)
        elif isinstance(inner, Mapping | list | tuple):
            yield from _walk(inner, (*path, word), leaf, seen, left, empty)


def _holds_tensors(value: object, leaf: type | tuple[type, ...], empty: set[int]) -> bool:
    """Whether a container holds a tensor, at any depth; a container without one is looked at once."""
    waiting: list[object] = [value]
    seen: set[int] = set()
    while waiting:
        at = waiting.pop()
        if id(at) in seen or id(at) in empty or not isinstance(at, Mapping | list | tuple):
            continue
        seen.add(id(at))
        for inner in at.values() if isinstance(at, Mapping) else at:
            if isinstance(inner, leaf):
                return True
            waiting.append(inner)
    empty |= seen
    return False


def _word(key: object) -> str:
    if isinstance(key, str):
        return encodable(key)
    return str(key) if isinstance(key, int) and abs(key) < 1 << 63 else f"({type(key).__name__})"
