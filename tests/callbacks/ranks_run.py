"""One training run, split over ranks in several ways; see `ranks` for how it is started.

Everything but the statistics is the same however the rows of a batch are divided: the loss is a sum
over rows, gradients are averaged, there is neither BatchNorm nor Dropout, and the model computes in
float64, so that the order of sums decides no rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks import DistillationCallback, StatQATCallback
from statqat_lightning.model.quantized_model import activation_quantizers, quantizer_state
from tests.callbacks.digits import Witness, make_trainer

STEPS = 6
PARTS = 4  # the smallest pieces of a batch; every rank gets as many of them as any other
SIZES = ((5, 3, 4, 2), (1, 6, 2, 7), (4, 4, 4, 4), (3, 1, 1, 9), (8, 2, 5, 1), (2, 3, 1, 4))
OVERFLOW_STEP, NEGATIVE_STEP = 3, 2

Batch = dict[str, Tensor]


def piece(step: int, part: int) -> Batch:
    """Rows of a step. Each part has another spread, and some things occur in one part only."""
    generator = torch.Generator().manual_seed(100 * step + part)
    rows = SIZES[step][part]
    spread = (1.0, 10.0, 0.1, 3.0)[part]

    def normal(columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    batch = {"x": spread * normal(16), "y": normal(8), "wild": normal(8), "signed": normal(8).abs()}
    batch["unsigned"] = normal(8).abs()
    batch["routed"] = torch.full((rows,), part == step % PARTS)
    if step == OVERFLOW_STEP and part == 1:
        batch["wild"][0, :3] = torch.tensor([torch.inf, -torch.inf, 1e30])
    if step == NEGATIVE_STEP and part == PARTS - 1:
        batch["signed"][0, 0] = -0.5
    return batch


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """What a rank sees in a step: its parts, one below the other."""
    own = PARTS // world_size
    pieces = [piece(step, part) for part in range(rank * own, (rank + 1) * own)]
    return {key: torch.cat([p[key] for p in pieces]) for key in pieces[0]}


class Batches(Dataset[Batch]):
    def __init__(self, count: int, rank: int, world_size: int) -> None:
        self.count, self.rank, self.world_size = count, rank, world_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Batch:
        if step >= self.count:
            raise IndexError(step)
        return batch_of(step, self.rank, self.world_size)


class PooledModule(LightningModule):
    """Layers with inputs of every kind; `routed` sees some rows only, `wild` trains nothing."""

    def __init__(self, world_size: int, shorter_by: int = 0) -> None:
        super().__init__()
        self.world_size = world_size
        self.shorter_by = shorter_by  # batches that the last rank has less than the others
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        self.routed = nn.Linear(16, 8)
        self.signed = nn.Linear(8, 8)
        self.unsigned = nn.Linear(8, 8)
        self.minmax = nn.Linear(16, 8)
        self.percentile = nn.Linear(16, 8)
        self.wild = nn.Linear(8, 8).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch["x"]
        out = self.body(x) + self.minmax(x) + self.percentile(x)
        out = out + self.signed(batch["signed"]) + self.unsigned(batch["unsigned"])
        if batch["routed"].any():  # a layer that is idle on some ranks
            index = batch["routed"].nonzero()[:, 0]
            out = out.index_add(0, index, self.routed(x[index]))
        with torch.no_grad():
            self.wild(batch["wild"])
        # Ranks average their gradients, and a single process sees all rows at once.
        return (out - batch["y"]).square().sum() * self.world_size

    def train_dataloader(self) -> Any:
        rank, world_size = self.trainer.global_rank, self.world_size
        last = world_size > 1 and rank == world_size - 1
        count = STEPS - self.shorter_by * last
        return DataLoader(Batches(count, rank, world_size), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-5)


def recipe(ranged: bool = True) -> QuantRecipe:
    adaptive = TensorSpec(  # scales that move with every step
        "int4", quantizer="iterative", unsigned_if_nonnegative=True, tolerance=0.0
    )
    rules = [
        QuantRule(name, "int8" if ranged else None, inputs if ranged else None)
        for name, inputs in (
            ("minmax", TensorSpec("int8", quantizer="minmax")),
            ("percentile", TensorSpec("int8", quantizer="percentile")),
        )
    ]
    return QuantRecipe([*rules, QuantRule("*", "int4", adaptive)])


def learning_recipe() -> QuantRecipe:
    spec = TensorSpec("int4", quantizer="lsq")
    return QuantRecipe([QuantRule("wild", None, None), QuantRule("*", spec, spec)])


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Record the names of the collectives that Python code asks for."""
    names = ("all_reduce", "broadcast", "all_gather", "barrier", "all_gather_into_tensor")
    originals = {name: getattr(torch.distributed, name) for name in names}

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(torch.distributed, name, recording(name))
    try:
        yield
    finally:
        for name in names:
            setattr(torch.distributed, name, originals[name])


