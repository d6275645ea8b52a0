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

from statqat_lightning.fake_quant.input_moments import InputChannels, InputMoments
from statqat_lightning.fake_quant.observers import (
    NEGATIVE,
    NOISE,
    QUANTIZED,
    SIGNAL,
    InputObserver,
    ObserverConfig,
    statistics_of,
)
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.fake_quant.weights_together import WeightsTogether
from statqat_lightning.formats import (
    BlockFormat,
    Format,
    at_least_bits,
    get_format,
    unsigned,
)
from statqat_lightning.numerics.functional import (
    QParams,
    fake_quantize,
    learned_fake_quantize,
    positive,
)
from statqat_lightning.numerics.granularity import Granularity, PerChannel, PerTensor
from statqat_lightning.quantizers import ErrorWeights, Quantizer, get_quantizer

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
        if not (self.enabled and self.ready and _is_floating(x)):
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


class WeightFakeQuantizer(FakeQuantizer):
    """Fake quantization of a weight; its scale comes from the weight itself.

    Attributes:
        read_by: Names of the modules that read the weight without calling its layer, see
            `weight_views`.
        together: During a training step, the weights that are quantized with this one.
        input_moments: What the errors of its elements count for the layer's output; None where all
            count alike, or no scale depends on it.
        weighed: Whether the scale in force was chosen by what errors count. If it was not, it is no
            start for a search that knows better: the best by another measure may rest for good.
        trained: What tells the weight at the end of the training from another one, None if that is
            not known; see `export.stale`.
    """

    def __init__(
        self,
        layer: str,
        spec: TensorSpec,
        weight: Tensor,
        axis: int = 0,
        role: str = WEIGHT,
        channels: InputChannels | None = None,
    ) -> None:
        granularity, quantizer = spec.weight_granularity(axis), spec.weight_quantizer()
        try:
            super().__init__(layer, role, spec, granularity, quantizer, tuple(weight.shape))
        except ValueError as error:
            raise ValueError(f"{layer}/{role}: {error}") from error
        self.together: WeightsTogether | None = None
        self.read_by: tuple[str, ...] = ()
        self.input_moments: InputMoments | None = None
        if channels is not None and spec.weighs:
            kept = granularity.axis if isinstance(granularity, PerChannel) else None
            if channels.matter_within(kept):
                self.input_moments = InputMoments(channels)
        self.weighed = False
        self.trained: tuple[float, float] | None = None
        self.to(weight.device if weight.device.type != "meta" else torch.device("cpu"))

    @property
    def search_every(self) -> int:
        # Weights move slowly. The error of a wide format hardly depends on the scale, and a search
        # takes longer.
        return 16 if self.fmt.bits <= 4 else 64

    def __call__(self, weight: Tensor) -> Tensor:
        if self.together is not None and self.enabled and self.ready:
            quantized = self.together.take(self, weight)
            if quantized is not None:
                return quantized
        return self.quantize(weight)

    def error_weights(self, weight: Tensor) -> ErrorWeights | None:
        """What errors of the weight's elements count for the layer's output, in rows of one scale.

        Args:
            weight: The weight, for its shape.

        Returns:
            None where all count alike: nothing is known of the inputs, or need be.
        """
        moments = self.input_moments
        if moments is None or not moments.known:
            return None
        variance, mean = moments.variance_and_mean()
        sharing, shape = self.granularity, list(weight.shape)
        parts = shape[0] if isinstance(sharing, PerTensor) and mean is not None else 1
        if isinstance(sharing, PerChannel) and variance.shape[sharing.axis] == 1:
            shape[sharing.axis] = 1  # the same in all rows
        rows = [None if x is None else sharing.rows(x.expand(shape)) for x in (variance, mean)]
        assert rows[0] is not None, "variances are always known"
        return ErrorWeights(rows[0], rows[1], parts)

    def to(self, device: torch.device) -> None:
        super().to(device)
        if self.input_moments is not None:
            self.input_moments.to(device)

    def widen(self, bits: int) -> bool:
        """Use a format of at least `bits` bits; whether it is another one and needs a scale."""
        self.min_bits = bits
        fmt = at_least_bits(get_format(self.spec.format), bits)
        changed = fmt != self.fmt
        if changed:
            self.fmt, self.ready = fmt, False  # the scale in force is no start for another format
        return changed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"together": None}  # a copy's weight is another one

    def state_dict(self) -> dict[str, Any]:
        moments = self.input_moments
        own: dict[str, Any] = {"read_by": list(self.read_by)}
        if moments is not None:
            own |= {"input_moments": moments.state_dict(), "weighed": self.weighed}
        return super().state_dict() | own

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        saved = state.get("input_moments")
        if self.input_moments is None or saved is None:
            return
        there, expected = tuple(saved["mean"].shape), tuple(self.input_moments.mean.shape)
        if there != expected:
            raise ValueError(
                f"{self.name}: the saved moments of its inputs have shape {there}; expected "
                f"{expected}. Use the model and the recipe it was saved with."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.read_by = tuple(state.get("read_by", ()))
        if self.input_moments is not None:
            self.input_moments.load_state_dict(state.get("input_moments"))
            self.weighed = bool(state.get("weighed", self.input_moments.known))

    @torch.no_grad()
    def energies(self, weight: Tensor, of_output: bool = False) -> tuple[Tensor, Tensor]:
        """Energy of the weight and of its quantization error, float32 scalars.

        Args:
            weight: The weight.
            of_output: Whether it is the energy that the layer's output has of them, as far as that
                is known, see `InputMoments.output_energy`.
        """
        wide = weight.detach().to(torch.float32)
        error = wide - self.quantize(wide)
        moments = self.input_moments
        if of_output and moments is not None and moments.known:
            return moments.output_energy(wide), moments.output_energy(error)
        return wide.square().sum(), error.square_().sum()


class ActivationFakeQuantizer(FakeQuantizer):
    """Fake quantization of a layer's input or output, with running statistics.

    Attributes:
        observing: Whether forward passes add to the observer: to the sums behind the SNR, and
            unless `frozen` to the statistics behind the scale.
        deciding: Whether the sign of the format may still change. It is settled by the smallest of
            all values of the first batches, not by a sample.
        recompute: Whether a layer quantizes its input again in the backward pass, and does not keep
            it quantized until then.
        lowest: Smallest value seen while deciding, or 0; float32 `()`.
    """

    batches_to_decide = 8

    def __init__(
        self,
        layer: str,
        spec: TensorSpec,
        config: ObserverConfig,
        device: torch.device,
        role: str = INPUT,
        optional: bool = False,
    ) -> None:
        if isinstance(get_format(spec.format), BlockFormat):
            raise ValueError(
                f"{layer}/{role}: got format {spec.format!r}; expected a format with one scale "
                "for the tensor. Block formats are for weights."
            )
        quantizer = get_quantizer(spec.quantizer or "iterative", **dict(spec.options))
        super().__init__(layer, role, spec, PerTensor(), quantizer, ())
        self.optional = optional
        self.observer = InputObserver(
            config, quantizer.needs_spectrum, quantizer.needs_range, quantizer.range_momentum
        )
        self.observing = False
        self.recompute = False
        self.deciding = spec.unsigned_if_nonnegative
        self.lowest = torch.zeros((), dtype=torch.float32, device="cpu")
        if device.type != "meta":
            self.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        x_hat = self.quantize(x)
        if self.observing and _is_floating(x) and not recomputing():
            self.observe(x, quantized=x_hat is not x)
        return x_hat

    def observe(self, x: Tensor, quantized: bool) -> None:
        """Add a tensor to the sums behind the SNR and, unless frozen, to the statistics.

        Args:
            x: The input or output, any shape, floating dtype.
            quantized: Whether it is quantized with the scale in force, or passed on as it is.
        """
        scale = self.qparams.scale if quantized else None
        # Peaks change slowly: they are looked at where a search comes next. A compiled graph must
        # not depend on a number that changes.
        peaks = self.quantizer.needs_peaks(self.fmt) and (
            torch.compiler.is_compiling() or self.is_due
        )
        self.observer.add(x, self.fmt, scale, statistics=not self.frozen, peaks=peaks)
        if self.deciding and x.numel() and not self.frozen:
            self.lowest = torch.fmin(self.lowest, x.detach().amin().to(torch.float32))

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.lowest = self.lowest.to(device)
        for name in self.observer.tensors():
            setattr(self.observer, name, getattr(self.observer, name).to(device))

    def settle(self) -> bool:
        """Make the quantizer ready if its statistics allow it, and choose the sign of its format.

        Reads from the device, but only until both are settled.

        Returns:
            Whether it has a scale from its statistics alone now.
        """
        if self.ready and not self.deciding:
            return False
        num_batches = self.observer.num_batches.item()
        if num_batches == 0:
            return False
        self.deciding = self.deciding and num_batches < self.batches_to_decide
        return self.follow_format()

    def widen(self, bits: int) -> bool:
        """Use a format of at least `bits` bits, with the scale that its statistics give.

        Returns:
            Whether it has a scale from its statistics alone now.
        """
        self.min_bits = bits
        if not self.ready:
            self.fmt = at_least_bits(get_format(self.spec.format), bits)
            return False
        return self.follow_format()

    def follow_format(self) -> bool:
        """Take the format that is due; whether it is another one, with a scale for it."""
        fmt = self._format()
        if self.ready and fmt == self.fmt:
            return False
        self._fit(fmt)
        return True

    def _format(self) -> Format:
        """The format of the specification, with the sign of the data and no fewer bits than due."""
        fmt = get_format(self.spec.format)
        if self.spec.unsigned_if_nonnegative and self.lowest.item() >= 0:
            fmt = unsigned(fmt) or fmt
        return at_least_bits(fmt, self.min_bits)

    @torch.no_grad()
    def _fit(self, fmt: Format) -> None:
        self.fmt = fmt
        statistics = statistics_of([self.observer])
        self.scale.copy_(self.quantizer.from_statistics(statistics, fmt).squeeze(0))
        self.stay_within_limit()
        self.ready = True

    def stay_within_limit(self) -> None:
        """Let the grid end where the values do, see `TensorSpec.max_value`."""
        if self.spec.max_value is not None:
            self.scale.clamp_(max=self.spec.max_value / self.fmt.max)

    @property
    def negative_share(self) -> float:
        """Share of the observed values that were negative and that an unsigned format set to zero.

        Reads from the device.
        """
        return float(self.observer.running_sums[NEGATIVE])

    def mean_energies(self) -> tuple[Tensor, Tensor]:
        """Running mean squares of the input and of its error; NaN before anything was quantized."""
        sums = self.observer.running_sums
        known = sums[QUANTIZED] > 0
        return torch.where(known, sums[SIGNAL], torch.nan), torch.where(
            known, sums[NOISE], torch.nan
        )

    def state_dict(self) -> dict[str, Any]:
        running = {
            name: getattr(self.observer, name).detach().cpu().clone()
            for name in self.observer.RUNNING
        }
        deciding = {"deciding": self.deciding, "lowest": self.lowest.detach().cpu().clone()}
        return super().state_dict() | running | deciding

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        for name in self.observer.RUNNING:
            saved, own = tuple(state[name].shape), tuple(getattr(self.observer, name).shape)
            if saved != own:
                raise ValueError(
                    f"{self.name}: the saved {name} has shape {saved}; expected {own}. It comes "
                    "from another version of the package or another quantizer: use those, or load "
                    "the model's weights alone and calibrate again."
                )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.deciding = bool(state["deciding"])
        self.lowest.copy_(state["lowest"])
        for name in self.observer.RUNNING:
            getattr(self.observer, name).copy_(state[name])
        self.observer.reset_accumulators()


def _is_floating(x: object) -> bool:
    """Whether `x` can be quantized; about all else, lists above all, the layer itself complains."""
    return isinstance(x, Tensor) and x.is_floating_point()


def recomputing() -> bool:
    """Whether this forward recomputes a checkpointed segment during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
