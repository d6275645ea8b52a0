"""What a recipe would do to a model, without a training: layers, bits, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.formats import BlockFormat
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.dataflow import Dataflow
from statqat_lightning.model.insertion import all_rules, assigned_rules, prepare, remove
from statqat_lightning.model.insertion_report import ROUNDED_BEFORE, InsertionReport
from statqat_lightning.model.isolated_copy import CannotCopy, isolated_copy
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.recording import record
from statqat_lightning.model.weight_reads import weight_reads
from statqat_lightning.recipes.comparison import rules_difference
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.placement import place_in
from statqat_lightning.targets.registry import check_target

_USUAL = {"weight": (" per_channel", " analytic")}
"""Granularity and quantizer that go without saying; those of inputs and outputs are others."""
_NEVER_RAN = {"weight": None, "input": None, "output": None, "reason": "never ran"}


@dataclass(frozen=True)
class Plan:
    """What a recipe would do to a model.

    Attributes:
        report: What each layer would get, and what would stay in float and why.
        num_weights: Elements of the weights that would be quantized.
        num_parameters: Elements of all parameters.
        code_bits: Bits of the codes of these weights, in all.
        scale_bits: Bits of their scales: 32 each, and 8 for those of block formats.
    """

    report: InsertionReport
    num_weights: int
    num_parameters: int
    code_bits: int
    scale_bits: int

    @property
    def mean_bits(self) -> float:
        """Bits of a quantized weight, without scales; 0 where none is quantized."""
        return self.code_bits / max(self.num_weights, 1)

    @property
    def bytes(self) -> float:
        """Bytes of all parameters: codes, scales, and float32 for what is not quantized."""
        left = self.num_parameters - self.num_weights
        return (self.code_bits + self.scale_bits) / 8 + 4 * left

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return 4 * self.num_parameters

    def summary(self) -> str:
        """Mean bits and bytes, a line each."""
        with_scales = (self.code_bits + self.scale_bits) / max(self.num_weights, 1)
        share = self.bytes / max(self.float_bytes, 1)
        return (
            f"quantized weights: {self.mean_bits:.2f} bits on average, {with_scales:.2f} with "
            f"scales\nall parameters: {_size(self.bytes)}, {share:.3f} of float32 "
            f"({_size(self.float_bytes)})"
        )

    def table(self) -> str:
        """All layers, a line each, and what `summary` says."""
        return "\n".join([self.report.table(), *self.report.notes, self.summary()])

    def __str__(self) -> str:
        return f"{self.report}\n{self.summary()}"

    def __repr__(self) -> str:
        return f"<Plan: {self.report.summary()}, {self.mean_bits:.2f} bits>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_() + html_table((), below=self.summary().splitlines())


def plan_recipe(
    model: nn.Module,
    recipe: QuantRecipe,
    run: Callable[[nn.Module], Any] | None = None,
    target: str | None = None,
) -> Plan:
    """What a recipe would do to a model. The model stays as it is, and nothing is trained.

    Args:
        model: Any module.
        recipe: What its layers are to get.
        run: Runs a model once: `lambda model: model(example)`. It shows which layers run, and who
            reads weights without calling their layers. It is given a copy in evaluation mode.
        target: The runtime that the model would be trained for, see `StatQATCallback`.

    Raises:
        ValueError: If a rule of the recipe fits no layer, if there is no such target, a target
            comes without a run, or the run fails.
    """
    if check_target(target) is not None and run is None:
        raise ValueError(
            f"plan_recipe: got target={target!r} without an input: what a target rounds depends on "
            "what the model computes. Give a run, or --input or --input-shape to `statqat plan`."
        )
    trial = _copy(model)
    parameters = {id(p): _count(p) for p in trial.parameters()}
    report = prepare(trial, recipe=recipe)
    idle: tuple[str, ...] = ()
    if run is not None:
        remove(trial)
        report, idle = _seen(_recorded(trial, run, target), trial, recipe, target, report)
    rules = all_rules(model, recipe).values()
    unused = [rule.pattern for rule in recipe.rules if rule.optional and rule not in rules]
    if unused:
        report = report.with_notes([f"Optional rules that no layer follows: {', '.join(unused)}."])
    num_weights, codes, scales = 0, 0, 0
    for name, module, quantizers in quantized_layers(trial):
        for role, quantizer in quantizers.weights.items():
            own = _parameters_of(module, role)
            if name in idle or not any(id(p) in parameters for p in own):
                continue  # it has another name, or another layer has it, too
            for parameter in own:
                parameters.pop(id(parameter), None)
            fmt, size = quantizer.fmt, weight_of(module, role).numel()
            num_weights += size
            codes += size * fmt.bits
            blocks = isinstance(fmt, BlockFormat)
            scales += quantizer.scale.numel() * (8 if blocks else 32)
            scales += 32 * (isinstance(fmt, BlockFormat) and fmt.has_tensor_scale)
    return Plan(report, num_weights, num_weights + sum(parameters.values()), codes, scales)


def _copy(model: nn.Module) -> nn.Module:
    """A float copy that shares the memory of parameters and buffers, in evaluation mode."""
    tensors = [*model.parameters(), *model.buffers()]
    try:
        trial = isolated_copy(model, [t for t in tensors if not nn.parameter.is_lazy(t)])
    except CannotCopy as error:
        raise ValueError(f"plan_recipe: {error}; expected one that copy.deepcopy takes.") from error
    remove(trial)
    return trial.eval()


def _recorded(trial: nn.Module, run: Callable[[nn.Module], Any], target: str | None) -> Dataflow:
    try:
        return record(trial, lambda: run(trial), operations=target is not None)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"plan_recipe: {type(trial).__name__} fails on the input: {said}. Expected an input "
            "that its forward takes."
        ) from error


def _seen(
    flow: Dataflow,
    trial: nn.Module,
    recipe: QuantRecipe,
    target: str | None,
    report: InsertionReport,
) -> tuple[InsertionReport, tuple[str, ...]]:
    """Insert what a run leaves of a recipe; the report of it, and layers that did not run."""
    reads = weight_reads(flow, trial, recipe, assigned_rules(trial, recipe))
    rows = {name: dict(row) for name, row in reads.rows.items()}
    notes: list[str] = []
    placed = reads.recipe
    if target is not None:
        placement = place_in(flow, trial, reads.recipe, target)
        placed = placement.recipe
        for name in placement.rounded_before:
            rows.setdefault(name, {})["input"] = ROUNDED_BEFORE
        notes += [f"{target}: {note}" for note in placement.left]
    rows |= dict.fromkeys(reads.idle, _NEVER_RAN)
    # A recipe of what is quantized has forgotten why all else is not.
    reasons = {row.name: {"reason": row.reason} for row in report.rows if row.reason}
    found = prepare(trial, recipe=placed)
    left = {row.name: reasons[row.name] for row in found.rows if row.reason and row.name in reasons}
    return found.updated(left).updated(rows).with_notes(notes), reads.idle


def _parameters_of(module: nn.Module, role: str) -> list[nn.Parameter]:
    """The parameter that a weight is, or those that a parametrization makes it of."""
    parameter = module._parameters.get(role)
    if parameter is not None:
        return [parameter]
    makers: Any = module._modules.get("parametrizations") or {}
    return list(makers[role].parameters()) if role in makers else []


def _count(parameter: nn.Parameter) -> int:
    return 0 if nn.parameter.is_lazy(parameter) else parameter.numel()


def _size(number: float) -> str:
    return f"{number / 1e3:,.1f} kB" if number < 1e6 else f"{number / 1e6:,.2f} MB"


class LayerChange(NamedTuple):
    """One tensor of a layer that two recipes give different formats.

    Attributes:
        layer: Its name.
        tensor: `weight`, `input` or `output`.
        first: Format, granularity and quantizer by the first recipe; `float` for none.
        second: The same by the second one.
    """

    layer: str
    tensor: str
    first: str
    second: str


@dataclass(frozen=True)
class RecipeComparison:
    """How two recipes differ.

    Attributes:
        rules: Rules that they do not have in common, as `diff -u` prints lines; empty if all are.
        layers: What they give to the layers of a model where that differs; None without a model.
    """

    rules: str
    layers: tuple[LayerChange, ...] | None = None

    @property
    def equal(self) -> bool:
        """Whether the rules are the same, in the same order."""
        return not self.rules

    def __str__(self) -> str:
        if self.equal:
            return "The recipes have the same rules."
        lines = [self.rules]
        if self.layers:
            lines += aligned([("layer", "tensor", "first", "second"), *map(_cut, self.layers)])
        elif self.layers is not None:
            lines.append("All layers of the model get the same from both.")
        return "\n".join(lines)


def compare_recipes(
    a: QuantRecipe,
    b: QuantRecipe,
    model: nn.Module | None = None,
    names: tuple[str, str] = ("first", "second"),
) -> RecipeComparison:
    """Which rules of two recipes differ, and what that changes in a model.

    Args:
        a: The first recipe.
        b: The second one.
        model: A model, for its layers; it stays as it is.
        names: What the recipes are called.

    Raises:
        ValueError: If a rule of one of them fits no layer of the model.
    """
    rules = rules_difference(a, b, names)
    if model is None:
        return RecipeComparison(rules)
    first, second = ({row.name: row for row in plan_recipe(model, r).report.rows} for r in (a, b))
    changes = []
    for name in dict.fromkeys([*first, *second]):
        for tensor in ("weight", "input", "output"):
            given = [getattr(rows.get(name), tensor, None) or "float" for rows in (first, second)]
            if given[0] != given[1]:
                changes.append(LayerChange(name, tensor, *given))
    return RecipeComparison(rules, tuple(changes))


def _cut(change: LayerChange) -> tuple[str, ...]:
    """A row of a table of 80 columns, without what goes without saying."""
    sharing, rule = _USUAL.get(change.tensor, (" per_tensor", " iterative"))
    first, second = (
        text.removesuffix(rule).removesuffix(sharing) for text in (change.first, change.second)
    )
    layer = change.layer or "(model)"
    layer = layer if len(layer) <= 22 else f"...{layer[-19:]}"
    cells = (text if len(text) <= 23 else f"{text[:20]}..." for text in (first, second))
    return (layer, change.tensor, *cells)
