"""Which layers get what: ordered rules, as data that YAML can hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from statqat_lightning._files import write_whole
from statqat_lightning._tables import html_table
from statqat_lightning._words import did_you_mean, short
from statqat_lightning.fake_quant.tensor_spec import TensorSpec as TensorSpec
from statqat_lightning.recipes.defaults import DEFAULT as DEFAULT
from statqat_lightning.recipes.defaults import Default as Default
from statqat_lightning.recipes.defaults import check_exclude, default_rules
from statqat_lightning.recipes.presets import PRESETS, get_preset
from statqat_lightning.recipes.reading import read_rules, rules_from
from statqat_lightning.recipes.rule import ROLES, QuantRule, is_opt_in, own_types, rule_cells


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
        return cls(default_rules(weights, activations, exclude, first_last_bits))

    @classmethod
    def preset(
        cls,
        name: str,
        exclude: Sequence[str] = (),
        first_last_bits: int | Default | None = DEFAULT,
    ) -> QuantRecipe:
        """The recipe of a name, such as `w4a8`; `list_presets` shows all of them.

        Args:
            name: Its name.
            exclude: Patterns of layers that stay in float.
            first_last_bits: See `default`.

        Raises:
            ValueError: If there is no such preset; the message lists near misses.
        """
        return cls(get_preset(name).rules(exclude, first_last_bits))

    @classmethod
    def choose(
        cls,
        recipe: QuantRecipe | str | Path | None = None,
        weights: str | TensorSpec | None = DEFAULT,
        activations: str | TensorSpec | None = DEFAULT,
        exclude: Sequence[str] = (),
        first_last_bits: int | Default | None = DEFAULT,
        preset: str | None = None,
    ) -> QuantRecipe:
        """The recipe that a caller gave, or the default one from the arguments beside it.

        Args:
            recipe: A recipe, the path of one in YAML, or None for `QuantRecipe.default`.
            weights: See `default`; like the others only where no recipe is given.
            activations: Likewise.
            exclude: Likewise.
            first_last_bits: Likewise.
            preset: Name of a preset, in place of `weights` and `activations`, see `list_presets`.

        Raises:
            ValueError: If a recipe or a preset comes beside arguments that it would silently
                replace, be they those that would be the default.
        """
        check_exclude(exclude)
        formats = {"weights": (weights, DEFAULT), "activations": (activations, DEFAULT)}
        if recipe is None and preset is None:
            return cls.default(weights, activations, exclude, first_last_bits)
        if recipe is None and preset is not None:
            if void := _given(formats):
                raise ValueError(
                    f"got {void} beside preset={preset!r}, which names the formats of both. Leave "
                    "out one of the two; exclude and first_last_bits may stay."
                )
            return cls.preset(preset, exclude, first_last_bits)
        if not isinstance(recipe, (QuantRecipe, str, Path)):
            raise TypeError(f"recipe: got {recipe!r}; expected a QuantRecipe or the path of one.")
        others = {
            "exclude": (list(exclude), []),
            "first_last_bits": (first_last_bits, DEFAULT),
            "preset": (preset, None),
        }
        if void := _given(formats | others):
            raise ValueError(
                f"got {void} beside recipe=...; the recipe alone says what layers get. Put them "
                "into its rules (`extends` in YAML for a preset), or leave out the recipe."
            )
        if isinstance(recipe, QuantRecipe):
            return recipe
        name = str(recipe)
        if name in PRESETS and not Path(recipe).exists():
            raise ValueError(
                f"recipe: got {name!r}, which names a preset; expected preset={name!r}, a "
                "QuantRecipe or the path of one."
            )
        return cls.from_yaml(recipe)

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
            ValueError: If a rule that is not optional matches no layer at all, or none that an
                earlier rule has not taken; the message names near misses and the layers there are.
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
        unused = [rule for rule, takers in matched.items() if not takers and not rule.optional]
        if unused:
            patterns = [short(rule.pattern, 100) for rule in unused]
            types = {f"type:{own_types(module)[0].__name__}" for module in layers.values()}
            others_names = [own for found in (aliases or {}).values() for own in found]
            hint = did_you_mean(unused[0].pattern, [*layers, *others_names, *types], most=3)
            raise ValueError(
                f"{_sources(unused)}Patterns [{', '.join(patterns)}] matched no layer.{hint} Fix "
                f"or drop them. Layers: {', '.join(layers)}."
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
        return cls(rules_from(data))

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe to a YAML file, whole or not at all."""
        write_whole(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> QuantRecipe:
        """Read a recipe from a YAML file.

        Its entries are `rules`, as `to_dict` writes them, and `extends`: a preset, or the path of
        another recipe relative to this one. What it extends comes after the rules of its own, and
        its rules are optional from then on, because those of the file may have replaced them.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file does not hold a recipe; the message names file and line.
        """
        rules = read_rules(path)
        if not rules:
            raise ValueError(f"{path}: got no rules; expected at least one.")
        return cls(rules)


def _refuse_shadowed(rule: QuantRule, taken_by: Sequence[QuantRule]) -> None:
    """Refuse a rule all of whose layers an earlier rule has taken, to give them something else.

    A catch-all is for what is left, and that may be nothing; so may be the layer at a position.
    """
    means_the_rest = rule.pattern == "*" or rule.pattern.startswith("position:")
    roles = (*ROLES, "results")
    is_said_twice = any(all(_same(rule, t, role) for role in roles) for t in taken_by)
    if rule.optional or means_the_rest or is_said_twice:
        return
    earlier = ", ".join(dict.fromkeys(short(t.pattern, 100) for t in taken_by))
    raise ValueError(
        f"{_sources([rule])}Pattern {short(rule.pattern, 100)} matches only layers that an earlier "
        f"rule has taken: {earlier}. "
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


def _given(arguments: Mapping[str, tuple[Any, Any]]) -> str:
    """The arguments that differ from their defaults, as they are written; empty without one."""
    return ", ".join(f"{n}={short(v)}" for n, (v, default) in arguments.items() if v != default)


def _sources(rules: Sequence[QuantRule]) -> str:
    """Where rules were read, to begin a message with; empty if they were not."""
    found = [rule.source for rule in rules if rule.source]
    return f"{', '.join(found)}: " if found else ""
