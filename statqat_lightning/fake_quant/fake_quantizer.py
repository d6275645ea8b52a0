"""Fake quantizers: format, granularity, quantizer and statistics joined for one tensor of a layer.

They are not modules: a layer holds them as plain attributes, so that parameters, buffers,
`state_dict` keys and module names stay those of the float model. Their tensors are float32 whatever
precision the model runs in, and follow the layer from device to device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import Format, get_format
from statqat_lightning.numerics.granularity import Granularity
from statqat_lightning.numerics.learned import learned_fake_quantize, positive
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import Quantizer

WEIGHT, INPUT, OUTPUT = "weight", "input", "output"
"""Roles of tensors; layers with several weights or inputs call them by their names in torch."""


class FakeQuantizer:
    """Fake quantization of one tensor with the scale in force.

    Attributes:
        name: The layer's name and the tensor's role, for messages and log keys.
        role: What the tensor is to the layer: the name of a weight or an input, or `output`.
        fmt: The number format in use.
        scale: float32, in the shape of its granularity; a parameter of the layer if it is learned.
        ready: Whether the scale is known; until then tensors pass unchanged.
        enabled: Switch for quantization.
        min_bits: Fewest bits that the format in use may have, whatever the specification says.
        optional: Whether it may well never run: attention whose keys are its queries quantizes them
            once, as queries.
        frozen: Whether the scale, and an input's statistics, are kept as they are. A weight's scale
            that is not learned changes when it is refreshed, and only then.
        num_refreshes: How often the scale was looked at, or passed over.
    """

    def __init__(
        self,
        layer: str,
        role: str,
        spec: TensorSpec,
        granularity: Granularity,
        quantizer: Quantizer,
        shape: tuple[int, ...],
    ) -> None:
        self.layer = layer
        self.role = role
        self.spec = spec
        self.fmt: Format = get_format(spec.format)
        self.granularity = granularity
        self.quantizer = quantizer
        self.scale = torch.ones(granularity.scale_shape(shape), dtype=torch.float32, device="cpu")
        if quantizer.learned:
            self.scale = nn.Parameter(self.scale)
        self.ready = False
        self.enabled = True
        self.min_bits = 0
        self.optional = False
        self.frozen = False
        self.num_refreshes = 0

    @property
    def name(self) -> str:
        """`{layer}/{role}`, as in log keys."""
        return f"{self.layer}/{self.role}" if self.layer else self.role

    @property
    def parameter_name(self) -> str | None:
        """What the layer calls the scale if it is learned, else None."""
        return f"{self.role}_scale" if self.quantizer.learned else None

    @property
    def qparams(self) -> QParams:
        """Scale and zero point in force, without gradient."""
        scale = positive(self.scale.detach()) if self.quantizer.learned else self.scale
        return QParams(scale, None, self.granularity)

    @property
    def search_every(self) -> int:
        """Every so many refreshes is a search; between them scales rest, or `track` follows."""
        return 4

    @property
    def is_due(self) -> bool:
        """Whether the next refresh is a search: often at first, then every so many refreshes."""
        number = self.num_refreshes
        early = number & (number - 1) == 0  # 0, 1, 2, 4, 8, 16
        return not self.ready or early or number % self.search_every == 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickle or a copy holds; `min_bits` was called `narrowest` before."""
        if "narrowest" in state:
            state = {"min_bits" if k == "narrowest" else k: v for k, v in state.items()}
        self.__dict__.update(state)

    def skip_refresh(self) -> bool:
        """Count a refresh in which the scale rests; False if there is something to do."""
        keeps_scale = self.quantizer.keeps_scale and not self.is_due
        self.num_refreshes += keeps_scale
        return keeps_scale

    def freeze(self, frozen: bool) -> None:
        """Set `frozen`; a learned scale then has no gradient."""
        if self.quantizer.learned and frozen != self.frozen:
            self.scale.requires_grad_(not frozen)
            self.scale.grad = None  # an optimizer leaves alone what has none
        self.frozen = frozen

    def quantize(self, x: Tensor) -> Tensor:
        """`x` fake-quantized, or `x` itself while switched off or without a scale."""
        if not (self.enabled and self.ready and is_floating(x)):
            return x
        if self.quantizer.learned:
            qparams = QParams(self.scale, None, self.granularity)
            return learned_fake_quantize(x, qparams, self.fmt)
        return fake_quantize(x, self.qparams, self.fmt, self.spec.gradient)

    def as_it_is_now(self) -> Callable[[Tensor], Tensor]:
        """What `quantize` does with the present format and scale, whatever becomes of them."""
        fmt, gradient = self.fmt, self.spec.gradient
        scale, zero_point, granularity = self.qparams
        qparams = QParams(scale.clone(), zero_point, granularity)
        if self.quantizer.learned:
            return lambda x: learned_fake_quantize(x, qparams, fmt)
        return lambda x: fake_quantize(x, qparams, fmt, gradient)

    def to(self, device: torch.device) -> None:
        """Move all tensors to `device`; their dtype stays float32."""
        if self.quantizer.learned:
            self.scale.data = self.scale.data.to(device)  # the layer holds it, too
        else:
            self.scale = self.scale.to(device)

    def follow(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Follow what `Module._apply` does to a layer, in device but not in dtype.

        A probe tells the device. So `to_empty` leaves the values intact, and nothing moves to the
        meta device, where they would be lost.
        """
        device = apply(torch.empty(0, dtype=torch.float32, device=self.scale.device)).device
        if device.type != "meta":
            self.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain data and CPU tensors."""
        return {
            "format": self.fmt.name,
            "narrowest": self.min_bits,
            "ready": self.ready,
            "num_refreshes": self.num_refreshes,
            "scale": self.scale.detach().cpu().clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse what `load_state_dict` cannot take over.

        Raises:
            ValueError: If a tensor has another shape.
        """
        if state["scale"].shape != self.scale.shape:
            raise ValueError(
                f"{self.name}: the saved scale has shape {tuple(state['scale'].shape)}; expected "
                f"{tuple(self.scale.shape)}. Use the model and the recipe it was saved with."
            )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: As `check_state`; nothing is changed then.
        """
        self.check_state(state)
        self.fmt = get_format(state["format"])
        self.min_bits = int(state.get("narrowest", 0))
        self.ready = bool(state["ready"])
        self.num_refreshes = int(state.get("num_refreshes", 0))
        self.scale.copy_(state["scale"])


def is_floating(x: object) -> bool:
    """Whether `x` can be quantized; about all else, lists above all, the layer itself complains."""
    return isinstance(x, Tensor) and x.is_floating_point()


def recomputing() -> bool:
    """Whether this forward recomputes a checkpointed segment during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
