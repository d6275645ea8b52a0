"""The table of formats."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from statqat_lightning import get_format, list_formats, prepare
from statqat_lightning.formats import block_format_names, format_names
from statqat_lightning.formats.listing import FormatInfo, FormatTable

TABLE = list_formats()


def test_the_table_has_every_named_format_once() -> None:
    assert [row.name for row in TABLE] == [*format_names(), *block_format_names()]


# Bits, largest values and block sizes of OCP OFP8 v1.0, OCP MX v1.0 and NVFP4. Of 127 positive
# codes, E4M3 has one for NaN, E5M2 four for infinity and NaN.
@pytest.mark.parametrize(
    ("row", "name"),
    [
        (FormatInfo("int4", "integer", 4, 15, 7.0, None, True, True, ()), "int4"),
        (FormatInfo("int8_full", "integer", 8, 256, 127.0, None, True, True, ()), "int8_full"),
        (FormatInfo("uint4", "integer", 4, 16, 15.0, None, False, True, ()), "uint4"),
        (FormatInfo("fp8_e4m3", "float", 8, 253, 448.0, None, True, True, ("fp8",)), "fp8"),
        (FormatInfo("fp8_e5m2", "float", 8, 247, 57344.0, None, True, True, ()), "FP8-E5M2"),
        (FormatInfo("fp5_e2m2", "float", 5, 31, 7.0, None, True, True, ()), "e2m2"),
        (FormatInfo("nf4", "codebook", 4, 16, 1.0, None, True, True, ()), "nf4"),
        (FormatInfo("nvfp4", "block", 4, 15, 6.0, 16, True, False, ("nvfp4_e2m1",)), "nvfp4"),
        (FormatInfo("mxfp6_e2m3", "block", 6, 63, 7.5, 32, True, False, ("mxfp6",)), "mxfp6"),
        (FormatInfo("levels:-1,0,2", "codebook", 2, 3, 2.0, None, True, True, ()), "levels:-1,0,2"),
    ],
)
def test_a_row_by_its_name(row: FormatInfo, name: str) -> None:
    assert TABLE[name] == row


def test_every_alias_leads_to_its_row() -> None:
    found = {alias: row for row in TABLE for alias in row.aliases}
    assert {"fp8", "fp4", "ufp4", "mxfp4_e2m1"} <= found.keys()
    for alias, row in found.items():
        assert get_format(alias).name == row.name
        assert TABLE[alias] == row


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_a_format_is_for(row: FormatInfo) -> None:
    fmt = get_format(row.name)
    # A weight of both signs keeps its signs, or loses half of them.
    assert row.weights == (float(fmt.round(torch.tensor([-fmt.max]))) < 0)
    prepare(nn.Linear(64, 4), row.name, None, first_last_bits=None)
    inputs = {"weights": None, "activations": row.name, "first_last_bits": None}
    if row.activations:
        prepare(nn.Linear(64, 4), **inputs)
    else:
        with pytest.raises(ValueError, match="Block formats are for weights"):
            prepare(nn.Linear(64, 4), **inputs)


def test_it_prints_as_a_table_of_80_columns() -> None:
    lines = repr(TABLE).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        *("name", "alias", "kind", "bits", "values", "largest", "block", "for"),
    ]
    assert [line.split()[0] for line in lines[1 : len(TABLE) + 1]] == [row.name for row in TABLE]
    assert lines[-3].split() == ["nvfp4", "nvfp4_e2m1", "block", "4", "15", "6", "16", "weights"]
    assert str(TABLE) == repr(TABLE)


def test_in_a_notebook_it_is_a_table_of_html() -> None:
    html = TABLE._repr_html_()
    assert html.count("<tr>") == len(TABLE) + 1
    assert '<td style="text-align: left">ufp4_e2m1</td>' in html


def test_it_is_a_tuple_that_knows_names() -> None:
    assert "FP4" in TABLE
    assert "fp4_e2m1" in TABLE
    assert TABLE[0] in TABLE
    assert "e2m2" not in TABLE
    assert "int9" not in TABLE
    assert 4 not in TABLE
    assert isinstance(TABLE[1:3], FormatTable)
    assert [row.name for row in TABLE[1:3]] == ["int3", "int4"]
    assert TABLE[-1].name == "nvfp4"
    assert pickle.loads(pickle.dumps(TABLE)) == TABLE == list_formats()


def test_an_unknown_name_is_an_error_with_near_misses() -> None:
    with pytest.raises(ValueError, match=r"got 'in4'\. Did you mean 'int4'"):
        TABLE["in4"]
    with pytest.raises(IndexError):
        TABLE[len(TABLE)]
