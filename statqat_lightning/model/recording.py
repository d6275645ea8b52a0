"""Recording a dataflow: the modes and hooks that watch one run."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from statqat_lightning.layers.batch_norm import normalized_by
from statqat_lightning.layers.function_results import (
    call_role,
    function_role,
    kind_of_function,
    makes_floating,
)
from statqat_lightning.layers.module_names import modules_by_name, plain_name
from statqat_lightning.layers.quantized_layer import is_quantized
from statqat_lightning.model.dataflow import (
    IDENTITIES,
    OUTPUT_KIND,
    Dataflow,
    Operation,
    Value,
    WeightRead,
    is_atom,
    own_class,
    takes_means_away,
)

_PRODUCTS = (
    *("linear", "bilinear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "addbmm", "addmv"),
    *("baddbmm", "einsum", "tensordot", "inner", "mul", "multiply"),
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    *("embedding", "embedding_bag", "multi_head_attention_forward"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
)
"""Functions that multiply values with weights, or look them up."""
_LOOKUPS = ("embedding", "embedding_bag")
_LEAVING = ("numpy", "tolist", "item")
"""Functions that take values out of torch."""
_NO_COMPUTATION = ("deepcopy", "reduce_ex", "setstate", "repr", "hash", "format")


def record(model: nn.Module, run: Callable[[], Any], operations: bool = True) -> Dataflow:
    """Watch a run of a model.

    Layers of torch, and those that can be quantized, are one operation each; of all other modules
    the functions are seen that their forwards call.

    Args:
        model: The model; it is run as it is, in train or eval mode.
        run: Runs it once: a forward, or a step of a training. Functions that it calls itself, and
            whoever it returns tensors to, are operations of kind `output`.
        operations: Whether operations are wanted, too, or only all else: their tensors are kept
            until the run is over.
    """
    recorder = _Recorder(model, operations)
    with torch.no_grad():
        recorder.watch(run)
    return recorder.flow


class Recording:
    """A recording without operations that begins and ends at other moments than a call of `record`.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._recorder = _Recorder(model, operations=False)
        self._stack = ExitStack()
        self._stack.enter_context(self._recorder.watching())

    @property
    def flow(self) -> Dataflow:
        """What has run so far."""
        return self._recorder.flow

    def stop(self) -> None:
        """End it."""
        self._stack.close()


