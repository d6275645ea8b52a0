"""The rooms of the architecture: what each module may import, held by walking the imports."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import statqat_lightning

PACKAGE = "statqat_lightning"
ROOT = Path(statqat_lightning.__file__).parent
MOST_LINES = 400

# Rooms of the architecture; a module may import from its own row and from those above it.
ROWS: list[set[str]] = [
    {"_files", "_moved", "_page", "_tables", "_words"},
    {"formats"},
    {"numerics"},
    {"error_analysis"},
    {"quantizers"},
    {"fake_quant"},
    {"layers"},
    {"recipes"},
    {"model"},
    {"targets"},
    {"insight"},
    {"export"},
    {"callbacks"},
    {"cli"},
    {"", "__main__"},  # the package itself only hands on what the rooms define
]
EXPORT_ROWS: list[set[str]] = [
    {"wording", "memory"},
    {"calls"},
    {"freezing"},
    {"files"},
    {"proof"},
    {"", "artefacts", "checkpoints", "file_advice", "file_report", "foresight", "inspection"},
]
NUMERIC_ROWS = range(1, 5)
"""Rows of pure functions: they import torch and the standard library, no module, file or logger."""
NOT_NUMERIC = ("torch.nn", "torch.distributed", "logging", "warnings", "pathlib", "io", "os")
NUMERIC_EXCEPTIONS = {"torch.nn.functional"}  # functions, no modules
CALLBACK_ROW = 12
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
REQUIRED = {"torch", "torchmetrics", "lightning", "numpy", "safetensors", "tqdm", "yaml"}
"""What an installation without extras has, numpy and tqdm by way of torchmetrics and lightning.

All else is imported where it is used.
"""


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    name: str
    line: int
    at_import: bool
    """Whether it runs when its module is imported: not in a function, not for type checks only."""


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, wherever it stands; for `from a import b` both `a` and `a.b`."""
    parents: dict[ast.AST, ast.AST] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        around, above = [], parents.get(node)
        while above is not None:
            around.append(above)
            above = parents.get(above)
        deferred = any(
            isinstance(a, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(a, ast.If) and "TYPE_CHECKING" in ast.unparse(a.test))
            for a in around
        )
        yield from (Import(name, node.lineno, not deferred) for name in names)


def row_of(module: str) -> int | None:
    """Row of a module of the package, None if the architecture does not know its room."""
    room = module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]
    return next((number for number, rooms in enumerate(ROWS) if room in rooms), None)


