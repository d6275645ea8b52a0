"""A copy of a model for trials: it runs in float on a few batches, and its inputs are observed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.fake_quant.fake_quantizer import is_floating
from statqat_lightning.fake_quant.observers import (
    InputObserver,
    ObserverConfig,
    add_up,
    update_running,
)
from statqat_lightning.insight.candidates import (
    Candidates,
    candidates_for_inputs,
    candidates_for_weights,
    follow_inputs,
    layers_with_weights,
    ready_candidates,
)
from statqat_lightning.insight.undisturbed import same_random_numbers
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.isolated_copy import (
    CannotCopy,
    ReachesOriginal,
    guarding,
    isolated_copy,
)
from statqat_lightning.model.quantized_model import (
    QuantizedLayer,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch, the mean over its samples, `()`."""

LEFT_BY_RULE = "left in float by rule"
"""How the reason of a layer begins that a pattern of `exclude` matches."""
DID_NOT_RUN = "did not run on these batches"

_ALL_VALUES = ObserverConfig(momentum=1e-9, max_observed=1 << 40)
"""All values of all batches count alike."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def own_loss(model: nn.Module) -> Loss | None:
    """The loss of a LightningModule's own step, None for models without one."""
    if not callable(getattr(model, "training_step", None)):
        return None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        step: Callable[..., Any] = model.training_step  # type: ignore[assignment]
        arguments = (batch, 0) if _takes_index(step) else (batch,)
        with warnings.catch_warnings():
            # It logs, and has no Trainer to log to.
            warnings.filterwarnings("ignore", r".*You are trying to `self\.log\(\)`")
            try:
                result = step(*arguments)
            except RuntimeError as error:
                if "not attached to a `Trainer`" not in str(error):
                    raise
                raise ValueError(
                    f"{type(model).__name__}.training_step needs its Trainer, and there is none "
                    "here. Expected loss=lambda model, batch: ..., the loss without it."
                ) from error
        found = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(model).__name__}.training_step: got {type(found).__name__} from it; "
                "expected a loss. Give it as loss=lambda model, batch: ..."
            )
        return found

    return loss


def _takes_index(step: Callable[..., Any]) -> bool:
    """Whether a `training_step` takes the number of the batch, as Lightning decides it."""
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        sum(kind in positional for kind in kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
    )


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tuple or a list as arguments, a mapping by name."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def samples_of(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor; 1 without one."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return max(1, len(tensors[0])) if tensors else 1


