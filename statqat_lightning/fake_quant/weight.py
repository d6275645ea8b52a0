"""The fake quantizer of a weight, whose scale comes from the weight itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statqat_lightning.fake_quant.fake_quantizer import WEIGHT, FakeQuantizer
from statqat_lightning.fake_quant.input_moments import InputChannels, InputMoments
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import at_least_bits, get_format
from statqat_lightning.numerics.granularity import PerChannel, PerTensor
from statqat_lightning.quantizers import ErrorWeights


class WeightFakeQuantizer(FakeQuantizer):
    """Fake quantization of a weight; its scale comes from the weight itself.

    Attributes:
        read_by: Names of the modules that read the weight without calling its layer, see
            `weight_views`.
        input_moments: What the errors of its elements count for the layer's output; None where all
            count alike, or no scale depends on it.
        weighed: Whether the scale in force was chosen by what errors count. If it was not, it is no
            start for a search that knows better: the best by another measure may rest for good.
        trained: What tells the weight at the end of the training from another one, None if that is
            not known; see `export.freezing.stale_scales`.
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
