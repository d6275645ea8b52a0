"""What a runtime computes from integers and rounds to integers again, seen in one run.

Between two roundings integer kernels are exact: sums of products of codes, codes looked up in a
function's table. What `biases` and `rounding_ties` arrange for is that nothing is lost where they
begin and end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import INPUT, OUTPUT, FakeQuantizer
from statqat_lightning.formats import IntFormat
from statqat_lightning.layers.layer_kinds import GATE
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.model.dataflow import (
    CONVOLUTIONS,
    KEEPING,
    LINEARS,
    NORMS,
    Dataflow,
    Operation,
    Value,
)
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.granularity import PerChannel, PerTensor
from statqat_lightning.targets.base import CLIPPING

Place = tuple[str, str]
"""Name of a module and a role: where a quantizer may be."""
Chain = tuple[Place, ...]
"""Places that a tensor passes, in their order; the first that has a quantizer rounds it."""

MEANS = ("mean", *(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)))
MEANS += tuple(f"AdaptiveAvgPool{n}d" for n in (1, 2, 3))
_WEIGHTED = (*CONVOLUTIONS, *LINEARS)


@dataclass(frozen=True)
class IntegerKernel:
    """One step of a run whose inputs may be rounded, and whose result may be.

    Attributes:
        kind: That of the operation.
        name: Name of the module that runs it; of a function, of the one whose forward calls it.
        norm: Name of the BatchNorm that is all that reads the output of a layer, None without.
        terms: The places that each of its inputs has passed, the nearest first.
        sources: For each input the number of the step that made it, None for what is no result of
            functions alone.
        results: The places that its result passes on the way to each of its readers.
        count: Over how many values a mean is taken.
    """

    kind: str
    name: str
    norm: str | None
    terms: tuple[Chain, ...]
    sources: tuple[int | None, ...]
    results: tuple[Chain, ...]
    count: int = 1

    @property
    def has_weights(self) -> bool:
        """Whether it is a layer: sums of products of an input with weights."""
        return self.kind in _WEIGHTED

    def below(self, prefix: str) -> IntegerKernel:
        """The same in a model of which the run's is the submodule `prefix`."""

        def moved(chains: tuple[Chain, ...]) -> tuple[Chain, ...]:
            return tuple(tuple((_join(prefix, n), role) for n, role in chain) for chain in chains)

        return replace(
            self,
            name=_join(prefix, self.name),
            norm=None if self.norm is None else _join(prefix, self.norm),
            terms=moved(self.terms),
            results=moved(self.results),
        )


def integer_kernels(flow: Dataflow) -> tuple[IntegerKernel, ...]:
    """All steps of a run, in its order; layers and BatchNorms only if they ran once."""
    found: list[IntegerKernel] = []
    numbers: dict[Value, int] = {}
    for operation in flow.operations:
        if not operation.inputs or not operation.outputs:
            continue
        end, norm = operation.outputs[0], None
        terms = tuple(tuple(_passed(value, operation, flow)) for value in operation.inputs)
        if operation.kind in _WEIGHTED:
            if flow.calls[operation.name] != 1:
                continue
            readers = end.consumers
            if len(readers) == 1 and readers[0].kind in NORMS:
                if flow.calls[readers[0].name] != 1:
                    continue
                norm, end = readers[0].name, readers[0].outputs[0]
            terms = (((operation.name, INPUT), *terms[0]),)
        else:
            numbers[end] = len(found)
        found.append(
            IntegerKernel(
                operation.kind,
                operation.name,
                norm,
                terms,
                tuple(_source(value, numbers) for value in operation.inputs),
                tuple(_ahead(end, flow)),
                _count(operation) if operation.kind in MEANS else 1,
            )
        )
    return tuple(found)


def _source(value: Value, numbers: Mapping[Value, int]) -> int | None:
    maker = value.producer
    while maker is not None and maker.kind in KEEPING and len(maker.inputs) == 1:
        value = maker.inputs[0]
        maker = value.producer
    return numbers.get(value)


