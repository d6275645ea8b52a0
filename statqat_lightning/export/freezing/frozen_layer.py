"""A frozen layer: codes and scales in place of weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.freezing.light_copy import CODES
from statqat_lightning.fake_quant.fake_quantizer import INPUT, OUTPUT, WEIGHT, FakeQuantizer
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import Format
from statqat_lightning.layers.attention import attend, each_input
from statqat_lightning.layers.forwards import (
    InputNames,
    names_of_inputs,
    with_each_input,
    with_output,
)
from statqat_lightning.layers.function_results import FunctionResults, is_result
from statqat_lightning.layers.layer_kinds import (
    GATE,
    RECURRENT,
    LayerKind,
    gate_of_class,
    kind_of_class,
)
from statqat_lightning.layers.turns import in_turn
from statqat_lightning.numerics.granularity import Granularity
from statqat_lightning.numerics.qparams import QParams, dequantize, quantize
from statqat_lightning.recipes.recipe import TensorSpec

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def codes_name(role: str) -> str:
    """Name of the buffer that holds the codes of a weight."""
    return role + CODES


def scale_name(role: str) -> str:
    """Name of the buffer that holds the scale of a weight, an input or the output."""
    return f"{role}_scale"


def weight_key(layer: str, role: str) -> str:
    """What a weight of a layer is called in comparisons: the only one goes by the layer's name."""
    return layer if role == WEIGHT else f"{layer}.{role}" if layer else role


@dataclass(frozen=True)
class FrozenTensor:
    """What is fixed about one quantized tensor of a frozen layer, apart from its numbers.

    Attributes:
        spec: The specification it was trained with.
        fmt: Its number format.
        granularity: Which elements share a scale.
        read_by: Names of modules that read a weight without calling its layer.
    """

    spec: TensorSpec
    fmt: Format
    granularity: Granularity
    read_by: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantizer: FakeQuantizer) -> FrozenTensor:
        """The fixed part of a quantizer."""
        read_by = quantizer.read_by if isinstance(quantizer, WeightFakeQuantizer) else ()
        return cls(quantizer.spec, quantizer.fmt, quantizer.granularity, read_by)


