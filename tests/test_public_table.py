"""The table of public modules: what counts as worse, and how it is printed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.public.lightning_suite import EXCEPTIONS, reason
from tests.public.table import CASES, kept, markdown, worse

GOOD: dict[str, Any] = {
    "name": "swin",
    "library": "torchvision",
    "title": "Swin",
    "version": "0.29.2",
    "trains": True,
    "resumes": True,
    "native": True,
    "onnx": True,
    "share": 0.97,
    "probe": [],
    "float": ["table (Embedding)"],
    "problems": {},
    "seconds": 12,
}


def test_the_same_row_is_not_worse() -> None:
    assert worse(GOOD, kept(GOOD)) == []
    assert worse(GOOD, {}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"native": False, "problems": {"native": "differs by 3"}}, "native: differs by 3"),
        ({"trains": False, "problems": {"fit": "KeyError: x"}}, "trains: KeyError: x"),
        ({"share": 0.5}, "share: 50.0%, before 97.0%"),
        ({"probe": ["w: reported as quantized"]}, "probe: w: reported as quantized"),
    ],
)
def test_what_is_worse_is_named(change: dict[str, Any], message: str) -> None:
    assert worse(GOOD | change, kept(GOOD)) == [message]


def test_a_fault_that_is_recorded_is_not_worse() -> None:
    bad = GOOD | {"onnx": False, "problems": {"onnx": "cannot be written"}}
    assert worse(bad, kept(bad)) == []


def test_a_disagreement_with_the_report_is_never_accepted() -> None:
    bad = GOOD | {"probe": ["w: reported as quantized"]}
    assert worse(bad, kept(bad)) == ["probe: w: reported as quantized"]


def test_a_row_that_ended_early_is_worse() -> None:
    early = {"name": "swin", "trains": False, "problems": {"fit": "not done in 300 s"}}
    assert "trains: not done in 300 s" in worse(early, kept(GOOD))


def test_the_table_has_narrow_lines_and_says_why() -> None:
    bad = GOOD | {
        "title": "ViT",
        "onnx": False,
        "problems": {"onnx": "cannot be written, " * 20},
        "probe": ["w: reported as quantized, entered addmm in float"],
    }
    text = markdown([GOOD, bad])
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "| torchvision | Swin | yes | 97.0 % | yes | yes | yes | agrees |" in text
    assert "| torchvision | ViT | yes | 97.0 % | yes | yes | no | 1 differ |" in text
    assert "- torchvision ViT: onnx: cannot be written" in text
    assert "- torchvision Swin: `table (Embedding)`" in text


def test_there_are_enough_rows() -> None:
    assert len(CASES) >= 25
    assert len({named.distribution for named in CASES.values()}) >= 12


def test_exceptions_are_told_by_the_name_of_the_test(repository: Any) -> None:
    assert reason("models/test_hooks.py::test_trainer_model_hook_system_fit[True-kwargs0]")
    assert reason("models/test_hooks.py::test_other") is None
    text = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for name in EXCEPTIONS:
        assert f"`{name}`" in text
