"""Kernels of torch that read the weights of an encoder without calling its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from statqat_lightning.layers.module_hooks import remove_hooks
from statqat_lightning.layers.quantized_layer import is_quantized


def set_fast_paths(model: nn.Module) -> None:
    """Keep encoders with quantizers off kernels that read weights without calling the layers.

    In evaluation, an encoder layer runs as one kernel unless a module in it has a hook, and a stack
    of them nests short sequences, which only that kernel takes, by an attribute that was set when
    it was built. Without quantizers both are as they were.
    """
    for encoder in model.modules():
        if not isinstance(encoder, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        quantized = any(is_quantized(part) for part in encoder.modules())
        if isinstance(encoder, nn.TransformerEncoder):
            chosen = encoder.__dict__.pop("_statqat_nested", encoder.use_nested_tensor)
            if quantized:
                encoder.__dict__["_statqat_nested"] = chosen
            encoder.use_nested_tensor = chosen and not quantized
            continue
        if not quantized:
            remove_hooks(encoder, lambda hook: hook is _no_fast_path)
        elif _no_fast_path not in encoder._forward_pre_hooks.values():
            encoder.register_forward_pre_hook(_no_fast_path)


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Do nothing; that there is a hook is what counts."""
