"""Reading native files and Lightning checkpoints back into the user's model."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from statqat_lightning.export.files.native import KEY, read_header, read_scale
from statqat_lightning.export.files.packing import packed_size, unpack
from statqat_lightning.export.freezing.frozen import (
    codes_name,
    drop_parametrization,
    scale_name,
    weight_key,
)
from statqat_lightning.export.freezing.stale_scales import remember_weights
from statqat_lightning.export.wording import some
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT, FakeQuantizer
from statqat_lightning.formats import at_least_bits, get_format
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import GATE
from statqat_lightning.layers.quantized_layer import kind_of, weight_of
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import (
    QuantizedLayer,
    follow_averaged_weights,
    learned_by_key,
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    set_enabled,
    state_tensors,
)
from statqat_lightning.numerics.granularity import get_granularity
from statqat_lightning.numerics.qparams import QParams, dequantize
from statqat_lightning.recipes.recipe import QuantRecipe, QuantRule, TensorSpec, full_name


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
    entry = _checked(checkpoint, where)[KEY]
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
    header, tensors = read_header(path), _read_tensors(path)
    for alias, name in header["aliases"].items():
        tensors[alias] = tensors[name]
    layers = {name: _Entry(path, name, entry) for name, entry in header["layers"].items()}
    weights = {
        entry.key(role): entry.dequantized(role, tensors)
        for entry in layers.values()
        for role in entry.weights
    }
    others = _other_names(header)
    same: dict[str, str] = dict(header["aliases"])
    for other, name in others.items():
        layers[other] = _Entry(path, other, header["layers"][name])
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


def _other_names(header: Mapping[str, Any]) -> dict[str, str]:
    """Other names of layers that are in the model several times, and the name of each."""
    found: dict[str, str] = {}
    for alias, name in header["aliases"].items():
        (other, tensor), (layer, own) = (key.rpartition(".")[::2] for key in (alias, name))
        roles = header["layers"].get(layer, {})
        if tensor == own and any(tensor in (codes_name(r), scale_name(r)) for r in roles):
            found[other] = layer
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {
            name: read_scale(name, file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118
        }


def native_weights(path: Path) -> dict[str, Tensor]:
    """The dequantized weights of a native file, by layer; see `weight_key`."""
    header, tensors = read_header(path), _read_tensors(path)
    entries = (_Entry(path, name, entry) for name, entry in header["layers"].items())
    return {
        weight_key(e.name, role): e.dequantized(role, tensors)
        for e in entries
        for role in e.weights
    }


def frozen_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a native file by their names in the frozen model, codes unpacked."""
    header, tensors = read_header(path), _read_tensors(path)
    for name, layer in header["layers"].items():
        entry = _Entry(path, name, layer)
        for role in entry.weights:
            tensors[entry.key(codes_name(role))] = entry.codes(role, tensors)
    return tensors | {alias: tensors[name] for alias, name in header["aliases"].items()}


