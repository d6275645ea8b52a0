"""Keeps the scales of weights in step with callbacks that put averaged weights in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.model.quantized_model import follow_averaged_weights, quantized_layers


class Averaging:
    """What to do beside `WeightAveraging` (and its kind) and `StochasticWeightAveraging`.

    They replace weights as a whole: in validation, for one more epoch, or at the end of the fit.
    Their writes cannot be told from others, so each moment is known by its callback.

    Args:
        callbacks: The callbacks of the Trainer.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        # By name: which of the two exist depends on the version of Lightning.
        self._exchanging = [c for c in callbacks if is_a(c, "WeightAveraging")]
        self._stochastic = [c for c in callbacks if is_a(c, "StochasticWeightAveraging")]
        self._set_aside: list[tuple[WeightFakeQuantizer, Tensor, int, bool]] = []

    @property
    def replaces_weights_of_checkpoints(self) -> bool:
        """Whether checkpoints hold averaged weights in place of those in training."""
        return bool(self._exchanging)

    def enter_validation(self, pl_module: LightningModule) -> None:
        """Fit the scales to the averaged weights; to be called at every validation batch."""
        if not self._exchanging or self._set_aside:
            return
        weights = [
            q for layer in quantized_layers(pl_module) for q in layer.quantizers.weights.values()
        ]
        self._set_aside = [(q, q.scale.clone(), q.num_refreshes, q.weighed) for q in weights]
        follow_averaged_weights(pl_module)

    @torch.no_grad()
    def leave_validation(self) -> None:
        """Put back the scales of the weights in training."""
        for quantizer, scale, num_refreshes, weighed in self._set_aside:
            quantizer.scale.copy_(scale)
            quantizer.num_refreshes, quantizer.weighed = num_refreshes, weighed
        self._set_aside.clear()

    def follow_training(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Fit the scales when the epoch begins that updates BatchNorm for the averaged weights."""
        if batch_idx == 0 and any(
            trainer.current_epoch == getattr(callback, "swa_end", -2) + 1
            for callback in self._stochastic
        ):
            follow_averaged_weights(pl_module)

    def finish(self, pl_module: LightningModule) -> None:
        """Fit the scales to the weights that the fit ends with."""
        if self._exchanging or self._stochastic:
            follow_averaged_weights(pl_module)
