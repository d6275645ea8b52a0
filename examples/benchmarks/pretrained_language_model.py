"""Nats a token of a pretrained Llama whose weights are rounded without training.

`smollm2.py` says which packages hold the model and the text.

All linear layers but the head are rounded. Inputs of ours are seen on text that is not evaluated.
What was done is kept in the output folder, and a command that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smollm2
from common import positive
from measuring import code_digest, versions_text, write_json, write_results
from rounding import METHODS, Method, rounded
from smollm2 import CONTEXT, all_but_the_head, spread_windows, windows

FORMATS = ("int4", "int3", "fp4_e2m1", "nf4")
# The last block of a row is shorter where 128 does not divide it.
GRANULARITIES = ("per_channel", "per_tensor", "per_block:128")


@torch.no_grad()
def nats(model: Any, held_out: Tensor) -> float:
    """Mean negative logarithm of the probability of each next token."""
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in held_out]
    return float(torch.stack(losses).mean())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], help="of the weights")
    parser.add_argument("--granularities", nargs="+", default=[*GRANULARITIES])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[*METHODS])
    smollm2.add_arguments(parser)
    parser.add_argument("--windows", type=positive, default=4, help=f"of {CONTEXT} held-out tokens")
    parser.add_argument("--seen", type=positive, default=10, help="windows that inputs are seen on")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/pretrained"), help="folder for results"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    model, train, held_out = smollm2.load(args)
    shown, seen = windows(held_out, args.windows), spread_windows(train, args.seen)
    print(f"{len(train)} and {len(held_out)} held-out tokens, {versions_text()}")
    path = args.output / "cells.json"
    cells = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made_by = f"code {code_digest()}, torch {torch.__version__}, {args.windows}, {args.seen}"
    rows = []
    for granularity in args.granularities:
        for fmt in args.formats:
            for name in args.methods:
                key = f"{fmt} {granularity}, {name}, {made_by}"
                if key not in cells:
                    start = time.perf_counter()
                    cells[key] = _cell(model, fmt, granularity, METHODS[name], seen, shown)
                    cells[key]["seconds"] = time.perf_counter() - start
                    args.output.mkdir(parents=True, exist_ok=True)
                    write_json(path, cells)
                rows.append({"format": fmt, "granularity": granularity, "method": name})
                rows[-1] |= cells[key]
                print(f"{fmt:10} {granularity:14} {name:26} {cells[key]['nats']:7.3f}", flush=True)
    float_nats = nats(model, shown)
    print(f"float {float_nats:.3f} nats, perplexity {math.exp(float_nats):.1f}")
    write_results(args.output / "results.json", float_nats=float_nats, rows=rows)
    print(f"results: {args.output / 'results.json'}")


def _cell(
    model: nn.Module, fmt: str, granularity: str, method: Method, seen: Tensor, shown: Tensor
) -> dict[str, float]:
    """Nats of one way to round; NaN where a method has no form for the format."""
    try:
        recipe = all_but_the_head(method.spec(fmt, granularity))
    except ValueError as error:
        print(error)
        return {"nats": math.nan}
    return {"nats": nats(rounded(model, recipe, method, seen.split(1)), shown)}


if __name__ == "__main__":
    main()
