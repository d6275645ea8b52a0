"""Models with quantizers for the export tests: one of every supported layer, and a user's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
FLOATS = ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"]
# Every format, and every granularity with a few of them.
FORMATS_AND_GRANULARITIES = [
    *((fmt, "per_channel") for fmt in (*INTEGERS, *FLOATS)),
    *((fmt, "per_tensor") for fmt in ("int3", "uint8", "fp8_e4m3", "fp4_e2m1")),
    *((fmt, "per_group:4") for fmt in ("int3", "int8", "fp6_e2m3", "fp4_e2m1")),
]


class ScaledLinear(nn.Linear):
    """A user's layer: its own forward, and an attribute that is called like a quantizer's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias) + self.weight.mean()


class Conv1D(nn.Module):
    """That of transformers, in GPT-2: a linear layer whose weight is `(in, out)`."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)

    def as_linear(self) -> nn.Linear:
        """What computes the same."""
        linear = nn.Linear(*self.weight.shape)
        linear.weight.data, linear.bias.data = self.weight.data.T.clone(), self.bias.data.clone()
        return linear


class Everything(nn.Module):
    """Every supported layer, normalisation, and inputs with and without negative values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1))
        self.conv2d = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1d = nn.Conv1d(8, 4, 4, padding="same", padding_mode="circular")
        self.own = ScaledLinear(64, 12)
        self.head = nn.Linear(12, 10)
        self.register_buffer("offset", torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3d(x.unsqueeze(1)).squeeze(2))
        x = F.relu(self.norm(self.conv2d(x)))
        x = F.hardswish(self.conv1d(x.flatten(2)))
        out: Tensor = self.head(torch.tanh(self.own(x.flatten(1)))) + self.offset
        return out


class Branches(nn.Module):
    """What it does depends on numbers: no tracing follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out if out.sum() > 0 else -out  # the culprit


def small_net() -> nn.Sequential:
    """Takes `(batch, 1, 8, 8)`."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 24),
        nn.Hardswish(),
        nn.Linear(24, 10),
    )


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 1, 8, 8)


def recipe_of(weights: Any, inputs: Any = None, granularity: str | None = None) -> QuantRecipe:
    """One format for all weights and one for all inputs, first and last layer included."""
    weight = TensorSpec(weights, granularity) if isinstance(weights, str) else weights
    return QuantRecipe([QuantRule("*", weight, inputs)])


def calibrated(model: nn.Module, recipe: QuantRecipe, *batch: Tensor) -> nn.Module:
    """The model in eval mode, with quantizers and BatchNorm statistics that know a batch."""
    return observed(model.train(), recipe, *batch).eval()


@torch.no_grad()
def observed(model: nn.Module, recipe: QuantRecipe, *batch: Tensor) -> nn.Module:
    """The model, in its own mode, with quantizers that know a batch."""
    prepare(model, recipe=recipe)
    set_observing(model, True)
    model(*batch)
    refresh(model)
    set_observing(model, False)
    return model


@torch.no_grad()
def outputs(model: nn.Module, *batch: Tensor) -> Tensor:
    """Outputs in eval mode; the model's own mode and state stay."""
    out: Tensor = copy.deepcopy(model).eval()(*batch)
    return out
