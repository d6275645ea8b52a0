"""Mean squares of what the columns of a weight are multiplied with: how much their errors count.

The output of a linear layer whose input channels are uncorrelated has the error
`sum_ij h_j (w_ij - w_hat_ij)^2` with `h_j = E[x_j^2]`. Where some channels carry a hundred times
the energy of others, as in language models, scales of least error of the weight alone are far from
those of least error of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.2
"""Weight of the newest batch; they are observed rarely, and the first ones are averaged evenly."""


@dataclass(frozen=True)
class InputChannels:
    """The input channels that a weight meets.

    Attributes:
        roles: Names of the inputs: one, or one for each part of a weight that holds several.
        axis: Axis of an input along which its channels lie, counted from the end; None for inputs
            that are indices, which pick rows of the weight.
        shape: Shape in which the values of all channels of all inputs broadcast to the weight, once
            each index of its first axis is repeated `repeats` times.
        repeats: As said.
    """

    roles: tuple[str, ...]
    axis: int | None
    shape: tuple[int, ...]
    repeats: int = 1

    @property
    def number(self) -> int:
        """Channels of each input."""
        total = 1
        for size in self.shape:
            total *= size
        return total // len(self.roles)

    def differ_within(self, kept_axis: int | None) -> bool:
        """Whether weights of one scale meet several channels; `kept_axis` has a scale each."""
        return any(size > 1 for axis, size in enumerate(self.shape) if axis != kept_axis)


class InputEnergies:
    """Running mean squares of the input channels of one weight.

    Attributes:
        channels: Where they come from.
        sums: Sums of squares of this step, and in the last column the number of values of each
            channel, float32 `(inputs, channels + 1)`.
        mean: Running mean squares, float32 `(inputs, channels)`; zeros for an input never seen.
        num_batches: Batches in `mean`, float32 `(inputs,)`.
        filled: Whether `sums` may differ from zero.
        known: Whether something was folded into `mean` since it is there, on any rank.
    """

    def __init__(self, channels: InputChannels) -> None:
        self.channels = channels
        inputs, number = len(channels.roles), channels.number
        self.sums = torch.zeros(inputs, number + 1, dtype=torch.float32, device="cpu")
        self.mean = torch.zeros(inputs, number, dtype=torch.float32, device="cpu")
        self.num_batches = torch.zeros(inputs, dtype=torch.float32, device="cpu")
        self.filled = False
        self.known = False

    @torch.no_grad()
    def add(self, role: str, x: Any) -> None:
        """Add an input, all of it: what draws all attention may be a single token.

        Args:
            role: Name of the input; others than those of `channels` are left out.
            x: Any shape with as many channels, floating dtype; or indices of rows, integers. What
                is neither is left out: some subclasses of layers take other inputs.
        """
        channels = self.channels
        if role not in channels.roles or not isinstance(x, Tensor) or x.numel() == 0:
            return
        sums = self.sums[channels.roles.index(role)]
        if channels.axis is None:
            if not x.is_floating_point():
                ones = torch.ones(x.numel(), dtype=torch.float32, device=x.device)
                sums.index_add_(0, x.detach().flatten().long(), ones)
                sums[-1] += 1.0
                self.filled = True
            return
        axis = x.dim() + channels.axis
        if not x.is_floating_point() or axis < 0 or x.shape[axis] != channels.number:
            return
        others = [i for i in range(x.dim()) if i != axis]
        x = x.detach()
        x = x if x.dtype != torch.float64 else x.to(torch.float32)
        if others:
            squares = torch.linalg.vector_norm(x, dim=others, dtype=torch.float32).square_()
        else:
            squares = x.to(torch.float32).square()
        sums[:-1] += squares
        sums[-1] += x.numel() // channels.number
        self.filled = True

    def importance(self) -> Tensor:
        """What the squared errors of a weight count, in a shape that broadcasts to the weight."""
        spread = self.mean.view(self.channels.shape)
        repeats = self.channels.repeats
        return spread if repeats == 1 else spread.repeat_interleave(repeats, 0)

    def to(self, device: torch.device) -> None:
        """Move all tensors to a device."""
        for name in ("sums", "mean", "num_batches"):
            setattr(self, name, getattr(self, name).to(device))

    def forget_step(self) -> None:
        """Forget what was added since the last fold."""
        if self.filled:
            self.sums.zero_()
            self.filled = False

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "mean": self.mean.cpu().clone(),
            "num_batches": self.num_batches.cpu().clone(),
            "known": self.known,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over what `state_dict` returned; None for a state that has none."""
        self.forget_step()
        if state is None:
            self.mean.zero_()
            self.num_batches.zero_()
            self.known = False
            return
        self.mean.copy_(state["mean"])
        self.num_batches.copy_(state["num_batches"])
        self.known = bool(state["known"])


def sums_of(energies: Sequence[InputEnergies]) -> Tensor:
    """What the inputs have added since the last fold, float32 `(n,)`: to be summed over ranks."""
    parts = [own.sums.flatten() for own in energies]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32)


@torch.no_grad()
def fold_energies(energies: Sequence[InputEnergies], total: Tensor) -> None:
    """Fold what the inputs have added into the running means.

    Args:
        energies: Those of one model, in the same order on every rank.
        total: Their `sums_of`, over all ranks.
    """
    parts = torch.split(total, [own.sums.numel() for own in energies])
    for own, part in zip(energies, parts, strict=True):
        sums = part.view_as(own.sums)
        count = sums[:, -1]
        means = sums[:, :-1] / count.clamp_min(1.0).unsqueeze(1)
        # One NaN in an input is no news about how its channels differ.
        seen = (count > 0) & means.isfinite().all(1)
        weight = torch.where(seen, (1 / (own.num_batches + 1)).clamp_min(MOMENTUM), 0.0)
        means = torch.where(seen.unsqueeze(1), means, own.mean)
        own.mean.lerp_(means, weight.unsqueeze(1))
        own.num_batches += seen
        own.sums.zero_()
        own.filled = False
        own.known = True
