"""Learned step size quantization: the scale is a parameter (arXiv 1902.08153)."""

from __future__ import annotations

import math

from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics
from statqat_lightning.quantizers.scales import positive_or_one
from statqat_lightning.quantizers.tails import Tails


class LSQ(Quantizer):
    r"""A scale that is trained with the weights, from :math:`2 E|x| / \sqrt{q_{max}}` on.

    (Esser et al., 2020.) The gradient of a quantized value with respect to the scale is
    `q - x / s` inside the clip points, and the end of the grid outside; the sum over the values
    that share a scale is multiplied by :math:`1 / \sqrt{N q_{max}}` with `N` their number in this
    forward pass. The formula holds for any grid; the paper has integers only. The start is over
    the values on the format's side.

    What it costs, and only in this mode:

    - The model gets parameters: `weight_scale` and `input_scale` of each layer, float32. The
        `state_dict` has keys that the float model does not know: strict loading of a float
        checkpoint, or of this one into the float model, fails until `remove(model)` has taken the
        parameters out.
    - Optimizers get them. One that is given `model.parameters()` in `configure_optimizers` has
        them; parameter groups chosen by name or by layer may miss them, which leaves a scale at its
        start. Weight decay pulls scales to zero; learning rates are those of the weights.
    - Statistics no longer choose scales. They give an input its start (its parameter is 1 until
        then) and the SNR; a refresh leaves learned scales alone. Nothing bounds their error by that
        of min-max.
    - A scale whose parameter is driven to zero or below counts as `functional.LEAST_LEARNED_SCALE`.
    - Freezing stops the gradient. DDP needs `find_unused_parameters=True` then, and where inputs
        cannot be calibrated ahead of training, as it does for any parameter without a gradient.
    """

    name = "lsq"
    needs_spectrum = True
    learned = True

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        magnitudes = rows.abs() if fmt.is_signed else rows.clamp_min(0)
        return self._start(magnitudes.mean(1), fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        assert statistics.spectrum is not None, "LSQ asks for the spectrum"
        return self._start(Tails.of(statistics.spectrum, fmt).first[:, 0], fmt)

    @staticmethod
    def _start(mean_magnitude: Tensor, fmt: Format) -> Tensor:
        return positive_or_one(2 * mean_magnitude / math.sqrt(fmt.reach))
