"""Models as the public writes them, unmodified: trained for two steps, exported and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from statqat_lightning import ExportCallback, StatQATCallback, load_quantized
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.digits import SeedEachBatch, assert_same

BATCH = 8
CLASSES = 5


class UNet(nn.Module):
    """Down, across and up again; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, CLASSES, 1)

    def forward(self, image: Tensor) -> Any:
        wide = self.down(image)
        return self.last(torch.cat([wide, self.up(self.deep(wide))], 1))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, sequence: Tensor) -> Any:
        return self.head(self.lstm(sequence)[0][:, -1])


class Encoder(nn.Module):
    """A classifier of token ids, padded to one length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=mask)
        return self.head(hidden.masked_fill(mask.unsqueeze(-1), 0.0).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)
    )


def vit() -> nn.Module:
    """ViT-B/16 with two of its twelve blocks."""
    return torchvision.models.VisionTransformer(32, 16, 2, 12, 768, 3072, num_classes=CLASSES)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=CLASSES)


def inputs_of(name: str) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    if name == "mlp":
        return (torch.randn(BATCH, 12),)
    if name == "lstm":
        return (torch.randn(BATCH, 9, 12),)
    if name == "encoder":
        mask = torch.arange(7).expand(BATCH, 7) >= torch.arange(3, 3 + BATCH).clamp(max=7)[:, None]
        return torch.randint(0, 50, (BATCH, 7)), mask
    return (torch.rand(BATCH, 3, 32, 32),)


MODELS: dict[str, Any] = {
    "mlp": mlp,
    "resnet18": resnet,
    "mobilenet_v3": mobilenet,
    "vit_b_16": vit,
    "unet": UNet,
    "lstm": LSTMClassifier,
    "encoder": Encoder,
}
QUICK = ("mlp", "encoder")
# After two steps the outputs for noise are nearly equal. Float rounding that moves some codes early
# in so deep a network decides between them, unless the target leaves nothing to decide.
TARGETS = {"resnet18": "onnxruntime"}


class Task(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        *inputs, labels = batch
        return F.cross_entropy(self.model(*inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(task: Task, name: str, folder: Path, *callbacks: Any, resume: Path | None = None) -> None:
    inputs = inputs_of(name)
    with torch.no_grad():
        shape = copy.deepcopy(task.model).eval()(*inputs).shape
    labels = torch.randint(0, CLASSES, (BATCH, *shape[2:]))
    data = DataLoader(TensorDataset(*inputs, labels), batch_size=BATCH)
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            StatQATCallback("int8", "int8", target=TARGETS.get(name), verbose=False),
            SeedEachBatch(),
            *callbacks,
        ],
        default_root_dir=folder,
    )
    trainer.fit(task, data, ckpt_path=resume)


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches .1. is smaller",
    "ignore:.*Please add the following callbacks.*",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS],
)
def test_a_public_model_trains_exports_and_resumes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Task(MODELS[name]())
    start = copy.deepcopy(task)
    exports = ExportCallback(tmp_path / "model.onnx")
    keeps = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(task, name, tmp_path, keeps, exports)

    report = exports.report
    assert report is not None
    assert report.native is not None
    assert report.native.max_difference == 0
    assert report.onnx is not None, report.notes
    assert report.onnx.agreement is not None
    assert report.onnx.agreement >= 0.95
    again = load_quantized(copy.deepcopy(start), tmp_path / "model.safetensors")
    inputs = inputs_of(name)
    task.eval()
    with torch.inference_mode():
        previous = torch.backends.mha.get_fastpath_enabled()
        assert torch.equal(again.model(*inputs), task.model(*inputs))
        assert torch.backends.mha.get_fastpath_enabled() == previous

    resumed = copy.deepcopy(start)
    last = ModelCheckpoint(tmp_path, filename="last")
    fit(resumed, name, tmp_path, last, resume=tmp_path / "epoch=0.ckpt")
    assert_same(resumed.state_dict(), task.state_dict())
    assert_same(quantizer_state(resumed), quantizer_state(task))
