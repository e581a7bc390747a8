"""Probe: a model's layers as they are now, and their metrics as vectors on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics.domination import domination_from, largest_singular_values, starting_vector
from orthofast.training import capture as watching
from orthofast.training.factors import LayerFactors
from orthofast.training.layers import Layer, Select, Skipped, find_layers
from orthofast.training.measures import (
    ACTIVATIONS,
    CHANGES,
    COVARIANCES,
    GRADIENTS,
    MEASURES,
    STATISTICS,
    WEIGHTS,
    Measure,
    Part,
    of_changes,
    of_statistics,
    of_weights,
    vectors_of,
)
from orthofast.training.rows import path_of
from orthofast.training.tracker import LATE, CovarianceTracker

RESTART = 0.05  # share of fixed noise in a warm start: no direction is lost for good
NO_GRADIENT = (
    "weight_domination found no gradients on a due step; call step() before zero_grad(), or observe_gradients() before "
    "the optimizer's step"
)


def checked(metrics: Sequence[str] | Mapping[str, int], every_n_steps: int = 1) -> list[Measure]:
    """The rows of the table, by name, with intervals in due steps.

    Args:
        metrics: names, or name -> steps between its measurements.
        every_n_steps: steps between due steps.

    Raises:
        InputError: for a name that is not there, none, or an interval that is no multiple of ``every_n_steps``.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        if name not in MEASURES:
            raise InputError(f"metrics needs names among {', '.join(MEASURES)}, got {name!r}")
    if not names:
        raise InputError("metrics is empty, which measures nothing; leave it out for the usual ones")
    chosen = [MEASURES[name] for name in dict.fromkeys(names)]
    if not isinstance(metrics, Mapping):
        return chosen
    for name, steps in metrics.items():
        if type(steps) is not int or steps < 1 or steps % every_n_steps:
            raise InputError(
                f"metrics needs steps between measurements of {name}, a multiple of every_n_steps={every_n_steps}, "
                f"got {steps!r}"
            )
    return [replace(measure, every=metrics[measure.name] // every_n_steps) for measure in chosen]


class Probe:
    """What to read of a model, and how; every reading is guarded, and a metric that fails is not tried again.

    Args:
        model: whose layers are measured.
        measures: of ``measures.MEASURES``, with their intervals.
        select: which layers.
        say: takes a sentence, to be reported once.

    Attributes:
        model: as given.
        device: where the results lie: that of the first layer.
        sharded: whether any layer's parameter is a DTensor, so that all processes measure together.
        layers: those measured, in order.
        skipped: those that are not, and why.
        capture: the hooks, or None where no metric needs them.
        tracker: those that add up covariances, or None.
        turn: due steps so far.

    Raises:
        InputError: if no layer can be measured.
    """

    def __init__(
        self, model: nn.Module, measures: Sequence[Measure], select: Select, say: Callable[[str], None]
    ) -> None:
        self.measures = list(measures)
        self.capture: watching.Capture | None = None
        self.tracker: CovarianceTracker | None = None
        self.turn = 0
        self.seldom = 1  # times the interval of covariances, where these cost more than their share
        self.model = model
        self._select = select
        self._say = say
        self._lost: set[tuple[str, str]] = set()  # source and layer that failed: reported, left out from then on
        self._weight_starts: dict[str, Tensor] = {}  # (d,)
        self._gradient_starts: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # vectors at the start, (1, n, d)
        self._plan(find_layers(model, select))
        if not self.layers:
            first = f"; {self.skipped[0].name} {self.skipped[0].reason}" if self.skipped else ""
            raise InputError(f"model has no layer that can be measured{first}")
        if self._asked(CHANGES):
            self._before = {
                layer.name: x.detach().clone() for layer, x in vectors_of(self.layers, self._failed({}, CHANGES))
            }

    def measure(self, gradients: list[Part] | None, errors: dict[str, str]) -> list[Part]:
        """One vector a metric.

        Args:
            gradients: what :meth:`gradients` gave for this step; None reads them now.
            errors: receives a sentence for each layer that failed, by path.
        """
        watch = self.capture
        seen: list[Part] = []
        if watch is not None:  # before the layers are listed anew, and hooks with them
            seen = self._guarded(self._asked(ACTIVATIONS), lambda: self._of_activations(watch))
        self.refresh()
        parts: list[Part] = []
        asked, changes = self._asked(WEIGHTS), self._asked(CHANGES)
        statistics = self._asked(STATISTICS)
        parts += self._guarded(statistics, lambda: of_statistics(self.model, self.device))
        failed = self._failed(errors, WEIGHTS)
        turned = self._failed(errors, CHANGES)
        parts += self._guarded(
            asked, lambda: of_weights(asked, vectors_of(self._kept(WEIGHTS), failed), self._paths, failed)
        )
        parts += self._guarded(
            changes,
            lambda: of_changes(vectors_of(self._kept(CHANGES), turned), self._before, self._paths, turned),
        )
        return parts + (self.gradients(errors) if gradients is None else gradients) + seen

    def arm(self, covariances: bool) -> None:
        """Look at the passes of the coming due step.

        Args:
            covariances: whether this process looks at these.
        """
        if self.capture is not None and not self.capture.armed and self._asked(ACTIVATIONS):
            self.capture.arm()
        if self.tracker is not None and not self.tracker.armed and covariances and self._asked(COVARIANCES):
            self.tracker.arm()

    @property
    def must_arm(self) -> bool:
        """Whether passes of the coming due step are still to be looked at."""
        capture = self.capture is not None and not self.capture.armed and bool(self._asked(ACTIVATIONS))
        return capture or (self.tracker is not None and not self.tracker.armed and bool(self._asked(COVARIANCES)))

    def covariances(self) -> tuple[list[Measure], dict[str, LayerFactors]]:
        """What was added up since the hooks were armed, and which metrics are asked of it."""
        tracker = self.tracker
        if tracker is None or not tracker.armed:
            return [], {}
        asked = self._asked(COVARIANCES)
        tracker.rest()
        taken = tracker.take()
        if not taken:
            self._say(f"no input was seen, so metrics of covariances have no values: {LATE}")
        return asked, taken

    def gradients(self, errors: dict[str, str]) -> list[Part]:
        """Metrics of the gradients as they are now."""
        asked = self._asked(GRADIENTS)
        return self._guarded(asked, lambda: self._of_gradients(self._failed(errors, GRADIENTS)))

    def refresh(self) -> None:
        """Notice modules that left or joined the model since the layers were listed."""
        present = {id(module) for module in self.model.modules()}
        gone = [layer.name for layer in self.layers if layer.module is not None and id(layer.module) not in present]
        if not gone:
            return
        try:
            found = find_layers(self.model, self._select)
        except InputError:  # the selection chooses nothing of what is left
            found = find_layers([])
        self._plan(found)
        there = {layer.name for layer in self.layers}
        replaced = [name for name in gone if name in there]
        left = [name for name in gone if name not in there]
        if replaced:
            self._say(f"{_some(replaced)} changed hands between modules and now is what the new module holds")
        if left:
            self._say(f"{_some(left)} left the model and no longer is measured; training goes on")

    def state_dict(self) -> dict[str, Any]:
        """Warm starts, and the first weights where a metric compares with them."""
        return {
            "turn": self.turn,
            "weight_starts": dict(self._weight_starts),
            "gradient_starts": dict(self._gradient_starts),
            "before": dict(self._before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.turn = int(state.get("turn", 0))
        self._weight_starts = dict(state["weight_starts"])
        self._gradient_starts = dict(state["gradient_starts"])
        self._before.update(state["before"])

    def _plan(self, found: tuple[tuple[Layer, ...], tuple[Skipped, ...]]) -> None:
        self.layers, self.skipped = found
        self._paths = {layer.name: path_of(layer.name) for layer in self.layers}
        if self.layers:
            first = self.layers[0].parameter
            self.device = first.device
            self.sharded = any(hasattr(layer.parameter, "full_tensor") for layer in self.layers)
        if self.capture is not None:
            self.capture.close()
            self.capture = None
        self._track()
        asked = {measure.name for measure in self.measures if measure.source == ACTIVATIONS}
        if not asked:
            return
        outputs = {
            path_of(layer.name): layer.module
            for layer in self.layers
            if layer.module is not None and layer.part.attribute == "weight"
        }
        firing = watching.firing_modules(self.model) or outputs
        self.capture = watching.Capture(
            self.model,
            outputs if "orthogonality_gap" in asked else {},
            firing if asked & {"dying_frac", "full_frac"} else {},
        )

    def _track(self) -> None:
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None
        asked = [measure for measure in self.measures if measure.source == COVARIANCES]
        if asked:
            self.tracker = CovarianceTracker(self.model, layers=self._select)
            self.tracker.gradients = any(measure.want in ("g", "F") for measure in asked)

    def _asked(self, source: str) -> list[Measure]:
        """Of this source, those whose turn it is."""
        times = self.seldom if source == COVARIANCES else 1
        return [m for m in self.measures if m.source == source and self.turn % (m.every * times) == 0]

    def _kept(self, source: str) -> list[Layer]:
        return [layer for layer in self.layers if (source, layer.name) not in self._lost]

    def _failed(self, errors: dict[str, str], source: str) -> Callable[[Layer, Exception], None]:
        def failed(layer: Layer, error: Exception) -> None:
            sentence = f"{type(error).__name__}: {error}"
            errors[path_of(layer.name)] = sentence
            self._lost.add((source, layer.name))
            self._say(
                f"{layer.name} cannot be measured and is left out of metrics of {source} from now on: {sentence}; "
                "training goes on"
            )

        return failed

    def _guarded(self, measures: Sequence[Measure], read: Callable[[], list[Part]]) -> list[Part]:
        """What ``read`` gives; if it raises, these metrics are reported and not tried again."""
        if not measures:
            return []
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - a monitor's trouble is not the training's
            names = ", ".join(measure.name for measure in measures)
            self.measures = [measure for measure in self.measures if measure not in measures]
            if self.capture is not None and not any(measure.source == ACTIVATIONS for measure in self.measures):
                self.capture.close()
                self.capture = None
            self._say(f"{names} failed and is left out from now on: {type(error).__name__}: {error}; training goes on")
            return []

    def _of_gradients(self, failed: Callable[[Layer, Exception], None]) -> list[Part]:
        found: list[tuple[Layer, Tensor, Tensor]] = []
        for layer, x in vectors_of(self._kept(GRADIENTS), failed):
            gradient = layer.parameter.grad
            if gradient is None:
                continue
            try:
                found.append((layer, x[0], layer.vectors(gradient)[0]))
            except Exception as error:  # noqa: BLE001 - the other layers are measured
                failed(layer, error)
        if not found:
            self._say(NO_GRADIENT)
            return []
        of_weight = self._largest([(layer, w) for layer, w, _ in found], self._weight_starts)
        of_gradient = self._largest([(layer, g) for layer, _, g in found], self._gradient_starts)
        ratios = domination_from(of_weight, of_gradient)
        return [Part("weight_domination", tuple(self._paths[layer.name] for layer, _, _ in found), ratios)]

    def _largest(self, matrices: Sequence[tuple[Layer, Tensor]], starts: dict[str, Tensor]) -> Tensor:
        """sigma_max of each, (len,) on the probe's device, from where the last due step got to."""
        values: list[Tensor] = [torch.empty(0)] * len(matrices)
        for device in dict.fromkeys(x.device for _, x in matrices):
            here = [index for index, (_, x) in enumerate(matrices) if x.device == device]
            warm = []
            for index in here:
                layer, x = matrices[index]
                noise = starting_vector(x.shape[1], device)
                known = starts.get(layer.name)
                fits = known is not None and known.shape == noise.shape
                warm.append(known.to(device) + RESTART * noise if known is not None and fits else noise)
            found, nearest = largest_singular_values([matrices[index][1] for index in here], warm)
            for index, value, start in zip(here, found.unbind(), nearest, strict=True):
                values[index] = value.to(self.device)
                starts[matrices[index][0].name] = start
        return torch.stack(values)

    def _of_activations(self, watch: watching.Capture) -> list[Part]:
        asked = [measure.name for measure in self._asked(ACTIVATIONS)]
        seen = watch.take()
        if watch.trouble is not None:
            trouble, watch.trouble = watch.trouble, None
            raise trouble
        if not seen:
            self._say(watching.CURE)
        return [
            Part(metric, tuple(values), torch.stack([value.to(self.device) for value in values.values()]))
            for metric, values in seen.items()
            if metric in asked
        ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
