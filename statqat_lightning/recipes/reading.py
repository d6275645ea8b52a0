"""Rules from plain data and from YAML files, which may extend a preset or another file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from statqat_lightning._words import did_you_mean, short
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.recipes.presets import PRESETS
from statqat_lightning.recipes.rule import ROLES, QuantRule, activation_spec, weight_spec
from statqat_lightning.recipes.yaml_file import YamlFile, read_yaml

At = Callable[..., str]
"""From the keys that lead to an entry to where it stands, `recipe.yaml:7: `; empty outside files"""
_LONGEST = 200
"""Characters of a name or a number in a rule, but for patterns and levels; none needs as many."""
_RULE = ("pattern", *ROLES, "results", "optional")


def read_rules(path: str | Path) -> list[QuantRule]:
    """The rules of a recipe in YAML: its own, then those of what it extends.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it does not hold a recipe; the message names file and line.
    """
    return _read(Path(path), ())


def _read(path: Path, extending: tuple[Path, ...]) -> list[QuantRule]:
    file = read_yaml(path)
    extends = isinstance(file.data, Mapping) and "extends" in file.data
    _expect_keys("recipe", file.data, ("rules", "extends"), file.at)
    own = {key: value for key, value in file.data.items() if key != "extends"}
    rules = [] if extends and "rules" not in own else rules_from(own, file.at)
    if not extends:
        return rules
    base = _base(file, (*extending, path.resolve()))
    return rules + [rule.taken_over() for rule in base]


def _base(file: YamlFile, extending: tuple[Path, ...]) -> list[QuantRule]:
    """The rules of what a file extends."""
    base, where = file.data["extends"], f"{file.at('extends')}extends"
    known = f"Expected a preset ({', '.join(PRESETS)}) or the path of a recipe in YAML"
    if not isinstance(base, str):
        raise ValueError(f"{where}: got {short(base)}. {known}.")
    if base in PRESETS:
        return PRESETS[base].rules()
    path = file.path.parent / base
    if not path.is_file():
        raise ValueError(
            f"{where}: got {short(base)}.{did_you_mean(base, PRESETS)} {known}, relative to this "
            "file."
        )
    if path.resolve() in extending:
        raise ValueError(
            f"{where}: got {short(base)}, which extends this file in turn; expected no circle."
        )
    return _read(path, extending)


def _nowhere(*keys: str | int) -> str:
    return ""


def rules_from(data: Any, at: At = _nowhere) -> list[QuantRule]:
    """The rules in plain data, such as `{"rules": [{"pattern": "*", "weights": "int4"}]}`.

    Args:
        data: The data, as `QuantRecipe.to_dict` makes it.
        at: Where its entries stand.

    Raises:
        ValueError: If an entry is missing, unknown or wrong.
    """
    _expect_keys("recipe", data, ("rules",), at, required="rules")
    entries = data["rules"]
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(
            f"{at('rules')}recipe: got rules={short(entries)}; expected a list of rules."
        )
    return [_rule(number, entry, at) for number, entry in enumerate(entries)]


def _rule(number: int, entry: Any, at: At) -> QuantRule:
    keys: tuple[str | int, ...] = ("rules", number)
    name = f"rule {number}"

    def here(*more: str | int) -> str:
        return at(*keys, *more)

    _expect_keys(name, entry, _RULE, here, required="pattern")
    specs = {role: _spec(f"{name}, {role}", role, entry.get(role), here, role) for role in ROLES}
    results = entry.get("results") or {}
    if not isinstance(results, Mapping):
        raise ValueError(
            f"{here('results')}{name}, results: got {short(results)}; expected formats by name, as "
            "in {add: int8}."
        )
    if unclear := [n for n in results if not isinstance(n, str) or len(n) > _LONGEST]:
        raise ValueError(
            f"{here('results')}{name}, results: got {short(unclear[0])}; expected the name of a "
            "function, such as add."
        )
    named: Any = {
        n: _spec(f"{name}, {n}", "results", s, here, "results", n) for n, s in results.items()
    }
    optional = entry.get("optional", False)
    try:
        rule = QuantRule(entry["pattern"], **specs, results=named, optional=optional)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{here(*named_in(error, entry))}{name}: {error}") from error
    return rule.found_at(here())


def _spec(where: str, role: str, entry: Any, at: At, *keys: str) -> TensorSpec | None:
    """The specification of one tensor: a mapping, the name of a format, or None."""
    if isinstance(entry, Mapping):
        if "format" not in entry:
            raise ValueError(f"{at(*keys)}{where}: got {short(entry)}; expected an entry 'format'.")
        for key, value in entry.items():
            if not isinstance(key, str) or len(key) > _LONGEST:
                raise ValueError(
                    f"{at(*keys)}{where}: got the entry {short(key)}; expected the name of one."
                )
            if key != "format" and len(repr(value)) > _LONGEST:
                raise ValueError(
                    f"{at(*keys, key)}{where}: got {key}={short(value)}; expected a short value."
                )
    elif entry is not None and not isinstance(entry, str):
        raise ValueError(
            f"{at(*keys)}{where}: got {short(entry)}; expected a format name or a mapping."
        )
    try:
        spec = TensorSpec(**entry) if isinstance(entry, Mapping) else entry
        return weight_spec(spec) if role == "weights" else activation_spec(spec, where)
    except (ValueError, TypeError) as error:
        named = "" if str(error).startswith(where) else f"{where}: "
        raise ValueError(f"{at(*keys, *named_in(error, entry))}{named}{error}") from error


def named_in(error: Exception, entry: Any) -> list[str]:
    """The entry of a mapping that an error names first, in a list; empty if it names none."""
    if not isinstance(entry, Mapping):
        return []
    found = {key: re.search(rf"\b{re.escape(str(key))}\b", str(error)) for key in entry}
    places = {key: match.start() for key, match in found.items() if match}
    return sorted(places, key=lambda key: places[key])[:1]


def _expect_keys(where: str, data: Any, known: Sequence[str], at: At, required: str = "") -> None:
    """Refuse what is no mapping, has an unknown entry, or lacks the required one."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{at()}{where}: got {short(data)}; expected a mapping with {', '.join(known)}."
        )
    if unknown := [key for key in data if key not in known]:
        if unknown == ["extends"]:
            raise ValueError(
                f"{where}: got extends={short(data['extends'])}; only recipes in YAML files extend "
                "others. Add the rules of QuantRecipe.preset(name) or QuantRecipe.from_yaml(path) "
                "to your own."
            )
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"{at(unknown[0])}{where}: got unknown entries {short(unknown)}.{hint} Expected "
            f"{', '.join(known)}."
        )
    if required and required not in data:
        raise ValueError(f"{at()}{where}: the entry {required!r} is missing.")