def kept_batches(where: str, model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Batches on the device of a model.

    Args:
        where: Who asks, for messages.
        model: The model.
        batches: Batches, nests of tensors; other objects in them stay as they are.

    Raises:
        ValueError: If there is none.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    kept = [tree_map_only(Tensor, lambda x: x.to(device), batch) for batch in batches]
    if not kept:
        raise ValueError(f"{where}: got no batches; expected at least one, best a few.")
    return kept


@contextmanager
def on_the_side(where: str, original: nn.Module) -> Iterator[None]:
    """While it lasts, a copy runs; the original may not, and random numbers go on as before.

    Args:
        where: Who asks, for messages.
        original: The model that the copy was made of.

    Raises:
        ValueError: If the original runs, or it cannot be copied.
    """
    with same_random_numbers(original), torch.compiler.set_stance("force_eager"):
        try:
            yield
        except ReachesOriginal as error:
            raise ValueError(
                f"{where}: {error}. A loss or a metric gets the copy as its argument `model`: "
                "expected that it runs that one."
            ) from error
        except CannotCopy as error:
            raise ValueError(f"{where}: {error}. Expected a model that can be copied.") from error


@dataclass(frozen=True)
class Observed:
    """A copy of a model whose layers all have quantizers, switched off, that know its inputs.

    Attributes:
        model: The copy, in eval mode.
        inputs: Quantizers of its inputs in other formats, with their scales.
        macs: Multiply-accumulates of its layers for one sample of the first batch, by name.
        skipped: Why others are left in float, by name.
        spectra: Of each input by `{layer}/{role}`, one row: of all values of all batches, where
            quantizers take samples. Scales are chosen by these, as in training, but what is rare
            decides about the error of wide formats.
    """

    model: nn.Module
    inputs: Candidates
    macs: Mapping[str, int]
    skipped: Mapping[str, str]
    spectra: Mapping[str, EnergySpectrum]


@torch.no_grad()
def observed_copy(
    model: nn.Module,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    formats: Sequence[str],
    exclude: Sequence[str] = (),
) -> Observed:
    """Copy a model, give the copy quantizers, and let them know its inputs in float.

    Args:
        model: Any module; quantizers that it has, and what they know, are of no account.
        batches: The batches.
        run: Runs the model on one.
        formats: Names of formats that inputs may have.
        exclude: Patterns of layers that get no quantizers.
    """
    trial = isolated_copy(model).eval()
    remove(trial)
    rules = [*map(QuantRule, exclude), QuantRule("*", "int8", "int8")]

    def first_run() -> Any:
        with guarding(model):
            return run(trial, batches[0])

    report = prepare(trial, recipe=QuantRecipe(rules), run=first_run)
    set_enabled(trial, weights=False, inputs=False)
    layers = layers_with_weights(trial)
    for layer in layers:
        layer.quantizers.ran = False
    inputs = candidates_for_inputs(trial, formats)
    whole: dict[str, InputObserver] = {}
    macs: dict[str, int] = {}
    with ExitStack() as counting, _seeing_all(layers, whole):
        counting.enter_context(_counting_macs(layers, samples_of(batches[0]), macs))
        for batch in batches:
            set_observing(trial, True)
            run(trial, batch)
            set_observing(trial, False)
            counting.close()  # one batch is enough
            refresh(trial, weights=False, search=True)
            follow_inputs(trial, inputs)
            if whole:
                update_running([*whole.values()], statistics=True)
    skipped = {row.name: row.reason for row in report.rows if row.reason}
    skipped |= {layer.name: DID_NOT_RUN for layer in layers if not layer.quantizers.ran}
    spectra = {name: EnergySpectrum(own.running_spectrum[None]) for name, own in whole.items()}
    return Observed(trial, inputs, macs, skipped, spectra)


def candidates_of(observed: Observed, weights: Sequence[str]) -> Candidates:
    """Quantizers for the tensors of a model that has been observed.

    Args:
        observed: The model, with candidates of its inputs.
        weights: Names of formats for weights.
    """
    inputs = ready_candidates(observed.model, observed.inputs)
    return candidates_for_weights(observed.model, weights) | inputs


@torch.no_grad()
def count_macs(
    model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]
) -> dict[str, int]:
    """Multiply-accumulates of each quantized layer for one sample, by its name.

    Args:
        model: A model with quantizers.
        batch: A batch.
        run: Runs the model on it.
    """
    macs: dict[str, int] = {}
    with _counting_macs(layers_with_weights(model), samples_of(batch), macs):
        run(model, batch)
    return macs


@contextmanager
def _seeing_all(
    layers: Sequence[QuantizedLayer], observers: dict[str, InputObserver]
) -> Iterator[None]:
    """Add all values of all inputs to observers, which are made when they are first needed."""

    def watcher(layer: QuantizedLayer) -> Callable[[str, Any], None]:
        def tell(role: str, x: Any) -> None:
            quantizer = layer.quantizers.inputs.get(role)
            if quantizer is None or not is_floating(x) or not x.numel():
                return
            if quantizer.name not in observers:
                own = InputObserver(_ALL_VALUES, needs_spectrum=True, needs_range=False)
                for name in own.tensors():
                    setattr(own, name, getattr(own, name).to(x.device))
                observers[quantizer.name] = own
            observer = observers[quantizer.name]
            observer.add(x.detach(), quantizer.fmt, None, statistics=True)
            add_up([observer])  # and keep no values

        return tell

    before = [(layer.quantizers, layer.quantizers.watchers) for layer in layers]
    try:
        for layer in layers:
            layer.quantizers.watchers = (*layer.quantizers.watchers, watcher(layer))
        yield
    finally:
        for quantizers, watchers in before:
            quantizers.watchers = watchers


@contextmanager
def _counting_macs(
    layers: Sequence[QuantizedLayer], samples: int, macs: dict[str, int]
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            hook = _counting(layer, macs, samples)
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _counting(layer: QuantizedLayer, macs: dict[str, int], samples: int) -> Callable[..., None]:
    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        made = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
        if given is None or made is None or not given.is_floating_point():
            return  # indices pick rows
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
            # Each place of the output, or transposed of the input, meets the whole kernel once.
            x = given if isinstance(module, _TRANSPOSED) else made
            places = x.numel() // x.shape[1 - module.weight.dim()]
        else:
            places = made.numel() // max(1, made.shape[-1])
        elements = sum(weight_of(module, role).numel() for role in layer.quantizers.weights)
        macs[layer.name] = macs.get(layer.name, 0) + math.ceil(places * elements / samples)

    return count
