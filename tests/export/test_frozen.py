from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export.freezing.frozen import (
    LeftInFloatWarning,
    freeze,
    frozen_layers,
    use_float_weights,
)
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer
from statqat_lightning.layers.quantized_layer import is_quantized
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers, set_enabled
from tests.export.models import (
    FORMATS_AND_GRANULARITIES,
    Everything,
    ScaledLinear,
    calibrated,
    images,
    outputs,
    recipe_of,
    small_net,
)

EVERYTHING_LAYERS = ("conv3d", "conv2d", "conv1d", "own", "head")


def everything(
    weights: str = "int4", inputs: str | None = "int4", granularity: str = "per_channel"
) -> tuple[nn.Module, Tensor]:
    x = images()
    recipe = recipe_of(weights, inputs, granularity)
    if granularity.startswith("per_group"):
        return calibrated(small_net()[2:], recipe, torch.randn(8, 8, 8, 8)), torch.randn(8, 8, 8, 8)
    return calibrated(Everything(), recipe, x), images()


@pytest.mark.parametrize(("fmt", "granularity"), FORMATS_AND_GRANULARITIES)
def test_frozen_outputs_are_bit_equal(fmt: str, granularity: str) -> None:
    model, x = everything(fmt, fmt, granularity)
    assert torch.equal(freeze(model)(x), outputs(model, x))


def test_codes_and_scales_take_the_place_of_weights() -> None:
    model, _ = everything("int4", "fp8_e4m3")
    frozen = freeze(model)
    state = frozen.state_dict()
    for name, layer, quantizers in quantized_layers(model):
        assert f"{name}.weight" not in state
        codes, scale = state[f"{name}.weight_codes"], state[f"{name}.weight_scale"]
        assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float32)
        assert codes.shape == layer.weight.shape
        assert codes.max() < 2**4
        assert quantizers.weight is not None
        assert quantizers.input is not None
        assert torch.equal(scale, quantizers.weight.scale)
        assert torch.equal(state[f"{name}.input_scale"], quantizers.input.scale)
        assert torch.equal(
            frozen.get_submodule(name).weight,  # type: ignore[arg-type]
            quantizers.weight(layer.weight),  # type: ignore[arg-type]
        )
    assert [name for name, _ in frozen_layers(frozen)] == [*EVERYTHING_LAYERS]
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(is_quantized(m) for m in frozen.modules())


def test_the_model_itself_is_not_touched() -> None:
    model, x = everything()
    model.train()
    before = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    freeze(model)
    assert model.training
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model(x).requires_grad


def test_layers_keep_their_class_and_the_class_is_made_once() -> None:
    model, _ = everything()
    first, second = freeze(model), freeze(model)
    assert isinstance(first.own, ScaledLinear)
    assert isinstance(first.own, FrozenLayer)
    assert type(first.own) is type(second.own)


def test_a_model_that_is_one_layer() -> None:
    x = torch.randn(5, 6)
    layer = calibrated(nn.Linear(6, 3), recipe_of("int4", "int4"), x)
    assert torch.equal(freeze(layer)(x), outputs(layer, x))


def test_deepcopy_and_pickle() -> None:
    model, x = everything()
    frozen = freeze(model)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(again(x), frozen(x))
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_bit_equal_and_keep_float32_scales(dtype: torch.dtype) -> None:
    x = torch.randn(16, 12, dtype=dtype)
    make = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    model = calibrated(make.to(dtype), recipe_of("int4", "int8"), x)
    frozen: Any = freeze(model)
    assert torch.equal(frozen(x), outputs(model, x))
    assert frozen[0].weight.dtype == dtype
    assert frozen[0].weight_scale.dtype == torch.float32
    wide = copy.deepcopy(frozen).float()
    assert wide[0].weight.dtype == wide[0].weight_scale.dtype == torch.float32
    assert wide(x.float()).dtype == torch.float32


def test_autocast_gives_what_the_model_gives() -> None:
    model, x = everything()
    frozen = freeze(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(frozen(x), model(x))


def test_parametrized_weights() -> None:
    x = torch.randn(16, 12)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))
    model = calibrated(nn.Sequential(layer, nn.ReLU()), recipe_of("int4", "int4"), x)
    frozen = freeze(model)
    assert torch.equal(frozen(x), outputs(model, x))
    assert not any("original" in name for name in frozen.state_dict())


def test_a_weight_from_a_hook_is_refused() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(12, 8))
    model = nn.Sequential(layer)
    prepare(model, "int4", None)
    with torch.no_grad():
        model(torch.randn(2, 12))
        layer.weight = layer.weight.detach()
    with pytest.raises(ValueError, match=r"layer '0' is not a parameter: a forward hook makes it"):
        freeze(model)


def test_what_has_no_scale_or_is_switched_off_stays_in_float_and_is_named() -> None:
    x = images()
    model: nn.Module = small_net()
    prepare(model, recipe=recipe_of("int4", "int4"))
    with pytest.warns(LeftInFloatWarning, match=r"0/input \(no statistics\), 2/input"):
        frozen = freeze(model.eval())
    assert torch.equal(frozen(x), outputs(model, x))

    model, x = everything()
    quantized_layers(model)[0].quantizers.weight.enabled = False  # type: ignore[union-attr]
    quantized_layers(model)[1].quantizers.input.enabled = False  # type: ignore[union-attr]
    with pytest.warns(LeftInFloatWarning, match=r"conv3d/weight \(switched off\), conv2d/input"):
        frozen = freeze(model)
    assert torch.equal(frozen(x), outputs(model, x))
    assert "conv3d.weight" in frozen.state_dict()


def test_nothing_to_freeze_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got a Sequential without quantizers.*prepare\(model\)"):
        freeze(small_net())
    model, _ = everything()
    set_enabled(model, weights=False, inputs=False)
    with pytest.raises(ValueError, match="all switched off or without statistics: conv3d/weight"):
        freeze(model)


def test_nan_in_a_weight_is_an_error_that_names_it() -> None:
    model, _ = everything()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="head/weight"):
        freeze(model)


def test_a_frozen_model_runs_without_lightning(tmp_path: Path, repository: Path) -> None:
    model = calibrated(small_net(), recipe_of("int4", "int4"), x := images())
    torch.save(freeze(model), tmp_path / "frozen.pt")
    torch.save((x, outputs(model, x)), tmp_path / "expected.pt")
    script = (
        "import sys, types, torch\n"
        # The package's own `__init__` brings the callbacks; the export room must not need them.
        "package = types.ModuleType('statqat_lightning'); package.__path__ = "
        f"[{str(repository / 'statqat_lightning')!r}]\n"
        "sys.modules['statqat_lightning'] = package\n"
        "frozen = torch.load('frozen.pt', weights_only=False)\n"
        "x, expected = torch.load('expected.pt')\n"
        "assert torch.equal(frozen(x), expected)\n"
        "assert not any(name.startswith(('lightning', 'onnx')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


class Masked(nn.Linear):
    """Has a buffer whose name begins as those of its codes do."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.register_buffer("weight_mask", torch.ones(3, 8))

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight * self.weight_mask, self.bias)


def test_float_weights_take_nothing_but_codes_away() -> None:
    x = torch.randn(4, 8)
    model = calibrated(nn.Sequential(Masked()), recipe_of("int4"), x)
    frozen = freeze(model)
    expected = frozen(x)
    use_float_weights(frozen[0])
    assert {*dict(frozen[0].named_buffers())} == {"weight_mask"}
    assert torch.equal(frozen(x), expected)
