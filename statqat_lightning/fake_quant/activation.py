"""The fake quantizer of an input or output, whose scale comes from running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statqat_lightning.fake_quant.fake_quantizer import (
    INPUT,
    FakeQuantizer,
    is_floating,
    recomputing,
)
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.observers import InputObserver, ObserverConfig, statistics_of
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import (
    BlockFormat,
    Format,
    IntFormat,
    at_least_bits,
    get_format,
    unsigned,
)
from statqat_lightning.numerics.granularity import PerTensor
from statqat_lightning.quantizers import get_quantizer

_WORTH_A_ZERO_POINT = 10**0.05
"""Half a decibel: kernels are simplest around zero, and data that is even gains next to nothing."""


class ActivationFakeQuantizer(FakeQuantizer):
    """Fake quantization of a layer's input or output, with running statistics.

    Attributes:
        observing: Whether forward passes add to the observer: to the sums behind the SNR, and
            unless `frozen` to the statistics behind the scale.
        deciding: Whether the sign of the format, or its zero point, may still change. The sign is
            decided by the smallest of all values of the first batches, not by a sample.
        recompute: Whether a layer quantizes its input again in the backward pass, and does not keep
            it quantized until then.
        lowest: Smallest value seen while deciding, or 0; float32 `()`.
        zero_point: Levels below zero in the width of the specification, if the data was found to
            want so many; None for the levels that the sign gives.
    """

    batches_to_decide = 8
    zero_point: int | None = None

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
        self.deciding = spec.unsigned_if_nonnegative or spec.zero_point
        self.lowest = torch.zeros((), dtype=torch.float32, device="cpu")
        if device.type != "meta":
            self.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        x_hat = self.quantize(x)
        if self.observing and is_floating(x) and not recomputing():
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

    def decide(self) -> bool:
        """Make the quantizer ready if its statistics allow it, and choose its sign or zero point.

        Reads from the device, but only until both are decided.

        Returns:
            Whether it has a scale from its statistics alone now.
        """
        if self.ready and not self.deciding:
            return False
        num_batches = self.observer.num_batches.item()
        if num_batches == 0:
            return False
        self.deciding = self.deciding and num_batches < self.batches_to_decide
        # At the batches at which scales are searched, too, and the last time when that is over.
        if self.spec.zero_point and (not self.deciding or num_batches in (1, 2, 4)):
            self._choose_zero_point()
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
        """The format that the data wants, with no fewer bits than due."""
        return at_least_bits(self.own_format(), self.min_bits)

    def own_format(self) -> Format:
        """The format of the specification, with the sign or the zero point of the data."""
        fmt = get_format(self.spec.format)
        if self.zero_point is not None:
            return IntFormat(fmt.bits, signed=False, zero_point=self.zero_point)
        if self.spec.unsigned_if_nonnegative and self.lowest.item() >= 0:
            return unsigned(fmt) or fmt
        return fmt

    @torch.no_grad()
    def _choose_zero_point(self) -> None:
        """Let as many levels lie below zero as its statistics want, where that gains enough."""
        self.zero_point = None
        without = self.own_format()
        if not without.is_signed:
            return
        levels, statistics = IntFormat(without.bits, signed=False), statistics_of([self.observer])
        plain = self.quantizer.from_statistics(statistics, without)
        scale, zero_point = self.quantizer.affine_from_statistics(statistics, levels)
        if (spectrum := statistics.spectrum) is not None:
            gain = spectrum.mse(without, plain) / spectrum.mse(levels, scale, zero_point)
        else:  # of a range alone: steps that are finer by so much
            gain = (plain / scale).square()
        if gain.item() >= _WORTH_A_ZERO_POINT:
            self.zero_point = int(zero_point)

    @torch.no_grad()
    def _fit(self, fmt: Format) -> None:
        self.fmt = fmt
        statistics = statistics_of([self.observer])
        self.scale.copy_(self.quantizer.from_statistics(statistics, fmt).squeeze(0))
        self.stay_within_limit()
        self.ready = True

    def stay_within_limit(self) -> None:
        """Let the grid end where the values do, see `TensorSpec.max_value`."""
        if self.spec.max_value is not None and self.fmt.max > 0:
            self.scale.clamp_(max=self.spec.max_value / self.fmt.max)

    @property
    def negative_share(self) -> float:
        """Share of the observed values that were negative and that an unsigned format set to zero.

        Reads from the device.
        """
        return float(InputSums(self.observer.running_sums).negative)

    def mean_energies(self) -> tuple[Tensor, Tensor]:
        """Running mean squares of the input and of its error; NaN before anything was quantized."""
        sums = InputSums(self.observer.running_sums)
        known = sums.quantized > 0
        signal, noise = (torch.where(known, x, torch.nan) for x in (sums.signal, sums.noise))
        return signal, noise

    def state_dict(self) -> dict[str, Any]:
        running = {
            name: getattr(self.observer, name).detach().cpu().clone()
            for name in self.observer.RUNNING
        }
        deciding = {"deciding": self.deciding, "lowest": self.lowest.detach().cpu().clone()}
        zero_point = {"zero_point": self.zero_point} if self.spec.zero_point else {}
        return super().state_dict() | running | deciding | zero_point

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
        self.zero_point = state.get("zero_point")
        for name in self.observer.RUNNING:
            getattr(self.observer, name).copy_(state[name])
        self.observer.reset_accumulators()
