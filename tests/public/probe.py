"""Which parameters entered a product in float, seen at the level of PyTorch's own operators.

An independent witness of what the package reports: it knows no class of the package and no layer,
only operators and memory. Each element of a parameter has a number, and the numbers follow views,
copies, casts and everything else that is computed from weights alone. Where such a tensor meets the
data in a product, the numbers say which parameter it is, and a mark says whether anything on the
way has rounded it.

    probe = WeightProbe(model)
    with probe.watching(batch):
        model(batch)
    probe.uses["head.weight"].unrounded  # {"addmm"}: it entered in float
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# The operators whose operands meet in a product, by the positions of these among the arguments.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "matmul": (0, 1),
    "linear": (0, 1),
    "addmm": (1, 2),
    "_addmm_activation": (1, 2),
    "baddbmm": (1, 2),
    "addbmm": (1, 2),
    "convolution": (0, 1),
    "convolution_overrideable": (0, 1),
    "_convolution": (0, 1),
    "mkldnn_convolution": (0, 1),
    "conv_depthwise3d": (0, 1),
    "_conv_depthwise2d": (0, 1),
    "conv1d": (0, 1),
    "conv2d": (0, 1),
    "conv3d": (0, 1),
    "deform_conv2d": (0, 1),
    "_trilinear": (0, 1, 2),
    "_scaled_mm": (0, 1),
    "_grouped_mm": (0, 1),
    "_scaled_grouped_mm": (0, 1),
    "mkldnn_rnn_layer": (0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "_scaled_dot_product_flash_attention": (0, 1, 2),
    "_scaled_dot_product_efficient_attention": (0, 1, 2),
    "_scaled_dot_product_cudnn_attention": (0, 1, 2),
    "_scaled_dot_product_attention_math": (0, 1, 2),
}
# Of these, a parameter is an operand only where the other one comes from the data: weights are
# scaled, normalised and put together by them, too.
_PRODUCTS_WITH_DATA: dict[str, tuple[int, ...]] = {
    "mul": (0, 1),
    "addcmul": (1, 2),
    "mv": (0, 1),
    "addmv": (1, 2),
    "dot": (0, 1),
    "_prelu_kernel": (0, 1),
}
_LOOKUPS = {"embedding": 0, "_embedding_bag": 0, "_embedding_bag_forward_only": 0}
# Recurrent kernels take all their weights in one list.
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "miopen_rnn", "quantized_lstm"}

# What leaves fewer values than there were, whatever arithmetic comes around it.
_ROUNDING = {
    "round",
    "floor",
    "ceil",
    "trunc",
    "fix",
    "floor_divide",
    "frexp",
    "bucketize",
    "searchsorted",
    "bitwise_and",
    "bitwise_or",
    "bitwise_right_shift",
    "argmin",
    "quantize_per_tensor",
    "quantize_per_channel",
    "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
}
# What puts elements elsewhere, or leaves some out, and computes nothing.
_MOVES = {
    "cat",
    "stack",
    "clone",
    "contiguous",
    "index_select",
    "index",
    "gather",
    "repeat",
    "flip",
    "roll",
    "constant_pad_nd",
    "tril",
    "triu",
    "masked_select",
    "slice_scatter",
    "select_scatter",
    "_unsafe_view",
    "_reshape_copy",
    "view_copy",
    "lift_fresh_copy",
    "repeat_interleave",
    "take_along_dim",
}
_REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "norm",
    "linalg_vector_norm",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "prod",
    "any",
    "all",
    "mv",
    "dot",
}
_RANDOM = (
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal",
    "normal_",
    "normal_functional",
    "uniform",
    "uniform_",
    "bernoulli",
    "bernoulli_",
    "exponential_",
    "random_",
    "native_dropout",
    "multinomial",
    "poisson",
    "randperm",
    "log_normal_",
    "cauchy_",
)
_FEW_VALUES = 256  # an 8-bit format has no more
_NOTHING = -1


@dataclasses.dataclass
class Use:
    """How one parameter entered products.

    Attributes:
        rounded: The operators that it entered rounded.
        unrounded: Those that it entered in float.
    """

    rounded: set[str] = dataclasses.field(default_factory=set)
    unrounded: set[str] = dataclasses.field(default_factory=set)


class Row(NamedTuple):
    """What a report says of one layer, as far as it matters here."""

    name: str
    quantized: bool
    type: str = ""
    reason: str = ""


@dataclasses.dataclass
class _Shadow:
    """The marks of the elements of one storage: twice an element's number, plus 1 if rounded.

    `_NOTHING` stands for an element that comes from no parameter.
    """

    storage: Any  # kept, so that its address is not given to another
    marks: Tensor
    itemsize: int

    def of(self, tensor: Tensor) -> Tensor:
        """The marks of a view of the storage, a view themselves if the element size is the same."""
        if tensor.element_size() == self.itemsize:
            return self.marks.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        if tensor.element_size() < self.itemsize:  # the real view of complex numbers
            marks = self.marks.repeat_interleave(self.itemsize // tensor.element_size())
        else:
            marks = self.marks[:: tensor.element_size() // self.itemsize]
        return marks.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class WeightProbe(TorchDispatchMode):
    """Records how the parameters of a model enter products while it is the mode in force.

    Args:
        model: The model, as it is when the forward pass begins.

    Attributes:
        uses: By the first name of each parameter.
        names: All names of each parameter, by the first; tied ones have several.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self.names: dict[str, list[str]] = {}
        self._parameters: list[tuple[str, Tensor]] = []
        self._starts: list[int] = []
        self._shadows: dict[int, _Shadow] = {}
        self._data: dict[int, Any] = {}
        self._own: set[int] = set()
        first: dict[tuple[int, int], str] = {}
        total = 0
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if nn.parameter.is_lazy(parameter) or parameter.device.type == "meta":
                continue
            place = (_key(parameter), parameter.storage_offset())
            if place in first:
                self.names[first[place]].append(name)
                continue
            first[place] = name
            self.names[name] = [name]
            self.uses[name] = Use()
            self._parameters.append((name, parameter.detach()))
            self._starts.append(total)
            shadow = self._shadow_for(parameter)
            numbers = torch.arange(total, total + parameter.numel())
            shadow.of(parameter).copy_(2 * numbers.view(parameter.shape))
            total += parameter.numel()
            self._own.add(_key(parameter))
        self._ends = [
            s + p.numel() for s, (_, p) in zip(self._starts, self._parameters, strict=True)
        ]

    @contextmanager
    def watching(self, *data: Any) -> Iterator[WeightProbe]:
        """Record what runs inside; `data` is what the forward pass is given."""
        self.add_data(*data)
        with self:
            yield self

    def add_data(self, *data: Any) -> None:
        """Tell what the data is: all tensors in lists, mappings, objects and what they hold."""
        for tensor in _tensors(data):
            if _key(tensor) not in self._own:
                self._data[_key(tensor)] = tensor.untyped_storage()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        plain = name.rstrip("_") if not name.startswith("_") else name
        # Before the operator runs: it may write to what it reads.
        before = {id(x): self._marks(x) for x in inputs}
        from_data = any(_key(x) in self._data for x in inputs)
        is_product = self._record(plain, args, kwargs, before)
        result = func(*args, **kwargs)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        fresh = [x for x in outputs if not any(_shares(x, y) for y in inputs)]
        written = [x for x in _written(func, args, kwargs) if _has_memory(x)]
        if from_data or is_product or name in _RANDOM:
            for x in [*fresh, *written]:
                self._become_data(x)
        elif any(marks is not None for marks in before.values()):
            for i, x in enumerate([*fresh, *written]):
                of_x, known = args, before
                if name.startswith("_foreach_"):  # the elements of each list belong together
                    plain = name.removeprefix("_foreach_").rstrip("_")
                    of_x = [y[i] if isinstance(y, (list, tuple)) else y for y in args]
                    known = {id(y): before[id(y)] for y in of_x if isinstance(y, Tensor)}
                self._set(x, _follow(func, plain, of_x, kwargs, x, known))
        else:
            for x in written:  # constants over weights
                self._set(x, None)
        return result

    def _marks(self, tensor: Tensor) -> Tensor | None:
        shadow = self._shadows.get(_key(tensor)) if _has_memory(tensor) else None
        return None if shadow is None else shadow.of(tensor).clone()

    def _shadow_for(self, tensor: Tensor) -> _Shadow:
        storage = tensor.untyped_storage()
        count = max(storage.nbytes() // tensor.element_size(), 1)
        return self._shadows.setdefault(
            _key(tensor),
            _Shadow(storage, torch.full((count,), _NOTHING), tensor.element_size()),
        )

    def _set(self, tensor: Tensor, marks: Tensor | None) -> None:
        if not _has_memory(tensor) or _key(tensor) in self._data:
            return
        if marks is None:
            shadow = self._shadows.get(_key(tensor))
            if shadow is not None and shadow.itemsize == tensor.element_size():
                shadow.of(tensor).fill_(_NOTHING)
            return
        shadow = self._shadow_for(tensor)
        if shadow.itemsize == tensor.element_size():
            shadow.of(tensor).copy_(marks)

    def _become_data(self, tensor: Tensor) -> None:
        if _has_memory(tensor) and _key(tensor) not in self._own:
            self._data[_key(tensor)] = tensor.untyped_storage()
            self._shadows.pop(_key(tensor), None)

    def _record(
        self, name: str, args: Sequence[Any], kwargs: Any, before: Mapping[int, Tensor | None]
    ) -> bool:
        """Note the parameters among the operands of a product; whether it is one."""
        if name in _LOOKUPS:
            self._note(name, args[_LOOKUPS[name]], before)
            return True
        if name in _RECURRENT:
            for x in tree_flatten((args[1:], kwargs))[0]:
                if isinstance(x, Tensor) and x.dim() > 1:
                    self._note(name, x, before)
            return True
        places = _PRODUCTS.get(name) or _PRODUCTS_WITH_DATA.get(name)
        if places is None:
            return False
        operands = [args[i] for i in places if i < len(args) and isinstance(args[i], Tensor)]
        ours = [x for x in operands if before.get(id(x)) is not None]
        if name in _PRODUCTS_WITH_DATA:
            if not any(_key(x) in self._data for x in operands):
                return False
        elif len(ours) == len(operands) and name not in ("mkldnn_rnn_layer", "_trilinear"):
            ours = ours[1:]  # a parameter in the place of the data, such as a learned query
        for x in ours:
            self._note(name, x, before)
        return True

    def _note(self, operator: str, operand: Tensor, before: Mapping[int, Tensor | None]) -> None:
        marks = before.get(id(operand))
        if marks is None:
            return
        flat = marks.flatten()
        flat = flat[flat != _NOTHING]
        numbers = flat // 2
        for i in torch.bucketize(numbers, torch.tensor(self._ends), right=True).unique().tolist():
            name, parameter = self._parameters[i]
            own = (numbers >= self._starts[i]) & (numbers < self._ends[i])
            rounded = bool((flat[own] % 2 == 1).all())
            if rounded and not self._has_changed(operand, marks, i, parameter):
                rounded = False
            use = self.uses[name]
            (use.rounded if rounded else use.unrounded).add(operator)

    def _has_changed(self, operand: Tensor, marks: Tensor, i: int, parameter: Tensor) -> bool:
        """Whether any value is not the parameter's; True where that shows nothing.

        A parameter of few values may lie on the grid as it is.
        """
        here = (marks >= 2 * self._starts[i]) & (marks < 2 * self._ends[i])
        places = marks[here] // 2 - self._starts[i]
        own = parameter.reshape(-1)[places].to(operand.dtype)
        values = operand.detach()[here]
        return not torch.equal(values, own) or own.unique().numel() <= _FEW_VALUES


def disagreements(probe: WeightProbe, rows: Iterable[Row]) -> list[str]:
    """Where what ran differs from a report: a line for each parameter, empty if they agree.

    A parameter under several names, or of a layer that does more than one thing with it, may be
    quantized in one place and in float in another if there is a row for each.

    Args:
        probe: After a forward pass.
        rows: The report's rows.
    """
    by_name = {row.name: row for row in rows}
    found = []
    for name, use in probe.uses.items():
        own = [row for alias in probe.names[name] if (row := _row_of(alias, by_name)) is not None]
        if not own:
            if use.rounded:
                found.append(f"{name}: rounded in {_some(use.rounded)}, but in no row")
            continue
        quantized, in_float = any(row.quantized for row in own), any(not r.quantized for r in own)
        if not _is_weight(probe, name):
            continue
        if quantized and not in_float and use.unrounded:
            also = f", rounded in {_some(use.rounded)}" if use.rounded else ""
            found.append(
                f"{name}: reported as quantized, entered {_some(use.unrounded)} in float{also}"
            )
        elif quantized and not use.rounded and not use.unrounded:
            if _has_sibling(probe, name):
                continue
            found.append(f"{name}: reported as quantized, entered no product")
        elif quantized and not use.rounded:
            found.append(f"{name}: reported as quantized, entered {_some(use.unrounded)} in float")
        elif not quantized and use.rounded:
            found.append(f"{name}: reported as float, entered {_some(use.rounded)} rounded")
    return found


def _is_weight(probe: WeightProbe, name: str) -> bool:
    """Whether it was an operand, or has the shape of one: biases and norms are not at stake."""
    use = probe.uses[name]
    if use.rounded or use.unrounded:
        return True
    parameter = dict(probe._parameters)[name]
    return parameter.dim() > 1 and "bias" not in name.rpartition(".")[2]


def _has_sibling(probe: WeightProbe, name: str) -> bool:
    """Whether it is a part of a weight, such as a norm, another part of which was an operand."""
    parts = name.rpartition(".")[0]
    return ".parametrizations." in f".{name}" and any(
        other.rpartition(".")[0] == parts and (use.rounded or use.unrounded)
        for other, use in probe.uses.items()
    )


def _row_of(name: str, rows: Mapping[str, Row]) -> Row | None:
    """The row of the layer that a parameter belongs to; parametrizations belong to their layer."""
    owner, _, inside = f".{name}".partition(".parametrizations.")
    if not inside:
        owner = owner.rpartition(".")[0]
    return rows.get(owner.removeprefix("."))


def _follow(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Tensor,
    before: Mapping[int, Tensor | None],
) -> Tensor | None:
    """The marks of what an operator made of weights and constants."""
    is_number = output.dtype.is_floating_point or output.dtype.is_complex
    narrow = output.element_size() == 1 and output.dtype is not torch.bool
    narrow = narrow or (name == "_to_copy" and not is_number)
    if name == "copy":
        source = before.get(id(args[1]))
        return None if source is None else _rounding(source.expand(output.shape), narrow)
    if name in _REDUCTIONS:
        return None  # a statistic of weights, such as a scale, is no weight
    if name in _MOVES:
        marks = _moved(func, name, args, kwargs, before)
        if marks is not None and marks.shape == output.shape:
            return marks
    # Elementwise: whatever has as many elements is in step with the result.
    same = [m for m in before.values() if m is not None and m.numel() == output.numel()]
    same = [m for m in same if m.shape == output.shape] or [m.reshape(output.shape) for m in same]
    if not same:
        wider = [m for m in before.values() if m is not None and m.numel() > 1]
        for m in wider:
            try:
                return m.expand(output.shape)
            except RuntimeError:
                continue
        return None
    marks = same[0].clone()
    for other in same[1:]:
        marks = torch.where(marks == _NOTHING, other, marks)
    is_rounding = name in _ROUNDING or narrow
    marked = is_rounding or any(bool(((m != _NOTHING) & (m % 2 == 1)).any()) for m in same)
    if not marked:
        return marks
    rounded = torch.zeros(output.shape, dtype=torch.bool)
    for m in same:
        rounded |= (m != _NOTHING) & (m % 2 == 1)
    return _rounding(marks, rounded | is_rounding)


def _rounding(marks: Tensor, where: Tensor | bool) -> Tensor:
    where = torch.as_tensor(where)
    return torch.where((marks != _NOTHING) & where, marks // 2 * 2 + 1, marks)


def _moved(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    before: Mapping[int, Tensor | None],
) -> Tensor | None:
    """What the operator makes of the marks in place of the values."""

    def swap(x: Any) -> Any:
        marks = before.get(id(x)) if isinstance(x, Tensor) else None
        return torch.full(x.shape, _NOTHING) if marks is None else marks

    whole = args[0]
    if name in ("cat", "stack"):
        first: Any = [swap(x) for x in whole]
    elif before.get(id(whole)) is not None:
        first = swap(whole)
    else:
        return None  # a table, looked up by what was made of weights
    options = {key: value for key, value in kwargs.items() if key != "dtype"}
    try:
        marks: Tensor = func(first, *args[1:], **options)
    except (RuntimeError, TypeError, IndexError):
        return None
    return marks


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that an operator writes to."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]
    return written


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if _has_memory(tensor) else 0


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _shares(x: Tensor, y: Tensor) -> bool:
    return _has_memory(x) and _has_memory(y) and _key(x) == _key(y)


def _tensors(thing: Any, depth: int = 6, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in lists, mappings and the attributes of objects."""
    seen = set() if seen is None else seen
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (nn.Module, str, bytes, int, float, type)):
        return
    elif isinstance(thing, Mapping):
        for part in list(thing.values()):
            yield from _tensors(part, depth - 1, seen)
    elif isinstance(thing, (list, tuple, set)):
        for part in thing:
            yield from _tensors(part, depth - 1, seen)
    elif hasattr(thing, "__dict__"):
        yield from _tensors(vars(thing), depth - 1, seen)
    elif hasattr(thing, "__slots__"):
        parts = [getattr(thing, name, None) for name in thing.__slots__]
        yield from _tensors(parts, depth - 1, seen)


def _some(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
