"""`sensitivity`: what quantizing one layer does, by trial, for who does not trust predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from statqat_lightning._files import write_whole
from statqat_lightning._tables import html_table
from statqat_lightning.insight.advice import Advice
from statqat_lightning.insight.advising import for_inputs, names_of_formats
from statqat_lightning.insight.candidates import (
    Candidates,
    layers_that_ran,
    put_in,
)
from statqat_lightning.insight.observed import (
    Loss,
    candidates_of,
    kept_batches,
    observed_copy,
    on_the_side,
    own_loss,
)
from statqat_lightning.insight.plots import new_figure, save_figure
from statqat_lightning.insight.undisturbed import same_random_numbers
from statqat_lightning.insight.wide_tables import in_width
from statqat_lightning.model.quantized_model import QuantizedLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metric = Callable[[nn.Module, Any], Tensor | float]
"""A figure of a model on a batch; the mean over the batches counts."""

_VERSION = 1
_LINEAR = 30
"""Below the decade of this part of the largest change the axes of a scatter plot are linear."""


@dataclass(frozen=True)
class LayerTrial:
    """What quantizing a layer does to the metric.

    Attributes:
        layer: Its name.
        format: The format of its weights and inputs.
        alone: Change of the metric if only this layer is quantized.
        all_but: Change of the metric if all layers but this one are.
    """

    layer: str
    format: str
    alone: float
    all_but: float


@dataclass(frozen=True)
class Trials:
    """Changes of a metric by layer and format.

    Attributes:
        baseline: The metric of the float model.
        everything: The change if all layers are quantized, by format.
        rows: A row for each layer and format.
    """

    baseline: float
    everything: Mapping[str, float]
    rows: tuple[LayerTrial, ...]

    def table(self) -> list[list[str]]:
        """A layer a row; for each format the change alone, and with all but the layer."""
        formats = [*self.everything]
        by_layer: dict[str, dict[str, LayerTrial]] = {}
        for row in self.rows:
            by_layer.setdefault(row.layer, {})[row.format] = row
        cells = [["layer", *(c for f in formats for c in (f"{f} alone", f"{f} all but"))]]
        for layer, own in by_layer.items():
            texts = [f"{x:+.3g}" for f in formats for x in (own[f].alone, own[f].all_but)]
            cells.append([layer or "(model)", *texts])
        every = [c for f in formats for c in ("", f"{self.everything[f]:+.3g}")]
        return [*cells, ["(all layers)", *every]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        rows = [asdict(row) for row in self.rows]
        return {"baseline": self.baseline, "everything": dict(self.everything), "rows": rows}

    def to_json(self) -> str:
        """All changes as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        return "\n".join([f"float: {self.baseline:.4g}", *in_width(self.table())])

    def __repr__(self) -> str:
        return f"<Trials: {len(self.rows)} of layers, float {self.baseline:.4g}>"

    def _repr_html_(self) -> str:
        return html_table(self.table(), above=f"float: {self.baseline:.4g}")

    def plot(self, advice: Advice | None = None, path: str | Path | None = None) -> Figure:
        """Draw the changes by layer, or against the changes that were predicted.

        Args:
            advice: Predictions with losses, see `advise`; None draws a bar for each layer.
            path: Where the picture is written, whole or not at all.

        Raises:
            ValueError: If the advice holds no predicted losses of these layers.
            ModuleNotFoundError: If matplotlib is missing; the message names the extra.
        """
        figure = _bars(self) if advice is None else _scatter(self, advice)
        if path is not None:
            save_figure(figure, path)
        return figure


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric | None = None,
    *,
    loss: Loss | None = None,
    formats: Sequence[str] = ("int4",),
    exclude: Sequence[str] = (),
    resume: str | Path | None = None,
    progress: bool = True,
) -> Trials:
    """Quantize each layer alone, and all layers but it, and measure.

    A copy of the model runs in eval mode over all batches, twice for each layer and format. Weights
    and inputs of a layer are quantized, with the scales that a training would begin with; in block
    formats its weights alone. The model, its buffers and the random numbers stay as they are.

    Args:
        model: Any module, in float or with quantizers, which do not matter.
        batches: A few batches, as `metric` takes them; the inputs are observed on the same ones.
        metric: `metric(model, batch)`, a number, of the model that it is given, which is the copy.
            None: the loss.
        loss: `loss(model, batch)`, likewise; None: that of `training_step` if the model has one.
        formats: Names of formats.
        exclude: Patterns of layers that stay in float.
        resume: A JSON file that keeps what is measured; a later call with the same model, batches
            and metric goes on where this one stopped.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no batch, no metric and no loss, or the file holds trials of another
            model: other layers, or another metric of the float model.
    """
    measure = metric or loss or own_loss(model)
    if measure is None:
        raise ValueError(
            "sensitivity: got no metric; expected metric=lambda model, batch: ..., or a model with "
            "a training_step."
        )
    names = names_of_formats("sensitivity", formats)
    kept = kept_batches("sensitivity", model, batches)
    with on_the_side("sensitivity", model):
        observed = observed_copy(model, kept, measure, for_inputs(names), exclude)
        candidates = candidates_of(observed, names)
        bench = _Bench(observed.model, kept, measure, candidates)
        layers = layers_that_ran(observed.model)
        memory = _Memory(resume, [layer.name for layer in layers], bench.value())
        everything: dict[str, float] = {}
        rows = []
        with _bar(len(names) * (2 * len(layers) + 1), progress) as bar:

            def change(name: str, which: str, quantized: Sequence[QuantizedLayer]) -> float:
                bench.quantize(name, quantized)
                value = memory.value(f"{name}/{which}", bench.value)
                bar.update()
                return value - memory.baseline

            for name in names:
                everything[name] = change(name, "all", layers)
                for layer in layers:
                    others = [other for other in layers if other is not layer]
                    alone = change(name, f"alone/{layer.name}", [layer])
                    all_but = change(name, f"all but/{layer.name}", others)
                    rows.append(LayerTrial(layer.name, name, alone, all_but))
        return Trials(memory.baseline, everything, tuple(rows))


