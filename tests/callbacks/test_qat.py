"""The model stays the user's model; statistics move at batch ends, and only in training."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    Witness,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    restless,
    rounded_int,
    scales,
    small_cnn,
    statqat,
    train,
)


class LayersFromSetup(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        self.net = small_cnn()


class LayersFromConfigureModel(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = small_cnn()


MODULES = [DigitsModule, LayersFromSetup, LayersFromConfigureModel]


class OptimizerNames(Callback):
    """Names of the parameters in each group of the optimizer, and the group's options."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.groups = [
            {"params": [names[id(p)] for p in group["params"]]}
            | {key: value for key, value in group.items() if key != "params"}
            for group in trainer.optimizers[0].param_groups
        ]


@pytest.mark.parametrize("kind", MODULES)
def test_names_and_optimizer_groups_are_those_of_the_float_run(kind: type[DigitsModule]) -> None:
    groups = OptimizerNames(), OptimizerNames()
    plain, _ = train(groups[0], module=kind)
    module, _ = train(statqat(), groups[1], module=kind)
    assert [layer.name for layer in quantized_layers(module)] == [*LAYERS]
    assert [*module.state_dict()] == [*plain.state_dict()]
    assert [name for name, _ in module.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert [name for name, _ in module.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]
    assert groups[0].groups == groups[1].groups
    plain.load_state_dict(module.state_dict(), strict=True)


def test_parameters_stay_the_same_objects() -> None:
    module = DigitsModule()
    before = dict(module.named_parameters())
    train(statqat(), module=module)
    after = dict(module.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(module.net[0], nn.Conv2d)
    assert isinstance(module.net[8], nn.Linear)


@pytest.mark.parametrize("kind", MODULES)
def test_switched_off_it_is_the_float_run_bit_for_bit(kind: type[DigitsModule]) -> None:
    L.seed_everything(5, verbose=False)
    start = kind()
    plain, float_run = train(module=copy.deepcopy(start), max_epochs=2)
    module, run = train(statqat(enabled=False), module=copy.deepcopy(start), max_epochs=2)
    assert run.losses == float_run.losses
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))
    # It observed nevertheless; switched on, it is another run.
    assert quantizer_of(module, "net.3/input").observer.num_batches > STEPS_PER_EPOCH
    assert not torch.equal(run.states[-1]["net.3/input"]["scale"], torch.ones(()))
    _, quantized = train(statqat(), module=copy.deepcopy(start), max_epochs=2)
    assert quantized.losses != float_run.losses


