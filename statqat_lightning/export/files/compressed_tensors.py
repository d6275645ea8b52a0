"""The `pack-quantized` layout of compressed-tensors, which language-model runtimes load.

A folder with `model.safetensors` and `config.json`. Each quantized Linear layer has `weight_packed`
(int32, rows of codes plus `2**(bits - 1)` as one dense bit string, least significant bits first,
rows padded to whole words), `weight_scale` (`(out, 1)` or `(out, groups)`) and `weight_shape`; all
other tensors are as they were. `quantization_config` in `config.json` says which layers have how
many bits. The layout is that of the compressed-tensors package, version 0.12 to 0.20.

Codes are weights alone: the rounding of inputs is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from statqat_lightning.export.files.native import as_os_error, library_version
from statqat_lightning.export.files.on_disk import replacing_folder
from statqat_lightning.export.files.packing import pack, packed_size, unpack
from statqat_lightning.export.files.torchao import formats_of
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.export.freezing.dequantized import (
    integer_linears,
    integers_and_scales,
    plain_model,
)
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer
from statqat_lightning.export.wording import some
from statqat_lightning.fake_quant.fake_quantizer import WEIGHT
from statqat_lightning.model.quantized_model import state_tensors

FILES = ("model.safetensors", "config.json")
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def save_compressed(
    model: nn.Module, folder: str | Path, config: Mapping[str, Any] | None = None
) -> None:
    """Write a model of Linear layers with integer weights to a folder.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        folder: Where to; it appears under its name when it is complete, and replaces an older one.
        config: Entries of `config.json` beside `quantization_config`; None takes them from
            `model.config`, as Hugging Face models have it.

    Raises:
        ExportError: If a layer has a format that the layout cannot hold; the message names layers
            and formats, and what can hold them.
        OSError: If the folder cannot be written, or holds other files.
    """
    frozen = model if frozen_layers(model) else freeze(model)
    chosen = dict(integer_linears(frozen))
    quantized = [n for n, layer in frozen_layers(frozen) if layer.frozen_weights]
    others = [name for name in quantized if name not in chosen]
    if others or not chosen:
        raise ExportError(
            "compressed-tensors (pack-quantized) holds signed integers of 2 to 8 bits of Linear "
            f"layers, per channel, tensor or group; expected no other quantized layers and one of "
            f"these at least, got {formats_of(frozen)}. It cannot hold: {some(others)}. The "
            "native file and .pt2 hold every format and layer."
        )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state_tensors(plain_model(frozen), keep_vars=True).items():
        layer, _, name = key.rpartition(".")
        if name == "weight" and layer in chosen:
            seen.add(id(tensor))  # a layer may go by several names
            tensors |= {f"{layer}.{k}" if layer else k: t for k, t in _packed(chosen[layer])}
        elif isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    entries = _model_config(model) if config is None else dict(config)
    entries["quantization_config"] = _quantization_config(frozen, chosen)
    with replacing_folder(Path(folder), FILES) as temporary:
        try:
            save_file(tensors, temporary / FILES[0], metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise as_os_error(error) from error
        text = json.dumps(entries, indent=2, default=str)
        (temporary / FILES[1]).write_text(text + "\n", encoding="utf-8")


def load_compressed(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a float model the dequantized weights of a folder; returns it in eval mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder is truncated, foreign, or of another model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        tensors = load_file(folder / FILES[0])
        groups = config["quantization_config"]["config_groups"].values()
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: not a whole folder of compressed-tensors ({error}). Export it again."
        ) from error
    for group in groups:
        bits = group["weights"]["num_bits"]
        for target in group["targets"]:
            layer = re.sub(r"\\(.)", r"\1", target.removeprefix("re:^").removesuffix("$"))
            prefix = f"{layer}." if layer else ""
            packed, scale, shape = (tensors.pop(prefix + n) for n in (PACKED, SCALE, SHAPE))
            tensors[f"{prefix}weight"] = _unpacked(packed, scale, shape.tolist(), bits)
    own = {name: id(t) for name, t in state_tensors(model, keep_vars=True).items()}
    known = {own[name] for name in tensors if name in own}
    missing = [name for name, i in own.items() if name not in tensors and i not in known]
    unexpected = [name for name in tensors if name not in own]
    try:
        if missing or unexpected:
            raise RuntimeError(f"only in the model: {missing}; only in the file: {unexpected}")
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder}: does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def _packed(layer: FrozenLayer) -> list[tuple[str, Tensor]]:
    bits = layer.frozen_weights[WEIGHT].fmt.bits
    integers, scale = integers_and_scales(layer)
    rows, columns = integers.shape
    codes = (integers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    # Eight codes fill whole bytes, so that each row of the padded matrix begins with one.
    padded = torch.nn.functional.pad(codes, (0, -columns % 8))
    octets = pack(padded, bits).view(rows, -1)
    wanted = 4 * -(-columns * bits // 32)
    octets = torch.nn.functional.pad(octets, (0, max(wanted - octets.shape[1], 0)))[:, :wanted]
    return [
        (PACKED, octets.contiguous().view(torch.int32)),
        (SCALE, scale),
        (SHAPE, torch.tensor([rows, columns])),
    ]


def _unpacked(packed: Tensor, scale: Tensor, shape: list[int], bits: int) -> Tensor:
    rows, columns = shape
    padded = columns + -columns % 8
    size = packed_size(padded, bits)
    octets = packed.view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, max(size - octets.shape[1], 0)))[:, :size]
    codes = unpack(octets.reshape(-1), bits, rows * padded).view(rows, padded)[:, :columns]
    integers = codes.to(torch.float32) - 2 ** (bits - 1)
    weight: Tensor = integers * scale.float().repeat_interleave(columns // scale.shape[1], 1)
    return weight


def _quantization_config(frozen: nn.Module, chosen: Mapping[str, FrozenLayer]) -> dict[str, Any]:
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, layer in chosen.items():
        tensor = layer.frozen_weights[WEIGHT]
        size = getattr(tensor.granularity, "size", None)
        groups.setdefault((tensor.fmt.bits, size), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [
            name
            for name, module in frozen.named_modules()
            if isinstance(module, nn.Linear) and name not in chosen
        ],
        "config_groups": {
            f"group_{number}": {
                "targets": [f"re:^{re.escape(name)}$" for name in names],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, ((bits, size), names) in enumerate(groups.items())
        },
        "statqat_lightning_version": library_version(),
    }


def _model_config(model: nn.Module) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return dict(to_dict()) if callable(to_dict) else {}
