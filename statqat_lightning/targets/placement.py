"""Where a runtime's integer kernels need quantizers, beside those of the layers' inputs.

What differs from runtime to runtime is in the module of each beside this one, as flags that
`places` goes by. ONNX Runtime, for one, runs a convolution in integers only if its output is
rounded to 8 bits, too, behind the BatchNorm that is folded into it and behind a ReLU; and a sum or
a product only if all its terms and its result are. So those tensors are rounded in training as
well: once each, where they are made, instead of at every layer that reads them. (Which patterns
have kernels: ONNX Runtime's QDQ selectors; measured ratios are in docs/targets.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from statqat_lightning.formats import CodebookFormat, IntFormat, get_format
from statqat_lightning.layers.module_names import modules_by_name
from statqat_lightning.model.dataflow import Dataflow
from statqat_lightning.model.insertion import assigned_rules
from statqat_lightning.model.recording import record
from statqat_lightning.model.weight_reads import weight_reads
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.base import Placement
from statqat_lightning.targets.places import Places
from statqat_lightning.targets.registry import TARGETS, check_target


def place(model: nn.Module, recipe: QuantRecipe, run: Callable[[], Any], target: str) -> Placement:
    """The recipe with quantizers where a runtime needs them.

    Layers with signed integer weights of at most 8 bits and inputs of 8 bits are placed, all
    others keep what the recipe gives them: there are no integer kernels for them. Signed tensors
    get the format `int8_full`, because -128 is where the runtime clips.

    Args:
        model: A float model.
        recipe: What its layers get.
        run: Runs the model once, on any input.
        target: The runtime, one of `TARGETS`.

    Raises:
        ValueError: If there is no such target, a layer gets a format that it cannot run, or the run
            is not one of the model.
    """
    flow = record(model, run)
    reads = weight_reads(flow, model, recipe, assigned_rules(model, recipe))
    return place_in(flow, model, reads.recipe, target)


def place_in(flow: Dataflow, model: nn.Module, recipe: QuantRecipe, target: str) -> Placement:
    """Like `place`, in a run that was recorded already, see `record`."""
    check_target(target)
    rules = assigned_rules(model, recipe)
    _refuse_formats(rules, target)
    if not any(flow.calls[name] for name in rules):
        raise ValueError(
            "place: got a run in which none of the layers that are to be quantized ran: "
            f"{', '.join(rules)}. Expected one of this very model, not of a copy: "
            "lambda: model(example)."
        )
    return Places(rules, flow, TARGETS[target], modules_by_name(model)).placement()


def _refuse_formats(rules: Mapping[str, QuantRule], target: str) -> None:
    for name, rule in rules.items():
        for role in ("inputs", "outputs"):
            spec = getattr(rule, role)
            if spec is not None and isinstance(get_format(spec.format), CodebookFormat):
                raise ValueError(
                    f"{name}: got {role}={spec.format!r}, which {target} cannot run: ONNX has no "
                    "operator that rounds to levels. Use integers or floats there, or no target: "
                    "the native and the .pt2 file hold any format."
                )
            fmt = None if spec is None else get_format(spec.format)
            signed_only = not TARGETS[target].unsigned_codes
            if signed_only and isinstance(fmt, IntFormat) and not fmt.signed:
                raise ValueError(
                    f"{name}: got {role}={spec.format!r}; {target} has signed integers only: "
                    f"use 'int{fmt.bits}'."
                )
