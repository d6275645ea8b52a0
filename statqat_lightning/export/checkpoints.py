"""Export of a checkpoint, when the training is over and its process gone."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.files.loading import load_checkpoint
from statqat_lightning.export.files.native import KEY
from statqat_lightning.export.files.reading import read_any, read_checkpoint
from statqat_lightning.export.files.registry import FILE_TYPES, wanted
from statqat_lightning.export.proof.report import ExportReport
from statqat_lightning.model.insertion import remove
from statqat_lightning.recipes.recipe import QuantRecipe


def export_checkpoint(
    checkpoint: str | Path,
    module: str | Callable[..., nn.Module],
    path: str | Path | None = None,
    example: Any = None,
    *,
    submodule: str = "",
    trust: bool = False,
    **options: Any,
) -> ExportReport:
    """Export a Lightning checkpoint of a training with `StatQATCallback`.

    Args:
        checkpoint: The file.
        module: The LightningModule's class, as `package.Module`, which is made with the
            hyper-parameters of the checkpoint; or a function that makes the model, as
            `package:factory`; or either as an object.
        path: Where the files go; None for beside the checkpoint.
        example: Input of a forward; None takes the module's `example_input_array`.
        submodule: The part of the model to write, `module` of `export_model`.
        trust: See `read_checkpoint`.
        **options: As in `export_model`; `target` is that of the training if it is not given.

    Raises:
        ValueError: If the checkpoint or the module is not what is expected.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: no such file.")
    state = read_checkpoint(checkpoint, trust)
    model = module_of(module, state)
    load_checkpoint(model, state, str(checkpoint))
    example = getattr(model, "example_input_array", None) if example is None else example
    recipe = QuantRecipe.from_dict(state[KEY]["recipe"])
    if old := {t.field: options.pop(t.field) for t in FILE_TYPES if t.field in options}:
        chosen = wanted("export_checkpoint", options.get("files"), **old)
        options["files"] = [each.name for each in chosen]
    options = {"target": state[KEY].get("placed_for", {}).get("target")} | options
    where = checkpoint.with_suffix("") if path is None else path
    return export_model(model, where, example, module=submodule, recipe=recipe, **options)


def module_of(
    module: str | Callable[..., nn.Module], checkpoint: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model that a class or a function makes.

    Args:
        module: See `export_checkpoint`.
        checkpoint: What was read of a checkpoint, for hyper-parameters; None to call it without.

    Raises:
        ValueError: If it is not there, or cannot be called like this; the message names it.
    """
    return _made(_found(module) if isinstance(module, str) else module, checkpoint)


def model_with_weights(
    module: str | Callable[..., nn.Module],
    checkpoint: str | Path | None = None,
    trust: bool = False,
) -> nn.Module:
    """The float model that a class or a function makes, with the weights of a checkpoint.

    Args:
        module: See `export_checkpoint`.
        checkpoint: A Lightning checkpoint, of a float or a quantized training, or a `state_dict`;
            None for the weights that the model is made with.
        trust: See `read_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If module or checkpoint is not what is expected, or they do not fit.
    """
    if checkpoint is None:
        return module_of(module)
    checkpoint = Path(checkpoint)
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: no such file.")
    state = read_any(checkpoint, trust)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{checkpoint}: got a {type(state).__name__}; expected a Lightning checkpoint, or a "
            "state_dict."
        )
    if KEY in state:
        model = load_checkpoint(module_of(module, state), state, str(checkpoint))
        remove(model)
        return model
    model = module_of(module, state if "state_dict" in state else None)
    try:
        model.load_state_dict(state.get("state_dict", state))
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{checkpoint}: does not fit the model: {error}") from error
    return model


def _found(name: str) -> Callable[..., nn.Module]:
    home, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not home or not attribute:
        raise ValueError(
            f"module: got {name!r}; expected package.Module or package:factory, such as "
            "'train.Classifier'."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # scripts in the current folder, as `python -m` finds them
    try:
        found = getattr(importlib.import_module(home), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"module: got {name!r}, but {error}. Run it where Python finds {home!r}."
        ) from error
    if not callable(found):
        raise ValueError(f"module: got {name!r}, but {home!r} has no class or function of it.")
    return found  # type: ignore[no-any-return]


def _made(make: Callable[..., nn.Module], checkpoint: Mapping[str, Any] | None) -> nn.Module:
    parameters = inspect.signature(make).parameters
    state = checkpoint or {}
    given = dict(state.get("hyper_parameters") or {})
    whole = state.get("hparams_name")
    if whole in parameters and whole != "kwargs":
        given = {whole: given}
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    try:
        model = make(**given)
    except TypeError as error:
        name = getattr(make, "__name__", make)
        if checkpoint is None:
            raise ValueError(
                f"module: {name} cannot be called without arguments: {error}. Give a function that "
                "can (package:factory)."
            ) from error
        raise ValueError(
            f"module: {name} cannot be made from the hyper-parameters "
            f"of the checkpoint, {[*given]}: {error}. Call save_hyperparameters() in it, or give a "
            "function without arguments (package:factory)."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"module: {make} made a {type(model).__name__}; expected an nn.Module.")
    return model
