"""Reading native files and Lightning checkpoints back into the user's model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from statqat_lightning.export.files.native import KEY, read_header
from statqat_lightning.export.files.reading import (
    NativeEntry,
    aliases_in,
    checked_checkpoint,
    file_kind,
    read_checkpoint,
    read_tensors,
)
from statqat_lightning.export.freezing.frozen import drop_parametrization
from statqat_lightning.export.freezing.stale_scales import remember_weights
from statqat_lightning.export.wording import some
from statqat_lightning.formats import at_least_bits, get_format
from statqat_lightning.layers.quantized_layer import kind_of, weight_of
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import (
    follow_averaged_weights,
    learned_by_key,
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    set_enabled,
    state_tensors,
)
from statqat_lightning.recipes.recipe import QuantRecipe


def load_quantized(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a float model into the quantized one that a file holds, ready for evaluation.

    Args:
        model: The user's model, as it is before training: the LightningModule, or the part of it
            that the file holds; the other parts of the file are then left out. Its weights are
            replaced.
        path: A `.safetensors` file by `ExportCallback` or `save_native`, or a Lightning checkpoint
            of a training with `StatQATCallback`.

    Returns:
        `model` itself, with quantizers, in eval mode. Its outputs equal those of the saved model
        bit for bit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is foreign, truncated, or does not fit the model; the model may hold
            parts of it then.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "native":
        return _load_native(model, path)
    return load_checkpoint(model, read_checkpoint(path), str(path))


def load_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Any], where: str = "checkpoint"
) -> nn.Module:
    """Like `load_quantized`, from a Lightning checkpoint that is loaded already.

    Args:
        model: The user's model.
        checkpoint: What Lightning saved.
        where: Its name in messages.
    """
    entry = checked_checkpoint(checkpoint, where)[KEY]
    remove(model)
    prefix = _prefix(model, set(checkpoint["state_dict"]), where)
    holder = _nested(model, prefix)
    _prepare(holder, QuantRecipe.from_dict(entry["recipe"]), where)
    scales = frozenset(learned_by_key(holder))  # among the quantizers' state
    _load_tensors(holder, _below(checkpoint["state_dict"], prefix), where, scales)
    state = {name: q for name, q in entry["quantizers"].items() if name.startswith(prefix)}
    _check_quantizers(holder, state, where)
    restore_quantizers(holder, entry, state)
    return _finished(model)


def restore_quantizers(
    model: nn.Module, entry: Mapping[str, Any], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put the quantizers of a prepared model into the state of a checkpoint.

    Args:
        model: Prepared by the recipe of the checkpoint, with the weights in it.
        entry: What the callback left in the checkpoint.
        state: The part of its `quantizers` that is this model's.

    Raises:
        ValueError: If the state is not that of this model's quantizers.
    """
    load_quantizer_state(model, state)
    if entry.get("averaged", False):
        follow_averaged_weights(model)  # the scales are those of the weights in training
    weights, inputs = entry.get("quantized", (True, True))
    set_enabled(model, weights, inputs)


def _load_native(model: nn.Module, path: Path) -> nn.Module:
    header, tensors = read_header(path), read_tensors(path)
    for alias, name in header["aliases"].items():
        tensors[alias] = tensors[name]
    layers = {name: NativeEntry(path, name, entry) for name, entry in header["layers"].items()}
    weights = {
        entry.key(role): entry.dequantized(role, tensors)
        for entry in layers.values()
        for role in entry.weights
    }
    others = aliases_in(header)
    same: dict[str, str] = dict(header["aliases"])
    for other, name in others.items():
        layers[other] = NativeEntry(path, other, header["layers"][name])
        keys = {layers[other].key(r): layers[name].key(r) for r in layers[name].weights}
        weights |= {key: weights[known] for key, known in keys.items()}
        same |= keys
    remove(model)
    for name, part in list(model.named_modules()):
        for role in kind_of(part).weights(part):
            if any(f".{key}".endswith(f".{name}.{role}") for key in weights):
                _make_plain(part, role)
    own = {key for entry in layers.values() for key in entry.keys_in_file()}
    state = {name: t for name, t in tensors.items() if name not in own}
    prefix = _prefix(model, state.keys() | weights.keys(), str(path), same)
    holder = _nested(model, prefix)
    own_names = {name for name, _ in holder.named_modules()}  # one of each layer
    layers = {
        name: entry
        for name, entry in layers.items()
        if f"{name}.".startswith(prefix) and (name in own_names or name not in others)
    }
    _prepare(holder, QuantRecipe([entry.rule() for entry in layers.values()]), str(path))
    # Last, so that a weight shared with a layer in float keeps its float values: quantized again,
    # they give the same codes.
    shared = _shared_keys(holder, state.keys())
    weights = {key: value for key, value in weights.items() if key not in shared}
    elsewhere = shared | learned_by_key(holder).keys()  # scales follow below
    _load_tensors(holder, _below(state | weights, prefix), str(path), optional=elsewhere)
    for layer in quantized_layers(holder):
        layers[layer.name].restore(layer, tensors)
    show_weights(holder)
    return _finished(model)