class _Bench:
    """A model whose layers take the quantizers of one format or another, layer by layer.

    Args:
        model: A model with quantizers that know its inputs, switched off.
        batches: The batches.
        metric: What is measured of the model on each.
        candidates: Quantizers of its tensors by format.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], metric: Metric, candidates: Candidates
    ) -> None:
        self._model, self._batches, self._metric = model, batches, metric
        self._candidates = candidates
        self._layers = [(layer, layer.quantizers.present()) for layer in layers_that_ran(model)]

    def quantize(self, name: str, layers: Iterable[QuantizedLayer]) -> None:
        """Quantize some layers with a format, whatever it is for, and no others."""
        chosen = {layer.name for layer in layers}
        for layer, own in self._layers:
            for quantizer in own:
                found = self._candidates.get(quantizer.name, {}).get(name)
                put_in(layer.quantizers, found if found and layer.name in chosen else quantizer)

    @torch.no_grad()
    def value(self) -> float:
        """The metric now, the mean over the batches; with the same random numbers every time."""
        with same_random_numbers(self._model):
            values = [float(self._metric(self._model, batch)) for batch in self._batches]
        return math.fsum(values) / len(values)


class _Memory:
    """What was measured so far, in a file if there is one."""

    def __init__(self, path: str | Path | None, layers: Sequence[str], baseline: float) -> None:
        self._path = None if path is None else Path(path)
        self._values: dict[str, float] = {}
        self._about: dict[str, Any] = {
            "version": _VERSION,
            "layers": [*layers],
            "baseline": baseline,
        }
        self.baseline = baseline
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, baseline = content["version"], float(content["baseline"])
            layers = [str(name) for name in content["layers"]]
            values = {str(name): float(value) for name, value in content["values"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a file of trials ({type(error).__name__}: {error}). Name another "
                "one, or delete it."
            ) from error
        if version != _VERSION:
            raise ValueError(
                f"{path}: got version {version!r} of a file of trials; this one reads {_VERSION}. "
                "Name another one, or delete it."
            )
        same = math.isclose(baseline, self.baseline, rel_tol=1e-6, abs_tol=1e-9)
        if layers != self._about["layers"] or not same:
            raise ValueError(
                f"{path}: trials of another model, or of other batches: there {baseline!r} in "
                f"float and {len(layers)} layers, here {self.baseline!r} and "
                f"{len(self._about['layers'])}. Name another file, or delete it."
            )
        self._values = values
        self.baseline = self._about["baseline"] = baseline

    def value(self, key: str, measure: Callable[[], float]) -> float:
        """What is kept under a key, or what is measured now and then kept."""
        if key not in self._values:
            self._values[key] = measure()
            if self._path is not None:
                text = json.dumps(self._about | {"values": self._values}, indent=1)
                write_whole(self._path, f"{text}\n")
        return self._values[key]


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm  # Lightning depends on it

    return tqdm(total=total, desc="sensitivity", leave=False, disable=not shown)


def _bars(trials: Trials) -> Figure:
    formats = [*trials.everything]
    layers = [*dict.fromkeys(row.layer for row in trials.rows)]
    figure = new_figure("Trials.plot", (7.4, 1.2 + 0.24 * len(layers) * len(formats)))
    axis = figure.subplots()
    height = 0.8 / len(formats)
    for number, name in enumerate(formats):
        values = {row.layer: row.alone for row in trials.rows if row.format == name}
        places = [position + number * height for position in range(len(layers))]
        axis.barh(places, [values[layer] for layer in layers], height=height, label=name)
    middle = 0.4 - height / 2
    names = [layer or "(model)" for layer in layers]
    axis.set_yticks([position + middle for position in range(len(layers))], names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("change of the metric with this layer quantized alone")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False)
    return figure


def predicted_by_layer(advice: Advice, fmt: str) -> dict[str, float]:
    """The predicted change of the loss if both weights and inputs of a layer are in a format."""
    found: dict[str, float] = {}
    for tensor in advice.tensors:
        cost = tensor.costs.get(fmt)
        if cost is not None and cost.loss_change is not None:
            found[tensor.layer] = found.get(tensor.layer, 0.0) + cost.loss_change.total
    return found


def _scatter(trials: Trials, advice: Advice) -> Figure:
    formats = [*trials.everything]
    points = {
        name: [
            (predicted[row.layer], row.alone)
            for row in trials.rows
            if row.format == name and row.layer in predicted
        ]
        for name in formats
        for predicted in [predicted_by_layer(advice, name)]
    }
    if not any(points.values()):
        raise ValueError(
            "Trials.plot: got advice without predicted losses of these layers and formats; "
            "expected that of advise(model, batches, loss=...) with the same formats."
        )
    figure = new_figure("Trials.plot", (4.2 * len(formats), 4.0))
    for axis, name in zip(figure.subplots(1, len(formats), squeeze=False)[0], formats, strict=True):
        axis.set_title(name)
        if points[name]:
            axis.scatter(*zip(*points[name], strict=True), s=22)
            ends = [min(map(min, points[name])), max(map(max, points[name]))]
            axis.plot(ends, ends, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
            # One layer often outweighs all others by far; near zero changes have both signs.
            threshold = 10.0 ** math.floor(math.log10(max(*map(abs, ends), 1e-9) / _LINEAR))
            axis.set_xscale("symlog", linthresh=threshold)
            axis.set_yscale("symlog", linthresh=threshold)
        axis.set_xlabel("predicted change of the loss")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("measured change")
    return figure
