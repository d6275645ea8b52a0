"""Layers besides Linear and Conv: frozen, written, read back and run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from statqat_lightning import load_quantized, prepare
from statqat_lightning.export.files.native import save_native
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


class Crossed(nn.Module):
    """Attention whose keys and values are narrower than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, query: torch.Tensor, memory: torch.Tensor) -> Any:
        return self.attention(query, memory, memory, need_weights=False)[0]


def models() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    torch.manual_seed(0)
    return {
        "transposed": (
            nn.Sequential(
                nn.ConvTranspose2d(3, 6, 3, 2), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3, groups=6)
            ),
            (torch.randn(4, 3, 5, 5),),
        ),
        "recurrent": (Recurrent(), (torch.randint(0, 20, (4, 7)),)),
        "encoder": (
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
            (torch.randn(4, 5, 8),),
        ),
        "crossed": (Crossed(), (torch.randn(4, 5, 8), torch.randn(4, 7, 6))),
        "outputs": (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
            (torch.randn(4, 3, 6, 6),),
        ),
    }


RECIPES = {
    "recurrent": [QuantRule("type:Embedding", "int8"), QuantRule("*", "int4", "int8")],
    "outputs": [QuantRule("1", outputs="int8"), QuantRule("*", "int4", "int8", "int8")],
}


def trained(name: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """A float model, the same with quantizers that know their inputs, and an input."""
    model, inputs = models()[name]
    rules = RECIPES.get(name, [QuantRule("*", "int4", "int8")])
    plain = copy.deepcopy(model)
    prepare(model, recipe=QuantRecipe(rules))
    set_observing(model, True)
    model(*inputs)
    refresh(model)
    set_observing(model, False)
    return plain, model.eval(), inputs


@pytest.mark.parametrize("name", models())
def test_frozen_models_give_the_same_outputs(name: str) -> None:
    _, model, inputs = trained(name)
    expected = model(*inputs)
    frozen = freeze(model)
    assert torch.equal(frozen(*inputs), expected)
    assert torch.equal(copy.deepcopy(frozen)(*inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(*inputs), expected)
    assert frozen_layers(frozen)
    half = copy.deepcopy(frozen).bfloat16()
    floats = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    assert half(*floats).dtype == torch.bfloat16
    for layer in frozen_layers(frozen):
        for role in layer.layer.frozen_weights:
            assert role not in layer.layer._parameters
    stored = sum(t.numel() for t in frozen.parameters())
    assert stored < sum(t.numel() for t in model.parameters()) / 2


@pytest.mark.parametrize("name", models())
def test_native_files_reload_bit_for_bit(name: str, tmp_path: Path) -> None:
    plain, model, inputs = trained(name)
    save_native(model, tmp_path / "model.safetensors")
    for parameter in plain.parameters():
        nn.init.constant_(parameter, float("nan"))
    again = load_quantized(plain, tmp_path / "model.safetensors")
    assert torch.equal(again(*inputs), model(*inputs))


@pytest.mark.parametrize("name", models())
def test_onnx_files_run(name: str, tmp_path: Path) -> None:
    _, model, inputs = trained(name)
    save_onnx(model, tmp_path / "model.onnx", inputs)
    session = onnx_session(tmp_path / "model.onnx")
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    given = torch.from_numpy(session.run(None, feed)[0])
    difference = (given - model(*inputs)).abs()
    # A value at the border of two codes may fall on the other side.
    assert difference.median() < 1e-5
    assert difference.max() < 0.1 * given.abs().max()
    dynamic = {i.name: x[:3].numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    assert session.run(None, dynamic)[0].shape[0] == 3
