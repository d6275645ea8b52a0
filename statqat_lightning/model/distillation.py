"""What a quantized network learns from the float one: outputs of layers, and how far they differ.

Distillation after G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network",
arXiv 1503.02531; of quantized networks, A. Mishra, D. Marr, "Apprentice", arXiv 1711.05852.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""Of the output of the network that learns and that of its teacher, of one shape; a scalar."""


SPREADS = 4.0
"""Temperature by how far logits differ, see `fitting_temperature`."""


def fitting_temperature(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """A temperature that is high while the logits are far apart and falls as they come together.

    By `SPREADS` times the root mean square of their differences, each about its mean over the
    classes, no logit is so far off that the divergence saturates: with all differences small
    beside the temperature, it is half their variance under the teacher's distribution, so every
    class says how far its logit has to move. Near the teacher a lower temperature lets those
    classes count that decide. Never below 1.

    Args:
        student: Logits of any shape and floating dtype.
        teacher: Logits of the same shape.
        dim: The dimension of the classes.

    Returns:
        A scalar without gradient.
    """
    difference = in_float(teacher.detach()) - in_float(student.detach())
    difference = difference - difference.mean(dim, keepdim=True)
    return (SPREADS * difference.square().mean().sqrt()).clamp_min(1.0)


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, dim: int
) -> Tensor:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, in nats.

    Args:
        student: Logits of any shape and floating dtype; computed in float32 at least.
        teacher: Logits of the same shape.
        temperature: Both are divided by it, and the result is multiplied by its square, so that
            gradients keep their size (arXiv 1503.02531, section 2.1).
        dim: The dimension of the classes; the mean is taken over all others.

    Returns:
        A scalar.
    """
    student, teacher = in_float(student), in_float(teacher)
    logs = F.log_softmax(student / temperature, dim)
    wanted = F.log_softmax(teacher / temperature, dim)
    terms = F.kl_div(logs, wanted, reduction="none", log_target=True)
    return terms.sum(dim).mean() * temperature**2


def in_float(x: Tensor) -> Tensor:
    """A tensor in float32, or as it is where its numbers are finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def class_dimension(module: nn.Module) -> int:
    """The dimension of a layer's output that counts the classes: 1 for convolutions, else the last.

    Convolutions are told by the kernel that they have.
    """
    return 1 if hasattr(module, "kernel_size") else -1


class Enough(BaseException):
    """Ends a run once all outputs that are wanted are there. Not an error, hence no Exception."""


class LayerOutputs:
    """What layers of a network return, in the order of their calls.

    Args:
        modules: Layers by name.

    Attributes:
        found: Outputs by name, of the last recording.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self._wanted: Mapping[str, int] | None = None
        self._recording = False
        self._handles = [
            module.register_forward_hook(functools.partial(self._keep, name))
            for name, module in modules.items()
        ]
        self._names = [*modules]

    def __deepcopy__(self, memo: Any) -> LayerOutputs:
        return LayerOutputs({})  # hooks of a copied network record for nobody

    @contextmanager
    def recording(self, until: Mapping[str, int] | None = None) -> Iterator[None]:
        """Keep outputs while it lasts.

        Args:
            until: Numbers of calls by name after which the run is over: the rest of it, such as
                the loss, is left out. None for a whole run.
        """
        self.found = {name: [] for name in self._names}
        self._wanted, self._recording = until, True
        try:
            yield
        except Enough:
            pass
        finally:
            self._recording = False

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        if isinstance(output, (tuple, list)) and output:
            output = output[0]  # of recurrent layers and attention
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer {name!r} returned {type(output).__name__}; expected a tensor, or a tuple "
                "that begins with one. Name another layer."
            )
        # What comes next may write to it (`relu_`, `x /= t`), and a run that ends here does not.
        self.found[name].append(output.clone())
        if self._wanted is not None and all(
            len(self.found[layer]) >= count for layer, count in self._wanted.items()
        ):
            raise Enough

    def clear(self) -> None:
        """Let go of the outputs, and of the memory of their graph."""
        self.found = {}

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()


def last_layer(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the last layer with a weight of its own that returns a floating tensor in a run.

    Args:
        model: Any network.
        run: Runs it.

    Returns:
        None if no such layer runs.
    """
    last: list[str] = []

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            last[:] = [name]

    handles = [
        module.register_forward_hook(functools.partial(note, name))
        for name, module in model.named_modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return last[0] if last else None