class FrozenLayer(nn.Module):
    """A layer whose weights consist of codes; inputs and output are rounded with constant scales.

    It stands before the layer's own class in a class made by `freeze`. Reading a weight dequantizes
    its codes, so the layer's own forward, whatever it does, needs no change.

    In its buffers, for each role (`weight`, `input`, `output`, or the name in torch of one of
    several weights or inputs): `{role}_codes`, uint8, in the shape of the weight, see
    `Format.encode`; `{role}_scale`, float32, in the shape of its granularity.

    Attributes:
        frozen_weights: Weights that consist of codes, by role.
        frozen_activations: Inputs that are rounded, results of functions that the forward calls,
            and the output, by role.
        weight_dtype: The model's own precision, in which weights are read.
    """

    kind: LayerKind
    input_names: InputNames
    statqat_gate: Callable[[Tensor], Tensor]
    frozen_weights: dict[str, FrozenTensor]
    frozen_activations: dict[str, FrozenTensor]
    weight_dtype: torch.dtype

    def read_weight(self, role: str) -> Tensor:
        """A weight in the model's own precision."""
        if role in self.frozen_weights:
            return self.dequantized_weight(role)
        parameter = self._parameters.get(role)
        assert parameter is not None, "supported layers have their weights"
        return parameter

    def dequantized_weight(self, role: str) -> Tensor:
        """Codes times scale, as fake quantization computes it."""
        tensor = self.frozen_weights[role]
        wide = torch.float64 if self.weight_dtype == torch.float64 else torch.float32
        values = tensor.fmt.decode(self.get_buffer(codes_name(role))).to(wide)
        qparams = QParams(self.get_buffer(scale_name(role)), None, tensor.granularity)
        return dequantize(values, qparams).to(self.weight_dtype)

    def rounded(self, role: str, x: Tensor) -> Tensor:
        """`x` on the grid of an input or the output, as fake quantization computes it."""
        tensor = self.frozen_activations[role]
        qparams = QParams(self.get_buffer(scale_name(role)), None, tensor.granularity)
        return dequantize(quantize(x, qparams, tensor.fmt), qparams).to(x.dtype)

    def _rounding(self, role: str) -> Callable[[Tensor], Tensor] | None:
        if role not in self.frozen_activations:
            return None
        return lambda x: self.rounded(role, x) if x.is_floating_point() else x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the rounded inputs."""
        result: Any
        if self.kind.cls is nn.MultiheadAttention:
            result = self._attend(*args, **kwargs)
        elif GATE in self.frozen_activations:
            result = self._gated(*args, **kwargs)
        else:
            args, kwargs = with_each_input(self.input_names, self._rounding, args, kwargs)
            if self.kind.cls in RECURRENT:
                with in_turn(self):
                    result = self._recur(*args, **kwargs)
            else:
                result = self._called(*args, **kwargs)
        return with_output(self._rounding(OUTPUT), result)

    def _recur(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a recurrent layer, which reads its weights from a list."""
        names: Any = self._flat_weights_names
        self.__dict__["_flat_weights"] = [getattr(self, name) for name in names]
        try:
            return self._called(*args, **kwargs)
        finally:
            self._forget_flat_weights()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, in which results of functions are rounded."""
        results = {
            role: rounding
            for role in self.frozen_activations
            if is_result(role) and (rounding := self._rounding(role)) is not None
        }
        if not results:
            return super().forward(*args, **kwargs)
        with FunctionResults(self, results):
            return super().forward(*args, **kwargs)

    def _gated(self, input: Tensor) -> Tensor:  # named as in torch
        rounding = self._rounding(INPUT)
        x = input if rounding is None else rounding(input)
        return x * self.rounded(GATE, self.statqat_gate(x))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        inputs = each_input(self._rounding, query, key, value)
        return attend(self, *inputs, lambda name: getattr(self, name), *args, **kwargs)

    def _forget_flat_weights(self) -> None:
        """Drop the list of weights that recurrent layers keep: it holds them in float."""
        if "_flat_weights" in self.__dict__:
            self.__dict__["_flat_weights"] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        roles = [*self.frozen_weights, *self.frozen_activations]
        scales = {scale_name(role): self.get_buffer(scale_name(role)) for role in roles}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Scales stay float32 in any precision; the weight's precision is what the codes turn into.
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(self.get_buffer(name).device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._forget_flat_weights()
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy find it by the class it was made from.
        made_from = type(self).__bases__[1], tuple(self.kind.weights(self))
        return _rebuild, made_from, super().__reduce_ex__(protocol)[2]


def frozen_class(base: type[nn.Module], weights: tuple[str, ...]) -> type[nn.Module]:
    """`base` with frozen behaviour in front; made once for each class and its names of weights."""
    key = base, weights
    if key not in _CLASSES:
        _CLASSES[key] = type(
            f"Frozen{base.__name__}",
            (FrozenLayer, base),
            {
                "__module__": __name__,
                "__doc__": f"Frozen `{base.__name__}`.",
                "kind": kind_of_class(base),
                "input_names": names_of_inputs(base),
                "statqat_gate": staticmethod(gate_of_class(base) or torch.ones_like),
                **{role: property(_reader(role)) for role in weights},
            },
        )
    return _CLASSES[key]


def _reader(role: str) -> Callable[[FrozenLayer], Tensor]:
    return lambda layer: layer.read_weight(role)


def _rebuild(base: type[nn.Module], weights: tuple[str, ...]) -> nn.Module:
    """An empty instance of the frozen class of `base`, for pickle and deepcopy."""
    cls = frozen_class(base, weights)
    return cls.__new__(cls)
