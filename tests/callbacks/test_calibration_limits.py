"""Calibration where it must hold back: other ranks, workers, trial runs, resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from statqat_lightning.callbacks.calibration import calibrate
from statqat_lightning.callbacks.qat import StatQATWarning
from statqat_lightning.callbacks.trial_run import CannotCalibrate
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    statqat,
    train,
)


class OtherRank:
    """Stands for the reduction over two ranks, the other of which fails at some batch."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at = fails_at
        self.words = 0

    def __call__(self, tensor: Tensor, operation: str) -> Tensor:
        if tensor.dim() > 0:
            return tensor
        self.words += 1
        assert self.words <= self.fails_at, "went on after another rank had failed"
        return torch.tensor(2.0) if self.words == self.fails_at else tensor


@pytest.mark.parametrize("fails_at", [1, 3])
def test_all_ranks_fall_back_when_one_cannot_calibrate(fails_at: int) -> None:
    class Probe(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            before = quantizer_state(pl_module)
            with pytest.raises(CannotCalibrate, match="it failed on another rank"):
                calibrate(trainer, pl_module, 8, OtherRank(fails_at))
            assert_same(quantizer_state(pl_module), before)
            self.ran = True

    module = DigitsModule()
    prepare(module, "int4", "int4")
    probe = Probe()
    make_trainer(probe, limit_val_batches=0).fit(module, loader(), held_out())
    assert probe.ran


class OpensLazily(Dataset[Any]):
    """Like a dataset over an HDF5 file: the process that reads first holds the handle."""

    def __init__(self) -> None:
        self.opened = False

    def __len__(self) -> int:
        return len(digits())

    def __getitem__(self, index: int) -> Any:
        self.opened = True
        return digits()[index]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_calibration_reads_in_a_worker_where_training_does(messages: Messages) -> None:
    data = OpensLazily()
    module, _ = train(statqat(), data=loader(data, num_workers=1), limit_val_batches=0)
    assert not data.opened
    assert not messages.about("calibration")
    assert quantizer_of(module, "net.3/input").ready


@pytest.mark.parametrize(
    ("options", "batches"), [({"fast_dev_run": True}, 2), ({"limit_train_batches": 2}, 4)]
)
def test_no_more_batches_than_the_training_has(options: dict[str, Any], batches: int) -> None:
    module, _ = train(statqat(freeze_at=None), **options)
    # As many in calibration as in training.
    assert quantizer_of(module, "net.3/input").observer.num_batches == batches


class WithIdleHead(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)


def test_a_run_with_an_idle_layer_resumes_without_a_second_calibration(tmp_path: Path) -> None:
    def saved() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    with pytest.warns(StatQATWarning, match="idle/input"):
        _, whole = train(statqat(), saved(), module=WithIdleHead, max_epochs=2)
    path = tmp_path / "epoch=0.ckpt"
    _, resumed = train(statqat(), saved(), module=WithIdleHead, ckpt_path=path, max_epochs=2)
    first = resumed.states[0]["net.3/input"]["num_batches"]
    assert first == whole.states[STEPS_PER_EPOCH - 1]["net.3/input"]["num_batches"] + 1


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([digits()[i] for i in range(64)])


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_a_stream_freezes_by_whole_epochs(messages: Messages) -> None:
    data = torch.utils.data.DataLoader(Stream(), batch_size=32)
    train(statqat(freeze_at=0.5), data=data, max_epochs=2, limit_val_batches=0)
    assert messages.about("frozen at step 2")
