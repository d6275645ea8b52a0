"""The `.pte` file in ExecuTorch's own runtime: what it computes, and which layers in integers."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.export import ExportError, export_model, save_executorch
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.proof.executorch_runtime import float_run, load
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.placement import place
from tests.callbacks.digits import statqat, train
from tests.callbacks.test_target import ResidualModule
from tests.export.models import observed, outputs, small_net
from tests.layers.test_gates import Excited
from tests.targets.test_placement import W8A8, Residual
from tests.targets.test_shared_scales import Mixed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    pytest.importorskip("executorch.runtime", exc_type=ImportError)


class Encoder(nn.Module):
    """Linear layers, norms and functions between them, as in an encoder's feed-forward half."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.drop = nn.Dropout(0.1)  # what it returns has two readers
        self.sum, self.head = nn.Identity(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).flatten(0, 1).view(len(x), -1, 12))
        x = self.drop(self.norm(x))
        x = x + self.down(self.act(self.up(x)))
        out: Tensor = self.head(self.sum(x).mean(1))
        return out


class Shuffling(nn.Module):
    """Halves of a tensor, one of which is computed on, shuffled as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_act = nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()
        self.conv, self.act = nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        self.drop, self.last, self.last_act = nn.Dropout(0.1), nn.Conv2d(16, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem_act(self.stem(x)).chunk(2, 1)
        y = torch.cat((left, self.act(self.conv(right))), 1)
        y = y.view(len(y), 2, 8, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        out: Tensor = self.last_act(self.last(self.drop(y))).mean((2, 3))
        return out


def placed(network: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = network().eval()
    return observed(model, place(model, W8A8, lambda: model(x[:2]), "executorch").recipe, x)


@pytest.mark.parametrize(
    "network",
    [
        Mixed,
        Shuffling,
        *(pytest.param(c, marks=pytest.mark.slow) for c in (Residual, Excited, Encoder)),
    ],
)
@pytest.mark.timed
def test_all_layers_run_in_integers(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    x = torch.randn(16, 3, 16, 16)
    model = placed(network, x)

    report = export_model(model, tmp_path / "m", x, files=("pte",), target="executorch")

    found = report.executorch
    assert found is not None
    assert found.path.endswith("m.pte")
    assert found.runtime.startswith("ExecuTorch ")
    assert found.agreement == 1
    assert found.max_steps <= 2
    assert found.snr_db > 35
    assert not [remark for remark in found.remarks if "in float" in remark]
    assert load(tmp_path / "m.pte").in_float() == []
    assert found.milliseconds is not None
    assert found.float_milliseconds is not None
    assert "1 only" in " ".join(found.remarks)


def test_without_a_target_layers_are_in_float_and_named(tmp_path: Path) -> None:
    """Their outputs are not rounded, so there is no kernel for them; the numbers are the same."""
    x = torch.randn(16, 3, 16, 16)
    model = observed(Residual().eval(), W8A8, x)
    save_executorch(model, tmp_path / "m.pte", x)

    runtime = load(tmp_path / "m.pte")

    assert {"blocks.0.conv2", "head"} <= {*runtime.in_float()}
    call = ForwardCall.of(x[:1])
    expected = outputs(model, x[:1])
    assert runtime.batch == 1
    assert (runtime.run(call)[0] - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("inputs", ["int8", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "weights",
    ["int4", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int2", "fp4", "mxfp4", "fp8"))],
)
def test_other_formats_compute_what_was_trained(
    weights: str, inputs: str | None, tmp_path: Path
) -> None:
    x = torch.randn(16, 1, 8, 8)
    model = observed(small_net().eval(), QuantRecipe([QuantRule("*", weights, inputs)]), x)
    save_executorch(model, tmp_path / "m.pte", x)
    expected = outputs(model, x[:1])
    given = load(tmp_path / "m.pte").run(ForwardCall.of(x[:1]))[0]
    bound = 0.02 if inputs else 1e-4
    assert (given - expected).abs().max() <= bound * expected.abs().max()


def test_weights_with_one_scale(tmp_path: Path) -> None:
    x = torch.randn(16, 1, 8, 8)
    recipe = QuantRecipe([QuantRule("*", TensorSpec("int8", "per_tensor"), "int8")])
    model = observed(small_net().eval(), recipe, x)
    save_executorch(model, tmp_path / "m.pte", x)
    given = load(tmp_path / "m.pte").run(ForwardCall.of(x[:1]))[0]
    expected = outputs(model, x[:1])
    assert (given - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_model_of_one_layer(tmp_path: Path) -> None:
    x = torch.randn(8, 6)
    model = observed(nn.Linear(6, 3).eval(), W8A8, x)
    save_executorch(model, tmp_path / "m.pte", x)
    runtime = load(tmp_path / "m.pte")
    assert runtime.in_float() == [""]
    given = runtime.run(ForwardCall.of(x[:1]))[0]
    torch.testing.assert_close(given, outputs(model, x[:1]), rtol=0.02, atol=0.02)


def test_what_lightning_trains_is_what_it_runs(tmp_path: Path) -> None:
    export = ExportCallback(tmp_path / "m", files=("native", "pte"))

    train(statqat("int8", "int8", target="executorch"), export, module=ResidualModule, max_epochs=2)

    assert export.report is not None
    found = export.report.executorch
    assert found is not None
    assert found.agreement == 1
    assert found.snr_db > 40
    assert load(tmp_path / "m.pte").in_float() == []


def test_the_float_model_runs_beside_it() -> None:
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    run = float_run(model, ForwardCall.of(x))
    assert run is not None
    torch.testing.assert_close(run(ForwardCall.of(x))[0], outputs(model, x), rtol=1e-4, atol=1e-5)

    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert float_run(Untraceable(), ForwardCall.of(x)) is None


def test_what_cannot_be_traced_is_named(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x if x.sum() > 0 else -x

    model = observed(Branching().eval(), W8A8, torch.randn(4, 4))
    with pytest.raises(ExportError, match=r"return x if x\.sum\(\) > 0"):
        save_executorch(model, tmp_path / "m.pte", torch.randn(4, 4))
    assert not [*tmp_path.iterdir()]


def test_without_the_package_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "executorch" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModuleNotFoundError, match=r"statqat-lightning\[executorch\]"):
        save_executorch(Residual(), tmp_path / "m.pte", torch.randn(1, 3, 8, 8))
