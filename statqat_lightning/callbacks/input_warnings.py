"""Warnings of inputs that make quantization worse than it could be, each given once."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import get_format
from statqat_lightning.model.insertion_report import InsertionReport
from statqat_lightning.model.quantized_model import activation_quantizers, idle_activations
from statqat_lightning.recipes.recipe import QuantRecipe

_LITTLE = 0.5
"""Share of the parameters below which a warning says what is in the way."""


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
        """Warn of inputs with negative values in an unsigned format.

        Not where no level below zero was found to be worth one: those values are next to nothing.
        """
        for quantizer in activation_quantizers(model):
            spec = quantizer.spec
            if quantizer.zero_point is not None:
                continue
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

    def of_weights_outside_checkpoints(self, names: Sequence[str]) -> None:
        """Warn of weights that were moved and that the module leaves out of its `state_dict`."""
        if names:
            self.once(
                "compensate",
                "outside",
                f"moved weights that the module's state_dict leaves out: {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if names[5:] else ''}. A run that resumes from a "
                "checkpoint starts with them as they were. Keep them in the state_dict, or leave "
                "these layers out of the recipe.",
            )

    def of_idle_layers(self, model: nn.Module) -> None:
        """Warn of layers that have not run, where others have."""
        idle = idle_activations(model)
        if idle and len(idle) < len(activation_quantizers(model)):
            self.once(
                ", ".join(idle), "idle", "did not run in calibration; unquantized until they do."
            )

    def of_layers_that_never_ran(self, model: nn.Module, idle: Sequence[str]) -> None:
        """Warn of layers that are switched off at the end of a fit.

        Those with quantized inputs were named when calibration was over.
        """
        inputs = {quantizer.layer for quantizer in activation_quantizers(model)}
        if named := [name for name in idle if name not in inputs]:
            self.once(
                ", ".join(named), "never", "never ran in training: in float in report and files."
            )

    def of_little(self, report: InsertionReport, recipe: QuantRecipe) -> None:
        """Warn if little of a model is quantized, or nothing as the recipe's last rule says."""
        left = report.left_unintended()
        share = report.share_quantized
        if left and share < _LITTLE and any(rule.weights for rule in recipe.rules):
            total = sum(row.parameters for row in report.rows)
            most = [f"{what} ({100 * n / total:.1f} %)" for what, n in [*left.items()][:3] if n]
            if most:
                self.once(
                    "model",
                    "little",
                    f"only {100 * share:.1f} % of the parameters are in quantized weights. In "
                    f"float: {'; '.join(most)}.",
                )
        rest = recipe.rules[-1]
        if rest.pattern != "*" or not isinstance(rest.weights, TensorSpec):
            return
        wanted = get_format(rest.weights.format).name
        formats = {row.weight.split(" ")[0].rstrip(",") for row in report.rows if row.weight}
        if formats and wanted not in formats:
            self.once(
                "model",
                "width",
                f"no weight has {wanted}, which the recipe gives to all layers that no other rule "
                f"names: there are none. The weights have {', '.join(sorted(formats))}; "
                "first_last_bits keeps the first and the last layer at 8 bits.",
            )

    def once(self, name: str, kind: str, message: str) -> None:
        """Warn, unless a warning of this name and kind was given before."""
        if (name, kind) not in self._given:
            self._given.add((name, kind))
            rank_zero_warn(f"StatQAT {name}: {message}", category=StatQATWarning)


class ExportWarning(UserWarning):
    """A file is missing at the end of a training, or differs from the trained model."""
