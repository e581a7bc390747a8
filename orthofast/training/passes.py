"""A model run forward over data for what can be seen on the way, and left as it was."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.training.layers import WRAPPERS
from orthofast.training.measures import still


def forward_passes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    training: bool | None = None,
    batches: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> Generator[int, None, None]:
    """Run each batch through the model, without gradients and eagerly; yield its number after it ran.

    Args:
        model: as :func:`unwrapped` gives it.
        loader: of inputs; of (inputs, targets), whose first entry is taken; or of mappings, taken as keyword arguments.
        training: the mode to run in, by which batch norm takes the batch's statistics; None: as the model is.
        batches: how many of the loader's; None for all.
        inputs: what the model takes of a batch, where the above is not it.

    Raises:
        InputError: if an argument cannot be used, or the loader gives nothing.
    """
    taken = batches_of(loader, batches)
    device = device_of(model)
    ran = 0
    with undisturbed(model, training=training):
        for batch in taken:
            given = moved(inputs(batch) if inputs is not None else inputs_of(batch), device)
            with torch.no_grad():
                called(model, given)
            yield ran
            ran += 1
    if not ran:
        raise InputError("loader gives no batch; pass one that can be iterated now")


def batches_of(loader: Iterable[Any], batches: int | None = None) -> Iterator[Any]:
    """The first so many batches of a loader, or all.

    Raises:
        InputError: if the loader is one batch or no iterable, or the number is not positive; at the call.
    """
    if batches is not None and (type(batches) is not int or batches < 1):
        raise InputError(f"batches needs a positive integer, or None for all, got {batches!r}")
    if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
        raise InputError(f"loader needs an iterable of batches, got {type(loader).__name__}; put one batch in a list")
    return itertools.islice(loader, batches)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, training: bool | None = None, seed: int | None = None) -> Iterator[None]:
    """Eager and in the mode asked for; modes, buffers and random numbers are as before afterwards.

    Args:
        model: that runs within.
        training: its mode; None: as it is.
        seed: of the random numbers within; None: as they are.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    accelerators = sorted((device for device in devices if device.type == "cuda"), key=str)

    def restore() -> None:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(accelerators))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in accelerators:  # no others: what is not forked is not put back
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        stack.callback(restore)  # after what still() restores
        if training is not None:
            model.train(training)
        stack.enter_context(still(model))
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """Without the shells of torch.compile and of data parallelism."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner  # type: ignore[no-any-return]


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model once, by its path without the words wrappers put in it."""
    found = {}
    for full, module in model.named_modules():
        words = full.split(".")
        if "parametrizations" not in words:
            found[".".join(word for word in words if word not in WRAPPERS)] = module
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the first of a model's tensors is."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def inputs_of(batch: Any) -> Any:
    """What a model takes of a batch: all of a tensor or a mapping, the first entry of a tuple or list."""
    return batch[0] if isinstance(batch, list | tuple) and batch else batch


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device; those made in inference mode are copied, so that autograd takes them."""
    if isinstance(value, Tensor):
        there = value.to(device)
        return there.clone() if there.is_inference() and not torch.is_inference_mode_enabled() else there
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(moved(entry, device) for entry in value)
    return value


def called(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs: a mapping is keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in what a module gives or takes."""
    if isinstance(value, Tensor):
        return value if value.dtype.is_floating_point else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)
