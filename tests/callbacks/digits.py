"""Real images, a small CNN that knows nothing of quantization, and a Trainer without extras."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state

BATCH_SIZE = 32
STEPS_PER_EPOCH = 6


@functools.cache
def digits() -> TensorDataset:
    """The first scanned digits: pixels 0 to 1, `(1, 8, 8)`, and their classes."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    count = BATCH_SIZE * STEPS_PER_EPOCH
    return TensorDataset(images[:count], torch.from_numpy(bunch.target[:count]))


def loader(dataset: Dataset[Any] | None = None, shuffle: bool = True, **options: Any) -> Any:
    return DataLoader(dataset or digits(), batch_size=BATCH_SIZE, shuffle=shuffle, **options)


def held_out() -> Any:
    """The same images in order: that validation changes nothing is all that matters here."""
    return loader(shuffle=False)


class Stream(IterableDataset[Any]):
    """Can be read once."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(digits())):
            self.read += 1
            yield digits()[index]


def once() -> Any:
    """A loader of a stream."""
    return loader(Stream(), shuffle=False)


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


LAYERS = ("net.0", "net.3", "net.8")


class DigitsModule(LightningModule):
    """Any LightningModule: layers from `__init__`, a metric, a loss, validation and test."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric(nan_strategy="disable")
        self.net: Any = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.seen.update(x.mean())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test_loss")

    def _evaluate(self, batch: Any, name: str) -> None:
        x, y = batch
        self.log(name, F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": 1e-4},
            {"params": plain},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


class Collections(DigitsModule):
    """Takes a batch, or a dict or list of batches."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        if isinstance(batch, dict):
            batch = [batch["a"], batch["b"]]
        if isinstance(batch[0], (list, tuple)):
            batch = [torch.cat(parts) for parts in zip(*batch, strict=True)]
        return super().training_step(batch, batch_idx)


class AtStart(Callback):
    """What the first training step would find."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DigitsModule)
        self.found = {
            "rng": (torch.get_rng_state(), repr(np.random.get_state()), random.getstate()),
            "state": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "metric": (pl_module.seen.update_count, float(pl_module.seen.mean_value)),
            "logged": dict(trainer.callback_metrics),
            "gradients": [p.grad for p in pl_module.parameters()],
            "training": [m.training for m in pl_module.modules()],
        }


class Witness(Callback):
    """Records what the training looks like from outside: batches, losses, scales, statistics."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.states: list[dict[str, Any]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))
        self.states.append(quantizer_state(pl_module))


class SeedEachBatch(Callback):
    """Dropout draws the same numbers in a batch, whatever has been drawn before."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer on one CPU without logger, bar, summary or checkpoints, unless asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=[*callbacks], **defaults | options)


def statqat(weights: Any = "int4", activations: Any = "int4", **options: Any) -> StatQATCallback:
    """The callback without its printed report."""
    return StatQATCallback(weights, activations, **{"verbose": False} | options)


def restless(**options: Any) -> StatQATCallback:
    """The callback with scales that move with every step; by default they rest while they can."""
    inputs = TensorSpec("int4", quantizer="iterative", unsigned_if_nonnegative=True, tolerance=0.0)
    return statqat(TensorSpec("int4", quantizer="minmax"), inputs, **options)


def train(
    *callbacks: Callback,
    module: LightningModule | type[LightningModule] = DigitsModule,
    data: Any = None,
    validation: Any = None,
    ckpt_path: str | Path | None = None,
    seed: int = 1,
    **options: Any,
) -> tuple[Any, Witness]:
    """Train a module, or a new one of a class, from a seed; return it and what was witnessed."""
    L.seed_everything(seed, verbose=False)
    module = module() if isinstance(module, type) else module
    witness = Witness()
    trainer = make_trainer(*callbacks, witness, **options)
    data = loader() if data is None else data
    trainer.fit(module, data, validation or held_out(), ckpt_path=ckpt_path)
    return module, witness


def scales(module: nn.Module) -> dict[str, Tensor]:
    """Scale of every quantizer by name."""
    return {
        q.name: q.scale.clone() for _, _, layer in quantized_layers(module) for q in layer.present()
    }


def quantizer_of(module: nn.Module, name: str) -> Any:
    """The fake quantizer `{layer}/{weight|input}`."""
    layer, _, role = name.rpartition("/")
    return next(getattr(q, role) for there, _, q in quantized_layers(module) if there == layer)


def rounded_int(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Fake quantization to integers in so many words: the oracle."""
    return torch.clamp(torch.round(x / scale), low, high) * scale


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Two nests of dicts, sequences, tensors and plain values are equal, bit for bit."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert left == right, path
