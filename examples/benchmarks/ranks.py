"""Time of a refresh of all scales, by the number of layers, of ranks, and by the size of a batch.

A refresh comes after every training step: what the inputs have gathered is summed over the ranks,
and scales that are due are chosen anew. Ranks are processes of this machine that talk through gloo.
What is timed begins when all ranks are there and ends when the last one has its scales; the forward
pass before it is not in it. Inputs are searched at every fourth refresh and weights of 8 bits at
every 64th, both more often at first: the mean holds these searches, the median does not.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import queue as queues
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import fail, positive
from measuring import write_results

from statqat_lightning import prepare
from statqat_lightning.model.quantized_model import activation_quantizers, refresh, set_observing

WIDTH, TOKENS = 64, 8  # 8 examples have as many values as the observer samples
AIM_LAYERS, AIM_MS = 100, 5.0
WARM_UP = 8  # as many as settle the signs of inputs, with a collective of their own

Case = tuple[int, int]
"""Layers, and batch size."""


def network(layers: int) -> nn.Sequential:
    """Small layers: with large ones, the weights would cost more than what is asked here."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    prepare(model, "int8", "int8")
    return model


def measure_case(
    prepared: nn.Module, batch_size: int, rank: int, world_size: int, rounds: int
) -> dict[str, Any]:
    """Seconds of each refresh on this rank, the collectives of one, and the scales in the end."""
    model, calls = copy.deepcopy(prepared), [0]
    generator = torch.Generator().manual_seed(rank)

    def reduce(tensor: Tensor, operation: str) -> Tensor:
        calls[0] += 1
        op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation]
        dist.all_reduce(tensor, op=op)
        return tensor

    seconds: dict[str, list[float]] = {"weights": [], "inputs": []}
    for number in range(-WARM_UP, rounds):
        x = torch.randn(batch_size, TOKENS, WIDTH, generator=generator)
        set_observing(model, True)
        with torch.no_grad():
            model(x)
        set_observing(model, False)
        calls[0] = 0
        if world_size > 1:
            dist.barrier()
        for part, taken in seconds.items():
            only = {"weights": part == "weights", "inputs": part == "inputs"}
            start = time.perf_counter()
            refresh(model, **only, reduce=reduce if world_size > 1 else None)
            if number >= 0:
                taken.append(time.perf_counter() - start)
    scales = torch.stack([q.scale for q in activation_quantizers(model)])
    return {"seconds": seconds, "collectives": calls[0], "scales": scales.tolist()}


def run_rank(
    rank: int,
    world_size: int,
    port: int,
    cases: list[Case],
    rounds: int,
    networks: Mapping[int, nn.Module],
    put: Callable[..., Any],
) -> None:
    """One process: all cases, in turn."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    results = [
        measure_case(networks[layers], batch_size, rank, world_size, rounds)
        for layers, batch_size in cases
    ]
    put((rank, results))
    if world_size > 1:
        dist.destroy_process_group()


def run_ranks(
    world_size: int, cases: list[Case], rounds: int, networks: Mapping[int, nn.Module]
) -> list[dict[str, Any]]:
    """What came out of each case, from so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # everything is imported already
    queue = context.Queue()
    ranks = [
        context.Process(
            target=run_rank, args=(rank, world_size, port, cases, rounds, networks, queue.put)
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    results: dict[int, list[dict[str, Any]]] = {}
    while len(results) < world_size:
        try:
            rank_number, found = queue.get(timeout=1)
            results[rank_number] = found
        except queues.Empty:
            if any(rank.exitcode for rank in ranks):
                for rank in ranks:  # the others wait for the one that is gone
                    rank.terminate()
                raise fail(f"a rank of {world_size} ended; its error is above.") from None
    for rank in ranks:
        rank.join()
    merged = []
    for number, (layers, batch_size) in enumerate(cases):
        parts = [results[rank][number] for rank in range(world_size)]
        taken = {
            role: [max(times) for times in zip(*(p["seconds"][role] for p in parts), strict=True)]
            for role in ("weights", "inputs")
        }
        whole = [sum(both) for both in zip(*taken.values(), strict=True)]
        merged.append(
            {
                "layers": layers,
                "ranks": world_size,
                "batch_size": batch_size,
                "median_ms": 1e3 * statistics.median(whole),
                "weights_ms": 1e3 * statistics.median(taken["weights"]),
                "inputs_ms": 1e3 * statistics.median(taken["inputs"]),
                "mean_ms": 1e3 * statistics.fmean(whole),
                "collectives": max(part["collectives"] for part in parts),
                "same_scales": all(part["scales"] == parts[0]["scales"] for part in parts),
            }
        )
    return merged


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=positive, nargs="+", default=[10, AIM_LAYERS, 300])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[16, 1024])
    parser.add_argument("--rounds", type=positive, default=16, help="refreshes of each kind")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # before any process is forked
    cases = [(layers, size) for layers in args.layers for size in args.batch_sizes]
    print(
        f"Linear({WIDTH}, {WIDTH}), W8A8, {TOKENS} tokens an example, {args.rounds} rounds, gloo, "
        f"{os.cpu_count()} cores, torch {torch.__version__}"
    )
    networks = {layers: network(layers) for layers in args.layers}
    header = "layers ranks  batch  median ms  weights   inputs     mean  collectives"
    print(f"{header}   scales equal")
    rows = []
    for world_size in args.ranks:
        for row in run_ranks(world_size, cases, args.rounds, networks):
            rows.append(row)
            write_results(args.output, threads=1, rounds=args.rounds, rows=rows)
            times = (row[f"{part}_ms"] for part in ("weights", "inputs", "mean"))
            print(
                f"{row['layers']:6}{row['ranks']:6}{row['batch_size']:7}{row['median_ms']:11.2f}"
                + "".join(f"{value:9.2f}" for value in times)
                + f"{row['collectives']:13}   {row['same_scales']}",
                flush=True,
            )
    for row in rows:
        if row["layers"] == AIM_LAYERS and row["ranks"] == 1:
            holds = "holds" if row["median_ms"] <= AIM_MS else "does not hold"
            print(
                f"{AIM_LAYERS} layers, batch {row['batch_size']}: {row['median_ms']:.2f} ms "
                f"without a search, at most {AIM_MS:g} ms: {holds}"
            )


if __name__ == "__main__":
    main()
