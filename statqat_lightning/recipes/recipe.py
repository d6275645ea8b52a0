"""Which layers get what: ordered rules, as data that YAML can hold."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import yaml
from torch import nn

from statqat_lightning._tables import html_table
from statqat_lightning._words import did_you_mean
from statqat_lightning.fake_quant.tensor_spec import TensorSpec as TensorSpec
from statqat_lightning.formats import IntFormat, at_least_bits, get_format, unsigned
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import KINDS

ROLES = ("weights", "inputs", "outputs", "gates")

Results = tuple[tuple[str, TensorSpec], ...]
"""Specifications of results of functions, by name."""

Default = Literal["default"]
DEFAULT: Final = "default"
"""Stands for an argument that nobody gave: what it means depends on what comes beside it."""


def activation_spec(spec: str | TensorSpec | None, role: str) -> TensorSpec | None:
    """A specification for inputs or outputs.

    The plain name of a signed integer format stands for its width: unsigned where nothing is
    negative. So does that of a float of at most 4 bits, which gets a zero point there; wider ones,
    which gain nothing by one in training, have it only where they are widened from such a name.
    """
    if not isinstance(spec, str):
        return _checked(role, spec)
    fmt = get_format(spec)
    adapts = unsigned(fmt) is not None and (isinstance(fmt, IntFormat) or fmt.bits <= 4)
    return TensorSpec(spec, unsigned_if_nonnegative=adapts)


def weight_spec(spec: str | TensorSpec | None) -> TensorSpec | None:
    """A specification for weights: a plain name stands for that format."""
    return TensorSpec(spec) if isinstance(spec, str) else _checked("weights", spec)


def _checked(role: str, spec: Any) -> TensorSpec | None:
    if spec is None or isinstance(spec, TensorSpec):
        return spec
    raise TypeError(f"{role}: got {spec!r}; expected a format name, a TensorSpec or None.")


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
            unsigned where the data is non-negative; plain FP4 gets a zero point there.
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
    """

    pattern: str
    weights: TensorSpec | str | None = None
    inputs: TensorSpec | str | None = None
    outputs: TensorSpec | str | None = None
    gates: TensorSpec | str | None = None
    results: Mapping[str, TensorSpec | str] | Results = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", weight_spec(self.weights))
        object.__setattr__(self, "inputs", activation_spec(self.inputs, "inputs"))
        object.__setattr__(self, "outputs", activation_spec(self.outputs, "outputs"))
        object.__setattr__(self, "gates", activation_spec(self.gates, "gates"))
        if self.pattern.startswith("position:") and self.pattern not in (
            "position:first",
            "position:last",
        ):
            raise ValueError(
                f"QuantRule: got pattern {self.pattern!r}; "
                "expected position:first or position:last."
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ValueError(f"QuantRule: got pattern {self.pattern!r}: {error}.") from error
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
            return self.pattern[5:] in (cls.__name__ for cls in _own_types(module))
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        entries: dict[str, Any] = {"pattern": self.pattern}
        for role in ROLES:
            spec = getattr(self, role)
            if spec is not None:
                entries[role] = spec.to_dict()
        if self.results:
            entries["results"] = {name: spec.to_dict() for name, spec in self.by_result.items()}
        return entries

    def __repr__(self) -> str:
        arguments = [repr(self.pattern)]
        arguments += [f"{role}={given!r}" for role, given in self._given().items()]
        return f"QuantRule({', '.join(arguments)})"

    def _repr_html_(self) -> str:
        return html_table(_cells([self]))

    def _given(self) -> dict[str, Any]:
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


def _cells(rules: Sequence[QuantRule]) -> list[tuple[str, ...]]:
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
        return ", ".join([name, *(f"{key}={value}" for key, value in entries.items())])
    if given is None:
        return "float"
    return "; ".join(f"{name}: {_in_words(spec)}" for name, spec in given)


def full_name(name: str) -> str:
    """The pattern that matches the layer of a name and no other."""
    return f"re:{re.escape(name)}" if any(sign in name for sign in "*?[:") else name


def _check_role(role: str, spec: TensorSpec | str | None) -> None:
    if spec is None:
        return
    assert isinstance(spec, TensorSpec)
    if role != "weights" and spec.granularity not in (None, "per_tensor"):
        raise ValueError(
            f"QuantRule: got granularity {spec.granularity!r} for {role}; expected per_tensor: "
            "a scale that differs along the summed dimension cannot leave an integer product."
        )
    for option in ("max_value", "shared", "unsigned_if_nonnegative"):
        if role == "weights" and getattr(spec, option) not in (None, False):
            raise ValueError(
                f"QuantRule: got {option} for weights; expected it for inputs and outputs only."
            )


@dataclass(frozen=True)
class QuantRecipe:
    """Ordered rules: the first match wins, and a layer that no rule matches stays in float.

    Args:
        rules: The rules.
    """

    rules: Sequence[QuantRule] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise ValueError("QuantRecipe: got no rules; expected at least one.")

    def __repr__(self) -> str:
        rules = [*map(repr, self.rules)]
        if len(rules) == 1:
            return f"QuantRecipe([{rules[0]}])"
        return "\n".join(["QuantRecipe([", *(f"    {rule}," for rule in rules), "])"])

    def _repr_html_(self) -> str:
        return html_table(_cells(self.rules), below=["The first rule that matches a layer counts."])

    @classmethod
    def default(
        cls,
        weights: str | TensorSpec | None = DEFAULT,
        activations: str | TensorSpec | None = DEFAULT,
        exclude: Sequence[str] = (),
        first_last_bits: int | Default | None = DEFAULT,
    ) -> QuantRecipe:
        """One specification for all layers; the first and the last get at least `first_last_bits`.

        Args:
            weights: Format or specification of every weight, int8 by default; None leaves weights
                in float.
            activations: Format or specification of every input, likewise.
            exclude: Patterns of layers that stay in float.
            first_last_bits: Least width of the first and last layer, 8 by default; None treats them
                like the others.
        """
        _check_exclude(exclude)
        weights = "int8" if weights == DEFAULT else weights
        activations = "int8" if activations == DEFAULT else activations
        if isinstance(first_last_bits, str):
            if first_last_bits != DEFAULT:
                raise ValueError(
                    f"first_last_bits: got {first_last_bits!r}; expected a number of bits, None or "
                    f"{DEFAULT!r}.{did_you_mean(first_last_bits, [DEFAULT])}"
                )
            first_last_bits = 8
        if weights is None and activations is None:
            raise ValueError("got weights=None and activations=None; expected at least one format.")
        weight, inputs = weight_spec(weights), activation_spec(activations, "activations")
        rules = [QuantRule(pattern) for pattern in exclude]
        if first_last_bits is not None:
            wide = [
                spec and spec.with_format(at_least_bits(get_format(spec.format), first_last_bits))
                for spec in (weight, inputs)
            ]
            if wide != [weight, inputs]:
                rules += [
                    QuantRule(f"position:{place}", wide[0], wide[1]) for place in ("first", "last")
                ]
        return cls([*rules, QuantRule("*", weight, inputs)])

    @classmethod
    def choose(
        cls,
        recipe: QuantRecipe | str | Path | None = None,
        weights: str | TensorSpec | None = DEFAULT,
        activations: str | TensorSpec | None = DEFAULT,
        exclude: Sequence[str] = (),
        first_last_bits: int | Default | None = DEFAULT,
    ) -> QuantRecipe:
        """The recipe that a caller gave, or the default one from the arguments beside it.

        Args:
            recipe: A recipe, the path of one in YAML, or None for `QuantRecipe.default`.
            weights: See `default`; like the others only where no recipe is given.
            activations: Likewise.
            exclude: Likewise.
            first_last_bits: Likewise.

        Raises:
            ValueError: If a recipe comes beside arguments that it would silently replace, be they
                those that would be the default.
        """
        _check_exclude(exclude)
        if recipe is None:
            return cls.default(weights, activations, exclude, first_last_bits)
        if not isinstance(recipe, (QuantRecipe, str, Path)):
            raise TypeError(f"recipe: got {recipe!r}; expected a QuantRecipe or the path of one.")
        given = {
            "weights": (weights, DEFAULT),
            "activations": (activations, DEFAULT),
            "exclude": (list(exclude), []),
            "first_last_bits": (first_last_bits, DEFAULT),
        }
        if void := [f"{name}={v!r}" for name, (v, default) in given.items() if v != default]:
            raise ValueError(
                f"got {', '.join(void)} beside recipe=...; the recipe alone says what layers get. "
                "Put them into its rules, or leave out the recipe."
            )
        return recipe if isinstance(recipe, QuantRecipe) else cls.from_yaml(recipe)

    def assign(
        self,
        layers: Mapping[str, nn.Module],
        others: Mapping[str, nn.Module] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, QuantRule | None]:
        """The rule of each layer, None where no rule matches.

        Args:
            layers: Layers whose weights can be quantized, by name, in the order in which the model
                registers them.
            others: All other modules, for rules that quantize no weights; they are in the result
                only if one matches.
            aliases: Further names of modules that have several, by the first; a rule that matches
                one of them matches the module.

        Raises:
            ValueError: If a rule matches no layer at all, or none that an earlier rule has not
                taken; the message names near misses and the layers there are.
        """
        ordered = [name for name, module in layers.items() if not _by_request(module)]
        positions = {name: position for position, name in enumerate(ordered)}
        matched: dict[QuantRule, list[QuantRule]] = {rule: [] for rule in self.rules}
        assigned: dict[str, QuantRule | None] = dict.fromkeys(layers)
        for name, module in [*layers.items(), *(others or {}).items()]:
            names = [name, *(aliases or {}).get(name, ())]
            for rule in self.rules:
                if name in layers:
                    means_it = not _by_request(module) or any(map(rule.names, names))
                else:
                    means_it = any(map(rule.suits_any_module, names))
                position = positions.get(name, -1)
                if means_it and any(
                    rule.matches(own, module, position, len(ordered)) for own in names
                ):
                    if assigned.get(name) is None:
                        assigned[name] = rule
                    taken_by = assigned[name]
                    assert taken_by is not None
                    matched[rule].append(taken_by)
        unused = [rule.pattern for rule, takers in matched.items() if not takers]
        if unused:
            types = {f"type:{_own_types(module)[0].__name__}" for module in layers.values()}
            others_names = [own for found in (aliases or {}).values() for own in found]
            near = difflib.get_close_matches(unused[0], [*layers, *others_names, *types], n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"Patterns {unused} matched no layer.{hint} Fix or drop them. "
                f"Layers: {', '.join(layers)}."
            )
        for rule, takers in matched.items():
            _refuse_shadowed(rule, takers)
        return assigned

    def to_dict(self) -> dict[str, Any]:
        """Plain data: lists, dicts, strings and numbers."""
        return {"rules": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantRecipe:
        """The recipe of `to_dict`'s data.

        Raises:
            ValueError: If an entry is missing or unknown.
        """
        _expect_keys("recipe", data, {"rules"}, required={"rules"})
        if not isinstance(data["rules"], Sequence) or isinstance(data["rules"], str):
            raise ValueError(f"recipe: got rules={data['rules']!r}; expected a list of rules.")
        rules = []
        for number, entry in enumerate(data["rules"]):
            known = {"pattern", *ROLES, "results"}
            _expect_keys(f"rule {number}", entry, known, required={"pattern"})
            specs = {role: _spec_from(f"rule {number}, {role}", entry.get(role)) for role in ROLES}
            results = entry.get("results") or {}
            if not isinstance(results, Mapping):
                raise ValueError(
                    f"rule {number}, results: got {results!r}; expected formats by name, as in "
                    "{add: int8}."
                )
            named: Any = {n: _spec_from(f"rule {number}, {n}", s) for n, s in results.items()}
            rules.append(QuantRule(entry["pattern"], **specs, results=named))
        return cls(rules)

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe to a YAML file."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> QuantRecipe:
        """Read a recipe from a YAML file.

        Raises:
            ValueError: If the file does not hold a recipe; the message names the file.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls.from_dict(yaml.safe_load(text))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error


def _refuse_shadowed(rule: QuantRule, taken_by: Sequence[QuantRule]) -> None:
    """Refuse a rule all of whose layers an earlier rule has taken, to give them something else.

    A catch-all is for what is left, and that may be nothing; so may be the layer at a position.
    """
    means_the_rest = rule.pattern == "*" or rule.pattern.startswith("position:")
    roles = (*ROLES, "results")
    if means_the_rest or any(all(_same(rule, t, role) for role in roles) for t in taken_by):
        return
    earlier = ", ".join(dict.fromkeys(repr(t.pattern) for t in taken_by))
    raise ValueError(
        f"Pattern {rule.pattern!r} matches only layers that an earlier rule has taken: {earlier}. "
        "The first match wins; put the rule for fewer layers first, or drop it."
    )


def _same(rule: QuantRule, other: QuantRule, role: str) -> bool:
    return bool(getattr(rule, role) == getattr(other, role))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two recipes as plain data: lines in YAML, marked `-` and `+`."""
    before, after = (
        yaml.safe_dump(dict(recipe), sort_keys=False).splitlines() for recipe in (old, new)
    )
    return "\n".join(difflib.unified_diff(before, after, lineterm="", n=1))


def _check_exclude(exclude: Sequence[str]) -> None:
    if isinstance(exclude, str):
        raise TypeError(f"exclude: got {exclude!r}; expected a list of patterns: [{exclude!r}].")


def _by_request(module: nn.Module) -> bool:
    """Whether only rules that mean a layer may give it quantizers."""
    return next((kind.opt_in for kind in KINDS if isinstance(module, kind.cls)), False)


def _own_types(module: nn.Module) -> list[type]:
    """The classes of a layer, without the one that insertion gives it."""
    return [cls for cls in type(module).__mro__ if not hasattr(cls, "_statqat_base")]


def _spec_from(where: str, entry: Any) -> TensorSpec | str | None:
    if isinstance(entry, Mapping):
        if "format" not in entry:
            raise ValueError(f"{where}: got {dict(entry)!r}; expected an entry 'format'.")
        try:
            return TensorSpec(**entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    if entry is None or isinstance(entry, str):
        return entry
    raise ValueError(f"{where}: got {entry!r}; expected a format name or a mapping.")


def _expect_keys(where: str, data: Any, known: set[str], required: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: got {data!r}; expected a mapping with {sorted(known)}.")
    if unknown := set(data) - known:
        raise ValueError(
            f"{where}: got unknown entries {sorted(unknown)}; expected {sorted(known)}."
        )
    if missing := required - set(data):
        raise ValueError(f"{where}: entries {sorted(missing)} are missing.")
