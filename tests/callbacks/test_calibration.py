"""Calibration sees training batches before the first step, and the run never notices."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, Sampler, default_collate

from statqat_lightning import DistillationCallback, QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from statqat_lightning.fake_quant.observers import statistics_of
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    AtStart,
    Collections,
    DigitsModule,
    Stream,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    once,
    quantizer_of,
    statqat,
    train,
)


class Noisy(Dataset[Any]):
    """Augmentation with all three global generators."""

    def __len__(self) -> int:
        return len(digits())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = digits()[index]
        return x + torch.rand(()) + np.random.rand() + random.random(), y


class Rotating(Sampler[int]):
    """Starts at another image in every epoch: it counts how often it was asked."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from ((index + 50 * self.epochs) % len(self) for index in range(len(self)))

    def __len__(self) -> int:
        return len(digits())


class Endless(Sampler[int]):
    """Random images without end; it has no length."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(len(digits()), ()))


class RotatingBatches(BatchSampler):
    def __init__(self) -> None:
        super().__init__(Rotating(), 32, drop_last=False)


DATA: dict[str, Callable[[], Any]] = {
    "shuffled": loader,
    "augmented": lambda: loader(Noisy()),
    "own generator": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "own sampler": lambda: loader(shuffle=False, sampler=Rotating()),
    "endless sampler": lambda: loader(shuffle=False, sampler=Endless()),
    "own batch sampler": lambda: torch.utils.data.DataLoader(
        digits(), batch_sampler=RotatingBatches()
    ),
    "no batching": lambda: torch.utils.data.DataLoader(
        digits(), sampler=RotatingBatches(), batch_size=None
    ),
    "dict of loaders": lambda: {"a": loader(), "b": loader(shuffle=False)},
    "combined": lambda: CombinedLoader([loader(), loader(Noisy())], "max_size_cycle"),
}


@pytest.mark.parametrize("name", DATA)
def test_calibration_changes_nothing_outside_the_quantizers(name: str, messages: Messages) -> None:
    plain, quantized = AtStart(), AtStart()
    float_data, data = DATA[name](), DATA[name]()
    length: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": STEPS_PER_EPOCH}
    callback = statqat(calibration_batches=4)
    _, float_run = train(plain, module=Collections, data=float_data, **length)
    module, run = train(callback, quantized, module=Collections, data=data, **length)
    assert not messages.about("calibration")
    assert run.states[0]["net.8/input"]["num_batches"] == 4 + 1
    assert_same(quantized.found, plain.found)
    assert_same(run.batches, float_run.batches)
    assert module.calls == 2 * STEPS_PER_EPOCH
    assert module.seen.update_count == 2 * STEPS_PER_EPOCH
    if name == "own generator":
        assert torch.equal(data.generator.get_state(), float_data.generator.get_state())
    if name == "own sampler":
        assert data.sampler.epochs == float_data.sampler.epochs == 2


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (3, 3), (50, STEPS_PER_EPOCH)])
def test_as_many_batches_as_asked_or_an_epoch(asked: int, got: int) -> None:
    recipe = QuantRecipe([QuantRule("net.0", inputs=TensorSpec("int8", quantizer="minmax"))])
    callback = StatQATCallback(recipe=recipe, calibration_batches=asked, verbose=False)
    images, labels = digits().tensors
    scaled = images * (1 + torch.arange(len(images)) // 32).view(-1, 1, 1, 1)
    data = loader(torch.utils.data.TensorDataset(scaled, labels), shuffle=False)
    seen: dict[str, float] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            observer = quantizer_of(pl_module, "net.0/input").observer
            seen["count"], seen["max"] = (
                float(observer.num_batches),
                float(observer.running_extremes[1]),
            )

    train(callback, Look(), data=data)
    assert seen["count"] == got
    assert seen["max"] == got  # batch k reaches k times as far


def test_the_last_batch_of_calibration_counts() -> None:
    last = 11  # its refresh is none that searches anyway
    callback = statqat(calibration_batches=last)
    images, labels = (torch.cat([tensor, tensor]) for tensor in digits().tensors)  # 12 batches
    scaled = images * (1 + 7 * (torch.arange(len(images)) // 32 == last - 1)).view(-1, 1, 1, 1)
    data = loader(torch.utils.data.TensorDataset(scaled, labels), shuffle=False)
    errors: list[float] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            quantizer = quantizer_of(pl_module, "net.0/input")
            spectrum = statistics_of([quantizer.observer]).spectrum
            assert spectrum is not None
            best = spectrum.optimal_scale(quantizer.fmt)
            for scale in (quantizer.scale.reshape(1), best):
                errors.append(float(spectrum.mse(quantizer.fmt, scale)))

    train(callback, Look(), data=data)
    assert errors[0] <= 1.06 * errors[1]  # what a scale may rest within


def test_the_progress_of_calibration_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    train(statqat(), enable_progress_bar=True)
    assert "StatQAT calibration" in capsys.readouterr().err
    train(statqat())
    assert "StatQAT calibration" not in capsys.readouterr().err


class ByHand(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()  # and not by `self.manual_backward`, of which a copy can do without
        optimizer.step()
        return loss


class Prefetched:
    """Batches from somewhere else than a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(held_out())


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        (DigitsModule, once, "IterableDataset may be readable only once"),
        (DigitsModule, Prefetched, "a Prefetched may be readable only once"),
        (ByHand, loader, "does not require grad"),
    ],
)
def test_where_it_is_impossible_the_first_batch_observes_in_float(
    kind: type[DigitsModule], data: Callable[[], Any], reason: str, messages: Messages
) -> None:
    # Weights in float and no weight decay of difference: only inputs tell the runs apart.
    _, float_run = train(module=kind, data=data(), limit_val_batches=0)
    stream = data()
    callback = statqat(None, "int2")
    module, run = train(callback, module=kind, data=stream, limit_val_batches=0)
    (message,) = messages.about("no calibration")
    assert reason in message
    assert callback.report is not None
    assert callback.report.notes[-1] in message
    assert "float for the first batch" in message
    assert run.losses[0] == float_run.losses[0]
    assert run.losses[1] != float_run.losses[1]
    assert run.states[0]["net.8/input"]["num_batches"] == 1
    assert run.states[0]["net.8/input"]["ready"]
    assert_same(run.batches, float_run.batches)
    assert all(quantizer_of(module, f"{layer}/input").enabled for layer in LAYERS)
    if isinstance(getattr(stream, "dataset", None), Stream):
        assert stream.dataset.read == len(digits())


