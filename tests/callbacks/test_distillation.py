"""Distillation: the loss and its gradient by hand, the teacher's isolation, checkpoints, bounds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.special import log_softmax
from torch import Tensor, nn

from statqat_lightning import DistillationCallback, ExportCallback, StatQATCallback
from statqat_lightning.model.distillation import fitting_temperature, kl_divergence
from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    Witness,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    statqat,
)


def module_of(seed: int, cls: type[DigitsModule] = DigitsModule) -> Any:
    torch.manual_seed(seed)
    return cls()


def fit(
    module: LightningModule, *callbacks: Any, ckpt_path: Any = None, **options: Any
) -> tuple[Any, Witness]:
    torch.manual_seed(0)  # of the calibration
    witness = Witness()
    trainer = make_trainer(*callbacks, SeedEachBatch(), witness, **options)
    trainer.fit(module, loader(shuffle=False), held_out(), ckpt_path=ckpt_path)
    return trainer, witness


def by_hand(
    module: DigitsModule, teacher: DigitsModule, steps: int, weight: float, temperature: Any
) -> list[float]:
    """A plain loop in PyTorch; the module is trained, the losses are returned."""
    teacher.eval()
    module.train()
    optimizer = module.configure_optimizers()
    losses, given = [], temperature
    for step, (x, y) in enumerate(loader(shuffle=False)):
        if step == steps:
            break
        torch.manual_seed(step)
        student = module.net(x)
        with torch.no_grad():
            of_teacher = teacher.net(x)
        if given == "auto":  # four times the spread of the differences
            apart = (student.detach() - of_teacher).double().numpy()
            temperature = max(1.0, 4 * math.sqrt(apart.var(axis=1).mean()))
        wanted = F.softmax(of_teacher / temperature, 1)
        cross = -(wanted * F.log_softmax(student / temperature, 1)).sum(1).mean()
        entropy = -(wanted * wanted.log()).sum(1).mean()
        loss = (1 - weight) * F.cross_entropy(student, y)
        loss = loss + weight * temperature**2 * (cross - entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_the_divergence_is_that_of_numpy(temperature: float, dim: int) -> None:
    p, q = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    a, b = (log_softmax(x.double().numpy() / temperature, axis=dim) for x in (q, p))
    expected = (np.exp(a) * (a - b)).sum(dim).mean() * temperature**2
    assert float(kl_divergence(p, q, temperature, dim)) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(p.bfloat16(), q.bfloat16(), temperature, dim).dtype == torch.float32
    assert kl_divergence(p.double(), q.double(), temperature, dim).dtype == torch.float64
    assert float(kl_divergence(p, p, temperature, dim)) == pytest.approx(0, abs=1e-6)


def test_a_temperature_that_follows_the_logits() -> None:
    """Four times the spread, which a shift of all logits does not touch; never below 1."""
    teacher = torch.randn(4, 5, 6)
    student = (teacher + 2 * torch.randn(4, 5, 6) + 7).requires_grad_()
    apart = (student.detach() - teacher).double().numpy()
    found = fitting_temperature(student, teacher, 1)
    assert float(found) == pytest.approx(4 * math.sqrt(apart.var(axis=1).mean()), rel=1e-5)
    assert not found.requires_grad
    assert fitting_temperature(teacher + 0.01, teacher, 1) == 1.0
    assert fitting_temperature(teacher.bfloat16(), teacher.bfloat16(), -1).dtype == torch.float32
    # Far apart, it is half the variance of the differences under the teacher's distribution.
    close, target = torch.randn(6).double(), torch.randn(6).double()
    p = (target / 50).softmax(0)
    mean = (p * (close - target)).sum()
    variance = float((p * (close - target - mean).square()).sum())
    assert float(kl_divergence(close, target, 50.0, 0)) == pytest.approx(variance / 2, rel=0.05)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 2.0), (0.3, 1.0), (0.6, "auto")])
def test_training_is_that_of_a_loop_by_hand(weight: float, temperature: Any) -> None:
    """With dropout and BatchNorm in the module, and another teacher than itself."""
    expected, module, teacher = module_of(1), module_of(1), module_of(2)
    kept = copy.deepcopy(teacher)
    losses = by_hand(expected, copy.deepcopy(teacher), 4, weight, temperature)
    callback = DistillationCallback(teacher, weight=weight, temperature=temperature)
    trainer, witness = fit(module, callback, limit_train_batches=4)
    assert witness.losses == pytest.approx(losses, rel=1e-4)
    for name, value in module.net.state_dict().items():
        assert torch.allclose(value, expected.net.state_dict()[name], rtol=1e-4, atol=1e-6), name
    assert_same(dict(teacher.state_dict()), dict(kept.state_dict()))
    assert teacher.training
    assert trainer.callback_metrics["distillation_loss"] > 0


def test_the_first_teacher_is_the_float_module_as_the_fit_begins() -> None:
    module = module_of(1)
    start = copy.deepcopy(module)
    _, own = fit(module, statqat(), DistillationCallback(), limit_train_batches=4)
    other = module_of(1)
    _, given = fit(other, statqat(), DistillationCallback(start), limit_train_batches=4)
    assert own.losses == given.losses
    assert_same(own.states, given.states)


def test_a_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    teacher = module_of(2)
    trainer, _ = fit(teacher, statqat("int4", "int4"), limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")  # its quantizers are left out
    _, given = fit(module_of(1), DistillationCallback(teacher), limit_train_batches=3)
    path = DistillationCallback(tmp_path / "teacher.ckpt")
    _, read = fit(module_of(1), path, limit_train_batches=3)
    assert read.losses == given.losses
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for name, kind, said in (
        ("gone.ckpt", FileNotFoundError, r"gone.ckpt: no such file"),
        ("other.pt", ValueError, r"no 'state_dict' in .*other.pt"),
        ("text.ckpt", ValueError, r"text.ckpt cannot be read as a checkpoint"),
    ):
        with pytest.raises(kind, match=said):
            fit(module_of(1), DistillationCallback(tmp_path / name), limit_train_batches=1)
    small = module_of(1)
    small.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"the teacher in .*teacher.ckpt is no DigitsModule"):
        fit(small, path, limit_train_batches=3)


class Busy(DigitsModule):
    """Its step draws, counts, logs and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bool] = []
        self.losses_computed = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(self.training)
        x, y = batch
        x = x + 0.01 * torch.randn_like(x)
        out = self(x)
        self.losses_computed += 1
        loss = F.cross_entropy(out, y)
        self.seen.update(x.mean())
        self.log("train_loss", loss)
        return {"loss": loss, "outputs": out.detach()} if batch_idx % 2 else loss


