"""Runs whose parameters are sharded over two ranks; see `ranks` for how it is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from statqat_lightning.callbacks import ReportCallback, StatQATCallback
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.digits import Witness, make_trainer, scales
from tests.callbacks.ranks_run import Batches


class Stream(IterableDataset[dict[str, Tensor]]):
    """Readable only once, as far as one knows: nothing calibrates, be it sharded or in one process.

    A sharded module cannot be copied for it, and what is compared must not differ in that.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batches[step] for step in range(len(self.batches)))


class ShardedModule(LightningModule):
    """Blocks that `fully_shard` takes apart, or a plain model where there is one process."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 7)
            ).double()
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch["x"]), batch["y"][:, :7], reduction="sum")
        return loss * self.trainer.world_size

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_sum", self.net(batch["x"]).sum(), sync_dist=True, batch_size=1)

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        batches = Batches(6, trainer.global_rank, trainer.world_size)
        return DataLoader(Stream(batches), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)


def train(
    folder: Path, name: str, strategy: Any = "auto", ckpt_path: Any = None, **options: Any
) -> Path:
    """Two epochs, and what the rank knows in `folder/{name}_{rank}.pt`; returns a checkpoint."""
    L.seed_everything(1, verbose=False)
    witness, callback = Witness(), callback_of()
    keep = ModelCheckpoint(folder / name, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(
        callback,
        witness,
        keep,
        ReportCallback(folder / f"{name}.html"),
        use_distributed_sampler=False,
        strategy=strategy,
        **({"max_epochs": 2} | options),
    )
    module = ShardedModule()
    trainer.fit(module, ckpt_path=ckpt_path)
    known = {"states": witness.states, "weights": whole_weights(module)}
    torch.save(known, folder / f"{name}_{trainer.global_rank}.pt")
    return folder / name / "epoch=0.ckpt"


class AtStart(Callback):
    """The scales of weights when the first batch begins."""

    def __init__(self) -> None:
        self.scales: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        self.scales = self.scales or weight_scales(pl_module)


def weight_scales(module: nn.Module) -> dict[str, Tensor]:
    return {name: scale for name, scale in scales(module).items() if name.endswith("weight")}


def start_from_float(folder: Path, strategy: Any) -> None:
    """Train in float, and go on quantized: which scales the weights of the checkpoint get."""
    options: dict[str, Any] = {"use_distributed_sampler": False, "devices": 2}
    trainer = make_trainer(strategy=strategy(), max_epochs=1, **options)
    trainer.fit(ShardedModule())
    path = folder / "float.ckpt"
    trainer.save_checkpoint(path)
    witness = AtStart()
    callback = StatQATCallback("int4", "int4", freeze_at=None, verbose=False)
    trainer = make_trainer(callback, witness, strategy=strategy(), max_epochs=2, **options)
    trainer.fit(ShardedModule(), ckpt_path=path)
    whole = ShardedModule()
    whole.configure_model()
    whole.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    prepare(whole, "int4", "int4")
    known = {"at_start": witness.scales, "of_checkpoint": weight_scales(whole)}
    torch.save(known, folder / f"from_float_{trainer.global_rank}.pt")


def callback_of() -> StatQATCallback:
    # Scales that move with every step, those of the weights without a last bit in doubt.
    weights = TensorSpec("int4", quantizer="minmax")
    inputs = TensorSpec("int4", quantizer="iterative", unsigned_if_nonnegative=True, tolerance=0.0)
    return StatQATCallback(weights, inputs, freeze_at=None, verbose=False)


def whole_weights(module: LightningModule) -> dict[str, Tensor]:
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
        for name, p in module.state_dict().items()
    }


def evaluate(folder: Path, name: str, strategy: Any, ckpt_path: Path, devices: int) -> None:
    """Test a checkpoint in a new module; its quantizers end in `folder/{name}_{rank}.pt`."""
    trainer = make_trainer(
        callback_of(), use_distributed_sampler=False, strategy=strategy, devices=devices
    )
    module = ShardedModule()
    loader = DataLoader(Batches(2, trainer.global_rank, devices), batch_size=None)
    trainer.test(module, loader, ckpt_path=ckpt_path, verbose=False)
    known = {"state": quantizer_state(module), "result": trainer.callback_metrics["test_sum"]}
    torch.save(known, folder / f"{name}_{trainer.global_rank}.pt")


def run(folder: Path) -> None:
    for kind, distributed in (("full", False), ("sharded", True)):

        def strategy(distributed: bool = distributed) -> ModelParallelStrategy:
            return ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)

        checkpoint = train(folder, kind, strategy(), devices=2)
        train(folder, f"{kind}_resumed", strategy(), checkpoint, devices=2)
        evaluate(folder, f"{kind}_tested", strategy(), checkpoint, 2)
        if not distributed:
            start_from_float(folder, strategy)