def _passed(value: Value, reader: Operation, flow: Dataflow) -> list[Place]:
    """What a value passes on its way to an operation, the nearest first.

    Modules that take it around the operation, all that returned it, and likewise what it is made of
    without leaving its grid.
    """
    found = [(name, INPUT) for name in reversed(value.taken_by) if _is_around(name, reader)]
    found += [(name, OUTPUT) for name in reversed(value.returned_by)]
    found += [] if value.made_in is None else [value.made_in]
    found = [(name, role) for name, role in found if flow.calls[name] == 1]
    maker = value.producer
    if maker is not None and maker.kind in KEEPING and len(maker.inputs) == 1:
        found += _passed(maker.inputs[0], maker, flow)
    return found


def _ahead(value: Value, flow: Dataflow) -> list[Chain]:
    """The places between a value and each of those that read it or keep it on its grid."""
    chains: list[Chain] = []
    for reader in value.consumers:
        own = [] if value.made_in is None else [value.made_in]
        own += [(name, OUTPUT) for name in value.returned_by]
        own += [(name, INPUT) for name in value.taken_by if _is_around(name, reader)]
        here = tuple(place for place in own if flow.calls[place[0]] == 1)
        if reader.kind in (*KEEPING, *CLIPPING) and len(reader.inputs) == 1:
            chains += [(*here, *chain) for chain in _ahead(reader.outputs[0], flow) or [()]]
        else:
            chains.append(here)
    return chains


def _is_around(name: str, operation: Operation) -> bool:
    """Whether an operation is a module, or part of it."""
    return not name or f"{operation.name}.".startswith(f"{name}.")


def _count(operation: Operation) -> int:
    """How many values each result of a mean is of; 0 if that is not the same for all."""
    before, after = operation.inputs[0].shape, operation.outputs[0].shape
    if len(before) == len(after) and any(a % b for a, b in zip(before, after, strict=True)):
        return 0
    return math.prod(before) // max(1, math.prod(after))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


class IntegerQuantizers:
    """The quantizers of a model that integer kernels have a form for.

    Signed weights with one scale for each channel at most, and inputs and outputs of 8 bits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: Mapping[str, LayerQuantizers] = {
            layer.name: layer.quantizers for layer in quantized_layers(model)
        }

    def weight(self, name: str) -> FakeQuantizer | None:
        """That of the weight of a layer."""
        layer = self._layers.get(name)
        found = None if layer is None else layer.weight
        if found is None or not isinstance(found.granularity, (PerChannel, PerTensor)):
            return None
        return found if _is_integer(found) and found.fmt.is_signed else None

    def first(self, chain: Chain) -> ActivationFakeQuantizer | None:
        """The one that rounds what passes a chain of places to 8 bits; None if another does."""
        found = self._first(chain)
        return found if found is not None and _is_integer(found) and found.fmt.bits == 8 else None

    def gate(self, kernel: IntegerKernel) -> ActivationFakeQuantizer | None:
        """That of what an activation multiplies its input with; None without."""
        return self.first(((kernel.name, GATE),))

    def rounds(self, chain: Chain) -> bool:
        """Whether anything rounds what passes a chain of places, be it to integers or not."""
        return self._first(chain) is not None

    def _first(self, chain: Chain) -> ActivationFakeQuantizer | None:
        for name, role in chain:
            layer = self._layers.get(name)
            if layer is None:
                continue
            found = layer.output if role == OUTPUT else layer.of_input(role)
            found = found or layer.results.get(role)
            if found is not None:
                return found
        return None

    def all(self, chains: tuple[Chain, ...]) -> list[ActivationFakeQuantizer]:
        """Those of several chains, each once."""
        return list(dict.fromkeys(q for chain in chains if (q := self.first(chain)) is not None))

    def products(self, kernel: IntegerKernel) -> Tensor | None:
        """Input scale times weight scale of a layer, float64 `(channels,)` or `(1,)`, or None."""
        weight, given = self.weight(kernel.name), self.first(kernel.terms[0])
        if weight is None or given is None:
            return None
        return weight.qparams.scale.double().flatten() * given.qparams.scale.double()


def _is_integer(quantizer: FakeQuantizer) -> bool:
    return isinstance(quantizer.fmt, IntFormat) and quantizer.enabled and quantizer.ready
