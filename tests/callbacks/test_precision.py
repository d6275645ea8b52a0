"""Every precision of the Trainer: what quantizers know is float32, whatever the model runs in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from statqat_lightning.error_analysis.spectrum_tables import BINS_PER_OCTAVE
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    loader,
    make_trainer,
    quantizer_of,
    restless,
    scales,
    statqat,
    train,
)

# What layers get to see is of this dtype.
DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
every_precision = pytest.mark.parametrize("precision", DTYPES)
half_precisions = pytest.mark.parametrize("precision", [p for p in DTYPES if "16" in p])

ALL_VALUES = 10**6  # of an input are sampled: no value is left out


def in_precision(precision: str) -> dict[str, Any]:
    """Arguments of a Trainer on the CPU, where Lightning turns 16-mixed into bf16-mixed by name."""
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", device="cpu")]}
    return {"precision": precision}


def tensors_of(thing: Any) -> list[Tensor]:
    """Every tensor that an object holds, at any depth."""
    if isinstance(thing, Tensor):
        return [thing]
    parts = list(thing) if isinstance(thing, list | tuple) else []
    parts += [*thing.values()] if isinstance(thing, dict) else []
    if type(thing).__module__.startswith("statqat_lightning") and hasattr(thing, "__dict__"):
        parts += [*vars(thing).values()]
    return [tensor for part in parts for tensor in tensors_of(part)]


class InputsOf(Callback):
    """Keeps what one layer is given in each training batch, and its statistics after it."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.inputs: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.start: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.start = self.start or scales(pl_module)
        layer = pl_module.get_submodule(self.layer)
        self.hook = layer.register_forward_pre_hook(
            lambda _, args: self.inputs.append(args[0].detach().clone())
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.hook.remove()
        self.states.append(quantizer_state(pl_module)[f"{self.layer}/input"])


@every_precision
@pytest.mark.parametrize("layer", LAYERS)
def test_statistics_are_those_of_what_the_layer_was_given(
    precision: str, layer: str, messages: Messages
) -> None:
    newest = TensorSpec("int8", quantizer="moving_average", averaging_constant=1.0)
    recipe = QuantRecipe([QuantRule(layer, "int4", newest)])
    callback = StatQATCallback(
        recipe=recipe, freeze_at=None, momentum=1.0, max_observed=ALL_VALUES, verbose=False
    )
    inputs = InputsOf(layer)
    module, _ = train(callback, inputs, limit_val_batches=0, **in_precision(precision))
    assert not messages.about("calibration")
    assert len(inputs.inputs) == STEPS_PER_EPOCH
    for given, state in zip(inputs.inputs, inputs.states, strict=True):
        if "true" in precision:  # under autocast some layers are given float32
            assert given.dtype == DTYPES[precision]
        low, high = given.amin().item(), given.amax().item()
        exact = torch.tensor([-low, high], dtype=torch.float64).to(torch.float32)
        assert torch.equal(state["running_extremes"], exact)
        energy = given.double().square().mean().item()
        sums = state["running_sums"]
        # float32 adds up 2048 to 12800 squares in blocks.
        assert InputSums(sums).signal.item() == pytest.approx(energy, rel=1e-5)
        assert InputSums(sums).quantized > 0
    saved = tensors_of(quantizer_state(module))
    assert {tensor.dtype for tensor in saved} == {torch.float32}
    held = tensors_of([q for _, _, q in quantized_layers(module)])
    assert len(held) > len(saved)
    # Formats hold their values in float64; nothing took over the default dtype of the forward.
    floats = {tensor.dtype for tensor in held if tensor.is_floating_point()}
    assert floats <= {torch.float32, torch.float64}


@functools.cache
def first_scales(precision: str) -> dict[str, Tensor]:
    """Scales that calibration chooses, and those of the weights before the first step."""
    inputs = InputsOf("net.0")
    callback = statqat(
        TensorSpec("int4", quantizer="minmax"), "int8", max_observed=ALL_VALUES, freeze_at=None
    )
    train(callback, inputs, limit_val_batches=0, limit_train_batches=2, **in_precision(precision))
    return inputs.start


@every_precision
def test_scales_are_those_of_float32_within_rounding(precision: str) -> None:
    own, reference = first_scales(precision), first_scales("32-true")
    # Pixels are sixteenths: every dtype holds them as they are.
    assert torch.equal(own["net.0/input"], reference["net.0/input"])
    # Rounding changes each value by a share of at most u, and so the largest of a channel.
    u = torch.finfo(DTYPES[precision]).eps / 2
    for layer in LAYERS:
        name = f"{layer}/weight"
        torch.testing.assert_close(own[name], reference[name], rtol=u + 2e-7, atol=0.0)
    # Deeper inputs are rounded a few times on the way, and are then sorted into bins: beside the
    # rounding, a scale may move by as much as one bin.
    few, one_bin = (4 * u, 2 ** (1 / BINS_PER_OCTAVE) - 1) if u > 2**-20 else (2e-7, 0.0)
    for layer in LAYERS[1:]:
        name = f"{layer}/input"
        torch.testing.assert_close(own[name], reference[name], rtol=few + one_bin, atol=0.0)


class Loud(DigitsModule):
    """Pixels of up to 512, whose squares and sums no float16 can hold."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((512 * x, y), batch_idx)


@every_precision
def test_squares_and_sums_are_not_taken_in_half_precision(precision: str) -> None:
    callback = statqat(freeze_at=None, momentum=1.0, max_observed=ALL_VALUES)
    _, run = train(
        callback, module=Loud, data=loader(shuffle=False), limit_train_batches=2,
        limit_val_batches=0, **in_precision(precision)
    )  # fmt: skip
    second = 512 * digits().tensors[0][32:64].double()  # multiples of 32: exact in every dtype
    assert second.square().max() > torch.finfo(torch.float16).max
    assert second.sum() > torch.finfo(torch.float16).max
    sums = run.states[-1]["net.0/input"]["running_sums"]
    assert InputSums(sums).signal.item() == pytest.approx(second.square().mean().item(), rel=1e-5)


# What a value of 1 becomes in the third batch: beyond the dtype, or in float64 beyond float32.
TOO_LARGE = {
    "32-true": float("inf"),
    "64-true": 1e39,
    "bf16-true": 4e38,
    "16-true": 1e5,
    "bf16-mixed": 4e38,
    "16-mixed": 1e5,
}


class Overflows(DigitsModule):
    """One value of an activation in the middle overflows in the third of the training batches."""

    too_large = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.batch = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[2](self.net[1](self.net[0](x)))
        if self.training and self.batch == 2:
            loud = torch.ones_like(h, dtype=torch.float64)
            loud[3, 7] = self.too_large
            h = ((1 + h.to(torch.float64)) * loud).to(h.dtype)
        out: Tensor = self.net[3](h)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch = batch_idx
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else loss.new_zeros((), requires_grad=True)


@every_precision
@pytest.mark.filterwarnings("ignore:StatQAT model. no weight has int4")
def test_an_overflow_is_kept_out_of_the_statistics(precision: str) -> None:
    module = Overflows()
    module.too_large = TOO_LARGE[precision]
    callback = restless(freeze_at=None, calibration_batches=2, max_observed=ALL_VALUES)
    inputs = InputsOf("net.3")
    with pytest.warns(StatQATWarning, match=r"net.3/input: holds NaN, infinite or huge"):
        module, run = train(
            callback, inputs, module=module, data=loader(shuffle=False), limit_val_batches=0,
            **in_precision(precision)
        )  # fmt: skip
    assert not inputs.inputs[2].to(torch.float32).isfinite().all()  # it did overflow
    for state in run.states:
        assert all(tensor.isfinite().all() for tensor in tensors_of(state))
    before, broken = (run.states[i]["net.3/input"] for i in (1, 2))
    # The other values of that batch count, and are one larger.
    assert before["scale"] < broken["scale"] < 3 * before["scale"]
    name = "net.3/input"
    assert quantizer_of(module, name).scale < 3 * before["scale"]


@half_precisions
@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
def test_a_resumed_run_equals_the_uninterrupted_one_in_half_precision(
    precision: str, tmp_path: Path
) -> None:
    data = loader(shuffle=False)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"data": data, "max_epochs": 3}
    whole, witness = train(statqat(), SeedEachBatch(), keep, **options, **in_precision(precision))
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    stored = torch.float32 if "mixed" in precision else DTYPES[precision]
    assert saved["state_dict"]["net.3.weight"].dtype == stored
    resumed, rest = train(
        statqat(), SeedEachBatch(), **options, **in_precision(precision), seed=99,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )  # fmt: skip
    assert len(rest.losses) == 2 * STEPS_PER_EPOCH
    assert rest.losses == witness.losses[STEPS_PER_EPOCH:]
    assert_same(rest.states, witness.states[STEPS_PER_EPOCH:])
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_without_the_plugin_lightning_replaces_mixed_float16_on_the_cpu() -> None:
    """Why these tests make the plugin themselves."""
    with pytest.warns(UserWarning, match="not supported on CPU"):
        trainer = make_trainer(precision="16-mixed")
    assert trainer.precision == "bf16-mixed"
    assert make_trainer(**in_precision("16-mixed")).precision == "16-mixed"
