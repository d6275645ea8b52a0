"""Warnings of inputs that make quantization worse than it could be, each given once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from statqat_lightning.quantized_model import activation_quantizers, idle_activations


class StatQATWarning(UserWarning):
    """Something in the data or the run makes quantization worse than it could be."""


class InputWarnings:
    """What has been warned of, and what has been seen since the last look.

    Where a method says `of`, it reads from the device.
    """

    def __init__(self) -> None:
        self._given: set[tuple[str, str]] = set()
        self._overflow: Tensor | None = None

    def start(self) -> None:
        """Forget what an earlier fit has seen, which may have been of another module."""
        self._overflow = None

    def remember(self, overflow: Tensor) -> None:
        """Keep, on the device, where inputs held NaN or infinite values.

        Args:
            overflow: bool `(number of input quantizers,)`, as `refresh` returns it.
        """
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    def of_overflow(self, model: nn.Module) -> None:
        """Warn of inputs that have held NaN or infinite values."""
        if self._overflow is None:
            return
        quantizers = activation_quantizers(model)
        for quantizer, happened in zip(quantizers, self._overflow.tolist(), strict=True):
            if happened:
                self.once(
                    quantizer.name,
                    "overflow",
                    "holds NaN, infinite or huge values. They are kept out of the statistics.",
                )
        self._overflow = None

    def of_negatives(self, model: nn.Module) -> None:
        """Warn of inputs with negative values in an unsigned format."""
        for quantizer in activation_quantizers(model):
            spec = quantizer.spec
            if not quantizer.fmt.is_signed and quantizer.negative_share > 0:
                # The sign follows the first batches, which held none.
                signed = (
                    f"TensorSpec({spec.format!r}), without unsigned_if_nonnegative"
                    if spec.unsigned_if_nonnegative
                    else f"a signed format, for example TensorSpec('int{quantizer.fmt.bits}')"
                )
                self.once(
                    quantizer.name,
                    "negative",
                    f"{100 * quantizer.negative_share:.3g} % of the values are negative, and "
                    f"{quantizer.fmt.name} sets them to zero. Give this input {signed}.",
                )

    def of_idle_layers(self, model: nn.Module) -> None:
        """Warn of layers that have not run, where others have."""
        idle = idle_activations(model)
        if idle and len(idle) < len(activation_quantizers(model)):
            self.once(
                ", ".join(idle), "idle", "did not run in calibration; unquantized until they do."
            )

    def once(self, name: str, kind: str, message: str) -> None:
        """Warn, unless a warning of this name and kind was given before."""
        if (name, kind) not in self._given:
            self._given.add((name, kind))
            rank_zero_warn(f"StatQAT {name}: {message}", category=StatQATWarning)
