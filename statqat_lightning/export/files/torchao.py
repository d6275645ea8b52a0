"""torchao tensors: integer weights of Linear layers as a float model's parameters.

A `.torchao.pt` file is a `state_dict` for the user's float model. Weights of Linear layers with
signed integers are `IntxUnpackedToInt8Tensor`, which hold our codes and scales and multiply to the
bit like our dequantized weights; all others, and the last projection of attention, are dequantized.
torchao has no static scales for inputs beside these tensors (it rounds activations per token, with
scales of the moment), so the rounding of inputs is left out of the file, and whoever writes it is
told of which layers.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.export.freezing.dequantized import (
    integer_linears,
    integers_and_scales,
    plain_model,
)
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer
from statqat_lightning.fake_quant.fake_quantizer import WEIGHT

_OF_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear


def require_torchao() -> None:
    """Check that torchao is installed.

    Raises:
        ModuleNotFoundError: If it is not; the message names the extra.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(
            'torchao tensors need torchao: pip install "statqat-lightning[torchao]", or, in a '
            'checkout, pip install ".[torchao]".'
        )


def to_torchao(model: nn.Module) -> nn.Module:
    """A plain copy of a quantized model, with torchao tensors for integer weights of Linear layers.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.

    Returns:
        A model of the user's classes in eval mode. Its outputs equal those of the fake-quantized
        model with inputs in float.

    Raises:
        ModuleNotFoundError: If torchao is not installed.
        ExportError: If no layer has a weight that torchao's tensors can hold; the message names
            layers and formats.
    """
    require_torchao()
    frozen = model if frozen_layers(model) else freeze(model)
    chosen = {
        name
        for name, layer in integer_linears(frozen)
        # Attention multiplies with the weight of its last projection by operators that these
        # tensors lack.
        if layer.weight_dtype != torch.float64 and not isinstance(layer, _OF_ATTENTION)
    }
    if not chosen:
        raise ExportError(
            "torchao tensors hold signed integers of Linear layers; there are none. Layers here: "
            f"{formats_of(frozen)}. The native file and .pt2 hold every format."
        )
    return plain_model(
        frozen,
        lambda name, layer, role: (
            _torchao_weight(layer) if name in chosen else layer.read_weight(role)
        ),
    )


def save_torchao(model: nn.Module, path: str | Path) -> None:
    """Write `to_torchao(model).state_dict()`, as `torch.load(weights_only=True)` takes it.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        path: The file.

    Raises:
        ModuleNotFoundError: If torchao is not installed.
        ExportError: As in `to_torchao`.
        OSError: If the file cannot be written.
    """
    data = io.BytesIO()  # torch's own writer of files ends the process on a full disk
    torch.save(to_torchao(model).state_dict(), data)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data.getbuffer())


def load_torchao(model: nn.Module, path: str | Path) -> nn.Module:
    """Give a float model the weights of a `.torchao.pt` file; returns it in eval mode.

    Raises:
        ModuleNotFoundError: If torchao is not installed.
        ValueError: If the file is truncated, or of another model.
    """
    require_torchao()
    _tensor_class()  # with its import, torch.load knows the class
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path}: cannot be loaded into {type(model).__name__} ({error}). Expected a whole "
            "file of that model by save_torchao."
        ) from error
    return model.eval()


def formats_of(frozen: nn.Module) -> str:
    """Names of the layers of a frozen model with the formats of their weights."""
    return ", ".join(
        f"{name or '(model)'} ({type(layer).__bases__[1].__name__}, {tensor.fmt.name})"
        for name, layer in frozen_layers(frozen)
        for tensor in layer.frozen_weights.values()
    )


def _torchao_weight(layer: FrozenLayer) -> Tensor:
    tensor = layer.frozen_weights[WEIGHT]
    codes, scale = integers_and_scales(layer)
    weight: Tensor = _tensor_class()(
        qdata=codes,
        scale=scale,  # in float32, as ours: the product is rounded once, to `dtype`
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{tensor.fmt.bits}"),
        block_size=(1, codes.shape[1] // scale.shape[1]),
        dtype=layer.weight_dtype,
        activation_quantization=None,
    )
    return weight


def _tensor_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torchao warns of on import concerns its own insides
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return IntxUnpackedToInt8Tensor
