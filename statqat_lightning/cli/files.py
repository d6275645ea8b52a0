"""Commands about files of quantized models: export, inspect, report, compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statqat_lightning.cli.arguments import add_example, example
from statqat_lightning.export.checkpoints import export_checkpoint
from statqat_lightning.export.file_comparison import compare_files
from statqat_lightning.export.file_report import file_report
from statqat_lightning.export.files.registry import DEFAULT, FILE_TYPES
from statqat_lightning.export.inspection import inspect_file
from statqat_lightning.targets.registry import TARGETS

NAMES = [each.name for each in FILE_TYPES]


def add_commands(commands: Any, trust: argparse.ArgumentParser) -> None:
    """Add them to the parser's commands; `trust` has the option of that name."""
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
    add_example(export)
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


def _export(options: argparse.Namespace) -> None:
    files = [name.strip() for name in options.to.split(",")]
    if unknown := [name for name in files if name not in NAMES]:
        raise ValueError(f"--to: got {', '.join(unknown)}; expected of {', '.join(NAMES)}.")
    report = export_checkpoint(
        options.checkpoint,
        options.module,
        options.output,
        example(options),
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
