"""Types of files: how they are asked for by name, now and in the way of before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from statqat_lightning import ExportCallback
from statqat_lightning.export import ExportReport, export_model
from statqat_lightning.export.files.registry import FILE_TYPES, FileName, with_ending
from tests.export.models import calibrated, recipe_of


def test_names_fields_and_endings_are_one_each() -> None:
    for names in (
        [each.name for each in FILE_TYPES],
        [each.field for each in FILE_TYPES],
        [each.ending for each in FILE_TYPES],
    ):
        assert len({*names}) == len(FILE_TYPES)
    assert tuple(each.name for each in FILE_TYPES) == get_args(FileName)
    assert {each.field for each in FILE_TYPES} <= {*ExportReport.__dataclass_fields__}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("native", "onnx")),
        (("onnx",), ("onnx",)),
        ("pt2", ("pt2",)),
        (["pte", "native", "pte"], ("native", "pte")),
        ({"compressed-tensors", "torchao"}, ("torchao", "compressed-tensors")),
    ],
)
def test_files_are_asked_for_by_name(given: Any, expected: tuple[str, ...]) -> None:
    assert ExportCallback("m", files=given).files == expected


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("onxx",), r"got files=\('onxx',\), with 'onxx'; expected of 'native', .* mean 'onnx'\?"),
        (("program",), "Did you mean 'pt2'"),
        (("native", "safetensors"), "with 'safetensors'; .* Did you mean 'native'"),
        ((), r"got files=\(\); expected at least one file"),
        ("", r"with ''; expected of"),
        ([True], r"got files=\[True\]; expected names"),
        ([["onnx"]], "expected names, such as"),
    ],
)
def test_wrong_names_are_errors_with_a_way_out(files: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"ExportCallback: .*{said}"):
        ExportCallback("m", files=files)
    with pytest.raises(ValueError, match=f"export_model: .*{said}"):
        export_model(nn.Linear(2, 2), "m", files=files)
    assert not [*Path().iterdir()]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"onnx": False}, ("native",)),
        ({"native": False, "program": True}, ("onnx", "pt2")),
        ({"executorch": True, "torchao": False}, ("native", "onnx", "pte")),
        ({"onnx": True, "compressed": True}, ("native", "onnx", "compressed-tensors")),
    ],
)
def test_the_way_of_before_works_and_says_what_to_write(
    old: dict[str, bool], new: tuple[str, ...]
) -> None:
    said = ", ".join(f"{name}={flag}" for name, flag in old.items())
    with pytest.warns(DeprecationWarning, match=f": {said} is deprecated; use files=") as found:
        callback = ExportCallback("m", **old)  # type: ignore[arg-type]
    assert callback.files == new
    (warning,) = found
    assert warning.filename == __file__
    assert str(warning.message).endswith(f"use files={new!r}.")


def test_both_ways_at_once_are_an_error() -> None:
    with pytest.raises(ValueError, match="and onnx=False; expected files alone"):
        ExportCallback("m", files=("pt2",), onnx=False)
    with pytest.raises(ValueError, match="got native=False, onnx=False; expected at least one"):
        ExportCallback("m", native=False, onnx=False)


def test_export_model_takes_both_and_warns_where_it_is_called() -> None:
    x = torch.randn(4, 8)
    model = calibrated(nn.Sequential(nn.Linear(8, 3)), recipe_of("int8", "int8"), x)
    with pytest.warns(DeprecationWarning, match="onnx=False is deprecated") as found:
        before = export_model(model, "before", x, onnx=False)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        now = export_model(model, "now", x, files=("native",))
    assert before.by_kind.keys() == now.by_kind.keys() == {"native"}
    assert Path("before.safetensors").read_bytes() == Path("now.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("m", "m.pte"), ("m.onnx", "m.pte"), ("run_0.1", "run_0.1.pte"), ("m.pt2", "m.pte")],
)
def test_one_ending_takes_the_place_of_another(given: str, expected: str) -> None:
    assert with_ending(Path("a", given), ".pte") == Path("a", expected)
