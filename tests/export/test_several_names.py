"""One module under several names: ALBERT's layers, `ModuleList([block] * 3)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export import export_model, freeze, load_compressed, load_quantized
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.native import read_header
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from tests.export.models import calibrated, outputs, recipe_of


class Repeats(nn.Module):
    """A block three times, and a tensor of its own that is shared, too."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    ("weights", "inputs"), [("int4", "int8"), ("mxfp4", None), ("nf4", None), ("int8", "int8")]
)
def test_every_kind_of_file_holds_a_module_under_several_names(weights: str, inputs: Any) -> None:
    x = torch.randn(32, 16)
    model = calibrated(Repeats(), recipe_of(weights, inputs), x)
    integers = weights.startswith("int")
    report = export_model(
        model,
        "m",
        x,
        files=("native", "onnx", "pt2", *(("torchao", "compressed-tensors") if integers else ())),
        measure_latency=False,
    )
    assert len(report.artefacts) == (5 if integers else 3), report.notes
    expected = outputs(model, x)
    loaded = load_quantized(Repeats(), "m.safetensors")
    assert torch.equal(outputs(loaded, x), expected)
    assert loaded.blocks[0] is loaded.blocks[2]  # type: ignore[index]
    assert [*read_header("m.safetensors")["layers"]] == ["blocks.0.0", "head"]
    # The part of it, by any of its names, and a model in which the copies are separate ones.
    part = load_quantized(Repeats().blocks[0], "m.safetensors")
    assert torch.equal(outputs(part, x), outputs(model.blocks[0], x))  # type: ignore[index]
    apart = Repeats()
    apart.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))
    assert torch.equal(outputs(load_quantized(apart, "m.safetensors"), x), expected)
    (given,) = onnx_session("m.onnx").run(None, {"x": x.numpy()})
    assert (torch.from_numpy(given) - expected).abs().max() < 0.02 * expected.abs().max()
    if integers:
        float_model: Any = load_compressed(Repeats(), "m.compressed")
        frozen: Any = freeze(model)
        assert torch.equal(float_model.blocks[2][0].weight, frozen.blocks[2][0].weight)


class SecondNameRuns(nn.Module):
    """A BatchNorm under two names, of which the forward uses the second: folded once, and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)] * 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norms[1](self.conv(x))
        return out


def test_a_folded_norm_is_gone_under_all_its_names() -> None:
    x = torch.randn(16, 1, 6, 6)
    frozen = freeze(calibrated(SecondNameRuns(), recipe_of("int4"), x))
    folded = fold_batch_norm(frozen, ForwardCall.of(x))
    assert folded.layers == {"conv": "norms.0"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.model.modules())
    assert torch.allclose(folded.model(x), frozen(x), atol=1e-5)
