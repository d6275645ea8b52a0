"""Trainers that `StatQATCallback` cannot work with, refused by name before anything happens."""

from __future__ import annotations

from lightning.pytorch import Trainer

from statqat_lightning.callbacks.lightning_names import is_a


def refuse_trainer(trainer: Trainer, learns_scales: bool) -> None:
    """Check the precision and the strategy of a Trainer.

    Args:
        trainer: The Trainer.
        learns_scales: Whether scales are parameters.

    Raises:
        ValueError: If layers are replaced, or do not hold their weights whole where they are
            needed; the message names what does that, and what to use.
    """
    plugin = type(trainer.precision_plugin).__name__
    if plugin in ("BitsandbytesPrecision", "TransformerEnginePrecision"):
        raise ValueError(
            f"StatQATCallback: got a Trainer with {plugin}, which replaces the layers by "
            'quantized ones of its own. Use another precision, such as "bf16-mixed", or leave '
            "StatQATCallback out."
        )
    strategy = trainer.strategy
    name = type(strategy).__name__
    if is_a(strategy, "FSDPStrategy") or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"StatQATCallback: got {name}, under which layers do not hold their weights "
            "between forward passes. Use ModelParallelStrategy with fully_shard, or DDP."
        )
    if not is_a(strategy, "ModelParallelStrategy"):
        return
    if learns_scales:
        raise ValueError(
            f"StatQATCallback: got learned scales (quantizer 'lsq') under {name}. They are not "
            "sharded, so nothing averages their gradients over the ranks. Use another "
            "quantizer, or DDP."
        )
    ranks = strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
    if ranks > 1:
        raise ValueError(
            f"StatQATCallback: got {name} with tensor parallelism over {ranks} ranks; expected "
            "every layer whole on its rank during forward. Use "
            "tensor_parallel_size=1 and fully_shard over the data-parallel mesh."
        )
