"""Commands about what a recipe can say: formats, presets, plan, diff."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from statqat_lightning.cli.arguments import add_example, example
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.checkpoints import module_of
from statqat_lightning.formats import list_formats
from statqat_lightning.insight.plan import compare_recipes, plan_recipe
from statqat_lightning.recipes.presets import PRESETS, list_presets
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.registry import TARGETS


def add_commands(commands: Any) -> None:
    """Add them to the parser's commands."""
    formats = commands.add_parser("formats", help="number formats: names, bits, largest values")
    formats.set_defaults(command=lambda o: print(list_formats()))

    presets = commands.add_parser("presets", help="recipes that have a name")
    presets.set_defaults(command=lambda o: print(list_presets()))

    what = "package.Module, or package:factory for a function without arguments"
    plan = commands.add_parser("plan", help="what a recipe would do to each layer")
    plan.add_argument("module", help=what)
    recipe = plan.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe in YAML")
    recipe.add_argument("--preset", default="w8a8", metavar="NAME", help="default: %(default)s")
    add_example(plan)
    plan.add_argument("--target", choices=tuple(TARGETS), help="the runtime to train for")
    plan.add_argument("--all", action="store_true", help="a line for each layer")
    plan.set_defaults(command=_plan)

    diff = commands.add_parser("diff", help="rules that differ; exit code 1 if any does")
    diff.add_argument("a", metavar="A", help="a recipe in YAML, or a preset")
    diff.add_argument("b", metavar="B", help="another one")
    diff.add_argument("--module", help=f"name the layers that get another format; {what}")
    diff.set_defaults(command=_diff)


def _plan(options: argparse.Namespace) -> None:
    given = options.recipe is not None
    chosen = QuantRecipe.choose(options.recipe, preset=None if given else options.preset)
    model, given_input = module_of(options.module), example(options)
    if given_input is None:
        given_input = getattr(model, "example_input_array", None)
    call = None if given_input is None else ForwardCall.of(given_input)
    plan = plan_recipe(model, chosen, None if call is None else call.run, options.target)
    print(plan.table() if options.all else plan)


def _diff(options: argparse.Namespace) -> int:
    names = options.a, options.b
    a, b = (
        QuantRecipe.preset(name) if name in PRESETS else QuantRecipe.from_yaml(name)
        for name in names
    )
    model = None if options.module is None else module_of(options.module)
    compared = compare_recipes(a, b, model, names)
    print(compared)
    return 0 if compared.equal else 1