@dataclass
class _Returned:
    """What a layer with weights has returned.

    Attributes:
        layer: Its name.
        tensor: The tensor.
        version: Of the tensor then; what writes to it moves that.
        read: Whether anything has read it.
        norm: The norm that alone has, by name.
    """

    layer: str
    tensor: weakref.ref[Tensor]
    version: int
    read: bool = False
    norm: str | None = None


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, operations: bool) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._wants_operations = operations
        self._parameters = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # What is made of parameters alone, such as a transpose or a sum of two, by its own id.
        self._made_of: dict[int, frozenset[str]] = {
            id(parameter): frozenset([plain_name(name)])
            for name, parameter in model.named_parameters()
        }
        self._holders: dict[str, list[tuple[nn.Module, str]]] = {}
        self._modules = modules_by_name(model)
        for name, module in self._modules.items():
            parts = module._modules.get("parametrizations")
            held = [*module.parameters(recurse=False), *(parts.parameters() if parts else ())]
            for parameter in held:
                for known in self._made_of.get(id(parameter), ()):
                    self._holders.setdefault(known, []).append((module, name))
        self._values: dict[int, Value] = {}
        # Tensors that are known by their ids, until they are gone and others may have those.
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._num_values = 0
        self._stack: list[str] = []
        self._counts: list[Counter[str]] = []  # of what the forwards of those have called
        self._paths: dict[str, dict[int, str]] = {}  # of the modules inside another, by their ids
        self._entered: list[int] = []  # how many values there were when each of those began
        self._atoms: list[str] = []
        self._norms: list[str] = []
        self._returned: dict[int, _Returned] = {}

    def watch(self, run: Callable[[], Any]) -> None:
        with self.watching():
            result = run()
        if self._wants_operations:
            self._note(OUTPUT_KIND, None, "", result, ())

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, module in self._modules.items():
            atom = is_atom(module)
            handles += [
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, n=name, a=atom: self._enter(n, m, a, args, kwargs),
                    with_kwargs=True,
                    prepend=True,
                ),
                module.register_forward_hook(
                    lambda m, args, kwargs, result, n=name, a=atom: self._leave(
                        n, m, a, (args, kwargs), result
                    ),
                    with_kwargs=True,
                ),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._look_for_reads(kind_of_function(func), (args, kwargs), result)
        outside = not self._atoms and not self._norms
        if outside and (_holds_tensors(result) or kind_of_function(func) in _LEAVING):
            self._note_readers((args, kwargs))
        if self._wants_operations and not self._atoms and makes_floating(result):
            kind = kind_of_function(func) if self._stack else OUTPUT_KIND
            role = self._next_role(kind) if self._stack else None
            if kwargs.get("alpha", 1) != 1:
                kind = f"scaled {kind}"  # not the sum of its terms
            if kind == "batch_norm" and not self._is_norms_own(args, kwargs):
                kind = "functional batch_norm"  # of statistics that only the caller knows
            caller = self._stack[-1] if self._stack else ""
            operation = self._note(kind, None, caller, (args, kwargs), result)
            if operation is not None and role is not None and isinstance(result, Tensor):
                operation.outputs[0].made_in = caller, role
        return result

    def _look_for_reads(self, kind: str, given: Any, made: Any) -> None:
        if kind in _NO_COMPUTATION:
            return
        tensors = [*_floating(given)]
        weights = [self._made_of[id(t)] for t in tensors if id(t) in self._made_of]
        if not weights:
            return
        parameters = frozenset[str]().union(*weights)
        alone = len(weights) == len(tensors)
        if kind in _PRODUCTS and (kind in _LOOKUPS or not alone):
            reader = self._stack[-1] if self._stack else None
            running = _running_forwards()
            for parameter in sorted(parameters):
                read = WeightRead(parameter, reader, kind)
                if any(f"{parameter}.".startswith(f"{a}." if a else "") for a in self._atoms):
                    continue
                holders = [n for m, n in self._holders.get(parameter, ()) if id(m) in running]
                # `layer.forward(x)`, of which no hook knows.
                self.flow.calls.update(n for n in holders if n not in self._stack)
                if not holders and read not in self.flow.reads:
                    self.flow.reads.append(read)
        elif alone:
            for tensor in _floating(made):
                self._made_of.setdefault(id(tensor), parameters)
                self._follow(tensor)

    def _next_role(self, kind: str) -> str:
        """The role of what the running forward has just called."""
        counts = self._counts[-1]
        counts[kind] += 1
        return function_role(kind, counts[kind] - 1)

    def _role_of_call(self, child: nn.Module) -> str | None:
        """The role of a child that has just run in the running forward; None for others."""
        caller = self._stack[-1]
        if caller not in self._paths:
            inside = self._modules[caller].named_modules()
            self._paths[caller] = {id(module): path for path, module in inside if path}
        path = self._paths[caller].get(id(child))
        if path is None or "-" in path:
            return None
        counts = self._counts[-1]
        counts[f"{path}()"] += 1
        return call_role(path, counts[f"{path}()"] - 1)

    def _is_norms_own(self, args: Any, kwargs: Any) -> bool:
        """Whether the module that calls `batch_norm` is a BatchNorm, and calls it for itself."""
        caller = self._modules[self._stack[-1]]
        return isinstance(caller, _BatchNorm) and normalized_by(caller, args, kwargs) is not None

    def _note_readers(self, given: Any, norm: str | None = None) -> None:
        """Note who reads what layers have returned: a norm that takes means away, or another."""
        for tensor in _floating(given):
            known = self._returned.get(id(tensor))
            if known is None or known.tensor() is not tensor:
                continue  # a tensor that is gone may have had this one's id
            norms = self.flow.to_norms.setdefault(known.layer, [])
            if known.norm is not None:
                norms.remove(known.norm)
                known.norm = None
            elif norm is not None and not known.read and self._is_as_it_was(tensor):
                norms.append(norm)
                known.norm = norm
            known.read = True

    def _note_returned(self, name: str, layer: nn.Module, tensor: Tensor) -> None:
        weight = layer._parameters.get("weight")
        # Outputs of a linear layer, and of a convolution, that have as many axes as its weight have
        # their channels along axis 1, where a norm has them, too. Of inference tensors nobody can
        # tell whether they are written to.
        if weight is not None and tensor.dim() == weight.dim() and not tensor.is_inference():
            self._returned[id(tensor)] = _Returned(name, weakref.ref(tensor), tensor._version)

    def _is_as_it_was(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is what a layer with weights returned, and nothing has written to it."""
        known = self._returned.get(id(tensor))
        return (
            known is not None
            and tensor is not None
            and known.tensor() is tensor
            and known.version == tensor._version
        )

    def _enter(self, name: str, module: nn.Module, atom: bool, args: Any, kwargs: Any) -> None:
        self.flow.calls[name] += 1
        self._stack.append(name)
        self._counts.append(Counter())
        if takes_means_away(module) and not self._atoms:
            self._norms.append(name)
        first = next(_floating((args, kwargs)), None) if self._wants_operations else None
        if first is not None and not self._atoms:
            self._value(first).taken_by.append(name)
        self._entered.append(self._num_values)
        if atom:
            self._atoms.append(name)

    def _leave(self, name: str, module: nn.Module, atom: bool, given: Any, result: Any) -> None:
        if atom:
            self._atoms.pop()
        norm = bool(self._norms) and self._norms[-1] == name
        if norm:
            self._norms.pop()
        self._stack.pop()
        self._counts.pop()
        entered = self._entered.pop()
        if self._atoms:
            return
        first = next(_floating(result), None)
        if not self._norms and (norm or (atom and not self._is_as_it_was(first))):
            tensors = [*_floating(given)]
            self._note_readers(tensors[:1], name if norm else None)
            self._note_readers(tensors[1:])  # a norm may take more than what it normalizes
        if first is not None and atom:
            self._note_returned(name, module, first)
        if not self._wants_operations:
            return
        if atom:
            operation = self._note(own_class(module).__name__, module, name, given, result)
            role = self._role_of_call(module) if self._stack else None
            if operation is not None and role is not None and isinstance(result, Tensor):
                operation.outputs[0].made_in = self._stack[-1], role
        if first is not None:
            value = self._value(first)
            if value.number >= entered:
                value.returned_by.append(name)
                if not value.consumers:
                    value.unread_by.append(name)

    def _note(
        self, kind: str, module: nn.Module | None, name: str, given: Any, made: Any
    ) -> Operation | None:
        """Add an operation; None for one that is not there in evaluation."""
        inputs = [self._value(t) for t in _floating(given) if id(t) not in self._parameters]
        results = [*_floating(made)]
        is_identity = kind in IDENTITIES and not (module is not None and is_quantized(module))
        if is_identity and len(inputs) == len(results) == 1:
            self._values[id(results[0])] = inputs[0]
            self._follow(results[0])
            return None
        operation = Operation(kind, module, name, inputs, [])
        for value in inputs:
            value.consumers.append(operation)
        # An operation in place returns the tensor it was given: from here on that is a new value.
        operation.outputs = [self._new(t, operation) for t in results]
        if module is None and self._is_constant(given):
            for value in operation.outputs:
                value.constant = True
        self.flow.operations.append(operation)
        return operation

    def _is_constant(self, given: Any) -> bool:
        """Whether all that a function reads, of whatever dtype, comes of parameters and buffers."""
        tensors = [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]
        values = [self._values.get(id(t)) for t in tensors if id(t) not in self._parameters]
        return all(value is not None and value.constant for value in values)

    def _value(self, tensor: Tensor) -> Value:
        return self._values.get(id(tensor)) or self._new(tensor, None)

    def _new(self, tensor: Tensor, producer: Operation | None) -> Value:
        value = Value(producer, tuple(tensor.shape), self._num_values)
        self._num_values += 1
        self._values[id(tensor)] = value
        self._follow(tensor)
        return value

    def _follow(self, tensor: Tensor) -> None:
        """Forget a tensor, which is known by its id, when it is gone: nothing is kept in memory."""
        key = id(tensor)
        if key in self._parameters or key in self._alive:
            return

        def forget(gone: weakref.ref[Tensor]) -> None:
            for known in (self._alive, self._values, self._made_of):
                known.pop(key, None)

        self._alive[key] = weakref.ref(tensor, forget)


def _running_forwards() -> set[int]:
    """Ids of the modules whose forwards are running, by the frames of the calls."""
    running = set()
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward":
            running.add(id(frame.f_locals.get("self")))
        frame = frame.f_back
    return running


def _floating(structure: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(structure)[0]:
        if isinstance(leaf, Tensor) and torch.is_floating_point(leaf):
            yield leaf


def _holds_tensors(structure: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(structure)[0])
