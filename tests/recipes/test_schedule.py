"""Moments, widths and what a schedule refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from statqat_lightning.recipes.schedule import Progress, QuantSchedule, When, reached


@pytest.mark.parametrize(
    ("when", "progress", "expected"),
    [
        (0, Progress(0, 0, 0), True),
        (10, Progress(9, 5.0, 1.0), False),
        (10, Progress(10, 0, 0), True),
        (0.5, Progress(10**6, 99.0, 0.49), False),
        (0.5, Progress(0, 0, 0.5), True),
        (1, Progress(0, 1.0, 1.0), False),  # one step, not all of the training
        (1.0, Progress(7, 1.0, 1.0), True),
        ("2 epochs", Progress(10**6, 1.99, 1.0), False),
        ("2 epochs", Progress(0, 2.0, 0), True),
        ("1 epoch", Progress(0, 1.0, 0), True),
        ("0.5 epochs", Progress(0, 0.5, 0), True),
    ],
)
def test_moments(when: When, progress: Progress, expected: bool) -> None:
    assert reached(when, progress) is expected


def test_widths_fall_step_by_step() -> None:
    schedule = QuantSchedule(widths=[(0.25, 8), (100, 4)])
    assert schedule.min_bits(Progress(0, 0, 0.0)) == 8
    assert schedule.min_bits(Progress(99, 0, 0.25)) == 4
    assert schedule.min_bits(Progress(100, 0, 0.25)) == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weights_at": -1}, "weights_at=-1"),
        ({"activations_at": 1.5}, r"activations_at=1\.5"),
        ({"weights_at": True}, "weights_at=True"),
        ({"freeze_at": "soon"}, "freeze_at='soon'"),
        ({"freeze_at": 0}, "freeze_at=0; expected a moment after the start"),
        ({"freeze_at": "0 epochs"}, "expected a moment after the start"),
        ({"widths": [(0.5, 9)]}, "got 9 bits"),
        ({"widths": [(0.2, 4), (0.5, 8)]}, "bits that fall"),
        ({"widths": [(0.2, 4), (0.5, 4)]}, "bits that fall"),
        ({"batch_norm": "freze"}, "Did you mean 'freeze'"),
        ({"batch_norm_batches": 0}, "batch_norm_batches=0"),
        ({"freeze": 0.9}, "Did you mean 'freeze_at'"),
    ],
)
def test_what_it_refuses(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSchedule.from_dict(entries)


def test_it_is_plain_data() -> None:
    schedule = QuantSchedule("1 epoch", 100, None, [(0.5, 8)], "reestimate", 0.7, 5)
    assert QuantSchedule.from_dict(schedule.to_dict()) == schedule


def test_it_reads_as_it_is_written() -> None:
    assert repr(QuantSchedule()) == "QuantSchedule()"
    schedule = QuantSchedule("1 epoch", freeze_at=None, widths=[(0.5, 8)])
    assert repr(schedule) == (
        "QuantSchedule(weights_at='1 epoch', freeze_at=None, widths=((0.5, 8),))"
    )
    assert eval(repr(schedule)) == schedule


def test_it_is_a_table_in_a_notebook() -> None:
    html = QuantSchedule("1 epoch", widths=[(0.5, 8)])._repr_html_()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", html)
    assert cells[:4] == ["QuantSchedule", "", "weights_at", "1 epoch"]
    assert cells[4:10] == ["activations_at", "0", "freeze_at", "0.9", "widths", "[[0.5, 8]]"]
