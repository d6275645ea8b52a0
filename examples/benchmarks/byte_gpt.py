"""A small GPT over bytes, and real text that every machine has: Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from measuring import rising_and_falling
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

HELD_OUT_SHARE = 16
"""One in so many files is held out."""

_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


class Block(nn.Module):
    """Attention and a network of two layers, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """Logits of the next byte: bytes `(batch, length)` to `(batch, length, 256)`."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # as in GPT-2: what is added to the stream is smaller
                small = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * layers) ** 0.5 if small else 1))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.bytes(x) + self.places(places))))
        return logits


class LanguageModel(L.LightningModule):
    """Cross entropy of the next byte, AdamW, a learning rate that rises and falls linearly.

    Args:
        model: Returns logits of the next byte.
        lr: Highest learning rate, reached after `warm_up` of the steps.
        warm_up: Share of the steps.
        weight_decay: Of matrices; not of vectors, nor of learned scales.
        scale_lr: Learning rate of learned scales, by that of everything else.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        warm_up: float = 0.1,
        weight_decay: float = 0.1,
        scale_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def _loss(self, text: Tensor) -> Tensor:
        text = text.long()
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, text: Tensor, batch_index: int) -> Tensor:
        return self._loss(text)

    def test_step(self, text: Tensor, batch_index: int) -> None:
        bits = self._loss(text) / torch.log(torch.tensor(2.0))
        self.log("bits_per_byte", bits, batch_size=text.shape[0])

    def configure_optimizers(self) -> Any:
        lr, decay = self.hparams["lr"], self.hparams["weight_decay"]
        scales = [p for n, p in self.named_parameters() if n.endswith("_scale")]
        rest = [p for n, p in self.named_parameters() if not n.endswith("_scale")]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
            {"params": scales, "weight_decay": 0.0, "lr": lr * self.hparams["scale_lr"]},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95))
        return rising_and_falling(optimizer, self.trainer.max_steps, self.hparams["warm_up"])


class Windows(Dataset[Tensor]):
    """Stretches of a text, `length` + 1 bytes each: inputs, and what comes next."""

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        self.text, self.starts = text, starts
        self.offsets = torch.arange(length + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[self.starts[index] + self.offsets]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.text[self.starts[indices].unsqueeze(1) + self.offsets]

    def loader(self, batch_size: int) -> DataLoader[Tensor]:
        """Batches in order; an incomplete last one is dropped."""
        return DataLoader(self, batch_size, drop_last=True, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class TrainingText(L.LightningDataModule):
    """Stretches at random places; which one comes when, follows from seed and step alone.

    Args:
        text: uint8 `(n,)`.
        context: Bytes of a stretch.
        batch_size: Stretches of a step.
        steps: Steps of the training.
        seed: Same seed, same stretches in the same order.
    """

    def __init__(self, text: Tensor, context: int, batch_size: int, steps: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - context, (steps * batch_size,), generator=generator)
        self.windows, self.batch_size = Windows(text, starts, context), batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        order = _FromStep(self, len(self.windows))
        return DataLoader(self.windows, self.batch_size, sampler=order, collate_fn=_as_is)


class _FromStep(Sampler[int]):
    """All places in order; for a resumed training, from its step on."""

    def __init__(self, text: TrainingText, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        trainer = self.text.trainer
        done = 0 if trainer is None else trainer.global_step
        return iter(range(done * self.text.batch_size, self.length))


def even_windows(text: Tensor, num_bytes: int, length: int) -> Windows:
    """Stretches of some `num_bytes` in all, evenly spread over a text."""
    count = max(1, min(num_bytes, len(text) - 1) // length)
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    return Windows(text, starts, length)


def standard_library(folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Source files of Python's standard library, without its tests: training and held-out text.

    Which files are held out follows from a hash of their names, so that it is the same everywhere.

    Returns:
        uint8 `(n,)` each: the files in the order of their names, with a zero byte after each.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not any(part in _LEFT_OUT for part in name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            parts[digest[0] % HELD_OUT_SHARE == 0].append(path.read_bytes() + b"\0")
    train, held_out = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, held_out
