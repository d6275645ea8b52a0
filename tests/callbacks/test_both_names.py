"""Modules and Trainers of `pytorch_lightning`, the other name of `lightning.pytorch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from statqat_lightning import ExportCallback, SNRMonitor, load_quantized
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    SeedEachBatch,
    assert_same,
    digits,
    held_out,
    loader,
    small_cnn,
    statqat,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class FromConfigureModel(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = small_cnn()


def trainer_of(*callbacks: Any, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


@pytest.mark.parametrize("kind", [Module, FromConfigureModel])
def test_train_resume_test_and_export(
    kind: type[Module], tmp_path: Path, messages: Messages
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    export = ExportCallback(tmp_path / "model.onnx", files=("native",))
    logger = CSVLogger(tmp_path, name="log", version=0)
    whole = kind()
    start = {name: value.clone() for name, value in small_cnn().state_dict().items()}
    torch.manual_seed(1)
    trainer = trainer_of(statqat(), SeedEachBatch(), SNRMonitor(), keep, export, logger=logger)
    trainer.fit(whole, loader(shuffle=False), held_out())
    assert not messages.about("no calibration")
    assert set(whole.state_dict()) == {f"net.{name}" for name in start}
    assert "snr_db_input/net.3" in (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    assert "snr_db/mean" in trainer.callback_metrics

    resumed = kind()
    again = trainer_of(statqat(), SeedEachBatch())
    again.fit(resumed, loader(shuffle=False), held_out(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(quantizer_state(resumed), quantizer_state(whole))

    (result,) = trainer.test(dataloaders=held_out(), ckpt_path="best", verbose=False)
    fresh = kind()
    (expected,) = trainer_of(statqat()).test(
        fresh, held_out(), tmp_path / "epoch=1.ckpt", verbose=False
    )
    assert result["test_loss"] == expected["test_loss"]

    if kind is Module:
        loaded = load_quantized(Module(), tmp_path / "model.safetensors")
        whole.eval()
        with torch.no_grad():
            assert torch.equal(loaded(digits().tensors[0]), whole(digits().tensors[0]))