def test_the_teacher_has_no_effect_on_the_training() -> None:
    """A weight of nearly nothing: the run is the one without the callback."""
    module, plain = module_of(1, Busy), module_of(1, Busy)
    callback = DistillationCallback(weight=1e-12)
    trainer, witness = fit(module, statqat(), callback, max_epochs=2)
    trainer_alone, alone = fit(plain, statqat(), max_epochs=2)
    assert witness.losses == pytest.approx(alone.losses, rel=1e-6)
    assert module.calls == plain.calls
    assert module.losses_computed == plain.losses_computed
    assert float(module.seen.compute()) == pytest.approx(float(plain.seen.compute()))
    logged = {*trainer.callback_metrics} - {"distillation_loss"}
    assert logged == {*trainer_alone.callback_metrics}


def test_the_teacher_sees_the_numbers_that_the_module_draws() -> None:
    """With the same noise on its input, a network without dropout equals itself."""
    module = module_of(1, Busy)
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    _, witness = fit(module, DistillationCallback(), limit_train_batches=1)
    assert witness.losses == [pytest.approx(0, abs=1e-6)]


def test_a_teachers_step_ends_with_the_last_output() -> None:
    teacher = module_of(2, Busy)
    callback = DistillationCallback(teacher)
    runs: list[Any] = []

    class Look(Witness):
        def on_train_batch_end(self, *args: Any) -> None:  # type: ignore[override]
            assert callback._run is not None
            runs.append(callback._run._teacher)

    fit(module_of(1, Busy), callback, Look())
    copied = runs[-1]
    assert copied is not teacher
    assert copied.calls == [False] * (STEPS_PER_EPOCH + 1)
    assert copied.losses_computed == 1  # in the first run, which finds the last layer
    assert teacher.calls == []


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
@pytest.mark.parametrize("teacher", [None, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(teacher: int | None, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        other = None if teacher is None else module_of(teacher)
        return [statqat("int4", "int4"), DistillationCallback(other, weight=0.7)]

    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, witness = fit(module_of(1), *callbacks(), checkpoints, max_epochs=3)
    module = module_of(99)  # the teacher is that of the checkpoint, not this one
    _, rest = fit(module, *callbacks(), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rest.losses == witness.losses[STEPS_PER_EPOCH:]
    assert_same(rest.states, witness.states[STEPS_PER_EPOCH:])
    assert_same(dict(module.state_dict()), dict(whole.lightning_module.state_dict()))
    # So does one that goes on from a checkpoint saved after its fit.
    short, _ = fit(module_of(1), *callbacks(), max_epochs=1)
    short.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert ("DistillationCallback" in saved["callbacks"]) == (teacher is None)
    if teacher is None:
        own = saved["callbacks"]["DistillationCallback"]["teacher"]
        assert_same(own, dict(module_of(1).state_dict()))


class Twice(DigitsModule):
    """Calls its layers twice in a step, and has features worth looking at."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x) + self(x.flip(-1)), y)


def test_features_of_named_layers() -> None:
    torch.manual_seed(0)
    module, teacher = module_of(1, Twice), module_of(2, Twice)
    for part in (module, teacher):
        part.net[6] = nn.Identity()
    x = next(iter(loader(shuffle=False)))[0]

    def features(net: Any, x: Tensor, training: bool) -> list[Tensor]:
        first = net.train(training)[0](x)
        return [first, net[1:4](first)]

    first, second = copy.deepcopy(module.net), copy.deepcopy(teacher.net)
    expected = [
        (a - b).square().mean().item()
        for image in (x, x.flip(-1))
        for a, b in zip(features(first, image, True), features(second, image, False), strict=True)
    ]
    callback = DistillationCallback(teacher, layers=["net.0", "net.3"], loss="mse")
    _, witness = fit(module, callback, limit_train_batches=1)
    assert witness.losses == [pytest.approx(sum(expected) / 4, rel=1e-5)]


class WritesToOutputs(DigitsModule):
    """Layers whose outputs are written to by what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.net[5] = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        logits /= 0.07
        return logits


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("options", [{}, {"layers": ["net.4"], "loss": "mse"}])
def test_what_a_layer_returned_counts_and_not_what_was_made_of_it(options: Any) -> None:
    module = module_of(1, WritesToOutputs)
    module.net.eval()  # the module is its own teacher, to the last bit
    _, witness = fit(module, DistillationCallback(**options), limit_train_batches=1)
    assert witness.losses == [pytest.approx(0, abs=1e-6)]


class Extra(nn.Linear):
    """A layer that keeps more than tensors."""

    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"calls": 1}


class KeepsPart(DigitsModule):
    """Keeps what is not trained out of its checkpoints, as with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.net[8] = Extra(72, 10)
        self.strict_loading = False
        self.net[0].requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("net.0.")}


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
def test_a_module_that_keeps_part_of_its_weights_and_more_than_weights(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [statqat("int4", "int4"), DistillationCallback()]

    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, witness = fit(module_of(1, KeepsPart), *callbacks(), checkpoints, max_epochs=2)
    module = module_of(1, KeepsPart)
    _, rest = fit(module, *callbacks(), max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rest.losses == witness.losses[STEPS_PER_EPOCH:]


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")
def test_logits_and_features_in_one_fit(tmp_path: Path) -> None:
    """Each callback takes the loss as those before it left it."""
    module, teacher = module_of(1), module_of(2)

    def both(teacher: Any = None) -> list[Any]:
        features = DistillationCallback(teacher, layers=["net.3"], loss="mse", weight=0.25)
        return [DistillationCallback(teacher, weight=0.5), features]

    torch.manual_seed(0)
    x, y = next(iter(loader(shuffle=False)))
    first, second = copy.deepcopy(module.net).train(), copy.deepcopy(teacher.net).eval()
    with torch.no_grad():
        mse = (first[:4](x) - second[:4](x)).square().mean()
        torch.manual_seed(0)  # of the dropout
        logits, wanted = first(x), second(x)
    kl = kl_divergence(logits, wanted, 2.0, -1)
    expected = 0.75 * (0.5 * F.cross_entropy(logits, y) + 0.5 * kl) + 0.25 * mse
    trainer, witness = fit(module, *both(teacher), limit_train_batches=1)
    assert witness.losses == [pytest.approx(float(expected), rel=1e-4)]
    logged = trainer.callback_metrics
    assert float(logged["distillation_loss"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(logged["distillation_loss_2"]) == pytest.approx(float(mse), rel=1e-4)

    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, whole = fit(module_of(1), statqat(), *both(), checkpoints, max_epochs=2)
    first_epoch = tmp_path / "epoch=0.ckpt"
    _, rest = fit(module_of(9), statqat(), *both(), max_epochs=2, ckpt_path=first_epoch)
    assert rest.losses == whole.losses[STEPS_PER_EPOCH:]


class Segmenter(DigitsModule):
    """Its classes are in dimension 1, and its labels in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3, padding=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[0][:, 0] * 2).long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_classes_of_convolutions_are_in_dimension_one() -> None:
    module, teacher = module_of(1, Segmenter), module_of(2, Segmenter)
    x = next(iter(loader(shuffle=False)))[0]
    with torch.no_grad():
        a, b = (log_softmax(m.net(x).double().numpy(), axis=1) for m in (teacher, module))
    expected = (np.exp(a) * (a - b)).sum(1).mean()
    _, witness = fit(module, DistillationCallback(teacher, temperature=1.0), limit_train_batches=1)
    assert witness.losses == [pytest.approx(expected, rel=1e-5)]


def test_own_losses_and_other_architectures() -> None:
    torch.manual_seed(3)
    teacher = DigitsModule()
    teacher.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    seen: list[tuple[int, ...]] = []

    def cosine(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append(tuple(student.shape))
        return 1 - F.cosine_similarity(student, teacher).mean()

    callback = DistillationCallback(teacher, layers={"net.8": "net.3"}, loss=cosine)
    _, witness = fit(module_of(1), statqat(), callback, limit_train_batches=2)
    assert seen == [(32, 10)] * 2
    assert all(0 < loss < 2 for loss in witness.losses)


def test_it_helps_a_narrow_network_and_is_told(messages: Messages) -> None:
    """Trained in float first: its knowledge comes back faster than the labels give it."""
    module = module_of(1)
    fit(module, max_epochs=20)
    start = copy.deepcopy(module)
    images = digits().tensors[0]
    with torch.no_grad():
        wanted = start.eval()(images)
    distances = []
    for distilled in (False, True):
        own = copy.deepcopy(start).train()
        extra = [DistillationCallback()] if distilled else []
        fit(own, statqat("int2", "int3", first_last_bits=None), *extra, max_epochs=4)
        with torch.no_grad():
            distances.append(float(kl_divergence(own.eval()(images), wanted, 1.0, 1)))
    assert distances[1] < 0.8 * distances[0]
    (told,) = messages.about("Distillation: ")
    assert "kl at temperature 2 on the output of net.8, weight 1" in told
    assert "M parameters (0.0 MB). It took " in told


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_with_everything_else(precision: Any) -> None:
    """Accumulation, clipping, a schedule's callback order, mixed precision, the export."""
    module = module_of(1)
    export = ExportCallback("m", measure_latency=False)
    callbacks = [DistillationCallback(weight=0.5), export, statqat("int8", "int8", target=None)]
    if precision == "64-true":
        module.double()
    options = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    if precision == "64-true":
        callbacks.remove(export)
    _, witness = fit(module, *callbacks, **options)
    assert all(map(math.isfinite, witness.losses))
    assert len(quantized_layers(module)) == 3
    hooks = [m._forward_hooks for m in module.modules()]
    assert not any(hooks)
    assert "training_step" not in vars(module)
    if precision == "bf16-mixed":
        assert export.report is not None
        assert export.report.native is not None


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_teacher_in_float32_runs_in_the_precision_of_the_fit(precision: Any) -> None:
    _, witness = fit(
        module_of(1), DistillationCallback(module_of(2)), precision=precision, max_steps=2
    )
    assert all(map(math.isfinite, witness.losses))


class WritesToItsBatch(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(0.5)
        return F.cross_entropy(self(batch[0]), batch[1])


class LeavesItsBatch(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] * 0.5), batch[1])


def test_a_step_that_writes_to_its_batch_does_not_write_twice() -> None:
    losses = []
    for cls in (WritesToItsBatch, LeavesItsBatch):
        callback = DistillationCallback(module_of(2, cls), weight=0.5)
        losses.append(fit(module_of(1, cls), callback, limit_train_batches=4)[1].losses)
    assert losses[0] == losses[1]


class LeavesOut(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_that_are_left_out() -> None:
    _, witness = fit(module_of(1, LeavesOut), DistillationCallback(), limit_train_batches=3)
    assert len(witness.losses) == 2


class Manual(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Frozen(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            features = self.net[:8](batch[0])
        return F.cross_entropy(self.net[8](features), batch[1])


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (Manual, {}, "Manual optimizes manually"),
        (DigitsModule, {"layers": ["net.9"]}, r"the module has no layers \['net.9'\]; expected of"),
        (DigitsModule, {"layers": {"net.8": "head"}}, r"the teacher has no layers \['head'\]"),
        (DigitsModule, {"layers": {"net.8": "net.3"}}, r"shape \(32, 10\), its teacher \(32, 8"),
        (Frozen, {"layers": ["net.0"]}, "output of layer 'net.0' has no gradient"),
        (DigitsModule, {"layers": ["seen"]}, "layer 'seen' ran 0 times in a training step"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    cls: type[DigitsModule], options: dict[str, Any], said: str
) -> None:
    module = module_of(1, cls)
    with pytest.raises(ValueError, match=said):
        fit(module, statqat(), DistillationCallback(**options), limit_train_batches=1)
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": nn.Linear(1, 1)}, "got a Linear as teacher; expected a LightningModule"),
        ({"layers": "fc"}, "got layers='fc'; expected names of layers in a list"),
        ({"layers": []}, r"got layers=\[\]"),
        ({"loss": "ce"}, "got loss='ce'; expected 'kl', 'mse' or a function"),
        ({"weight": 0.0}, "got weight=0.0; expected above 0 and at most 1"),
        ({"weight": 1.5}, "got weight=1.5"),
        ({"temperature": 0.0}, "got temperature=0.0; expected 'auto' or a number above 0"),
        ({"temperature": "Auto"}, "got temperature='Auto'"),
        ({"temperature": float("nan")}, "got temperature=nan"),
    ],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillationCallback(**options)


def test_beside_a_plain_callback_of_the_same_fit() -> None:
    """Two fits of one callback: the second teacher is the module as the first fit has left it."""
    module, callback = module_of(1), DistillationCallback()
    fit(module, StatQATCallback("int4", "int4", verbose=False), callback, limit_train_batches=2)
    between = copy.deepcopy(module)
    trainer, _ = fit(module, callback, limit_train_batches=1)
    trainer.save_checkpoint("m.ckpt")
    saved = torch.load("m.ckpt", weights_only=True)["callbacks"]["DistillationCallback"]["teacher"]
    assert_same(saved, {k: v for k, v in between.state_dict().items() if k in saved})