class CountingCallback(StatQATCallback):
    """Records the collectives of every batch end, and whether the signs are settled by then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.collectives: list[list[str]] = []
        self.settled: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        calls: list[str] = []
        self.settled.append(not any(q.deciding for q in activation_quantizers(pl_module)))
        with counted(calls):
            super().on_train_batch_end(trainer, pl_module, *args)
        self.collectives.append(calls)


class BeforeStep(Callback):
    """Keeps what a step starts from, and the gradients that the optimizer gets."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: dict[str, Any] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step == self.step:
            self.kept["start"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            self.kept["quantizers"] = quantizer_state(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, _: Any
    ) -> None:
        if trainer.global_step == self.step:
            self.kept["gradients"] = {
                name: p.grad.clone()
                for name, p in pl_module.named_parameters()
                if p.grad is not None
            }


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"max_epochs": 2},
    "accumulated": {"accumulate_grad_batches": 2},
    "unequal loaders": {"shorter_by": 2, "max_steps": 3},
    "no range": {"max_epochs": 2, "recipe": recipe(ranged=False)},
    "learned": {"recipe": learning_recipe()},
    "distilled": {"max_epochs": 2, "distilled": True},
    "compensated": {"max_epochs": 2, "compensate": True},
}


def distillation(world_size: int) -> DistillationCallback:
    """From another network; like the loss of the module, a sum over the rows of all ranks."""
    torch.manual_seed(2)
    return DistillationCallback(
        PooledModule(world_size).double(),
        layers=["body.2"],
        loss=lambda student, teacher: (student - teacher).square().sum() * world_size,
        weight=0.5,
    )


def fit(name: str, folder: Path, strategy: str = "auto", devices: int = 1) -> None:
    """Train and leave what the rank knows in `folder/name/{rank}.pt`."""
    options = dict(SCENARIOS[name])
    shorter_by = options.pop("shorter_by", 0)
    extra = [distillation(devices)] if options.pop("distilled", False) else []
    L.seed_everything(1, verbose=False)
    callback = CountingCallback(
        recipe=options.pop("recipe", recipe()),
        # Calibration ends with the shortest loader, which a single process does not have.
        calibration_batches=STEPS - (shorter_by if devices == 1 else 0),
        freeze_at=None,
        verbose=False,
        compensate=options.pop("compensate", False),
    )
    witness, before, start = Witness(), BeforeStep(1), BeforeStep(0)
    trainer = make_trainer(
        callback,
        witness,
        before,
        start,
        *extra,
        use_distributed_sampler=False,
        precision="64-true",
        strategy=strategy,
        devices=devices,
        **options,
    )
    module = PooledModule(devices, shorter_by)
    trainer.fit(module)
    known = {
        "states": witness.states,
        "weights": dict(module.state_dict()),
        "overflow": sorted(name for name, kind in callback._warnings._given if kind == "overflow"),
        "collectives": callback.collectives,
        "settled": callback.settled,
        "step": before.kept,
        "start": start.kept["start"],
        "compensated": [tuple(vars(row).values()) for row in callback.compensation.rows]
        if callback.compensation
        else [],
    }
    (folder / name).mkdir(exist_ok=True)
    torch.save(known, folder / name / f"{trainer.global_rank}.pt")


def run(folder: Path) -> None:
    for name in SCENARIOS:
        fit(name, folder, "ddp_find_unused_parameters_true", int(os.environ["WORLD_SIZE"]))
