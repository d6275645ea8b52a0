"""Reads what an offline W&B run has logged from its `.wandb` file.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB that hold chunks of records,
each with checksum, length and kind. A record is a protobuf message.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")  # b":W&B", 0xBEE1, version
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Run(NamedTuple):
    """What a run holds: a row for each step, summary, configuration, alerts, names of artifacts."""

    history: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    alerts: list[str]
    artifacts: list[str]


def read_finished_run(path: Path, patience: float = 60.0) -> Run:
    """The run in a `.wandb` file, once W&B's own process has written its last record.

    `finish()` can return before that where cores are busy.

    Raises:
        TimeoutError: If that record does not come within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        run, finished = _read(path)
        if finished:
            return run
        time.sleep(0.1)
    raise TimeoutError(f"{path}: the run did not finish within {patience} s")


def read_run(path: Path) -> Run:
    """History, summary and configuration of the run in a `.wandb` file, as far as it is written."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Run, bool]:
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined, unused-ignore]
    run, finished = Run([], {}, {}, [], []), False
    for data in _records(path.read_bytes()):
        record = new_record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary.update(_values(record.summary.update))
        elif kind == "config":
            run.config.update(_values(record.config.update))
        elif kind == "alert":
            run.alerts.append(record.alert.text)
        elif kind == "artifact":
            run.artifacts.append(record.artifact.name)
        finished = finished or kind == "exit"
    return run, finished


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    if len(content) < FILE_HEADER.size:
        return
    identifier, magic, _ = FILE_HEADER.unpack_from(content)
    if (identifier, magic) != (b":W&B", 0xBEE1):
        raise ValueError(f"not a .wandb file: it starts with {content[:7]!r}")
    position, record = FILE_HEADER.size, b""
    while position + CHUNK_HEADER.size <= len(content):
        rest_of_block = BLOCK - position % BLOCK
        if rest_of_block < CHUNK_HEADER.size:
            position += rest_of_block  # no chunk starts in the last bytes of a block
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            return  # zeros: the rest was never written
        position += CHUNK_HEADER.size
        chunk = content[position : position + length]
        position += length
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            yield record
