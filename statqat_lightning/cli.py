"""`statqat`: export a checkpoint, look into files, report, advise, plan, list what there is.

Each command is a function: `export_checkpoint`, `inspect_file`, `file_report`, `file_advice` and
`compare_files` of `statqat_lightning.export`, `advise`, `sensitivity`, `list_formats` and
`list_presets` of `statqat_lightning`, `plan_recipe` and `compare_recipes` of
`statqat_lightning.insight`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning._files import write_whole
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.checkpoints import export_checkpoint, model_with_weights, module_of
from statqat_lightning.export.file_advice import file_advice
from statqat_lightning.export.file_comparison import compare_files
from statqat_lightning.export.file_report import file_report
from statqat_lightning.export.files.native import library_version
from statqat_lightning.export.files.reading import read_any
from statqat_lightning.export.files.registry import DEFAULT, FILE_TYPES
from statqat_lightning.export.inspection import inspect_file
from statqat_lightning.formats import list_formats
from statqat_lightning.insight.advising import DEFAULT_FORMATS, advise
from statqat_lightning.insight.plan import compare_recipes, plan_recipe
from statqat_lightning.insight.trials import sensitivity
from statqat_lightning.recipes.presets import PRESETS, list_presets
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.registry import TARGETS

NAMES = [each.name for each in FILE_TYPES]


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

    export = commands.add_parser(
        "export", parents=[trust], help="write a checkpoint of a training as files that run"
    )
    export.add_argument("checkpoint", type=Path)
    export.add_argument(
        "--module",
        required=True,
        metavar="package.Module",
        help="the LightningModule, or package:factory for a function that makes the model",
    )
    export.add_argument(
        "--to",
        default=",".join(DEFAULT),
        metavar="FILES",
        help=f"comma-separated, of {', '.join(NAMES)} (default: %(default)s)",
    )
    export.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="default: beside the checkpoint",
    )
    export.add_argument(
        "--submodule",
        default="",
        metavar="NAME",
        help="part of the model to write",
    )
    _add_example(export)
    export.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="the runtime meant: layers it has no integer kernels for are named "
        "(default: the one of the training)",
    )
    export.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="INPUT:DIMENSION=NAME,...",
        help="dimensions that stay open beside the batch, such as x:2=height,3=width",
    )
    export.add_argument(
        "--not-strict", action="store_true", help="keep files that differ from the trained model"
    )
    export.set_defaults(command=_export)

    inspect = commands.add_parser(
        "inspect", parents=[trust], help="recipe, layers, bits, SNR and size of a file"
    )
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(command=lambda o: print(inspect_file(o.file, o.trust)))

    report = commands.add_parser(
        "report", parents=[trust], help="layers, SNR, spectra and proof of a file as an HTML page"
    )
    report.add_argument("file", type=Path, help="a checkpoint, or a .safetensors file")
    report.add_argument(
        "-o", "--output", type=Path, metavar="PAGE", help="default: FILE.html beside the file"
    )
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", parents=[trust], help="weights of two files")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.set_defaults(command=lambda o: print(compare_files(o.a, o.b, o.trust)))

    formats = commands.add_parser("formats", help="number formats: names, bits, largest values")
    formats.set_defaults(command=lambda o: print(list_formats()))
    _add_recipes(commands)
    _add_advice(commands, trust)
    return parser


def _add_example(parser: argparse.ArgumentParser) -> None:
    example = parser.add_mutually_exclusive_group()
    example.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="a batch of inputs, saved by torch.save (default: the module's example_input_array)",
    )
    example.add_argument(
        "--input-shape", metavar="N,C,H,W", help="random numbers of this shape as input"
    )


def _export(options: argparse.Namespace) -> None:
    files = [name.strip() for name in options.to.split(",")]
    if unknown := [name for name in files if name not in NAMES]:
        raise ValueError(f"--to: got {', '.join(unknown)}; expected of {', '.join(NAMES)}.")
    report = export_checkpoint(
        options.checkpoint,
        options.module,
        options.output,
        _example(options),
        trust=options.trust,
        submodule=options.submodule,
        strict=not options.not_strict,
        dynamic=_dynamic(options.dynamic),
        **({} if options.target is None else {"target": options.target}),
        files=files,
    )
    print(report)
    if len(report.artefacts) < len({*files}):
        raise ValueError(
            "not all files were written, see above. If no input is known, give --input."
        )


def _report(options: argparse.Namespace) -> None:
    data = file_report(options.file, options.trust)
    path = options.output or options.file.with_name(f"{options.file.name}.html")
    data.to_html(path)
    print(f"{path}: {len(data.layers)} layers, {path.stat().st_size / 1e3:.1f} kB")


def _dynamic(given: Sequence[str]) -> dict[str, dict[int, str]] | None:
    found: dict[str, dict[int, str]] = {}
    for entry in given:
        name, _, dimensions = entry.partition(":")
        try:
            pairs = [pair.split("=") for pair in dimensions.split(",")]
            found[name] = {int(number): title for number, title in pairs}
        except ValueError as error:
            raise ValueError(
                f"--dynamic: got {entry!r}; expected an input and its dimensions, such as "
                "x:2=height,3=width."
            ) from error
    return found or None


def _example(options: argparse.Namespace) -> Any:
    if options.input is not None:
        return torch.load(options.input, map_location="cpu", weights_only=True)
    if options.input_shape is None:
        return None
    try:
        sizes = [int(size) for size in options.input_shape.split(",")]
        return torch.randn(sizes)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--input-shape: got {options.input_shape!r}; expected sizes such as 8,3,32,32."
        ) from error


def _add_recipes(commands: Any) -> None:
    """The commands about recipes: presets, plan, diff."""
    presets = commands.add_parser("presets", help="recipes that have a name")
    presets.set_defaults(command=lambda o: print(list_presets()))

    what = "package.Module, or package:factory for a function without arguments"
    plan = commands.add_parser("plan", help="what a recipe would do to each layer")
    plan.add_argument("module", help=what)
    recipe = plan.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe in YAML")
    recipe.add_argument("--preset", default="w8a8", metavar="NAME", help="default: %(default)s")
    _add_example(plan)
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
    model, example = module_of(options.module), _example(options)
    example = getattr(model, "example_input_array", None) if example is None else example
    call = None if example is None else ForwardCall.of(example)
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


def _add_advice(commands: Any, trust: argparse.ArgumentParser) -> None:
    """The commands that say what formats would cost: advise, sensitivity."""
    advise = commands.add_parser(
        "advise",
        parents=[trust],
        help="what each format would cost each layer, and the cheapest that will do",
    )
    advise.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="a checkpoint of a training with StatQATCallback, which needs no class: SNRs alone",
    )
    _add_model(advise, "with --batch: SNRs, and the change of the loss of its training_step")
    advise.add_argument(
        "--target-db", type=float, metavar="DB", help="choose the cheapest formats of this SNR"
    )
    advise.add_argument("--snr", action="store_true", help="print SNRs where losses are known, too")
    advise.add_argument("--json", type=Path, metavar="FILE", help="write the whole table")
    advise.add_argument(
        "-o", "--output", type=Path, metavar="RECIPE", help="write the choice as a recipe in YAML"
    )
    _add_formats(advise, DEFAULT_FORMATS)
    advise.set_defaults(command=_advise)

    trial = commands.add_parser(
        "sensitivity", parents=[trust], help="what each layer does to the loss, by trial"
    )
    _add_model(trial, "whose training_step has a loss")
    trial.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what is measured, and go on from there"
    )
    trial.add_argument("--json", type=Path, metavar="FILE", help="write all changes")
    _add_formats(trial, ("int4",))
    trial.set_defaults(command=_sensitivity)


def _add_model(parser: argparse.ArgumentParser, about: str) -> None:
    what = f"package.Module, or package:factory without arguments, {about}"
    parser.add_argument("--module", metavar="package.Module", help=what)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="its weights; default: as it is made"
    )
    parser.add_argument(
        "--batch",
        type=Path,
        action="append",
        metavar="FILE",
        help="what training_step takes, saved by torch.save; may come several times",
    )


def _add_formats(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    parser.add_argument(
        "--formats",
        default=",".join(default),
        metavar="NAMES",
        help="comma-separated, see statqat formats (default: %(default)s)",
    )


def _advise(options: argparse.Namespace) -> None:
    if options.output is not None and options.target_db is None:
        raise ValueError("-o: got no --target-db; expected the SNR that the recipe is to keep.")
    formats = _split(options.formats)
    if options.file is not None:
        if options.module or options.batch or options.checkpoint:
            raise ValueError(
                f"advise: got {options.file} beside --module, --checkpoint or --batch; expected "
                "either. With a module, the file goes to --checkpoint."
            )
        advice = file_advice(options.file, formats, options.trust)
    else:
        model, batches = _model_and_batches("advise", options)
        advice = advise(model, batches, formats=formats)
    recipe = None if options.output is None else advice.recipe(options.target_db)
    print(advice.text(options.target_db, loss=False if options.snr else None))
    if options.json is not None:
        write_whole(options.json, f"{advice.to_json()}\n")
        print(f"{options.json}: {len(advice.tensors)} tensors")
    if recipe is not None:
        recipe.to_yaml(options.output)
        print(f"{options.output}: {len(recipe.rules)} rules")


def _sensitivity(options: argparse.Namespace) -> None:
    model, batches = _model_and_batches("sensitivity", options)
    trials = sensitivity(model, batches, formats=_split(options.formats), resume=options.resume)
    print(trials)
    if options.json is not None:
        write_whole(options.json, f"{trials.to_json()}\n")
        print(f"{options.json}: {len(trials.rows)} trials")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _model_and_batches(command: str, options: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    if not (options.module and options.batch):
        other = "a checkpoint, or " if command == "advise" else ""
        raise ValueError(
            f"{command}: expected {other}--module package.Module and --batch FILE, what its "
            "training_step takes, saved by torch.save."
        )
    model = model_with_weights(options.module, options.checkpoint, options.trust)
    return model, [read_any(path, options.trust) for path in options.batch]


if __name__ == "__main__":
    sys.exit(main())
