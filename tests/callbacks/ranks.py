"""Starts the ranks of a test: `python -m tests.callbacks.ranks MODULE WORLD_SIZE FOLDER`.

The processes are forked after everything is imported, one thread each, and find each other the way
they do under `torchrun`; so one start serves any strategy and many Trainers. Each runs
`MODULE.run(FOLDER)`.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import torch


def launch(repository: Path, module: str, world_size: int, folder: Path) -> str:
    """Run `module.run(folder)` on so many ranks; what they wrote to stderr."""
    return run_module(repository, "tests.callbacks.ranks", module, str(world_size), str(folder))


def run_module(repository: Path, module: str, *arguments: str) -> str:
    """Run `python -m module`, which has to succeed; what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def _start(module: str, world_size: int, folder: Path) -> int:
    run = importlib.import_module(module).run
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "TORCHELASTIC_RUN_ID": "test",
    }
    children: list[int] = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in (shared | own).items()})
            code = 1
            try:
                torch.set_num_threads(1)
                run(folder)
                code = 0
            except BaseException:
                print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(code)  # the parent's exit handlers are not this process's business
        children.append(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status != 0 and not failed:
            failed = 1
            for other in children:  # they wait for the one that is gone
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(_start(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
