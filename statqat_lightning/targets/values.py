"""Questions to the values of a recorded run that placement asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from statqat_lightning.formats import IntFormat, get_format
from statqat_lightning.model.dataflow import KEEPING, NORMS, OUTPUT_KIND, Operation, Value
from statqat_lightning.recipes.recipe import TensorSpec
from statqat_lightning.targets.base import LARGEST, Target


def end_of_fused(value: Value, target: Target) -> Value:
    """What the runtime computes together: BatchNorm and ReLU behind a layer are part of it."""
    for kinds in (NORMS, target.fused):
        reader = only_reader(value)
        while target.sums_in_float and reader is not None and scales_channels(reader):
            value = reader.outputs[0]
            reader = only_reader(value)
        if reader is not None and reader.kind in kinds:
            value = reader.outputs[0]
    return value


def only_reader(value: Value) -> Operation | None:
    """The operation that reads a value, if a single one does."""
    return value.consumers[0] if len(value.consumers) == 1 else None


def variable_terms(operation: Operation) -> list[Value]:
    """What an operation reads that is not made of parameters alone."""
    return [value for value in operation.inputs if not value.constant]


def scales_channels(operation: Operation) -> bool:
    """Whether an operation is a product with parameters, such as a LayerScale."""
    return (
        operation.kind == "mul" and operation.module is None and len(variable_terms(operation)) == 1
    )


def whole_of_part(value: Value) -> Value:
    """What a value is a part of: that is rounded once, ahead of `chunk` and `split`."""
    maker = value.producer
    while maker is not None and maker.kind in KEEPING and len(maker.outputs) > 1:
        value = maker.inputs[0]
        maker = value.producer
    return value


def kept_on_grid(value: Value) -> Value | None:
    """What becomes of a value that a single operation reads, which leaves it on its grid."""
    reader = only_reader(value)
    if reader is None or reader.kind not in KEEPING:
        return None
    return reader.outputs[0] if len(reader.inputs) == len(reader.outputs) == 1 else None


def largest_possible(values: Sequence[Value]) -> float | None:
    """The largest value that all of several can have; None if there is none."""
    limits = [None if v.producer is None else LARGEST.get(v.producer.kind) for v in values]
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def all_read_inside(name: str, readers: list[Operation]) -> bool:
    """Whether all that reads a value is part of one module."""
    return all(f"{reader.name}.".startswith(f"{name}.") for reader in readers)


def is_output(value: Value) -> bool:
    """Whether a value goes nowhere but out of the model."""
    return all(o.kind == OUTPUT_KIND for o in value.consumers)


def signed(spec: TensorSpec) -> TensorSpec:
    """The same specification with codes around zero, whatever the data."""
    is_integer = isinstance(get_format(spec.format), IntFormat)
    return replace(spec, unsigned_if_nonnegative=False, zero_point=False) if is_integer else spec
