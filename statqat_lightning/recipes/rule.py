"""One rule of a recipe: which layers it matches, and what their tensors get."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from statqat_lightning._tables import html_table
from statqat_lightning._words import short
from statqat_lightning.fake_quant.tensor_spec import TensorSpec as TensorSpec
from statqat_lightning.formats import BlockFormat, IntFormat, get_format, unsigned
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import KINDS

ROLES = ("weights", "inputs", "outputs", "gates")
Results = tuple[tuple[str, TensorSpec], ...]
"""Specifications of results of functions, by name."""


def activation_spec(spec: str | TensorSpec | None, role: str) -> TensorSpec | None:
    """A specification for inputs or outputs.

    The plain name of a signed integer format stands for its width: unsigned where nothing is
    negative, and with a zero point where the data is skewed. So does that of a float of at most 4
    bits, which gets a zero point where nothing is negative; wider ones, which gain nothing by one
    in training, have it only where they are widened from such a name.
    """
    if not isinstance(spec, str):
        return _checked(role, spec)
    try:
        fmt = get_format(spec)
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error
    adapts = unsigned(fmt) is not None and (isinstance(fmt, IntFormat) or fmt.bits <= 4)
    skewed = isinstance(fmt, IntFormat) and fmt.signed
    return _checked(role, TensorSpec(spec, unsigned_if_nonnegative=adapts, zero_point=skewed))


def weight_spec(spec: str | TensorSpec | None) -> TensorSpec | None:
    """A specification for weights: a plain name stands for that format."""
    return TensorSpec(spec) if isinstance(spec, str) else _checked("weights", spec)


def _checked(role: str, spec: Any) -> TensorSpec | None:
    if spec is None:
        return None
    if not isinstance(spec, TensorSpec):
        raise TypeError(f"{role}: got {short(spec)}; expected a format name, a TensorSpec or None.")
    if role != "weights":
        fmt = get_format(spec.format)
        if isinstance(fmt, BlockFormat):
            raise ValueError(
                f"{role}: got {fmt.name!r}. Block formats are for weights: they need a scale for "
                "each block of values, and inputs and outputs have one for the tensor. Use "
                f"{fmt.element.name!r}, the format of its elements, or None for float."
            )
    return spec


@dataclass(frozen=True)
class QuantRule:
    r"""What the layers that a pattern matches get.

    Args:
        pattern: A glob over layer names (`backbone.*`), a regular expression (`re:layer[12]\..*`),
            a layer type or one of its base classes (`type:Conv2d`), or a position among the layers
            that can be quantized (`position:first`, `position:last`). Embeddings are matched only
            by a rule for their type or with their full name.
        weights: Specification of the weights, a format name, or None for float.
        inputs: Specification of the inputs, likewise. A plain integer name means that width,
            unsigned where the data is non-negative, and with a zero point where it is skewed; plain
            FP4 gets a zero point where it is non-negative.
        outputs: Specification of the output, likewise. A rule with nothing else matches any module
            that it describes, with weights or not: `QuantRule("type:BatchNorm2d", outputs="int8")`.
            One with inputs, too, matches modules without weights by their full name only: what is
            quantized there is the first argument of their forward.
        gates: Specification of what an activation multiplies its input with, likewise: the sigmoid
            of `nn.SiLU`. Some runtimes compute such activations in integers only if it is rounded.
        results: Specifications of results of functions that a module's own forward calls, by name:
            `{"add": "int8", "cat_1": "int8"}` for the first sum and the second concatenation in it.
            Those of a child that runs several times are `relu_call`, `relu_call_1` and so on. A
            rule with these alone matches modules by their full name or their type.
        optional: Whether it may match no layer, or only layers that an earlier rule has taken. That
            is an error otherwise, because it is how a misspelt pattern shows.

    Attributes:
        source: File and line that it was read from; empty for others.
    """

    pattern: str
    weights: TensorSpec | str | None = None
    inputs: TensorSpec | str | None = None
    outputs: TensorSpec | str | None = None
    gates: TensorSpec | str | None = None
    results: Mapping[str, TensorSpec | str] | Results = ()
    optional: bool = False
    source: str = field(default="", init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_types(self.pattern, self.optional)
        object.__setattr__(self, "weights", weight_spec(self.weights))
        object.__setattr__(self, "inputs", activation_spec(self.inputs, "inputs"))
        object.__setattr__(self, "outputs", activation_spec(self.outputs, "outputs"))
        object.__setattr__(self, "gates", activation_spec(self.gates, "gates"))
        if self.pattern.startswith("position:") and self.pattern not in (
            "position:first",
            "position:last",
        ):
            raise ValueError(
                f"QuantRule: got pattern {short(self.pattern)}; "
                "expected position:first or position:last."
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"QuantRule: got pattern {short(self.pattern)}: {error}."
                ) from error
        object.__setattr__(self, "results", _results_of(self.results))
        for role in ROLES:
            _check_role(role, getattr(self, role))
        for name, spec in self.by_result.items():
            _check_role(f"results, {name}", spec)
        if self.only_outputs and self.pattern == "*":
            raise ValueError(
                "QuantRule: got pattern '*' with outputs alone, which would round the output of "
                "every module; expected a type or names."
            )

    @property
    def quantizes(self) -> bool:
        """Whether there is anything that the layers get."""
        return bool(self.results) or any(getattr(self, role) is not None for role in ROLES)

    @property
    def by_result(self) -> dict[str, TensorSpec]:
        """Specifications of results of functions, by name."""
        return dict(cast(Results, self.results))

    @property
    def only_outputs(self) -> bool:
        """Whether outputs are all that is quantized."""
        others = self.weights is not None or self.inputs is not None or bool(self.results)
        return self.outputs is not None and not others

    def matches(self, name: str, module: nn.Module, position: int, num_layers: int) -> bool:
        """Whether the pattern matches a layer at `position` among `num_layers` candidates."""
        if self.pattern == "position:first":
            return position == 0
        if self.pattern == "position:last":
            return position == num_layers - 1
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        if self.pattern.startswith("type:"):
            return self.pattern[5:] in (cls.__name__ for cls in own_types(module))
        return fnmatch.fnmatchcase(name, self.pattern)

    def names(self, name: str) -> bool:
        """Whether the pattern is one of types, or the full name of a layer."""
        return self.pattern.startswith("type:") or self._is_full(name)

    def _is_full(self, name: str) -> bool:
        return self.pattern in (name, f"re:{re.escape(name)}")

    def suits_any_module(self, name: str) -> bool:
        """Whether it may give quantizers to the module of a name that has no weights."""
        if self.weights is not None or not self.quantizes:
            return False
        only_results = bool(self.results) and self.inputs is None
        return self.only_outputs or self._is_full(name) or (only_results and self.names(name))

    def around_zero(self) -> QuantRule:
        """The same rule without zero points that data chooses."""
        specs = {role: _around_zero(getattr(self, role)) for role in ROLES}
        results = tuple((name, _around_zero(spec)) for name, spec in self.by_result.items())
        rule = QuantRule(self.pattern, **specs, results=results, optional=self.optional)
        return rule.found_at(self.source)

    def taken_over(self) -> QuantRule:
        """The same rule as part of a recipe that extends its own: it need not match a layer."""
        is_never_unused = self.pattern == "*" or self.pattern.startswith("position:")
        return replace(self, optional=not is_never_unused).found_at(self.source)

    def found_at(self, source: str) -> QuantRule:
        """The same rule with another `source`, such as `recipe.yaml:7`."""
        rule = replace(self)
        object.__setattr__(rule, "source", source.rstrip(": "))
        return rule

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        entries: dict[str, Any] = {"pattern": self.pattern}
        for role in ROLES:
            spec = getattr(self, role)
            if spec is not None:
                entries[role] = spec.to_dict()
        if self.results:
            entries["results"] = {name: spec.to_dict() for name, spec in self.by_result.items()}
        if self.optional:
            entries["optional"] = True
        return entries

    def __repr__(self) -> str:
        arguments = [repr(self.pattern)]
        arguments += [f"{role}={given!r}" for role, given in self.given().items()]
        arguments += ["optional=True"] * self.optional
        return f"QuantRule({', '.join(arguments)})"

    def _repr_html_(self) -> str:
        return html_table(rule_cells([self]))

    def given(self) -> dict[str, Any]:
        """What there is for each role and for results, the plain name of a format where one does.

        Plain names mean another thing for inputs than for weights.
        """
        specs = {role: getattr(self, role) for role in ROLES}
        found = {role: _named(role, spec) for role, spec in specs.items() if spec is not None}
        results = {name: _named("results", spec) for name, spec in self.by_result.items()}
        return found | ({"results": results} if results else {})


def _results_of(results: Any) -> Results:
    """Specifications of results of functions, in a form that can be hashed."""
    if not isinstance(results, (Mapping, tuple)):
        raise TypeError(
            f"results: got {results!r}; expected formats by name, as in {{'add': 'int8'}}."
        )
    pairs = results.items() if isinstance(results, Mapping) else results
    found = []
    for name, given in pairs:
        if not is_result(name):
            raise ValueError(
                f"QuantRule: got {name!r} in results; expected the name of a function and its "
                "number, such as 'add' or 'add_1'."
            )
        spec = activation_spec(given, f"results, {name}")
        if spec is None:
            raise ValueError(f"QuantRule: got None for {name!r} in results; leave it out instead.")
        found.append((name, spec))
    return tuple(found)


def _named(role: str, spec: TensorSpec) -> str | TensorSpec:
    """The name of the format, if it alone stands for the specification; else that."""
    name = spec.format
    plain = weight_spec(name) if role == "weights" else activation_spec(name, role)
    return name if plain == spec else spec


def rule_cells(rules: Sequence[QuantRule]) -> list[tuple[str, ...]]:
    """Rules as rows of texts, with columns for what any of them has."""
    always = ("weights", "inputs")
    columns = [c for c in (*ROLES, "results") if c in always or any(getattr(r, c) for r in rules)]
    rows = [
        (rule.pattern, *(_in_words(getattr(rule, column)) for column in columns)) for rule in rules
    ]
    return [("layers", *columns), *rows]


def _in_words(given: TensorSpec | Results | None) -> str:
    if isinstance(given, TensorSpec):
        entries = given.to_dict()
        name = str(entries.pop("format"))
        if entries.pop("unsigned_if_nonnegative", False):
            name = f"{name} or {unsigned(get_format(name))}"
        if entries.pop("zero_point", False):
            name = f"{name}, zero point"
        return ", ".join([name, *(f"{key}={value}" for key, value in entries.items())])
    if given is None:
        return "float"
    return "; ".join(f"{name}: {_in_words(spec)}" for name, spec in given)


def _around_zero(spec: Any) -> Any:
    has_zero_point = isinstance(spec, TensorSpec) and spec.zero_point
    return replace(spec, zero_point=False) if has_zero_point else spec


def full_name(name: str) -> str:
    """The pattern that matches the layer of a name and no other."""
    return f"re:{re.escape(name)}" if any(sign in name for sign in "*?[:") else name


def _check_types(pattern: Any, optional: Any) -> None:
    if not isinstance(pattern, str):
        number = isinstance(pattern, int) and not isinstance(pattern, bool)
        hint = f" The layer of that name is {str(pattern)!r}." if number else ""
        raise TypeError(
            f"QuantRule: got pattern {short(pattern)}; expected a text in quotes, such as "
            f"'layer1.*'.{hint}"
        )
    if not isinstance(optional, bool):
        raise TypeError(f"QuantRule: got optional={short(optional)}; expected True or False.")


def _check_role(role: str, spec: TensorSpec | str | None) -> None:
    if spec is None:
        return
    assert isinstance(spec, TensorSpec)
    if role != "weights" and spec.granularity not in (None, "per_tensor"):
        raise ValueError(
            f"QuantRule: got granularity {spec.granularity!r} for {role}; expected per_tensor: "
            "a scale that differs along the summed dimension cannot leave an integer product."
        )
    fmt = get_format(spec.format)
    if role == "weights" and isinstance(fmt, IntFormat) and fmt.zero_point:
        raise ValueError(
            f"QuantRule: got format {spec.format!r} for weights; expected one around zero, as "
            f"'int{fmt.bits}': products with a zero point on both sides need sums of inputs."
        )
    for option in ("max_value", "shared", "unsigned_if_nonnegative", "zero_point"):
        if role == "weights" and getattr(spec, option) not in (None, False):
            raise ValueError(
                f"QuantRule: got {option} for weights; expected it for inputs and outputs only."
            )


def is_opt_in(module: nn.Module) -> bool:
    """Whether only rules that mean a layer may give it quantizers."""
    return next((kind.opt_in for kind in KINDS if isinstance(module, kind.cls)), False)


def own_types(module: nn.Module) -> list[type]:
    """The classes of a layer, without the one that insertion gives it."""
    return [cls for cls in type(module).__mro__ if not hasattr(cls, "_statqat_base")]
