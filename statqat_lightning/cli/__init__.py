"""`statqat`: export a checkpoint, look into files, report, advise, plan, list what there is.

Each command is a function: `export_checkpoint`, `inspect_file`, `file_report`, `file_advice` and
`compare_files` of `statqat_lightning.export`, `advise`, `allocate`, `sensitivity`, `list_formats`
and `list_presets` of `statqat_lightning`, `plan_recipe` and `compare_recipes` of
`statqat_lightning.insight`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from statqat_lightning.cli import advice, files, recipes
from statqat_lightning.export.files.native import library_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error is one line and exit code 2.

    Returns:
        The exit code: what the command returns, 0 for None.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = options.command
    try:
        return command(options) or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        print(f"statqat: {text or type(error).__name__}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("statqat", description="Files of quantized models.")
    about = f"%(prog)s {library_version()}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    trust = argparse.ArgumentParser(add_help=False)
    trust.add_argument(
        "--trust",
        action="store_true",
        help="load any object from the checkpoint, which may run code in it",
    )

    files.add_commands(commands, trust)
    recipes.add_commands(commands)
    advice.add_commands(commands, trust)
    return parser