def export_row_of(module: str) -> int | None:
    """Row of a module within `export/`, None if it is not there or has none."""
    parts = module.split(".")
    if parts[:2] != [PACKAGE, "export"]:
        return None
    room = parts[2] if len(parts) > 2 else ""
    return next((number for number, rooms in enumerate(EXPORT_ROWS) if room in rooms), None)


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Every import of a module that the architecture does not allow."""
    row = row_of(module)
    if row is None:
        return [f"{module}: no row of the architecture has this room"]
    found = []
    for entry in imports_of(source, module, is_package):
        top = entry.name.split(".")[0]
        if top == PACKAGE:
            if (other := row_of(entry.name)) is None:
                # `from statqat_lightning import name`: the package itself was checked before.
                continue
            allowed = other <= row
            here, there = export_row_of(module), export_row_of(entry.name)
            if here is not None and there is not None and there > here:
                allowed = entry.name == f"{PACKAGE}.export"  # its last name was checked before
        elif row in NUMERIC_ROWS:
            allowed = top in {"torch", "__future__"} | sys.stdlib_module_names
            banned = any(within(entry.name, name) for name in NOT_NUMERIC)
            kept = any(within(entry.name, name) for name in NUMERIC_EXCEPTIONS)
            allowed = allowed and (not banned or kept)
        elif top in LIGHTNING:
            allowed = row == CALLBACK_ROW
        else:
            known = top in sys.stdlib_module_names | REQUIRED
            allowed = known or not entry.at_import
        if not allowed:
            found.append(f"{module}, line {entry.line}: imports {entry.name}")
    return found


def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join([PACKAGE, *(part for part in parts if part != "__init__")])] = path
    return names


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_its_row_may_know(module: str) -> None:
    path = modules()[module]
    source = path.read_text(encoding="utf-8")
    assert violations(source, module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", modules())
def test_a_long_module_gives_its_reason(module: str) -> None:
    source = modules()[module].read_text(encoding="utf-8")
    if len(source.splitlines()) > MOST_LINES:
        docstring = ast.get_docstring(ast.parse(source)) or ""
        assert "makes the file long" in docstring


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """The modules of the package that are imported when this one is, itself left out."""
    known = modules()
    names = {e.name for e in imports_of(source, module, is_package) if e.at_import}
    # `from module import name` is listed as both; a package is imported before what is in it.
    return {name for name in names if name in known and not within(module, name)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name: imported_modules(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules().items()
    }
    assert sum(map(len, graph.values())) > 500
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert order.index(f"{PACKAGE}.formats.base") < order.index(f"{PACKAGE}.callbacks.qat")


def test_all_rooms_of_the_core_are_there() -> None:
    rooms = {name.split(".")[1] for name in modules() if "." in name}
    assert {room for row in ROWS for room in row} - {""} == rooms


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("formats", "from statqat_lightning.numerics import QParams"),
        ("formats", "from statqat_lightning import recipes"),
        ("formats", "from statqat_lightning import get_format"),
        ("formats", "import statqat_lightning.insight.snr"),
        ("formats", "from . import callbacks"),
        ("formats", "from .model import prepare"),
        ("error_analysis.exact", "from ..quantizers import Analytic"),
        ("error_analysis.exact", "from ..quantizers.base import Quantizer"),
        ("fake_quant.observers", "from statqat_lightning.recipes import QuantRule"),
        ("recipes.recipe", "def f():\n    from statqat_lightning.insight.snr import SNRSummary"),
        ("export.files.onnx", "from statqat_lightning.callbacks import StatQATCallback"),
        ("callbacks.qat", "from statqat_lightning import prepare"),
        ("numerics.qparams", "import numpy"),
        ("numerics.qparams", "import yaml"),
        ("numerics.qparams", "def f():\n    import numpy as np"),
        ("numerics.qparams", "from torch import nn"),
        ("numerics.qparams", "import torch.nn as nn"),
        ("quantizers.base", "import logging"),
        ("quantizers.base", "from pathlib import Path"),
        ("quantizers.base", "from lightning import Trainer"),
        ("model.insertion", "import lightning as L"),
        ("insight.snr", "def f():\n    from lightning.pytorch import Trainer"),
        ("cli", "from pytorch_lightning import Trainer"),
        ("model.insertion", "if TYPE_CHECKING:\n    from lightning import LightningModule"),
        ("insight.snr", "import matplotlib.pyplot as plt"),
        ("insight.snr", "try:\n    import wandb\nexcept ImportError:\n    wandb = None"),
        ("export.files.onnx", "from onnx import helper"),
        ("callbacks.export", "class A:\n    import onnxruntime"),
        ("export.files.onnx", "import ml_dtypes"),
        ("export.files.onnx", "from statqat_lightning.export.proof.proof import Proof"),
        ("export.calls.dimensions", "from ..freezing import frozen"),
        ("nowhere", ""),
    ],
)
def test_checker_catches_a_violation(module: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("formats", "from __future__ import annotations\nimport math, re\nimport torch"),
        ("numerics.qparams", "from statqat_lightning.formats import Format"),
        ("numerics.qparams", "import torch.nn.functional as F"),
        ("numerics.qparams", "from torch.nn.functional import hardtanh"),
        ("error_analysis.exact", "from .densities import Density\nfrom ..formats import Format"),
        ("quantizers.base", "from torch import Tensor"),
        ("recipes.recipe", "import yaml\nfrom torch import nn\nfrom pathlib import Path"),
        ("insight.snr", "def f():\n    import matplotlib"),
        ("insight.snr", "async def f():\n    import matplotlib"),
        ("export.files.onnx", "class A:\n    def f(self):\n        import onnx"),
        (
            "export.files.onnx",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx",
        ),
        ("export.files.native", "import safetensors"),
        (
            "callbacks.qat",
            "import lightning as L\nfrom statqat_lightning.insight.snr import snr_by_tensor",
        ),
        ("cli", "from statqat_lightning.export import inspect_file"),
    ],
)
def test_checker_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_checker_knows_relative_imports_of_a_package() -> None:
    assert violations("from .base import Quantizer", f"{PACKAGE}.quantizers", True) == []
    assert violations("from . import base", f"{PACKAGE}.quantizers", True) == []
    assert violations("from ..recipes import QuantRule", f"{PACKAGE}.quantizers", True) != []
    assert violations("from .formats import Format", f"{PACKAGE}", True) == []