class Collates(DigitsModule):
    """Its batches come from a method of its own that counts, and some are none."""

    def __init__(self) -> None:
        super().__init__()
        self.collated = 0

    def collate(self, samples: list[Any]) -> Any:
        self.collated += 1
        return None if self.collated % 3 == 1 else default_collate(samples)

    def train_dataloader(self) -> Any:
        return loader(collate_fn=self.collate)


@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_a_collate_function_of_the_module_is_that_of_the_copy(messages: Messages) -> None:
    """What it counts is the training's; batches that are none are left out."""
    module = Collates()
    callbacks = [statqat(calibration_batches=4), DistillationCallback(weight=0.5)]
    make_trainer(*callbacks).fit(module, val_dataloaders=held_out())
    assert module.collated == STEPS_PER_EPOCH
    assert not messages.about("no calibration")
    for name in LAYERS:  # four batches of calibration, and four of training
        assert quantizer_of(module, f"{name}/input").observer.num_batches >= 8


class OneArgument(DigitsModule):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class AnyArguments(DigitsModule):
    def training_step(self, *args: Any) -> Tensor:
        assert len(args) == 2
        return super().training_step(*args)


class OtherNames(DigitsModule):
    def training_step(self, samples: Any, number: int, scale: float = 1.0) -> Tensor:
        return super().training_step(samples, number) * scale


class Keywords(DigitsModule):
    """Forward with keyword arguments, integers among them."""

    def forward(self, x: Tensor, *, shift: Tensor | None = None, gain: float = 1.0) -> Tensor:
        assert shift is not None
        assert not shift.is_floating_point()
        return super().forward(gain * x) + shift

    def training_step(self, batch: Any, batch_idx: int, **options: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x=x, gain=2.0, shift=torch.zeros_like(y[:1])), y)


@pytest.mark.parametrize("kind", [OneArgument, AnyArguments, OtherNames, Keywords])
def test_any_signature_is_calibrated(kind: type[DigitsModule], messages: Messages) -> None:
    _, run = train(statqat(), module=kind, limit_val_batches=0)
    assert not messages.about("calibration")
    assert run.states[0]["net.8/input"]["num_batches"] == STEPS_PER_EPOCH + 1
    assert len(run.losses) == STEPS_PER_EPOCH


class Scaled(LightningDataModule):
    """Scales pixels after the transfer, as augmentation on the device would, and counts."""

    transfers = 0

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return held_out()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers += 1
        x, y = batch
        return 100 * x, y


