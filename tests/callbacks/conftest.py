"""What the callback tests share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest


class Messages(list[str]):
    """What Lightning's `rank_zero_info` has said, which is how the callbacks speak."""

    def about(self, text: str) -> list[str]:
        return [message for message in self if text in message]


@pytest.fixture
def messages() -> Iterator[Messages]:
    said = Messages()
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    # Whichever of the two packages was imported last speaks for both.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def loading_is_lightnings_own() -> Iterator[None]:
    """Take back what `STATQAT_CONFIG` switches on for a process: see `callbacks.loading`."""
    yield
    for package in ("lightning.pytorch", "pytorch_lightning"):
        saving = sys.modules.get(f"{package}.core.saving")
        if saving is not None and hasattr(saving._load_state, "_statqat"):
            saving._load_state = saving._load_state.__wrapped__
