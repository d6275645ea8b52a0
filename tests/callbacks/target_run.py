"""A run for a target on several ranks; see `ranks` for how it is started."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.digits import loader, make_trainer, statqat
from tests.callbacks.test_target import ResidualModule


class Ends(Callback):
    """What a rank knows when training ends, and when the fit has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, name: str, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {"weights": pl_module.state_dict(), "quantizers": quantizer_state(pl_module)}
        torch.save(known, self.folder / f"{name}_{trainer.global_rank}.pt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep("trained", trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep("settled", trainer, pl_module)


def run(folder: Path) -> None:
    """One epoch of DDP, each rank with images of its own."""
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(
        statqat("int8", "int8", target="onnxruntime"),
        Ends(folder),
        strategy="ddp",
        devices=2,
        limit_val_batches=0,
    )
    trainer.fit(ResidualModule(), loader(shuffle=False))
