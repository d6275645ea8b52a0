"""What a model's forward does with its tensors, by watching one run: any forward that runs will do.

Nothing is traced symbolically, so control flow and other Python in the forward do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from statqat_lightning.layer_kinds import has_weights
from statqat_lightning.quantized_layer import base_class, kind_of

OUTPUT_KIND = "output"
"""Kind of what reads tensors outside all modules: the caller, who gets the result or goes on."""
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
KEEPING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d"),
    *("flatten", "Flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze"),
    *("unsqueeze", "getitem", "pad", "Identity", "dropout", "Dropout", "Dropout2d", "chunk"),
    *("split", "clone", "to", "ZeroPad2d", "ChannelShuffle", "movedim", "relu", "ReLU"),
)
"""What leaves values on the grid that they lie on."""


@dataclass(eq=False)
class Value:
    """One tensor of a run.

    Attributes:
        producer: The operation that made it; None for inputs, and what was made out of sight.
        shape: Its shape.
        consumers: The operations that read it; one that reads it twice is there twice.
        returned_by: Names of the modules whose first output it was, the innermost first.
        taken_by: Names of the modules whose first argument it was, the outermost first.
    """

    producer: Operation | None
    shape: tuple[int, ...]
    consumers: list[Operation] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    taken_by: list[str] = field(default_factory=list)


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


@dataclass
class Dataflow:
    """All operations of one run.

    Attributes:
        operations: In the order in which they ran.
        calls: How often each module ran, by name.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


def record(model: nn.Module, run: Callable[[], Any]) -> Dataflow:
    """Watch a run of a model.

    Layers of torch, and those that can be quantized, are one operation each; of all other modules
    the functions are seen that their forwards call.

    Args:
        model: The model; it is run as it is, in train or eval mode.
        run: Runs it once: a forward, or a step of a training. Functions that it calls itself, and
            whoever it returns tensors to, are operations of kind `output`.
    """
    recorder = _Recorder(model)
    with torch.no_grad():
        recorder.watch(run)
    return recorder.flow


def is_atom(module: nn.Module) -> bool:
    """Whether a module is one operation."""
    if has_weights(kind_of(module)):
        return True
    return _own_class(module).__module__.startswith("torch.nn.") and not any(module.children())


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before insertion and freezing."""
    mro = base_class(module).__mro__
    return next(c for c in mro if not c.__module__.startswith("statqat_lightning."))


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._model = model
        self._parameters = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # or another tensor would get the same id
        self._stack: list[str] = []
        self._inside_atom = 0

    def watch(self, run: Callable[[], Any]) -> None:
        handles: list[RemovableHandle] = []
        for name, module in self._model.named_modules():
            atom = is_atom(module)
            handles += [
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, n=name, a=atom: self._enter(n, a, args, kwargs),
                    with_kwargs=True,
                    prepend=True,
                ),
                module.register_forward_hook(
                    lambda m, args, kwargs, result, n=name, a=atom: self._leave(
                        n, m if a else None, (args, kwargs), result
                    ),
                    with_kwargs=True,
                ),
            ]
        try:
            with self:
                result = run()
        finally:
            for handle in handles:
                handle.remove()
        self._note(OUTPUT_KIND, None, "", result, ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside_atom and any(True for _ in _floating(result)):
            kind = _kind_of_function(func) if self._stack else OUTPUT_KIND
            if kwargs.get("alpha", 1) != 1:
                kind = f"scaled {kind}"  # not the sum of its terms
            self._note(kind, None, self._stack[-1] if self._stack else "", (args, kwargs), result)
        return result

    def _enter(self, name: str, atom: bool, args: Any, kwargs: Any) -> None:
        self.flow.calls[name] += 1
        self._stack.append(name)
        if not self._inside_atom and (first := next(_floating((args, kwargs)), None)) is not None:
            self._value(first).taken_by.append(name)
        self._inside_atom += atom

    def _leave(self, name: str, atom: nn.Module | None, given: Any, result: Any) -> None:
        self._inside_atom -= atom is not None
        self._stack.pop()
        if self._inside_atom:
            return
        if atom is not None:
            self._note(_own_class(atom).__name__, atom, name, given, result)
        if (first := next(_floating(result), None)) is not None:
            self._value(first).returned_by.append(name)

    def _note(self, kind: str, module: nn.Module | None, name: str, given: Any, made: Any) -> None:
        inputs = [self._value(t) for t in _floating(given) if id(t) not in self._parameters]
        operation = Operation(kind, module, name, inputs, [])
        for value in inputs:
            value.consumers.append(operation)
        # An operation in place returns the tensor it was given: from here on that is a new value.
        operation.outputs = [self._new(t, operation) for t in _floating(made)]
        self.flow.operations.append(operation)

    def _value(self, tensor: Tensor) -> Value:
        return self._values.get(id(tensor)) or self._new(tensor, None)

    def _new(self, tensor: Tensor, producer: Operation | None) -> Value:
        value = Value(producer, tuple(tensor.shape))
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return value


def _floating(structure: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(structure)[0]:
        if isinstance(leaf, Tensor) and torch.is_floating_point(leaf):
            yield leaf


def _kind_of_function(function: Any) -> str:
    """`add` for `torch.add`, `Tensor.add_`, `__add__`, `__radd__` and `__iadd__`."""
    name: str = getattr(function, "__name__", str(function))
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] in "ri" and name[1:] in ("add", "mul", "sub", "truediv", "matmul"):
            name = name[1:]
    return name.rstrip("_")
