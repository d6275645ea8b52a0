"""Quantization-aware training in plain Lightning, to copy from: scanned digits, W8A8, a minute.

    python examples/image_classifier.py

needs `pip install -e ".[examples]"` in a clone. Remove the three callbacks of statqat_lightning,
and it is the float training.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from statqat_lightning import ExportCallback, SNRMonitor, StatQATCallback


class Digits(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.train, self.val = random_split(
            *(TensorDataset(pixels, torch.tensor(labels)), [0.8, 0.2]),
            generator=torch.Generator().manual_seed(0),
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=64)


def block(given: int, made: int) -> nn.Module:
    conv = nn.Conv2d(given, made, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(made), nn.ReLU())


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(block(1, 64), block(64, 128), block(128, 128)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    callbacks = [
        StatQATCallback(target="onnxruntime"),  # int8 weights and activations, kernels' layout
        SNRMonitor(prog_bar=True),  # SNR of every layer, to the logger
        ExportCallback("outputs/image_classifier/model", best=True),  # .safetensors and .onnx
        ModelCheckpoint("outputs/image_classifier", monitor="accuracy", mode="max"),
        EarlyStopping(monitor="accuracy", mode="max", patience=3),
    ]
    logger = WandbLogger(project="statqat", save_dir="outputs", offline=True)
    L.Trainer(max_epochs=10, callbacks=callbacks, logger=logger).fit(Classifier(), Digits())