def read_checkpoint(path: Path, trust: bool = False) -> Mapping[str, Any]:
    """A Lightning checkpoint of a training with `StatQATCallback`, on the CPU.

    Args:
        path: The file.
        trust: Whether to load any object in it, which may run code.

    Raises:
        ValueError: If it is truncated, foreign, or holds objects and is not trusted.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: the checkpoint holds objects that are not loaded from a file one may not "
            f"trust ({error}). If you trust it: "
            "load_checkpoint(model, torch.load(path, weights_only=False))."
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole checkpoint ({error}). It may have been cut off; copy it again."
        ) from error
    return _checked(checkpoint, str(path))


def _checked(checkpoint: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{where}: no 'state_dict' in it; expected a Lightning checkpoint.")
    if KEY not in checkpoint:
        raise ValueError(
            f"{where}: a checkpoint without the entry {KEY!r}: it was trained without "
            "StatQATCallback and holds a float model. "
            "Load it with load_from_checkpoint."
        )
    if checkpoint[KEY]["version"] > 1:
        raise ValueError(
            f"{where}: got version {checkpoint[KEY]['version']} of {KEY!r}; this one reads 1. "
            "Update statqat-lightning."
        )
    return checkpoint


class _Entry:
    """One layer of a native file."""

    def __init__(self, path: Path, name: str, entry: Mapping[str, Any]) -> None:
        self.where = f"{path}: layer {name!r}"
        self.name = name
        self.weights = {role: part for role, part in entry.items() if "shape" in part}
        self.activations = {role: part for role, part in entry.items() if "shape" not in part}

    def key(self, tensor: str) -> str:
        return f"{self.name}.{tensor}" if self.name else tensor

    def keys_in_file(self) -> list[str]:
        names = [codes_name(role) for role in self.weights]
        names += [scale_name(role) for role in (*self.weights, *self.activations)]
        return [self.key(name) for name in names]

    def rule(self) -> QuantRule:
        named = {
            role: TensorSpec(**part["spec"])
            for role, part in self.activations.items()
            if is_result(role)
        }
        others = (OUTPUT, GATE, *named)
        inputs = (part for role, part in self.activations.items() if role not in others)
        return QuantRule(
            full_name(self.name),
            _spec(next(iter(self.weights.values()), None)),
            _spec(next(inputs, None)),
            _spec(self.activations.get(OUTPUT)),
            _spec(self.activations.get(GATE)),
            named,
        )

    def codes(self, role: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Codes of a weight, uint8 in its shape."""
        part = self.weights[role]
        fmt, shape = get_format(part["format"]), tuple(part["shape"])
        packed, count = self._tensor(tensors, codes_name(role)), math.prod(shape)
        if packed.numel() != packed_size(count, fmt.bits):
            raise ValueError(
                f"{self.where}: got {packed.numel()} bytes of codes; expected "
                f"{packed_size(count, fmt.bits)} for shape {shape} "
                f"in {fmt.name}. The file is damaged; export it again."
            )
        return unpack(packed, fmt.bits, count).view(shape)

    def dequantized(self, role: str, tensors: Mapping[str, Tensor]) -> Tensor:
        part = self.weights[role]
        shape = tuple(part["shape"])
        granularity = get_granularity(part["granularity"], part["axis"])
        scale = self._tensor(tensors, scale_name(role))
        if tuple(scale.shape) != granularity.scale_shape(shape):
            raise ValueError(
                f"{self.where}: got a scale of shape {tuple(scale.shape)}; expected "
                f"{granularity.scale_shape(shape)} for a weight "
                f"of shape {shape}, {granularity}. The file is damaged; export it again."
            )
        dtype: torch.dtype = getattr(torch, part["dtype"])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = get_format(part["format"]).decode(self.codes(role, tensors)).to(wide)
        return dequantize(values, QParams(scale, None, granularity)).to(dtype)

    def restore(self, layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> None:
        """Give a layer's quantizers format and scale, and check that they reproduce the codes."""
        for role, weight in layer.quantizers.weights.items():
            if role not in self.weights:
                continue
            part = self.weights[role]
            _restore(weight, part["format"], self._tensor(tensors, scale_name(role)))
            weight.read_by = tuple(part.get("read_by", ()))
            own = weight_of(layer.module, role)
            if not torch.equal(weight(own), self.dequantized(role, tensors).to(own)):
                raise ValueError(
                    f"{self.where}: the model's {role} does not quantize to the codes of the file. "
                    f"Expected a weight of its own in {part['dtype']}; it may be shared with a "
                    "layer of another format, or the model's precision too low."
                )
        for activation in layer.quantizers.activations():
            if (entry := self.activations.get(activation.role)) is not None:
                scale = self._tensor(tensors, scale_name(activation.role))
                _restore(activation, entry["format"], scale)

    def _tensor(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if self.key(name) not in tensors:
            raise ValueError(f"{self.where}: {name} is missing. The file is damaged; export again.")
        return tensors[self.key(name)]


def _spec(part: Mapping[str, Any] | None) -> TensorSpec | None:
    return None if part is None else TensorSpec(**part["spec"])


def _restore(quantizer: FakeQuantizer, fmt: str, scale: Tensor) -> None:
    quantizer.fmt = get_format(fmt)
    with torch.no_grad():
        quantizer.scale.copy_(scale)
    quantizer.ready = True


def file_kind(path: Path) -> str:
    """`native` or `checkpoint`, by the first bytes of a file.

    Raises:
        ValueError: If it is neither, or a folder.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: got a folder; expected a file. A sharded checkpoint is turned into one by "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return "checkpoint"
    if len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1e8:
        return "native"
    raise ValueError(
        f"{path}: neither a .safetensors file nor a checkpoint (it begins with {start!r}). "
        "Expected a file by ExportCallback, "
        "or a checkpoint of a training with StatQATCallback."
    )


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
        # Inputs decide on their sign in training, and have one range without it. In an earlier
        # phase of a schedule, formats are wider than the recipe says.
        least = at_least_bits(get_format(own[name]["format"]), int(state[name].get("narrowest", 0)))
        formats = [
            fmt.removeprefix("u").removesuffix("_full")
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
