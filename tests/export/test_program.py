from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export import ExportError, export_model, save_program
from statqat_lightning.export.files.tracing import operators_of, where_it_stopped
from statqat_lightning.export.freezing.frozen import freeze
from tests.export.fresh import run_fresh
from tests.export.models import (
    Branches,
    Everything,
    calibrated,
    images,
    outputs,
    recipe_of,
    small_net,
)

ALONE = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("statqat_lightning", "lightning", "torchmetrics"):
            raise ImportError(name)


sys.meta_path.insert(0, Blocked())
import torch

for number in range(int(sys.argv[1])):
    model = torch.export.load(f"{number}.pt2").module()
    x, expected = torch.load(f"{number}.pt", weights_only=True)
    assert torch.equal(model(x), expected), number
    assert model(x[:1]).shape == expected[:1].shape
assert not [name for name in sys.modules if name.startswith("statqat")]
"""


def test_a_process_with_torch_alone_gets_the_same_outputs() -> None:
    kinds = [
        ("int4", "int4", None),
        ("nf4", "fp8", None),
        ("mxfp4", None, None),
        ("levels:-1,0,0.5", "levels:-1,0,0.5,1", None),
    ]
    x = images(5)
    for number, (weights, inputs, granularity) in enumerate(kinds):
        model = calibrated(Everything(), recipe_of(weights, inputs, granularity), images(16))
        save_program(model, f"{number}.pt2", x)
        torch.save((x, outputs(model, x)), f"{number}.pt")
    run_fresh(ALONE, str(len(kinds)))


def test_the_graph_is_pytorch_s_own_and_holds_no_data(tmp_path: Path) -> None:
    model = calibrated(small_net(), recipe_of("int4", "int4"), images())
    save_program(freeze(model), "m.pt2", images(64))
    program = torch.export.load("m.pt2")
    assert all(name.startswith("aten.") for name in operators_of(program))
    assert program.example_inputs is None
    assert str(Path(__file__)).encode() not in Path("m.pt2").read_bytes()


def test_keyword_arguments_structures_and_flags() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, a: Tensor, *, pair: Any, negate: bool = False) -> dict[str, Tensor]:
            out = self.fc(a + pair[0])
            return {"out": -out if negate else out, "ids": pair[1] + 1}

    x, y, ids = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6)
    model: Any = Model()
    arguments = {"a": x, "pair": (y, ids), "negate": True}
    report = export_arguments(model, arguments)
    assert report.program.max_steps == 0
    module = torch.export.load("m.pt2").module()
    given = module(**arguments)
    expected = model(**arguments)
    assert torch.equal(given["out"], expected["out"])
    assert torch.equal(given["ids"], expected["ids"])


def export_arguments(model: nn.Module, arguments: dict[str, Any]) -> Any:
    from statqat_lightning.model.insertion import prepare
    from statqat_lightning.model.quantized_model import refresh, set_observing

    prepare(model, recipe=recipe_of("int4", "int8"))
    set_observing(model, True)
    model(**arguments)
    refresh(model)
    set_observing(model, False)
    model.eval()
    return export_model(model, "m", arguments, files=("native", "pt2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(16, 8, dtype=dtype)
    calibrated(model, recipe_of("int4", "int8"), x)
    save_program(model, "m.pt2", x)
    given = torch.export.load("m.pt2").module()(x)
    assert given.dtype == dtype
    assert torch.equal(given, outputs(model, x))


def test_the_line_that_cannot_be_traced_is_named_and_the_native_file_written() -> None:
    model = calibrated(Branches(), recipe_of("int4", "int4"), torch.randn(4, 4))
    Path("m.pt2").write_bytes(b"old")
    where = r"stopped at \".*models.py\", line \d+, in forward: .*# the culprit"
    with pytest.raises(ExportError, match=where):
        save_program(model, "m.pt2", torch.randn(4, 4))
    report = export_model(model, "m", torch.randn(4, 4), files=("native", "onnx", "pt2"))
    for note, title in zip(report.notes, ("ONNX", "torch.export"), strict=True):
        assert note.startswith(f"{title}: not written. ")
        assert "# the culprit" in note
        assert ", in forward: return out" in note
    assert report.program is None
    assert Path("m.pt2").read_bytes() == b"old"
    assert Path("m.safetensors").exists()
    assert not [*Path().glob(".m*")]


def test_operators_of_other_libraries_are_refused() -> None:
    @torch.library.custom_op("test_statqat::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(lambda x: torch.empty_like(x))

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = twice(self.fc(x))
            return out

    model = calibrated(Custom(), recipe_of("int4"), torch.randn(4, 4))
    with pytest.raises(ExportError, match=r"calls test_statqat.twice.default, which torch alone"):
        save_program(model, "m.pt2", torch.randn(4, 4))
    assert not [*Path().iterdir()]


def test_an_error_without_a_line_of_the_user_names_none() -> None:
    assert where_it_stopped(ValueError("nowhere")) == ""


def test_without_an_input_the_note_says_how_to_give_one() -> None:
    model = calibrated(small_net(), recipe_of("int4"), images())
    report = export_model(model, "m", files=("native", "onnx", "pt2"))
    assert [note.split(":")[0] for note in report.notes] == ["ONNX", "torch.export"]
    assert all("Set example_input_array in the LightningModule" in note for note in report.notes)
    assert report.program is None
    assert report.native is not None
