"""Learned scales in real runs of the Trainer: they train, resume, freeze, and leave no trace."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec, freeze, prepare, remove
from statqat_lightning.callbacks import SNRMonitor, StatQATCallback
from statqat_lightning.export import load_quantized, save_native
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_frozen,
    set_observing,
)
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    assert_same,
    digits,
    loader,
    quantizer_of,
    scales,
    small_cnn,
    train,
)

LEARNED = [f"{layer}.{role}_scale" for layer in LAYERS for role in ("weight", "input")]


def recipe(weights: str = "int4", inputs: str = "int4") -> QuantRecipe:
    adaptive = inputs.startswith("int")
    return QuantRecipe(
        [
            QuantRule(
                "*",
                TensorSpec(weights, quantizer="lsq"),
                TensorSpec(inputs, quantizer="lsq", unsigned_if_nonnegative=adaptive),
            )
        ]
    )


def lsq(**options: Any) -> StatQATCallback:
    return StatQATCallback(recipe=recipe(), **({"verbose": False, "freeze_at": None} | options))


class Scales(Callback):
    """The scales at the start of every batch and after the last, and whether they are trained."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.trained: list[bool] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        self.seen.append(scales(pl_module))
        self.trained.append(all(p.requires_grad for p in learned(pl_module).values()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(scales(pl_module))


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if name.endswith("_scale")}


@pytest.mark.parametrize(("weights", "inputs"), [("int4", "int4"), ("fp4", "fp8")])
def test_scales_are_parameters_that_training_moves(weights: str, inputs: str) -> None:
    witness = Scales()
    callback = StatQATCallback(recipe=recipe(weights, inputs), freeze_at=None, verbose=False)
    module, run = train(callback, witness, max_epochs=2)
    assert sorted(learned(module)) == sorted(LEARNED)
    for name, first in witness.seen[0].items():
        last = witness.seen[-1][name]
        assert not torch.equal(first, last), name
        assert (last > 0).all()
        assert not torch.equal(first, torch.ones_like(first)), name  # calibration gave the start
    assert learned(module)["net.0.weight_scale"].shape == (8, 1, 1, 1)
    assert learned(module)["net.0.input_scale"].shape == ()
    assert run.losses[-1] < run.losses[0]
    optimizer = module.trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trained for p in learned(module).values())


def test_first_scales_are_those_of_the_paper() -> None:
    witness = Scales()
    module = DigitsModule()
    weight = module.net[0].weight.detach().clone()
    train(lsq(), witness, module=module, max_epochs=1)
    expected = 2 * weight.abs().mean((1, 2, 3)) / math.sqrt(7)
    torch.testing.assert_close(witness.seen[0]["net.0/weight"].flatten(), expected)
    images = digits().tensors[0]
    pixels = 2 * images.mean() / math.sqrt(15)  # unsigned: no pixel is negative
    torch.testing.assert_close(witness.seen[0]["net.0/input"], pixels, rtol=0.05, atol=0)


def test_freezing_stops_them() -> None:
    witness = Scales()
    module, _ = train(lsq(freeze_at=0.5), witness, max_epochs=2)
    assert witness.trained == [True] * STEPS_PER_EPOCH + [False] * STEPS_PER_EPOCH
    frozen = witness.seen[STEPS_PER_EPOCH]
    assert_same(frozen, witness.seen[-1])
    assert any(not torch.equal(witness.seen[0][name], frozen[name]) for name in frozen)
    assert not any(p.requires_grad for p in learned(module).values())
    again = Scales()
    train(lsq(), again, module=module, max_epochs=1)
    assert all(again.trained)


