"""Words of a fixed set: annotations name those that are accepted, messages those that are near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from statqat_lightning import (
    DistillationCallback,
    ExportCallback,
    QuantRecipe,
    QuantSchedule,
    StatQATCallback,
    TensorSpec,
    fake_quantize,
    get_format,
    prepare,
)
from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import BlockFormat, FloatFormat
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.quantizers import Block
from statqat_lightning.targets.registry import TARGETS, check_target

ONE = QParams(torch.tensor(1.0))
E2M1 = FloatFormat(2, 1)

# What is annotated, its parameter, and a call with a word for that.
CALLS: list[tuple[Callable[..., Any], str, Callable[[Any], Any]]] = [
    (fake_quantize, "gradient", lambda w: fake_quantize(torch.ones(2), ONE, get_format("int4"), w)),
    (TensorSpec.__init__, "gradient", lambda w: TensorSpec("int4", gradient=w)),
    (TensorSpec.__init__, "objective", lambda w: TensorSpec("int4", objective=w)),
    (QuantSchedule, "batch_norm", lambda w: QuantSchedule(batch_norm=w)),
    (Block.__init__, "rule", lambda w: Block(w)),
    (BlockFormat, "scale_format", lambda w: BlockFormat("mine", E2M1, 32, w)),
    (QuantRecipe.default, "first_last_bits", lambda w: QuantRecipe.default(first_last_bits=w)),
    (StatQATCallback.__init__, "first_last_bits", lambda w: StatQATCallback(first_last_bits=w)),
    (prepare, "first_last_bits", lambda w: prepare(nn.Linear(2, 2), first_last_bits=w)),
    (DistillationCallback.__init__, "loss", lambda w: DistillationCallback(loss=w)),
    (DistillationCallback.__init__, "temperature", lambda w: DistillationCallback(temperature=w)),
    (ExportCallback.__init__, "data", lambda w: ExportCallback("m", data=w)),
    (ExportCallback.__init__, "files", lambda w: ExportCallback("m", files=[w])),
]


def words_in(annotation: Any) -> Iterator[str]:
    """The words of every `Literal` in an annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from words_in(argument)


@pytest.mark.parametrize(("annotated", "parameter", "call"), CALLS)
def test_the_annotated_words_are_those_that_are_accepted(
    annotated: Callable[..., Any], parameter: str, call: Callable[[Any], Any]
) -> None:
    words = [*words_in(get_type_hints(annotated)[parameter])]
    assert words
    for word in words:
        call(word)
        with pytest.raises(ValueError, match=f"Did you mean '{word}'") as caught:
            call(f"{word}_")
        assert parameter in str(caught.value)
        assert all(other in str(caught.value) for other in words)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_nearly_one(target: str) -> None:
    assert check_target(target) == target
    with pytest.raises(ValueError, match=rf"executorch\. Did you mean '{target}'\?$"):
        check_target(f"{target}_")


def test_near_words() -> None:
    assert did_you_mean("freze", ["train", "freeze"]) == " Did you mean 'freeze'?"
    assert did_you_mean("int44", ["int4", "uint4", "nf4"]) == " Did you mean 'int4'?"
    assert did_you_mean("int44", ["int4", "uint4", "x"], 2) == " Did you mean 'int4' or 'uint4'?"
    assert did_you_mean("zzz", ["train"]) == did_you_mean(None, []) == ""
