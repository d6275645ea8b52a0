"""A training run whose ranks see different data; run as a script, on two processes.

`python -m tests.callbacks.ddp_run FOLDER` leaves what each rank knows at the end in
`FOLDER/{rank}.pt`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.callbacks.snr_monitor import SNRMonitor
from tests.callbacks.digits import BATCH_SIZE, DigitsModule, Witness, digits, held_out, make_trainer


class RankModule(DigitsModule):
    """Nothing in it depends on the size of the batch of one rank; rank 1 sees larger pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
        )

    def train_dataloader(self) -> Any:
        images, labels = digits().tensors
        images = images.clone()
        images[1::2] *= 4
        ranks = self.trainer.world_size
        dataset = TensorDataset(images, labels)
        rank = self.trainer.global_rank
        sampler: Any = DistributedSampler(dataset, ranks, rank, shuffle=False)
        return DataLoader(dataset, batch_size=BATCH_SIZE // ranks, sampler=sampler)

    def val_dataloader(self) -> Any:
        return held_out()


class Keep(Callback):
    """Writes what a rank knows at the end."""

    def __init__(self, folder: Path, witness: Witness, monitor: SNRMonitor) -> None:
        self.folder, self.witness, self.monitor = folder, witness, monitor

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {
            "states": self.witness.states,
            "history": self.monitor.history,
            "errors": [
                [step, {name: vars(own) for name, own in row.items()}]
                for step, row in self.monitor.error_history
            ],
            "weights": dict(pl_module.state_dict()),
        }
        torch.save(known, self.folder / f"{trainer.global_rank}.pt")


def fit(folder: Path, **options: Any) -> None:
    L.seed_everything(1, verbose=False)
    recipe = QuantRecipe(
        [
            QuantRule("type:Linear", "int8", TensorSpec("int8", quantizer="minmax")),
            QuantRule("*", "int4", "int4"),
        ]
    )
    callback = StatQATCallback(recipe=recipe, max_observed=2**20, freeze_at=None, verbose=False)
    witness, monitor = Witness(), SNRMonitor(output_every=3)
    trainer = make_trainer(
        callback,
        monitor,
        witness,
        Keep(folder, witness, monitor),
        use_distributed_sampler=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(RankModule())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), strategy="ddp_fork", devices=2)
