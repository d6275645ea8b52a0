"""Whatever a Trainer is told to do, and in whatever order, the callback lives with it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from statqat_lightning.callbacks.qat import StatQATWarning
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    quantized_layers,
    quantizer_state,
)
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    Witness,
    assert_same,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    restless,
    rounded_int,
    scales,
    statqat,
    train,
)


class Predicts(DigitsModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out


def assert_at_rest(module: nn.Module) -> None:
    """Three layers with quantizers, none observing; no hook that a Trainer needs is wrapped."""
    assert [layer.name for layer in quantized_layers(module)] == [*LAYERS]
    assert not any(q.observing for q in activation_quantizers(module))
    assert not {"setup", "configure_model", "on_load_checkpoint"} & set(vars(module))


# What a Trainer is told


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"max_epochs": 0}, 0),
        ({"max_steps": 0}, 0),
        ({"limit_train_batches": 0}, 0),
        ({"limit_val_batches": 0}, STEPS_PER_EPOCH),
        ({"limit_test_batches": 0}, STEPS_PER_EPOCH),
        ({"num_sanity_val_steps": 0}, STEPS_PER_EPOCH),
        ({"num_sanity_val_steps": -1}, STEPS_PER_EPOCH),
        ({"overfit_batches": 2}, 2),
        ({"limit_train_batches": 0.5, "val_check_interval": 2}, STEPS_PER_EPOCH // 2),
        ({"detect_anomaly": True}, STEPS_PER_EPOCH),
        ({"max_time": {"minutes": 5}}, STEPS_PER_EPOCH),
    ],
)
def test_short_and_empty_runs(options: dict[str, Any], steps: int) -> None:
    module, run = train(statqat(), data=loader(shuffle=False), **options)
    assert len(run.losses) == steps
    assert_at_rest(module)
    assert [q.ready for q in activation_quantizers(module)] == [steps > 0] * 3
    # A full run afterwards is none the worse.
    module, run = train(statqat(freeze_at=None), module=module)
    assert len(run.losses) == STEPS_PER_EPOCH
    assert all(q.ready for q in activation_quantizers(module))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_barebones() -> None:
    module = DigitsModule()
    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[statqat()])
    trainer.fit(module, loader(), held_out())
    assert_at_rest(module)
    assert all(q.ready for q in activation_quantizers(module))
    _, same = train(statqat(), limit_val_batches=0)
    assert set(same.states[-1]) == set(quantizer_state(module))


class Norms(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        # Lightning clips between this hook and the step: the next one sees what was left.
        optimizer.register_step_pre_hook(lambda *_: self._note(pl_module))

    def _note(self, pl_module: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(algorithm: str) -> None:
    options: dict[str, Any] = {
        "gradient_clip_val": 1e-2,
        "gradient_clip_algorithm": algorithm,
        "max_epochs": 1,
    }
    norms = Norms()
    _, run = train(statqat(), norms, **options)
    assert len(run.losses) == STEPS_PER_EPOCH
    if algorithm == "norm":
        assert max(norms.norms) <= 1e-2 * (1 + 1e-5)
    _, float_run = train(**options)
    _, switched_off = train(statqat(enabled=False), **options)
    assert switched_off.losses == float_run.losses


class TwoOptimizers(DigitsModule):
    """One for the convolutions, one for the rest, that steps at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizers[0], 1.0, "norm")
        optimizers[0].step()
        if batch_idx % 2:
            optimizers[1].step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[:6].parameters(), lr=0.1),
            torch.optim.Adam(self.net[6:].parameters(), lr=0.1),
        ]


def test_several_optimizers() -> None:
    module, run = train(restless(freeze_at=None), module=TwoOptimizers, limit_val_batches=0)
    assert_at_rest(module)
    of_first, of_second = (
        [state[name]["scale"] for state in run.states] for name in ("net.3/weight", "net.8/weight")
    )
    assert all(not a.equal(b) for a, b in itertools.pairwise(of_first))
    # After every second batch; in between its weights rest, and the scales may settle.
    assert all(not a.equal(b) for a, b in itertools.pairwise(of_second[1::2]))