def _prefix(
    model: nn.Module, keys: set[str], where: str, same: Mapping[str, str] | None = None
) -> str:
    """What stands before the model's names in a file that holds a larger model.

    Args:
        model: The model, or a part of the one in the file.
        keys: Names in the file.
        where: The file, for messages.
        same: Other names of the same tensors: parts that differ in nothing else are one.
    """
    own = {k for k in model.state_dict() if not k.endswith("_extra_state")}
    if not own or own & keys:
        return ""
    probe = min(own, key=len)
    prefixes = {key.removesuffix(probe) for key in keys if key.endswith(f".{probe}")}
    fitting = sorted(p for p in prefixes if all(p + key in keys for key in own))
    known = same or {}
    if len({tuple(known.get(p + key, p + key) for key in sorted(own)) for p in fitting}) == 1:
        return fitting[0]
    outer = sorted(k for k in own if any(k.endswith(f".{key}") for key in keys))
    hint = ""
    if fitting:
        parts = ", ".join(part[:-1] for part in fitting)
        hint = f" Several parts of it fit: {parts}; load the whole model instead."
    elif outer:
        hint = f" It seems to hold a part of this model, with {outer[0]!r}; pass that part alone."
    raise ValueError(
        f"{where}: none of the names in it is a name of {type(model).__name__}.{hint} In the file: "
        f"{some(keys)}. "
        f"In the model: {some(own)}."
    )


def _nested(model: nn.Module, prefix: str) -> nn.Module:
    """The model inside empty modules, so that its names begin with `prefix`."""
    for part in reversed(prefix.split(".")[:-1]):
        holder = nn.Module()
        holder.add_module(part, model)
        model = holder
    return model


def _finished(model: nn.Module) -> nn.Module:
    """The model in eval mode, its quantizers named as in this model rather than as in the file."""
    for name, _, quantizers in quantized_layers(model):
        for quantizer in quantizers.present():
            quantizer.layer = name
    remember_weights(model)
    return model.eval()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prepare(model: nn.Module, recipe: QuantRecipe, where: str) -> None:
    try:
        prepare(model, recipe=recipe)
    except ValueError as error:
        raise ValueError(f"{where}: its recipe does not fit the model. {error}") from error


def _load_tensors(
    model: nn.Module, tensors: dict[str, Tensor], where: str, optional: frozenset[str] = frozenset()
) -> None:
    own = state_tensors(model)
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }
    problems = []
    if missing := own.keys() - given.keys() - optional:
        problems.append(f"only in the model: {some(missing)}")
    if unexpected := given.keys() - own.keys():
        problems.append(f"only in the file: {some(unexpected)}")
    problems += [
        f"{name}: shape {tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the "
        "model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"{where}: does not fit the model. {'; '.join(problems)}. Build the model as it was "
            "built for training."
        )
    model.load_state_dict(given, strict=False)


def _check_quantizers(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """A checkpoint's quantizers must have the shapes and kinds of formats of the model's."""
    own = quantizer_state(model)
    for name in sorted(own.keys() & state.keys()):
        shapes = [tuple(s["scale"].shape) for s in (state[name], own[name])]
        # Inputs decide on their sign or zero point in training, and have one range without. In an
        # earlier phase of a schedule, formats are wider than the recipe says.
        least = at_least_bits(get_format(own[name]["format"]), int(state[name].get("narrowest", 0)))
        formats = [
            re.sub(r"_(full|zp\d+)$", "", fmt.removeprefix("u"))
            for fmt in (state[name]["format"], least.name)
        ]
        if shapes[0] != shapes[1] or formats[0] != formats[1]:
            raise ValueError(
                f"{where}: quantizer {name!r} is {state[name]['format']} with scales of shape "
                f"{shapes[0]} in the checkpoint, "
                f"{own[name]['format']} with {shapes[1]} in the model. Load the whole model that "
                "was trained: the recipe goes by "
                "the position of layers."
            )


def _make_plain(module: nn.Module, role: str) -> None:
    """Give a parametrized layer a weight of its own: the file has the weight, not its making."""
    if parametrize.is_parametrized(module, role):
        weight = weight_of(module, role).detach().clone()
        drop_parametrization(module, role)
        module.register_parameter(role, nn.Parameter(weight))


def _shared_keys(model: nn.Module, in_file: Any) -> frozenset[str]:
    """Names of parameters that go by another name, too, under which the file has them."""
    names: dict[int, list[str]] = {}
    for name, tensor in state_tensors(model, keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    groups = [group for group in names.values() if any(name in in_file for name in group)]
    return frozenset(name for group in groups for name in group if name not in in_file)
