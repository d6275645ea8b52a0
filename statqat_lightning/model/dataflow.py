"""What a model's forward does with its tensors, by watching one run: any forward that runs will do.

Nothing is traced symbolically, so control flow and other Python in the forward do not matter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from statqat_lightning.layers.layer_kinds import CONV1D, has_weights
from statqat_lightning.layers.quantized_layer import base_class, kind_of

OUTPUT_KIND = "output"
"""Kind of what reads tensors outside all modules: the caller, who gets the result or goes on."""
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
LINEARS = ("Linear", CONV1D)
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm")
"""BatchNorms; the function, where a subclass of theirs with a forward of its own calls it."""
_DROPPING = ("DropPath", "StochasticDepth", "DropBlock2d")
"""Classes of timm and torchvision that drop in training what they are given, by their names."""
IDENTITIES = (
    *("Identity", "Sequential", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "dropout"),
    *_DROPPING,
)
"""What is not there in evaluation, and in no file; a Sequential without children is one."""
KEEPING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d"),
    *("flatten", "Flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze"),
    *("unsqueeze", "getitem", "pad", "chunk"),
    *("split", "clone", "to", "ZeroPad2d", "ChannelShuffle", "movedim", "relu", "ReLU"),
)
"""What leaves values on the grid that they lie on."""
_COMPUTING = ("forward", "_conv_forward", "__call__")
"""Methods of a layer that its subclasses may compute something else in."""


@dataclass(eq=False)
class Value:
    """One tensor of a run, and what becomes of it where nothing is computed in evaluation.

    Attributes:
        producer: The operation that made it; None for inputs, and what was made out of sight.
        shape: Its shape.
        number: How many were made before it.
        consumers: The operations that read it; one that reads it twice is there twice.
        returned_by: Names of the modules that it was made in and whose first output it was, the
            innermost first.
        unread_by: Those of them that returned it before anything had read it.
        taken_by: Names of the modules whose first argument it was, the outermost first.
        constant: Whether functions have made it of parameters and buffers alone.
        made_in: The module whose forward called what made it, and its role there, see
            `function_results`; None for what no such role tells from others.
    """

    producer: Operation | None
    shape: tuple[int, ...]
    number: int
    consumers: list[Operation] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    unread_by: list[str] = field(default_factory=list)
    taken_by: list[str] = field(default_factory=list)
    constant: bool = False
    made_in: tuple[str, str] | None = None


@dataclass(eq=False)
class Operation:
    """A layer or a function that ran.

    Attributes:
        kind: Name of the layer's class, as it was before insertion and freezing, or of the
            function: `add` for `+`, `+=` and `torch.add`.
        module: The layer; None for a function.
        name: Its name; for functions that of the module whose forward called it.
        inputs: Floating tensors that it read and that are no parameters.
        outputs: Floating tensors that it made.
    """

    kind: str
    module: nn.Module | None
    name: str
    inputs: list[Value]
    outputs: list[Value]


class WeightRead(NamedTuple):
    """A product with a parameter that is not computed by the layer that holds the parameter.

    Attributes:
        parameter: Name of the parameter, `{module}.{parameter}`.
        reader: Name of the module whose forward computes the product; None outside of all forwards,
            as in `training_step`.
        kind: Name of the function.
    """

    parameter: str
    reader: str | None
    kind: str


@dataclass
class Dataflow:
    """All operations of one run.

    Attributes:
        operations: In the order in which they ran.
        calls: How often each module ran, by name.
        reads: Products with parameters that their own layers do not compute, each once.
        to_norms: Names of norms that take the mean of each channel away, such as BatchNorm in train
            mode, and were all that read what a layer with weights returned: one for each such call
            of the layer, by its name.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    reads: list[WeightRead] = field(default_factory=list)
    to_norms: dict[str, list[str]] = field(default_factory=dict)

    @property
    def centred(self) -> dict[str, tuple[str, ...]]:
        """Norms that take away the means of all that a layer returns, in each call, by layer."""
        read_elsewhere = {read.parameter.rpartition(".")[0] for read in self.reads}
        return {
            name: tuple(dict.fromkeys(norms))
            for name, norms in self.to_norms.items()
            if len(norms) == self.calls[name] > 0 and name not in read_elsewhere
        }


def is_atom(module: nn.Module) -> bool:
    """Whether a module is one operation."""
    if has_weights(kind_of(module)) or type(module).__name__ in _DROPPING:
        return True
    return own_class(module).__module__.startswith("torch.nn.") and not any(module.children())


def takes_means_away(module: nn.Module) -> bool:
    """Whether a norm takes away the means of its batch, or of a part of it, channel by channel.

    And whether those that it keeps for evaluation follow.
    """
    if not isinstance(module, _NormBase):
        return False
    keeps_none = module.running_mean is None
    if keeps_none or (isinstance(module, _InstanceNorm) and not module.track_running_stats):
        return True
    return module.training and module.track_running_stats and module.momentum != 0


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class whose computation a module does: torch's, where a subclass changes nothing of it.

    As the module was before insertion and freezing.
    """
    mro = base_class(module).__mro__
    own = next(c for c in mro if not c.__module__.startswith("statqat_lightning."))
    for base in own.__mro__:
        if base.__module__.startswith("torch.nn.") and all(
            getattr(own, name, None) is getattr(base, name, None) for name in _COMPUTING
        ):
            return base
    return own