class SeveralForwards(DigitsModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_runs_the_step_several_times() -> None:
    _, run = train(statqat(freeze_at=None), module=SeveralForwards, limit_val_batches=0)
    counts = [state["net.3/input"]["num_batches"].item() for state in run.states]
    assert counts == [counts[0] + i for i in range(STEPS_PER_EPOCH)]


def test_inference_mode_makes_no_difference() -> None:
    (on, run), (off, other) = (
        train(statqat(), max_epochs=2, inference_mode=inference_mode)
        for inference_mode in (True, False)
    )
    assert run.losses == other.losses
    assert_same(run.states, other.states)
    for inference_mode in (True, False):
        results = [
            make_trainer(statqat(), inference_mode=inference_mode).test(
                module, held_out(), verbose=False
            )
            for module in (on, off)
        ]
        assert results[0] == results[1]
    assert not any(q.scale.is_inference() for q in activation_quantizers(on))


# In any order


@pytest.mark.filterwarnings("ignore::statqat_lightning.callbacks.qat.StatQATWarning")
@pytest.mark.parametrize("order", [*itertools.permutations(["validate", "test", "predict"])])
def test_stages_alone_and_in_any_order(order: tuple[str, ...]) -> None:
    module, callback = Predicts(), statqat()
    trainer = make_trainer(callback)

    def evaluate() -> list[Any]:
        results = {}
        for stage in order:
            options = {} if stage == "predict" else {"verbose": False}
            results[stage] = getattr(trainer, stage)(module, held_out(), **options)
            assert_at_rest(module)
        return [results[stage] for stage in ("validate", "test", "predict")]

    validated, tested, predicted = evaluate()
    assert validated[0]["val_loss"] == tested[0]["test_loss"]
    before = quantizer_state(module)
    assert not any(entry["ready"] for name, entry in before.items() if name.endswith("input"))
    trainer.fit(module, loader(), held_out())
    trained = quantizer_state(module)
    assert all(entry["ready"] for entry in trained.values())
    validated, tested, later = evaluate()
    assert validated[0]["val_loss"] == tested[0]["test_loss"]
    assert not torch.equal(later[0], predicted[0])
    assert_same(quantizer_state(module), trained)


def test_evaluation_alone_says_what_is_missing() -> None:
    with pytest.warns(StatQATWarning, match=r"no statistics, so these inputs are evaluated in f"):
        make_trainer(statqat()).validate(DigitsModule(), held_out(), verbose=False)


def test_several_trainers_on_one_module() -> None:
    module = DigitsModule()
    first, second = (make_trainer(statqat(freeze_at=None), Witness()) for _ in range(2))
    first.fit(module, loader(), held_out())
    classes = [type(layer) for _, layer, _ in quantized_layers(module)]
    one, two = (
        trainer.test(module, held_out(), verbose=False)[0]["test_loss"]
        for trainer in (first, second)
    )
    assert one == two
    counted = quantizer_state(module)["net.3/input"]["num_batches"]
    second.fit(module, loader(), held_out())
    assert [type(layer) for _, layer, _ in quantized_layers(module)] == classes
    assert quantizer_state(module)["net.3/input"]["num_batches"] == counted + STEPS_PER_EPOCH
    first.fit_loop.max_epochs = 2
    first.fit(module, loader(), held_out())
    assert quantizer_state(module)["net.3/input"]["num_batches"] == counted + 2 * STEPS_PER_EPOCH
    assert_at_rest(module)


class Interrupts(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        assert all(q.observing for q in activation_quantizers(pl_module))
        if args[-1] == 3:
            raise KeyboardInterrupt


def test_after_ctrl_c_the_module_can_be_fitted_again() -> None:
    module, callback = DigitsModule(), statqat(freeze_at=None)
    # Lightning ends the process, or returns from the fit, depending on its version.
    trainer = make_trainer(callback, Interrupts())
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        trainer.fit(module, loader(), held_out())
    assert trainer.interrupted
    assert_at_rest(module)
    counted = quantizer_state(module)["net.3/input"]["num_batches"]
    _, run = train(callback, module=module)
    assert len(run.losses) == STEPS_PER_EPOCH
    # What the unfinished batch had added is forgotten.
    assert run.states[0]["net.3/input"]["num_batches"] == counted + 1


# Weights that others write to


class WritesWeights(Callback):
    """Writes to a weight in place between steps, and looks at what the layer computes then."""

    def __init__(self, through_data: bool) -> None:
        self.through_data = through_data
        self.num_seen = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        layer = pl_module.net[3]
        if self.through_data:
            layer.weight.data.clamp_(-0.05, 0.05).mul_(1.01)
        else:
            with torch.no_grad():
                layer.weight.clamp_(-0.05, 0.05).mul_(1.01)
        self.hook = layer.register_forward_hook(self._look)

    def _look(self, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        both = layer._statqat
        weight = rounded_int(layer.weight.detach(), both.weight.scale, -7, 7)
        x = rounded_int(args[0].detach(), both.input.scale, 0, 15)
        expected = F.conv2d(x, weight, layer.bias, stride=2)
        torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-5)
        self.num_seen += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.hook.remove()


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_written_to_in_place_between_steps(through_data: bool) -> None:
    writer = WritesWeights(through_data)
    module, _ = train(statqat(freeze_at=None), writer, limit_val_batches=0)
    assert writer.num_seen == STEPS_PER_EPOCH
    assert module.net[3].weight.abs().max() < 0.2
    assert quantizer_of(module, "net.3/weight").scale.max() < 0.2 / 7


# Checkpoints that Lightning finds itself


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
def test_the_last_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    data = loader(shuffle=False)
    whole, witness = train(statqat(freeze_at=None), SeedEachBatch(), data=data, max_epochs=3)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    half, _ = train(statqat(freeze_at=None), SeedEachBatch(), keep, data=data, max_epochs=2)
    resumed, rest = train(
        statqat(freeze_at=None),
        SeedEachBatch(),
        ModelCheckpoint(tmp_path, save_last=True, save_top_k=0),
        data=data,
        max_epochs=3,
        ckpt_path="last",
        seed=99,
    )
    assert len(rest.losses) == STEPS_PER_EPOCH
    assert rest.losses == witness.losses[-STEPS_PER_EPOCH:]
    assert_same(rest.states, witness.states[-STEPS_PER_EPOCH:])
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert not scales(half)["net.3/weight"].equal(scales(whole)["net.3/weight"])
