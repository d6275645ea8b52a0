"""What all ranks of a Trainer have to agree on."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from statqat_lightning.fake_quant.observers import Reduce, Reduction


def share_batch_norm(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give all ranks the BatchNorm statistics of the first, which it will export and save.

    They have their own since the last step, and would settle on other scales.
    """
    norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    own = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    first = trainer.strategy.broadcast([buffer.detach().cpu() for buffer in own])
    with torch.no_grad():
        for buffer, value in zip(own, first, strict=True):
            buffer.copy_(value)


def reduction_over_ranks(trainer: Trainer) -> Reduce | None:
    """How tensors are reduced over all ranks, in place where that saves a copy."""
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor, operation: Reduction) -> Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Lightning's own reduction begins with a barrier: a second collective, and one for
            # which the host waits.
            op = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
            torch.distributed.all_reduce(tensor, op=op[operation])
            return tensor
        reduced = trainer.strategy.reduce(tensor, reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    return reduce
