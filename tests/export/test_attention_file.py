"""Attention in an `.onnx` file: its products run on integers of both signs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from statqat_lightning import freeze, prepare
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.divergence import first_divergence
from statqat_lightning.export.proof.onnx_runtime import load_onnx
from statqat_lightning.model.quantized_model import refresh, set_observing


class Attends(nn.Module):
    """The projections read a transposed input, past which ONNX Runtime moves DequantizeLinear."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 32)
        nn.init.normal_(self.attention.in_proj_bias)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return y


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    prepare(model.eval(), first_last_bits=None)
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    return model


def test_attention_computes_what_the_frozen_model_computes(tmp_path: Path) -> None:
    x = torch.randn(8, 10, 32)
    model = calibrated(Attends(), x)
    save_onnx(model, tmp_path / "m.onnx", x)
    frozen, runtime = freeze(model), load_onnx(tmp_path / "m.onnx")
    call = ForwardCall((x,), {})
    (found,) = runtime.run(call)
    torch.testing.assert_close(found, frozen(x), rtol=1e-5, atol=1e-5)
    assert first_divergence(frozen, call, runtime.layer_outputs(call), [found]) is None


def test_a_rounded_output_is_compared_after_rounding(tmp_path: Path) -> None:
    from statqat_lightning import QuantRecipe, QuantRule

    x = torch.randn(6, 12)
    model = nn.Sequential(nn.Linear(12, 9), nn.PReLU(), nn.Linear(9, 4)).eval()
    prepare(model, recipe=QuantRecipe([QuantRule("*", "int8", "int8", "int8")]))
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    frozen, call = freeze(model), ForwardCall((x,), {})
    # A runtime shows what a layer computes, before it is rounded.
    layer = frozen.get_submodule("0")
    inner = torch.nn.functional.linear(layer.rounded("input", x), layer.weight, layer.bias)
    rounded = layer.rounded("output", inner)
    assert not torch.equal(inner, rounded)
    assert first_divergence(frozen, call, {"0": [inner]}, [frozen(x)]) is None
    scale = float(layer.get_buffer("output_scale"))
    wrong = first_divergence(frozen, call, {"0": [inner + 20 * scale]}, [frozen(x)])
    assert wrong is not None
    assert wrong.layer == "0"