class ScalesInStep(Callback):
    """Scales at the start, within and at the end of each batch, and the optimizer step then."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.start = scales(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert_same(scales(pl_module), self.start)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.rows.append((trainer.global_step, self.start, scales(pl_module)))


def test_scales_move_at_the_end_of_a_batch_with_an_optimizer_step_and_at_no_other_time() -> None:
    witness = ScalesInStep()
    train(restless(freeze_at=None), witness, accumulate_grad_batches=2)
    steps = [0, *(step for step, _, _ in witness.rows)]
    assert steps == [0, 0, 1, 1, 2, 2, 3]
    for (_, start, end), before, after in zip(witness.rows, steps, steps[1:], strict=False):
        moved = {name for name in start if not torch.equal(start[name], end[name])}
        assert moved == (set(start) if after > before else set())


def test_refresh_every_waits_for_so_many_batches_or_the_end_of_the_epoch() -> None:
    _, witness = train(statqat(refresh_every=4, freeze_at=None), max_epochs=2)
    inputs = [state["net.0/input"]["num_batches"].item() for state in witness.states]
    calibrated = inputs[0]
    assert [count - calibrated for count in inputs] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4]


def test_scales_rest_while_their_error_is_near_the_least() -> None:
    """What the default does, beside rules that take the best scale every time."""
    _, witness = train(statqat(freeze_at=None), max_epochs=4)
    _, other = train(restless(freeze_at=None), max_epochs=4)
    for name in ("net.3/weight", "net.3/input"):
        changes, often = (
            sum(not a[name]["scale"].equal(b[name]["scale"]) for a, b in itertools.pairwise(states))
            for states in (witness.states, other.states)
        )
        assert changes < 6 < 20 < often


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_inputs_are_quantized_again_without_a_change_of_any_number(target: str | None) -> None:
    options: dict[str, Any] = {"target": target, "weights": "int8", "activations": "int8"}
    module, run = train(statqat(**options), max_epochs=2)
    own, again = train(statqat(recompute_inputs=True, **options), max_epochs=2)
    assert again.losses == run.losses
    assert_same(again.states, run.states)
    assert_same(dict(own.state_dict()), dict(module.state_dict()))
    inputs = [q.input for _, _, q in quantized_layers(own) if q.input is not None]
    assert inputs
    assert all(quantizer.recompute for quantizer in inputs)


class TwoLosses(DigitsModule):
    """One layer is used twice in a forward pass, on inputs of different range."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(64, 10)
        self.ranges: list[tuple[float, float]] = []
        self.shared.register_forward_pre_hook(self._remember)

    def _remember(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.ranges.append((args[0].min().item(), args[0].max().item()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        flat = x.flatten(1) * (1 + batch_idx)
        return F.cross_entropy(self.shared(flat) + self.shared(-3 * flat), y)


def test_a_layer_used_twice_counts_one_batch_with_both_inputs() -> None:
    newest = TensorSpec("int8", quantizer="moving_average", averaging_constant=1.0)
    recipe = QuantRecipe([QuantRule("shared", inputs=newest)])
    callback = StatQATCallback(recipe=recipe, freeze_at=None, verbose=False)
    module, witness = train(callback, module=TwoLosses(), limit_val_batches=0)
    # Each batch calls the layer twice; the recorded ranges of the module are those of training,
    # because calibration runs on a copy.
    assert len(module.ranges) == 2 * STEPS_PER_EPOCH
    calibrated = witness.states[0]["shared/input"]["num_batches"] - 1
    for index, state in enumerate(witness.states):
        both = module.ranges[2 * index : 2 * index + 2]
        low, high = min(r[0] for r in both), max(r[1] for r in both)
        assert state["shared/input"]["running_extremes"].tolist() == [-low, high]
        assert state["shared/input"]["num_batches"] == calibrated + 1 + index


def test_validation_and_sanity_check_leave_no_trace_in_the_statistics() -> None:
    # A generator of its own: starting a loader draws from the global one, in float runs, too.
    other = loader(digits_times_ten(), shuffle=False, generator=torch.Generator())
    _, without = train(statqat(), max_epochs=2, limit_val_batches=0)
    module, with_validation = train(
        statqat(), validation=other, max_epochs=2, val_check_interval=2, num_sanity_val_steps=2
    )
    assert_same(with_validation.states, without.states)
    assert with_validation.losses == without.losses
    before = quantizer_state(module)
    trainer = make_trainer(statqat())
    trainer.validate(module, other, verbose=False)
    trainer.test(module, other, verbose=False)
    assert_same(quantizer_state(module), before)


def digits_times_ten() -> Any:
    images, labels = digits().tensors
    return torch.utils.data.TensorDataset(10 * images, labels)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_backbone_in_eval_mode_is_observed() -> None:
    module = DigitsModule()
    module.net.eval()
    module, witness = train(restless(freeze_at=None), module=module)
    assert not module.net[3].training
    counts = [state["net.3/input"]["num_batches"].item() for state in witness.states]
    assert counts == [*range(int(counts[0]), int(counts[0]) + STEPS_PER_EPOCH)]
    assert witness.states[0]["net.3/input"]["scale"] != witness.states[-1]["net.3/input"]["scale"]


def behind_scales(state: dict[str, Any]) -> dict[str, Any]:
    """All but the running sums of the SNR, which go on when scales are frozen."""
    return {
        name: {key: value for key, value in entry.items() if key != "running_sums"}
        for name, entry in state.items()
    }


@pytest.mark.parametrize(
    ("length", "freeze_at", "first_frozen"),
    [
        ({"max_epochs": 2}, 0.5, 6),
        ({"max_epochs": 2}, 0.9, 11),
        ({"max_epochs": -1, "max_steps": 8}, 0.5, 4),
        ({"max_epochs": 2}, None, 12),
    ],
)
def test_scales_stop_at_the_share_of_the_training(
    length: dict[str, Any], freeze_at: float | None, first_frozen: int, messages: Messages
) -> None:
    _, witness = train(restless(freeze_at=freeze_at), **length)
    states = [behind_scales(state) for state in witness.states]
    for state in states[first_frozen:]:
        assert_same(state, states[first_frozen - 1])
    for before, after in itertools.pairwise(states[:first_frozen]):
        # At 8 bits, as in the other layers, a scale may stay the same to the last bit by chance.
        for name in ("net.3/weight", "net.3/input"):
            assert not torch.equal(before[name]["scale"], after[name]["scale"])
    said = messages.about("frozen")
    assert len(said) == (first_frozen < len(states))
    assert all(f"frozen at step {first_frozen}" in message for message in said)


def test_a_second_fit_starts_unfrozen() -> None:
    module, first = train(restless(freeze_at=0.5))
    _, second = train(restless(freeze_at=0.5), module=module)
    frozen, moving = first.states[-1]["net.3/input"], second.states[0]["net.3/input"]
    assert moving["num_batches"] == frozen["num_batches"] + 1
    assert moving["scale"] != frozen["scale"]


def test_weights_only_recipe_quantizes_no_input(messages: Messages) -> None:
    module, _ = train(statqat("int4", None), limit_val_batches=0)
    assert all(q.input is None for _, _, q in quantized_layers(module))
    assert not messages.about("calibration")
    layer = module.net[3]
    x = torch.randn(4, 8, 8, 8)
    weight = rounded_int(layer.weight, quantizer_of(module, "net.3/weight").scale, -7, 7)
    assert torch.equal(layer(x), F.conv2d(x, weight, layer.bias, stride=2))
    assert not torch.equal(weight, layer.weight)


def test_activations_only_recipe_quantizes_no_weight() -> None:
    module, _ = train(statqat(None, "int4"))
    assert all(q.weight is None for _, _, q in quantized_layers(module))
    layer, inputs = module.net[3], quantizer_of(module, "net.3/input")
    x = torch.randn(4, 8, 8, 8).relu()
    assert inputs.fmt.name == "uint4"  # it follows a ReLU
    x_hat = rounded_int(x, inputs.scale, 0, 15)
    assert torch.equal(layer(x), F.conv2d(x_hat, layer.weight, layer.bias, stride=2))
    assert not torch.equal(x_hat, x)


def test_floats_work_as_well_as_integers() -> None:
    module, witness = train(StatQATCallback("fp4_e2m1", "fp8_e4m3", verbose=False), max_epochs=4)
    assert witness.losses[-1] < 0.6 * witness.losses[0]
    layer, quantizer = module.net[3], quantizer_of(module, "net.3/weight")
    steps = (quantizer(layer.weight) / quantizer.scale).abs().unique()
    fp4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert (steps.unsqueeze(1) - fp4).abs().amin(1).max() < 1e-5  # division by the scale rounds
    assert len(steps) > 5
    inputs = quantizer_of(module, "net.3/input")
    x = torch.rand(1000) * 100 * inputs.scale
    as_torch = (x / inputs.scale).to(torch.float8_e4m3fn).float() * inputs.scale
    assert torch.equal(inputs(x), as_torch)


def test_recipe_from_a_yaml_path(working_directory: Path) -> None:
    path = working_directory / "recipe.yaml"
    QuantRecipe([QuantRule("net.3", "int2", "uint3"), QuantRule("net.8", "int5")]).to_yaml(path)
    module, _ = train(StatQATCallback(recipe=path, verbose=False))
    formats = {
        q.name: q.fmt.name for _, _, layer in quantized_layers(module) for q in layer.present()
    }
    assert formats == {"net.3/weight": "int2", "net.3/input": "uint3", "net.8/weight": "int5"}


def test_exclude_leaves_layers_in_float_and_the_report_says_so() -> None:
    callback = statqat(exclude=["type:Linear"])
    module, _ = train(callback)
    assert [layer.name for layer in quantized_layers(module)] == ["net.0", "net.3"]
    assert callback.report is not None
    reasons = {row.name: row.reason for row in callback.report.rows}
    assert "type:Linear" in reasons["net.8"]


def test_report_lists_every_layer_and_is_printed_once(messages: Messages) -> None:
    module = DigitsModule()
    callback = StatQATCallback("int4", "int4")
    train(callback, module=module)
    make_trainer(callback).validate(module, held_out(), verbose=False)
    (report,) = messages.about("layers quantized")
    lines = [line.split() for line in report.splitlines()]
    assert ["net.0", "Conv2d", "80", "int8", "uint8"] in lines
    assert ["net.3", "Conv2d", "584", "int4", "uint4"] in lines
    assert "2 BatchNorm2d (32): normalisation stays in float" in report
    assert "3 of 5 layers" in report
    assert callback.report is not None
    rows = [line.split() for line in callback.report.table().splitlines()]
    assert ["net.3", "Conv2d", "584", "int4", "per_channel", "analytic", "uint4"] in [
        row[:7] for row in rows
    ]
    assert "1,394 of 1,426 parameters (97.8 %)" in report


def test_fitting_twice_inserts_once_and_goes_on() -> None:
    callback = statqat(freeze_at=None)
    module, first = train(callback)
    classes = [type(layer) for _, layer, _ in quantized_layers(module)]
    module, second = train(callback, module=module)
    assert [type(layer) for _, layer, _ in quantized_layers(module)] == classes
    assert [cls.__mro__[1] for cls in classes] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    counts = [w.states[0]["net.0/input"]["num_batches"].item() for w in (first, second)]
    assert counts[1] == counts[0] + STEPS_PER_EPOCH
    assert second.losses[-1] < first.losses[-1]


class Stop(Exception):
    pass


class FailsOnce(DigitsModule):
    failing = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 3 and self.failing:
            raise Stop
        return super().training_step(batch, batch_idx)


def test_after_an_exception_the_module_can_be_fitted_again() -> None:
    module = FailsOnce()
    callback = statqat()
    with pytest.raises(Stop):
        train(callback, module=module)
    assert not {"setup", "on_load_checkpoint"} & set(vars(module))
    observed = quantizer_state(module)
    module(digits().tensors[0])  # outside training nothing is observed
    module.failing = False
    _, witness = train(callback, module=module)
    before, after = observed["net.0/input"], witness.states[0]["net.0/input"]
    assert after["num_batches"] == before["num_batches"] + 1
    assert len(witness.losses) == STEPS_PER_EPOCH


class CopyInFit(Callback):
    """Copies the module in the middle of a fit, by pickle and by deepcopy."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if args[-1] == 2:
            self.copies = [pickle.loads(pickle.dumps(pl_module)), copy.deepcopy(pl_module)]
            self.state = quantizer_state(pl_module)
            x = digits().tensors[0]
            self.outputs = [copy.deepcopy(pl_module).eval()(x)]
            self.outputs += [each.eval()(x) for each in self.copies]


def test_the_module_can_be_pickled_and_copied_during_fit() -> None:
    copying = CopyInFit()
    module, _ = train(statqat(), copying, callbacks_last := Witness())
    assert len(callbacks_last.losses) == STEPS_PER_EPOCH
    for each in copying.copies:
        assert_same(quantizer_state(each), copying.state)
        assert each.net[3] is not module.net[3]
    # They stayed what they were, while the module was trained further.
    assert_same(copying.outputs[1:], copying.outputs[:1] * 2)
    assert not torch.equal(module.eval()(digits().tensors[0]), copying.outputs[0])
