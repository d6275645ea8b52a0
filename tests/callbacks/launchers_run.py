"""Fits whose ranks Lightning starts itself: `python -m tests.callbacks.launchers_run FOLDER`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.ddp_run import RankModule
from tests.callbacks.digits import make_trainer, statqat


def main(folder: Path) -> None:
    for strategy in ("ddp_spawn", "ddp_fork"):
        module = RankModule()
        trainer = make_trainer(
            statqat(freeze_at=None),
            ModelCheckpoint(folder / strategy, filename="last"),
            use_distributed_sampler=False,
            limit_val_batches=0,
            strategy=strategy,
            devices=2,
            max_epochs=1,
        )
        start = {name: value.clone() for name, value in module.state_dict().items()}
        trainer.fit(module)
        known = {
            "start": start,
            "weights": dict(module.state_dict()),
            "quantized": len(quantized_layers(module)),
        }
        torch.save(known, folder / f"{strategy}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"  # for those that are spawned
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
