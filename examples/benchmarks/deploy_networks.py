"""Public networks with random weights, for the benchmark of what is deployed.

Weights are random because nothing can be downloaded; BatchNorms know their inputs, as after a
training. Speed does not depend on weights, and the SNR to float compares quantizers on equal terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Network:
    """A network, and what goes into it.

    Attributes:
        make: Builds it.
        batch: Random inputs, as many as given.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]


def _images(size: int = 224) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, 3, size, size)


def _timm(name: str, size: int = 224) -> Network:
    def make() -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(name, pretrained=False)
        return network

    return Network(make, _images(size))


def _torchvision(name: str, size: int = 224) -> Network:
    def make() -> nn.Module:
        import torchvision

        # GoogLeNet warns where it is not told.
        options = {"init_weights": True} if name == "googlenet" else {}
        network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return network

    return Network(make, _images(size))


class _First(nn.Module):
    """A model of transformers that takes tokens and returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        first: Tensor = self.model(tokens)[0]
        return first


def _transformer(kind: str) -> Network:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**_SIZES[kind])
        config.use_cache, config.return_dict = False, False
        config._attn_implementation = "sdpa"
        return _First(getattr(transformers, f"{kind}Model")(config))

    return Network(make, lambda count: torch.randint(0, 8192, (count, 128)))


_SIZES: dict[str, dict[str, Any]] = {
    "Bert": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
    "DistilBert": {
        "vocab_size": 8192,
        "dim": 384,
        "n_layers": 6,
        "n_heads": 6,
        "hidden_dim": 1536,
    },
    "GPT2": {"vocab_size": 8192, "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 128},
    "Llama": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
}


class _ConvAct(nn.Sequential):
    def __init__(self, given: int, made: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(given, made, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(made),
            nn.SiLU(inplace=True),
        )


class _C2f(nn.Module):
    """Two halves by `chunk`, one of which goes on through bottlenecks; all are joined by `cat`."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half = channels // 2
        self.before = _ConvAct(channels, channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_ConvAct(half, half), _ConvAct(half, half)) for _ in range(depth)
        )
        self.after = _ConvAct((2 + depth) * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.before(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        joined: Tensor = self.after(torch.cat(parts, 1))
        return joined


class Detector(nn.Module):
    """A detector in the manner of YOLOv8: SiLU, chunk, cat, upsampling, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_ConvAct(3, 32, 3, 2), _ConvAct(32, 64, 3, 2), _C2f(64, 1))
        self.middle = nn.Sequential(_ConvAct(64, 128, 3, 2), _C2f(128, 2))
        self.deep = nn.Sequential(_ConvAct(128, 256, 3, 2), _C2f(256, 1))
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.joined = _ConvAct(512, 256, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.neck = _ConvAct(384, 128, 1)
        self.heads = nn.ModuleList((nn.Conv2d(128, 64, 1), nn.Conv2d(256, 64, 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        deep = self.joined(torch.cat((deep, self.pool(deep)), 1))
        neck = self.neck(torch.cat((self.up(deep), middle), 1))
        return self.heads[0](neck), self.heads[1](deep)


class _DoubleConv(nn.Sequential):
    def __init__(self, given: int, made: int) -> None:
        layers: list[nn.Module] = []
        for before in (given, made):
            layers += [nn.Conv2d(before, made, 3, padding=1, bias=False), nn.BatchNorm2d(made)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """Three levels, up by ConvTranspose2d."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList((_DoubleConv(3, 32), _DoubleConv(32, 64), _DoubleConv(64, 128)))
        self.up = nn.ModuleList(
            (nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2))
        )
        self.joined = nn.ModuleList((_DoubleConv(128, 64), _DoubleConv(64, 32)))
        self.head = nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down[0](x)
        middle = self.down[1](F.max_pool2d(high, 2))
        low = self.down[2](F.max_pool2d(middle, 2))
        middle = self.joined[0](torch.cat((middle, self.up[0](low)), 1))
        high = self.joined[1](torch.cat((high, self.up[1](middle)), 1))
        found: Tensor = self.head(high)
        return found


NETWORKS: dict[str, Network] = {
    "resnet26": _timm("resnet26"),
    "seresnet": _timm("seresnet18"),
    "mobilenetv2_100": _timm("mobilenetv2_100"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "yolo": Network(Detector, _images(256)),
    "unet": Network(UNet, _images(128)),
    "convnext": _timm("convnext_atto"),
    "vit": _timm("vit_tiny_patch16_224"),
    "bert": _transformer("Bert"),
    "gpt2": _transformer("GPT2"),
    "resnet18": _torchvision("resnet18"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "shufflenet_v2": _torchvision("shufflenet_v2_x1_0"),
    "densenet": _timm("densenet121", 128),
    "regnety": _timm("regnety_002"),
    "googlenet": _torchvision("googlenet", 128),
    "squeezenet": _torchvision("squeezenet1_1"),
    "vgg11_bn": _torchvision("vgg11_bn", 64),
    "swin": _timm("swin_tiny_patch4_window7_224"),
    "mixer": _timm("mixer_s32_224"),
    "mobilevit": _timm("mobilevit_xxs", 256),
    "ghostnet": _timm("ghostnet_050"),
    "res2net": _timm("res2net50_14w_8s", 128),
    "hrnet": _timm("hrnet_w18_small", 128),
    "distilbert": _transformer("DistilBert"),
    "llama": _transformer("Llama"),
}
"""The first ten are those of the table that the benchmark began with."""


def find(name: str) -> Network:
    """A network of the table, or another one by its library: `timm:poolformer_s12:128`.

    Raises:
        ValueError: If the name is neither.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    library, _, rest = name.partition(":")
    own, _, size = rest.partition(":")
    makers = {"timm": _timm, "torchvision": _torchvision}
    if library not in makers or not own or not (size or "224").isdecimal():
        raise ValueError(
            f"got {name!r}; expected one of {', '.join(NETWORKS)}, or timm:NAME or "
            "torchvision:NAME, with :SIZE for images of another size than 224"
        )
    return makers[library](own, int(size or 224))


@torch.no_grad()
def network_of(name: str, seed: int = 0) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A network in eval mode, whose BatchNorms have seen inputs, and what makes inputs for it."""
    torch.manual_seed(seed)
    found = find(name)
    network, batch = found.make(), found.batch
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the mean of all batches
    if norms:
        network.train()
        for _ in range(2):
            network(batch(8))
    return network.eval(), batch
