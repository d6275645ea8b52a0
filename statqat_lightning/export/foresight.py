"""What is known before a training of an export at its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from statqat_lightning.export.wording import in_short
from statqat_lightning.model.isolated_copy import CannotCopy, isolated_copy
from statqat_lightning.model.quantized_model import quantized_layers


def refuse_uncopyable(model: nn.Module) -> None:
    """Check that a model can be copied, without the memory that a copy takes.

    Raises:
        ValueError: If it cannot; the message says why.
    """
    try:
        with _SharingTensors():
            isolated_copy(model)
    except CannotCopy as error:
        raise ValueError(
            f"export: {error}, and files are written from a copy. Keep what stands in the way "
            f"elsewhere than on the module. From: {in_short(error.__cause__ or error)}"
        ) from error


class _SharingTensors(TorchFunctionMode):
    """While it is active, copies of tensors are the tensors themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.clone, Tensor.__deepcopy__):
            return args[0]
        return func(*args, **(kwargs or {}))


def tied_in_two_formats(model: nn.Module) -> str:
    """Layers that share a quantized weight in different formats, in words; empty without any."""
    found: dict[int, dict[str, str]] = {}
    for _, module, quantizers in quantized_layers(model):
        for role, quantizer in quantizers.weights.items():
            weight = module._parameters.get(role)
            if weight is not None and quantizer.enabled:
                format_here = f"{quantizer.spec.format} {quantizer.granularity}"
                found.setdefault(id(weight), {})[quantizer.name] = format_here
    different = [names for names in found.values() if len({*names.values()}) > 1]
    return "; ".join(
        ", ".join(f"{name} ({fmt})" for name, fmt in names.items()) for names in different
    )


def complex_parameters(model: nn.Module) -> list[str]:
    """Names of complex parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.is_complex()]
