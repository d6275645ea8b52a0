"""Which layers get what: ordered rules, as data that YAML can hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from torch import nn

from statqat_lightning._tables import html_table
from statqat_lightning._words import did_you_mean
from statqat_lightning.fake_quant.tensor_spec import TensorSpec as TensorSpec
from statqat_lightning.formats import at_least_bits, get_format
from statqat_lightning.recipes.rule import (
    ROLES,
    QuantRule,
    activation_spec,
    is_opt_in,
    own_types,
    rule_cells,
    weight_spec,
)

Default = Literal["default"]
DEFAULT: Final = "default"
"""Stands for an argument that nobody gave: what it means depends on what comes beside it."""


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
        return html_table(
            rule_cells(self.rules), below=["The first rule that matches a layer counts."]
        )

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
        ordered = [name for name, module in layers.items() if not is_opt_in(module)]
        positions = {name: position for position, name in enumerate(ordered)}
        matched: dict[QuantRule, list[QuantRule]] = {rule: [] for rule in self.rules}
        assigned: dict[str, QuantRule | None] = dict.fromkeys(layers)
        for name, module in [*layers.items(), *(others or {}).items()]:
            names = [name, *(aliases or {}).get(name, ())]
            for rule in self.rules:
                if name in layers:
                    means_it = not is_opt_in(module) or any(map(rule.names, names))
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
            types = {f"type:{own_types(module)[0].__name__}" for module in layers.values()}
            others_names = [own for found in (aliases or {}).values() for own in found]
            hint = did_you_mean(unused[0], [*layers, *others_names, *types], most=3)
            raise ValueError(
                f"Patterns {unused} matched no layer.{hint} Fix or drop them. "
                f"Layers: {', '.join(layers)}."
            )
        for rule, takers in matched.items():
            _refuse_shadowed(rule, takers)
        return assigned

    def around_zero(self) -> QuantRecipe:
        """The same recipe without zero points that data chooses, as for kernels that have none."""
        return QuantRecipe([rule.around_zero() for rule in self.rules])

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
