"""Commands that say what formats would cost: advise, allocate, sensitivity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from statqat_lightning._files import write_whole
from statqat_lightning.cli.arguments import add_formats, add_model, model_and_batches, split
from statqat_lightning.export.file_advice import file_advice
from statqat_lightning.insight.advice import Advice
from statqat_lightning.insight.advising import DEFAULT_FORMATS, advise
from statqat_lightning.insight.allocation import allocate
from statqat_lightning.insight.trials import sensitivity
from statqat_lightning.targets.registry import TARGETS

ALLOCATED = ("int2", "int3", "int4", "int5", "int6", "int8")


def add_commands(commands: Any, trust: argparse.ArgumentParser) -> None:
    """Add them to the parser's commands; `trust` has the option of that name."""
    advise = commands.add_parser(
        "advise",
        parents=[trust],
        help="what each format would cost each layer, and the cheapest that will do",
    )
    _add_source(advise)
    advise.add_argument(
        "--target-db", type=float, metavar="DB", help="choose the cheapest formats of this SNR"
    )
    advise.add_argument("--snr", action="store_true", help="print SNRs where losses are known, too")
    advise.add_argument("--json", type=Path, metavar="FILE", help="write the whole table")
    advise.add_argument(
        "-o", "--output", type=Path, metavar="RECIPE", help="write the choice as a recipe in YAML"
    )
    add_formats(advise, DEFAULT_FORMATS)
    advise.set_defaults(command=_advise)

    allocation = commands.add_parser(
        "allocate", parents=[trust], help="formats of least predicted loss within a budget"
    )
    _add_source(allocation)
    allocation.add_argument(
        "--budget",
        required=True,
        help="'4 bits', '4 bits with inputs', '300 kB' or '1.5 Gbitops'",
    )
    allocation.add_argument("--inputs", metavar="FORMAT", help="the format of all inputs")
    allocation.add_argument(
        "--first-last-bits", type=int, default=8, help="their least width; 0 treats them alike"
    )
    allocation.add_argument("--target", choices=tuple(TARGETS), help="formats of its kernels alone")
    allocation.add_argument(
        "-o", "--output", type=Path, metavar="RECIPE", help="write the formats as a recipe in YAML"
    )
    add_formats(allocation, ALLOCATED)
    allocation.set_defaults(command=_allocate)

    trial = commands.add_parser(
        "sensitivity", parents=[trust], help="what each layer does to the loss, by trial"
    )
    add_model(trial, "whose training_step has a loss")
    trial.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what is measured, and go on from there"
    )
    trial.add_argument("--json", type=Path, metavar="FILE", help="write all changes")
    add_formats(trial, ("int4",))
    trial.set_defaults(command=_sensitivity)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="a checkpoint of a training with StatQATCallback, which needs no class: SNRs alone",
    )
    add_model(parser, "with --batch: SNRs, and the change of the loss of its training_step")


def _advice(command: str, options: argparse.Namespace) -> Advice:
    """From a checkpoint alone, or from a model and batches."""
    formats = split(options.formats)
    if options.file is None:
        model, batches = model_and_batches(command, options)
        return advise(model, batches, formats=formats)
    if options.module or options.batch or options.checkpoint:
        raise ValueError(
            f"{command}: got {options.file} beside --module, --checkpoint or --batch; expected "
            "either. With a module, the file goes to --checkpoint."
        )
    return file_advice(options.file, formats, options.trust)


def _allocate(options: argparse.Namespace) -> None:
    allocation = allocate(
        _advice("allocate", options),
        options.budget,
        inputs=options.inputs,
        first_last_bits=options.first_last_bits or None,
        target=options.target,
    )
    print(allocation)
    if options.output is not None:
        allocation.recipe.to_yaml(options.output)
        print(f"{options.output}: {len(allocation.recipe.rules)} rules")


def _advise(options: argparse.Namespace) -> None:
    if options.output is not None and options.target_db is None:
        raise ValueError("-o: got no --target-db; expected the SNR that the recipe is to keep.")
    advice = _advice("advise", options)
    recipe = None if options.output is None else advice.recipe(options.target_db)
    print(advice.text(options.target_db, loss=False if options.snr else None))
    if options.json is not None:
        write_whole(options.json, f"{advice.to_json()}\n")
        print(f"{options.json}: {len(advice.tensors)} tensors")
    if recipe is not None:
        recipe.to_yaml(options.output)
        print(f"{options.output}: {len(recipe.rules)} rules")


def _sensitivity(options: argparse.Namespace) -> None:
    model, batches = model_and_batches("sensitivity", options)
    trials = sensitivity(model, batches, formats=split(options.formats), resume=options.resume)
    print(trials)
    if options.json is not None:
        write_whole(options.json, f"{trials.to_json()}\n")
        print(f"{options.json}: {len(trials.rows)} trials")
