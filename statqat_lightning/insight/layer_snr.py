"""`LayerSNR`: the SNR of one tensor or of many as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from statqat_lightning.numerics.qparams import widened


class LayerSNR(Metric):
    r"""Signal-to-quantization-noise ratio in dB, streamed over batches and summed over ranks.

    .. math:: 10 \log_{10} \bigl( \sum x^2 / \sum (x - \hat x)^2 \bigr)

    The sums run over all values of all batches, so large values count as they do in the tensor.
    `torchmetrics.audio.SignalNoiseRatio` averages the decibels of its samples instead; of a single
    sample the two agree.

    Args:
        layers: Names of layers, which share one reduction over ranks; `update` then takes tensors
            by name and `compute` returns decibels by name. None for a single tensor.
        **kwargs: As of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are no names, or one twice.

    Examples:
        >>> metric = LayerSNR()
        >>> metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        >>> metric.compute()
        tensor(20.)
        >>> metric = LayerSNR(["fc"])
        >>> metric.update({"fc": torch.tensor([3.0, 4.0])}, {"fc": torch.tensor([3.0, 4.5])})
        >>> metric.compute()
        {'fc': tensor(20.)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0

    signal: Tensor
    noise: Tensor

    def __init__(self, layers: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if layers is not None and (not layers or len({*layers}) != len(layers)):
            raise ValueError(f"LayerSNR: got layers={list(layers)!r}; expected names, each once.")
        self.layers = None if layers is None else list(layers)
        zeros = torch.zeros(len(self.layers or [""]), dtype=torch.float64)
        self.add_state("signal", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("noise", zeros.clone(), dist_reduce_fx="sum")

    def update(
        self, x: Tensor | Mapping[str, Tensor], x_hat: Tensor | Mapping[str, Tensor]
    ) -> None:
        """Add tensors and what quantization makes of them.

        Args:
            x: Reference, any shape and floating dtype; by name if the metric has names, in which
                case layers may be missing.
            x_hat: The same quantized and dequantized, equal shapes.

        Raises:
            TypeError: If names are given to a metric without names, or the other way round.
            ValueError: If shapes or names differ, or a name is unknown.
        """
        if self.layers is None:
            if not (isinstance(x, Tensor) and isinstance(x_hat, Tensor)):
                raise TypeError(
                    "LayerSNR.update: got no tensors; expected two, or LayerSNR(layers=[...]) for "
                    "tensors by name."
                )
            self._add(0, x, x_hat, "")
            return
        if not (isinstance(x, Mapping) and isinstance(x_hat, Mapping)):
            raise TypeError("LayerSNR.update: got tensors; expected them by the names of layers.")
        if x.keys() != x_hat.keys():
            raise ValueError(
                f"LayerSNR.update: got {sorted(x.keys() ^ x_hat.keys())} on one side only; "
                "expected the same names in both."
            )
        numbers = {name: number for number, name in enumerate(self.layers)}
        for name in x:
            if name not in numbers:
                raise ValueError(
                    f"LayerSNR.update: got {name!r}; expected names among {', '.join(numbers)}."
                )
            self._add(numbers[name], x[name], x_hat[name], f" for {name}")

    def _add(self, number: int, x: Tensor, x_hat: Tensor, which: str) -> None:
        if x.shape != x_hat.shape:
            raise ValueError(
                f"LayerSNR.update: got shapes {tuple(x.shape)} and {tuple(x_hat.shape)}{which}; "
                "expected equal shapes."
            )
        x, x_hat = widened(x.detach()), widened(x_hat.detach())
        self.signal[number] += x.square().sum(dtype=torch.float64)
        self.noise[number] += (x - x_hat).square().sum(dtype=torch.float64)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The SNR in dB, float32 `()`, or one for each name.

        Infinite where nothing was lost, NaN where nothing was seen but zeros.
        """
        decibels = (10 * torch.log10(self.signal / self.noise)).to(torch.float32)
        if self.layers is None:
            return decibels[0]
        return dict(zip(self.layers, decibels.unbind(), strict=True))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or values by layer, as `torchmetrics` draws metrics.

        Args:
            val: What `compute` or `forward` returned, or several of these; None for `compute()`.
            ax: A matplotlib axis to draw on.
        """
        return self._plot(val, ax)
