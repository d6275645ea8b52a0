"""Which rules of two recipes differ, as lines that a recipe's YAML could hold."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import yaml

from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule


def rules_difference(
    a: QuantRecipe, b: QuantRecipe, names: tuple[str, str] = ("first", "second")
) -> str:
    """The rules that two recipes do not have in common, in their order.

    Whether a rule is optional makes no difference: layers get the same.

    Returns:
        Lines as `diff -u` prints them, a rule each, headed by the names; empty without a
        difference.
    """
    before, after = ([*map(_line, recipe.rules)] for recipe in (a, b))
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=1))


def _line(rule: QuantRule) -> str:
    entries = {"pattern": rule.pattern} | _plain(rule.given())
    text = yaml.safe_dump(
        entries, default_flow_style=True, sort_keys=False, width=sys.maxsize, allow_unicode=True
    )
    return text.strip()


def _plain(given: Any) -> Any:
    if isinstance(given, TensorSpec):
        return given.to_dict()
    return {n: _plain(v) for n, v in given.items()} if isinstance(given, dict) else given
