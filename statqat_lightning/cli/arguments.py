"""Arguments that several commands have, and how they are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning.export.checkpoints import model_with_weights
from statqat_lightning.export.files.reading import read_any


def add_example(parser: argparse.ArgumentParser) -> None:
    """An input for the model."""
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


def example(options: argparse.Namespace) -> Any:
    """The input that `add_example` describes, None without."""
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


def add_model(parser: argparse.ArgumentParser, about: str) -> None:
    """A model with batches for its training step."""
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


def model_and_batches(command: str, options: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """What `add_model` describes."""
    if not (options.module and options.batch):
        other = "" if command == "sensitivity" else "a checkpoint, or "
        raise ValueError(
            f"{command}: expected {other}--module package.Module and --batch FILE, what its "
            "training_step takes, saved by torch.save."
        )
    model = model_with_weights(options.module, options.checkpoint, options.trust)
    return model, [read_any(path, options.trust) for path in options.batch]


def add_formats(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Names of formats."""
    parser.add_argument(
        "--formats",
        default=",".join(default),
        metavar="NAMES",
        help="comma-separated, see statqat formats (default: %(default)s)",
    )


def split(names: str) -> list[str]:
    """Names that commas separate."""
    return [name.strip() for name in names.split(",") if name.strip()]