class ScaledByModule(DigitsModule):
    """The same, in a hook of the module that counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers = nn.Buffer(torch.zeros(()))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers.add_(1)
        x, y = batch
        return 100 * x, y


@pytest.mark.parametrize("place", ["data module", "module"])
def test_calibration_goes_through_the_hooks_of_the_batch_transfer(
    place: str, messages: Messages
) -> None:
    maximum: list[float] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            observer = quantizer_of(pl_module, "net.0/input").observer
            maximum.append(float(observer.running_extremes[1]))

    recipe = QuantRecipe([QuantRule("net.0", inputs=TensorSpec("int8", quantizer="minmax"))])
    callback = StatQATCallback(recipe=recipe, verbose=False)
    trainer = make_trainer(callback, Look(), limit_val_batches=0)
    if place == "module":
        module = ScaledByModule()
        trainer.fit(module, loader(), held_out())
        assert module.transfers == STEPS_PER_EPOCH
    else:
        data = Scaled()
        trainer.fit(DigitsModule(), datamodule=data)
        assert data.transfers == STEPS_PER_EPOCH
    assert not messages.about("calibration")
    assert maximum == [100.0]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_calibration_runs_in_the_precision_of_the_training(
    precision: Any, messages: Messages
) -> None:
    everything: dict[str, Any] = {"freeze_at": None, "max_observed": 10**6}
    # Rows of nine weights have several scales of almost the same error, but one maximum.
    everything["weights"] = TensorSpec("int4", quantizer="minmax")
    _, reference = train(statqat(**everything), limit_val_batches=0)
    module, run = train(statqat(**everything), precision=precision, limit_val_batches=0)
    assert not messages.about("calibration")
    for name, entry in run.states[0].items():
        assert entry["scale"].dtype == torch.float32
        # bfloat16 has 8 bits of mantissa; weights carry its error, and that of one step's update.
        rtol = 0.05 if name.endswith("/input") else 0.3
        expected = reference.states[0][name]["scale"]
        torch.testing.assert_close(entry["scale"], expected, rtol=rtol, atol=0.0)
    assert quantizer_of(module, "net.3/input").observer.running_spectrum.dtype == torch.float32


class Idle(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_a_layer_that_does_not_run_is_named() -> None:
    with pytest.warns(StatQATWarning, match="spare/input: did not run in calibration"):
        module, _ = train(statqat(), module=Idle)
    assert not quantizer_of(module, "spare/input").ready
    x = torch.randn(3, 4)
    assert torch.equal(quantizer_of(module, "spare/input")(x), x)


@pytest.mark.parametrize("data", [loader, once])
@pytest.mark.parametrize("trains", [False, True])
def test_means_count_where_no_norm_in_training_takes_them_away(
    data: Callable[[], Any], trains: bool
) -> None:
    class Norms(DigitsModule):
        def on_train_start(self) -> None:
            for i in (1, 4):
                self.net[i].train(trains)

    module = Norms()
    callback = StatQATCallback("int3", None, verbose=False, first_last_bits=None)
    make_trainer(callback, limit_train_batches=2).fit(module, data(), held_out())
    centred = {
        name: moments.centred
        for name in LAYERS
        if (moments := quantizer_of(module, f"{name}/weight").input_moments) is not None
    }
    assert centred == {"net.0": trains, "net.3": trains, "net.8": False}


class MomentsAtStart(Callback):
    """Mean squares of the inputs of layers that the first step starts from, by layer."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        for name in LAYERS if trainer.global_step == 0 else ():
            moments = quantizer_of(pl_module, f"{name}/weight").input_moments
            if moments is not None and moments.known:
                self.found[name] = moments.mean_square[0].clone()


def test_weights_alone_are_calibrated_for_their_inputs() -> None:
    torch.manual_seed(0)
    module, start = DigitsModule(), MomentsAtStart()
    net = copy.deepcopy(module.net)  # the first batch runs in float, and in train mode
    callback = StatQATCallback(
        "int3", None, verbose=False, first_last_bits=None, calibration_batches=1
    )
    trainer = make_trainer(callback, start, limit_train_batches=2)
    trainer.fit(module, loader(shuffle=False), held_out())
    x, _ = next(iter(loader(shuffle=False)))
    with torch.no_grad():
        seen = net[:3](x)
    assert start.found.keys() == set(LAYERS)
    torch.testing.assert_close(start.found["net.3"], seen.square().mean((0, 2, 3)))


def test_weights_alone_whose_data_is_read_once_follow_the_first_step(messages: Messages) -> None:
    torch.manual_seed(0)
    module, start = DigitsModule(), MomentsAtStart()
    callback = StatQATCallback("int3", None, verbose=False, first_last_bits=None)
    make_trainer(callback, start, limit_train_batches=1).fit(module, once(), held_out())
    assert not start.found
    moments = quantizer_of(module, "net.3/weight").input_moments
    assert moments is not None
    assert moments.known
    assert moments.mean_square.all()
    (note,) = [note for note in callback.report.notes if "no calibration" in note]  # type: ignore[union-attr]
    assert note.endswith("Scales of weights follow their inputs from the first step on.")
