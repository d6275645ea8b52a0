"""Which values of a recorded run get quantizers for a runtime, and where these stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from statqat_lightning.formats import IntFormat, get_format
from statqat_lightning.layers.layer_kinds import gate_of_class, has_weights
from statqat_lightning.layers.quantized_layer import base_class, kind_of
from statqat_lightning.model.dataflow import (
    CONVOLUTIONS,
    KEEPING,
    LINEARS,
    NORMS,
    OUTPUT_KIND,
    TRANSPOSED,
    Dataflow,
    Operation,
    Value,
)
from statqat_lightning.model.quantizable import has_own_forward
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import ROLES, QuantRule, full_name
from statqat_lightning.targets.base import Placement, Target
from statqat_lightning.targets.integer_kernels import MEANS
from statqat_lightning.targets.rounding_ties import FUNCTIONS
from statqat_lightning.targets.values import (
    all_read_inside,
    end_of_fused,
    is_output,
    kept_on_grid,
    largest_possible,
    scales_channels,
    signed,
    variable_terms,
    whole_of_part,
)

_CONCATENATING = ("cat", "concat", "concatenate")
_JOINING = ("add", *_CONCATENATING, "mul")


@dataclass
class Places:
    """Puts quantizers where a recorded run needs them, rule by rule."""

    rules: Mapping[str, QuantRule]
    flow: Dataflow
    target: Target
    modules: Mapping[str, nn.Module]
    rounded: dict[Value, TensorSpec] = field(default_factory=dict)
    made: dict[Value, TensorSpec] = field(default_factory=dict)  # by convolutions and their sums
    of_layers: set[Value] = field(default_factory=set)  # those of them by convolutions alone
    reaching: dict[Value, bool] = field(default_factory=dict)
    computed: dict[Value, TensorSpec] = field(default_factory=dict)  # as functions of such values
    shared: set[Value] = field(default_factory=set)  # what is rounded for all that read it
    changed: dict[str, dict[str, TensorSpec | None]] = field(default_factory=dict)
    results: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    joined: dict[Value, tuple[Value, ...]] = field(default_factory=dict)  # with one scale
    concatenated: dict[Value, list[Value]] = field(default_factory=dict)  # what a result is made of
    unplaced: set[Value] = field(default_factory=set)

    def placement(self) -> Placement:
        """What comes of the model."""
        self._need_layers()
        self._need_what_comes_of_them()
        if self.target.splits_gates:
            self._round_gates()
        names = self._names_of_scales()
        for value in sorted(self.rounded, key=lambda value: value.number):
            group = self.joined.get(value, (value,))
            spec, shared = self.rounded[group[0]], names.get(value)
            self._put(
                value,
                replace(
                    spec,
                    max_value=largest_possible(group),
                    shared=shared,
                    zero_point=spec.zero_point and shared is None,
                ),
            )
        names_of_rules = dict.fromkeys([*self.rules, *self.changed, *self.results])
        rules = [self._rule(name) for name in names_of_rules]
        before = [
            name
            for name, specs in self.changed.items()
            if "inputs" in specs and specs["inputs"] is None
        ]
        layers = [o for o in self.flow.operations if self._spec_of(o) is not None]
        slow = [o.name for o in self.flow.operations if self._is_slow(o)]
        if slow:
            more = f" and {len(slow) - 3} more" if len(slow) > 3 else ""
            self.left.append(
                f"{', '.join(slow[:3])}{more} stay in float, as groups of so few channels are "
                "slower in integers."
            )
        return Placement(QuantRecipe(rules), tuple(self.left), tuple(before), len(layers))

    def _rule(self, name: str) -> QuantRule:
        given = self.rules.get(name)
        specs = {role: getattr(given, role) for role in ROLES} if given is not None else {}
        specs |= self.changed.get(name, {})
        results = (given.by_result if given is not None else {}) | self.results.get(name, {})
        if not self.target.unsigned_codes:
            specs = {role: None if spec is None else signed(spec) for role, spec in specs.items()}
            results = {role: signed(spec) for role, spec in results.items()}
        return QuantRule(full_name(name), **specs, results=results)

    def _need_layers(self) -> None:
        """Inputs of integer layers, and what convolutions give on."""
        for operation in self.flow.operations:
            spec = self._spec_of(operation)
            if spec is None:
                continue
            if operation.inputs:
                self.rounded.setdefault(operation.inputs[0], spec)
            if operation.kind in CONVOLUTIONS or self.target.rounds_all:
                self._round_end(operation, spec)

    def _need_what_comes_of_them(self) -> None:
        """Terms and results of sums and products that convolutions give to, and what means are of.

        A function of such a tensor is rounded only where one of these takes it.
        """
        for operation in self.flow.operations:
            terms = variable_terms(operation)
            known = [spec for value in terms if (spec := self._origin(value)) is not None]
            if not known:
                continue
            joins = operation.kind in _JOINING and len(terms) > 1
            if (operation.kind in FUNCTIONS and len(terms) == 1) or scales_channels(operation):
                self.computed[operation.outputs[0]] = known[0]
            if not joins and operation.kind not in MEANS:
                continue
            if not (self.target.rounds_outputs or self._reaches_layer(operation.outputs[0])):
                continue
            if joins and self._needs_one_scale(operation):
                if self._keeps_to_layer(operation):
                    self._share_scale(operation, known[0])
                continue
            fused = self._fused_term(operation) if self.target.sums_in_float else None
            if fused is not None:
                self.rounded.pop(fused, None)
                self.shared.discard(fused)
            for value in terms:
                if value is fused:
                    continue
                whole = whole_of_part(value)
                self.rounded.setdefault(whole, known[0])
                self.shared.add(whole)
            if joins:
                self._round_end(operation, known[0])

    def _round_gates(self) -> None:
        """The gates of activations whose input and output are rounded."""
        for operation in self.flow.operations:
            module, name = operation.module, operation.name
            if module is None or gate_of_class(base_class(module)) is None:
                continue
            x, y = operation.inputs[0], operation.outputs[0]
            if x in self.rounded and y in self.rounded and self.flow.calls[name] == 1:
                self._change(name, gates=replace(self.rounded[y], max_value=1.0))

    def _origin(self, value: Value) -> TensorSpec | None:
        return self.made.get(value) or self.computed.get(value)

    def _round_end(self, operation: Operation, spec: TensorSpec) -> None:
        end = end_of_fused(operation.outputs[0], self.target)
        wanted = self.target.rounds_outputs or self._reaches_layer(end)
        if wanted and (self.target.rounds_all or not is_output(end)):
            self.rounded.setdefault(end, spec)
            self.made[end] = spec
            self.shared.add(end)
            if operation.kind in CONVOLUTIONS:
                self.of_layers.add(end)

    def _is_slow(self, operation: Operation) -> bool:
        """Whether a layer could run in integers, and is faster in float."""
        return (
            operation.kind in CONVOLUTIONS
            and self._format_of(operation) is not None
            and self.target.is_slow(operation.module)
        )

    def _spec_of(self, operation: Operation) -> TensorSpec | None:
        """How tensors around a layer are rounded; None if it is not to run in integers."""
        return None if self._is_slow(operation) else self._format_of(operation)

    def _format_of(self, operation: Operation) -> TensorSpec | None:
        """How tensors around a layer are rounded; None if the runtime has no integers for it."""
        rule = self.rules.get(operation.name) if operation.module is not None else None
        if rule is None or operation.kind not in (*CONVOLUTIONS, *LINEARS):
            return None
        weights, inputs = rule.weights, rule.inputs
        if not (isinstance(weights, TensorSpec) and isinstance(inputs, TensorSpec)):
            return None
        formats = get_format(weights.format), get_format(inputs.format)
        if not all(isinstance(fmt, IntFormat) for fmt in formats) or formats[1].bits != 8:
            return None
        if not formats[0].is_signed or self.flow.calls[operation.name] != 1:
            return None
        return TensorSpec(
            "int8_full",
            inputs.granularity,
            inputs.quantizer,
            unsigned_if_nonnegative=self.target.unsigned_codes,
            gradient=inputs.gradient,
            zero_point=inputs.zero_point and self.target.zero_points,
            **dict(inputs.options),
        )

    def _rounds_alike(self, operation: Operation) -> bool:
        """Whether a layer rounds what it takes to integers as wide, and need not once that is."""
        if operation.kind not in (*CONVOLUTIONS, *TRANSPOSED, *LINEARS):
            return False
        rule = self.rules.get(operation.name) if operation.module is not None else None
        if rule is None or self.flow.calls[operation.name] != 1:
            return False
        if not isinstance(rule.inputs, TensorSpec):
            return False
        fmt = get_format(rule.inputs.format)
        return isinstance(fmt, IntFormat) and fmt.bits == 8

    def _reaches_layer(self, value: Value) -> bool:
        """Whether a layer that runs in integers takes a value, or what integers make of it."""
        if value not in self.reaching:
            self.reaching[value] = any(
                self._spec_of(reader) is not None
                or (
                    reader.kind in (*KEEPING, *_JOINING, *MEANS, *NORMS, *self.target.fused)
                    and not scales_channels(reader)
                    and any(map(self._reaches_layer, reader.outputs))
                    and (not self._needs_one_scale(reader) or self._keeps_to_layer(reader))
                )
                for reader in value.consumers
            )
        return self.reaching[value]

    def _needs_one_scale(self, operation: Operation) -> bool:
        return self.target.concatenates_codes and operation.kind in _CONCATENATING

    def _keeps_to_layer(self, operation: Operation) -> bool:
        """Whether a layer takes the result of an operation, or what leaves it on its grid."""
        return any(
            self._spec_of(reader) is not None
            or (reader.kind in (*KEEPING, *_CONCATENATING) and self._keeps_to_layer(reader))
            for value in operation.outputs
            for reader in value.consumers
        )

    def _share_scale(self, operation: Operation, spec: TensorSpec) -> None:
        """Give what is concatenated one scale: the result is on its grid, and rounded no more."""
        result = operation.outputs[0]
        parts = list(dict.fromkeys(v for term in operation.inputs for v in self._rounded_for(term)))
        self.concatenated[result], self.computed[result] = parts, spec
        group: dict[Value, None] = {}
        for value in parts:
            self.rounded.setdefault(value, spec)
            self.shared.add(value)
            group |= dict.fromkeys(self.joined.get(value, [value]))
        self.joined |= dict.fromkeys(group, tuple(group))

    def _rounded_for(self, value: Value) -> list[Value]:
        """What has to be rounded so that a value is on a grid."""
        if value in self.concatenated:
            return self.concatenated[value]
        maker = value.producer
        if value in self.made or maker is None or maker.kind not in KEEPING:
            return [value]
        return self._rounded_for(maker.inputs[0]) if len(maker.inputs) == 1 else [value]

    def _names_of_scales(self) -> dict[Value, str]:
        """Names of scales that several values share, by the module that concatenates first."""
        names: dict[Value, str] = {}
        taken: Counter[str] = Counter()
        for result, parts in self.concatenated.items():
            if parts[0] in names:
                continue
            assert result.producer is not None, "it is the result of a concatenation"
            name = f"{result.producer.name}.cat".lstrip(".")
            taken[name] += 1
            number = f"_{taken[name]}" if taken[name] > 1 else ""
            names |= dict.fromkeys(self.joined[parts[0]], name + number)
        return names

    def _fused_term(self, operation: Operation) -> Value | None:
        """The term of a sum that the layer which makes it adds the others to; None if none does.

        Of several such layers that is the last to run.
        """
        if operation.kind != "add":
            return None
        made = [v for v in operation.inputs if v in self.of_layers and len(v.consumers) == 1]
        return max(made, key=lambda value: value.number, default=None)

    def _put(self, value: Value, spec: TensorSpec) -> None:
        """Find a module that can round a value, once for all that read it."""
        readers = [o for o in value.consumers if o.kind != OUTPUT_KIND]
        layers = [o for o in readers if self._rounds_alike(o)]
        if self._is_on_grid(value):
            for layer in layers:
                self._change(layer.name, inputs=None)
            return
        if value not in self.shared or (len(readers) == 1 and layers):
            for layer in layers:
                self._change(layer.name, inputs=spec)
            return
        ahead: Value | None = value
        while ahead is not None:
            if (place := self._place(ahead)) is not None:
                name, role = place
                self._change(name, **{role: spec})
                for layer in layers:
                    self._change(layer.name, inputs=None)
                return
            ahead = kept_on_grid(ahead)
        if self._put_where_made(value, spec):
            for layer in layers:
                self._change(layer.name, inputs=None)
            return
        for layer in layers:
            self._change(layer.name, inputs=spec)
        if len(layers) < len(readers):
            self.unplaced.add(value)
            self._report(value)

    def _place(self, value: Value) -> tuple[str, str] | None:
        """A module that can round a value for all that read it, and whether by input or output."""
        readers = [o for o in value.consumers if o.kind != OUTPUT_KIND]
        calls = self.flow.calls
        for name in value.unread_by:
            if name and calls[name] == 1:
                return name, "outputs"
        with_weights = {
            o.name for o in readers if o.module is not None and has_weights(kind_of(o.module))
        }
        for name in reversed(value.taken_by):
            if (
                name
                and calls[name] == 1
                and name not in with_weights
                and all_read_inside(name, readers)
            ):
                return name, "inputs"
        return None

    def _put_where_made(self, value: Value, spec: TensorSpec) -> bool:
        """Round the result of a function in the forward that calls it; whether that is possible."""
        if value.made_in is None:
            return False
        caller, role = value.made_in
        module = self.modules[caller]
        if self.flow.calls[caller] != 1 or not role.replace("-", "_").isidentifier():
            return False
        if hasattr(module, f"{role}_scale") or has_own_forward(module):
            return False
        self.results.setdefault(caller, {})[role] = spec
        return True

    def _is_on_grid(self, value: Value) -> bool:
        """Whether a value consists of values that are rounded already."""
        while value not in self.concatenated:
            maker = value.producer
            if maker is None or maker.kind not in KEEPING or len(maker.inputs) != 1:
                return False
            value = maker.inputs[0]
            if value in self.shared:
                return value not in self.unplaced
        return not self.unplaced.intersection(self.concatenated[value])

    def _change(self, name: str, **specs: TensorSpec | None) -> None:
        self.changed.setdefault(name, {}).update(specs)

    def _report(self, value: Value) -> None:
        maker = value.producer
        what = "an input" if maker is None else f"the result of {maker.kind!r}"
        where = (
            "" if maker is None or maker.module is not None else f" in {maker.name or 'forward'}"
        )
        readers = ", ".join(dict.fromkeys(o.name or o.kind for o in value.consumers))
        self.left.append(
            f"{what}{where}, read by {readers}, is made in no module that runs once, so it stays "
            "in float there. Give each place a module of its own: two of nn.ReLU(), for instance, "
            "and not one that runs twice."
        )
