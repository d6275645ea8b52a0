"""Recipes by name, as data, and the table of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, overload

from statqat_lightning._tables import aligned, html_table
from statqat_lightning._words import did_you_mean, short
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.recipes.defaults import DEFAULT, Default, default_rules
from statqat_lightning.recipes.rule import QuantRule

_WIDTH = 80
_HEADER = ("name", "weights", "activations", "what for")
_ALL = (
    "The first and the last layer get at least 8 bits. Block formats (mxfp8, mxfp4, nvfp4) are for "
    "weights: activations stay in float."
)


class PresetInfo(NamedTuple):
    """One preset.

    Attributes:
        name: As `preset=` and `extends:` take it.
        weights: Format of the weights.
        activations: Format of the inputs, None for float.
        about: What it is for, in a few words.
        linears: Specification of the weights of `Linear` layers, None where they get `weights`.
    """

    name: str
    weights: str
    activations: str | None
    about: str
    linears: TensorSpec | None = None

    def rules(
        self, exclude: Sequence[str] = (), first_last_bits: int | Default | None = DEFAULT
    ) -> list[QuantRule]:
        """Its rules, with those of `exclude` and `first_last_bits`, see `QuantRecipe.preset`."""
        *rules, rest = default_rules(self.weights, self.activations, exclude, first_last_bits)
        if self.linears is not None:  # optional: there may be other layers only
            rules.append(QuantRule("type:Linear", self.linears, self.activations, optional=True))
        return [*rules, rest]


_BLOCKS_OF_128 = TensorSpec("int4", "per_block:128")  # a row's last block may be shorter
_PRESETS = (
    PresetInfo("w8a8", "int8", "int8", "integer kernels; the default"),
    PresetInfo("w4a8", "int4", "int8", "half the weights of w8a8"),
    PresetInfo("w4a4", "int4", "int4", "4 bits for both"),
    PresetInfo("w2a2", "int2", "int2", "with DistillationCallback"),
    PresetInfo("fp8", "fp8_e4m3", "fp8_e4m3", "8-bit floats, E4M3"),
    PresetInfo("fp4", "fp4_e2m1", "fp4_e2m1", "4-bit floats, a scale a channel"),
    PresetInfo("mxfp8", "mxfp8_e4m3", None, "blocks of 32; weights only"),
    PresetInfo("mxfp4", "mxfp4", None, "blocks of 32; weights only"),
    PresetInfo("nvfp4", "nvfp4", None, "blocks of 16; weights only"),
    PresetInfo("int8_weight_only", "int8", None, "a quarter of the size"),
    PresetInfo("int4_weight_only", "int4", None, "an eighth, a scale a channel"),
    PresetInfo(
        "int4_weight_only_g128", "int4", None, "Linear: a scale for 128 values", _BLOCKS_OF_128
    ),
    PresetInfo("nf4_weight_only", "nf4", None, "the levels of QLoRA"),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
"""All of them, by name."""


class PresetTable(tuple[PresetInfo, ...]):
    """Presets: a tuple of `PresetInfo` that prints as a table, with look-up by name."""

    __slots__ = ()

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> PresetInfo: ...

    @overload
    def __getitem__(self, key: slice) -> PresetTable: ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> PresetInfo | PresetTable:
        """The preset at an index or with a name, or the table of a slice.

        Raises:
            ValueError: If there is no preset of that name; the message lists near misses.
        """
        if isinstance(key, str):
            return get_preset(key)
        if isinstance(key, slice):
            return PresetTable(super().__getitem__(key))
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            return key in [row.name for row in self]
        return super().__contains__(key)

    def __repr__(self) -> str:
        return "\n".join([*aligned(self._cells()), *textwrap.wrap(_ALL, _WIDTH)])

    def _repr_html_(self) -> str:
        return html_table(self._cells(), below=[_ALL])

    def _cells(self) -> list[tuple[str, ...]]:
        rows = ((row.name, row.weights, row.activations or "float", row.about) for row in self)
        return [_HEADER, *rows]


def list_presets() -> PresetTable:
    """Every preset: a recipe that has a name.

    Returns:
        A tuple of `PresetInfo`, which prints as a table, in a notebook as one of HTML. An index may
        be a name. `QuantRecipe.preset(name)` is the recipe; `StatQATCallback(preset=name)`,
        `prepare(model, preset=name)` and `extends: name` in a recipe's YAML take the name.

    Examples:
        >>> list_presets()[1:3]
        name  weights  activations  what for
        w4a8  int4     int8         half the weights of w8a8
        w4a4  int4     int4         4 bits for both
        The first and the last layer get at least 8 bits. Block formats (mxfp8, mxfp4,
        nvfp4) are for weights: activations stay in float.
        >>> list_presets()["fp8"].weights
        'fp8_e4m3'
    """
    return PresetTable(_PRESETS)


def get_preset(name: str) -> PresetInfo:
    """The preset with the given name; `list_presets` shows all of them.

    Raises:
        ValueError: If there is none; the message lists near misses and all names.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise ValueError(
        f"preset: got {short(name)}.{did_you_mean(name, PRESETS, most=3)} Known presets: "
        f"{', '.join(PRESETS)}."
    )