class SeedEachBatch(Callback):
    """Dropout draws the same numbers in a batch, whatever has been drawn before."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
@pytest.mark.parametrize("freeze_at", [None, 0.5])
def test_a_resumed_run_equals_the_uninterrupted_one(
    freeze_at: float | None, tmp_path: Path
) -> None:
    data = loader(shuffle=False)
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = (lsq(freeze_at=freeze_at), SeedEachBatch())
    whole, witness = train(*callbacks, checkpoints, data=data, max_epochs=3)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert not set(LEARNED) & set(saved["state_dict"])  # a float module loads it strictly
    resumed, rest = train(
        *(lsq(freeze_at=freeze_at), SeedEachBatch()),
        data=data,
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=0.ckpt",
        seed=99,
    )
    assert rest.losses == witness.losses[STEPS_PER_EPOCH:]
    assert_same(rest.states, witness.states[STEPS_PER_EPOCH:])
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_remove_gives_the_keys_of_the_float_model_back() -> None:
    module, _ = train(lsq(), max_epochs=1)
    float_keys = list(DigitsModule().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.0\.weight_scale"):
        DigitsModule().load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.weight_scale"):
        module.load_state_dict(DigitsModule().state_dict())
    remove(module)
    assert list(module.state_dict()) == float_keys
    assert not learned(module)
    DigitsModule().load_state_dict(module.state_dict())


def test_another_recipe_takes_them_out() -> None:
    module, _ = train(lsq(), max_epochs=1)
    prepare(module, "int4", "int4")
    assert not learned(module)
    prepare(module, recipe=recipe())
    assert sorted(learned(module)) == sorted(LEARNED)


def test_snr_is_tracked() -> None:
    monitor = SNRMonitor()
    train(lsq(), monitor, max_epochs=2)
    _, last = monitor.history[-1]
    assert len(last) == 2 * len(LAYERS)
    assert all(3 < value < 40 for value in last.values())


def test_export_uses_the_learned_scales(tmp_path: Path) -> None:
    module, _ = train(lsq(), max_epochs=1)
    module.eval()
    x = digits().tensors[0][:16]
    frozen = freeze(module.net)
    with torch.no_grad():
        expected = module.net(x)
        assert torch.equal(frozen(x), expected)
    names = list(frozen.state_dict())
    assert not [name for name, _ in frozen.named_parameters() if name.endswith("_scale")]
    assert "0.weight_scale" in names
    path = tmp_path / "net.safetensors"
    save_native(module.net, path)
    with torch.no_grad():
        assert torch.equal(load_quantized(small_cnn(), path).eval()(x), expected)


# Without a Trainer


def layer() -> nn.Linear:
    linear = nn.Linear(6, 4)
    prepare(linear, recipe=recipe())
    set_observing(linear, True)
    linear(torch.randn(32, 6))
    refresh(linear)
    return linear


def test_a_refresh_leaves_them_alone() -> None:
    linear = layer()
    before = scales(linear)
    set_observing(linear, True)
    linear(100 * torch.randn(32, 6))
    with torch.no_grad():
        linear.weight.mul_(50)
    refresh(linear)
    assert_same(before, scales(linear))


def test_copies_and_pickles_have_scales_of_their_own() -> None:
    linear = layer()
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        for role in ("weight", "input"):
            scale = getattr(other, f"{role}_scale")
            assert quantizer_of(other, f"/{role}").scale is scale
            assert scale is not getattr(linear, f"{role}_scale")
            assert torch.equal(scale, getattr(linear, f"{role}_scale"))


def test_scales_stay_float32_and_the_same_parameters_in_any_precision() -> None:
    linear = layer()
    parameters = [linear.weight_scale, linear.input_scale]
    values = scales(linear)
    linear.weight_scale.grad = torch.ones_like(linear.weight_scale)
    for move in (nn.Module.bfloat16, nn.Module.double, nn.Module.half, nn.Module.float):
        move(linear)
        assert linear.weight_scale is parameters[0] is quantizer_of(linear, "/weight").scale
        assert linear.input_scale is parameters[1] is quantizer_of(linear, "/input").scale
        assert linear.weight_scale.dtype == linear.weight_scale.grad.dtype == torch.float32
    assert_same(values, scales(linear))
    linear.bfloat16()
    linear(torch.randn(3, 6, dtype=torch.bfloat16)).sum().backward()
    assert linear.input_scale.grad is not None


def test_a_scale_below_zero_counts_as_tiny_and_comes_back() -> None:
    linear = layer()
    optimizer = torch.optim.SGD([linear.input_scale], lr=1e-2)
    with torch.no_grad():
        linear.input_scale.fill_(-0.5)
    x = torch.rand(64, 6) + 1
    assert linear(x).isfinite().all()
    assert quantizer_of(linear, "/input").qparams.scale > 0
    for _ in range(200):
        optimizer.zero_grad()
        quantized = quantizer_of(linear, "/input").quantize(x)
        (quantized - x).square().sum().backward()
        optimizer.step()
    assert linear.input_scale > 0.05


def test_frozen_scales_have_no_gradient() -> None:
    linear = layer()
    linear(torch.randn(3, 6)).sum().backward()
    set_frozen(linear, True)
    assert linear.weight_scale.grad is linear.input_scale.grad is None
    linear(torch.randn(3, 6)).sum().backward()
    assert linear.weight_scale.grad is linear.input_scale.grad is None
    set_frozen(linear, False)
    linear(torch.randn(3, 6)).sum().backward()
    assert linear.input_scale.grad is not None


def test_a_layer_with_such_an_attribute_is_refused() -> None:
    linear = nn.Linear(3, 3)
    linear.weight_scale = 1.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match="weight: the layer has an attribute 'weight_scale' of it"):
        prepare(linear, recipe=recipe())
    assert type(linear) is nn.Linear


def test_reports_count_the_parameters_of_the_float_model() -> None:
    linear = nn.Linear(6, 4)
    first = prepare(linear, recipe=recipe())
    assert str(prepare(linear, recipe=recipe())) == str(first)
    assert len(quantized_layers(linear)) == 1


@pytest.mark.parametrize("rule", ["pass_through", "magnitude"])
def test_other_gradients_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=f"gradient='{rule}' with quantizer 'lsq'; expected 'clip"):
        TensorSpec("int4", quantizer="lsq", gradient=rule)
