from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export import ExportError, load_torchao, save_torchao, to_torchao
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import set_enabled
from tests.export.models import calibrated, images, outputs, recipe_of, small_net


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", [None, "per_tensor", "per_group:16"])
def test_weights_multiply_to_the_bit_and_survive_the_file(
    bits: int, granularity: str | None
) -> None:
    x = torch.randn(8, 64)
    model = calibrated(linears(), recipe_of(f"int{bits}", None, granularity), x)
    converted: Any = to_torchao(model)
    expected = outputs(model, x)
    assert torch.equal(converted(x), expected)
    save_torchao(model, "m.torchao.pt")
    again: Any = load_torchao(linears(), "m.torchao.pt")
    assert torch.equal(again(x), expected)
    frozen: Any = freeze(model)
    for number in (0, 2):
        weight = again[number].weight
        assert type(weight.data).__name__ == "IntxUnpackedToInt8Tensor"
        assert type(again[number]) is nn.Linear
        # torchao's own dequantization, against ours.
        assert torch.equal(weight.data.dequantize(), frozen[number].weight)
        assert weight.data.target_dtype == getattr(torch, f"int{bits}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(8, 64, dtype=dtype)
    model = calibrated(linears().to(dtype), recipe_of("int4"), x)
    if dtype == torch.float64:
        with pytest.raises(ExportError, match="there are none"):
            to_torchao(model)
    else:
        assert torch.equal(to_torchao(model)(x), outputs(model, x))


def test_full_range_integers_reach_their_lowest_code() -> None:
    x = torch.randn(8, 64)
    model = calibrated(linears(), recipe_of("int4_full"), x)
    model[0].weight.data[0, 0] = -9  # type: ignore[index, union-attr]
    assert torch.equal(to_torchao(model)(x), outputs(model, x))
    assert int(to_torchao(model)[0].weight.data.qdata.min()) == -8  # type: ignore[index, union-attr]


def test_other_layers_are_dequantized_and_inputs_stay_in_float() -> None:
    model = calibrated(small_net(), recipe_of("int4", "int8"), images())
    x = images()
    converted = to_torchao(model)
    set_enabled(model, inputs=False)
    assert torch.equal(converted(x), outputs(model, x))


def test_what_torchao_cannot_hold_is_named() -> None:
    model = calibrated(linears(), recipe_of("fp4"), torch.randn(4, 64))
    with pytest.raises(ExportError, match=r"Layers here: 0 \(Linear, fp4_e2m1\), 2 \(Linear,"):
        to_torchao(model)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"statqat-lightning\[torchao\]"):
        to_torchao(linears())


def test_files_of_another_model_and_truncated_ones() -> None:
    model = calibrated(linears(), recipe_of("int4"), torch.randn(4, 64))
    save_torchao(model, "m.torchao.pt")
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded into Linear .*Missing key"):
        load_torchao(nn.Linear(3, 3), "m.torchao.pt")
    data = Path("m.torchao.pt").read_bytes()
    Path("m.torchao.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"m.torchao.pt: cannot be loaded"):
        load_torchao(linears(), "m.torchao.pt")


def test_attention_runs_with_its_last_projection_in_float() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    prepare(model, "int8", None)
    x = torch.randn(3, 5, 8)

    plain = to_torchao(model)

    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))
    assert type(plain.get_parameter("layers.0.self_attn.out_proj.weight").data) is Tensor
