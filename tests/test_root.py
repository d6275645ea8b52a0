"""The package's root: it hands on public names, and loads what they need only then."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import statqat_lightning
from statqat_lightning._moved import MOVED

ROOT = Path(statqat_lightning.__file__)
PUBLIC = (
    *("LayerSNR", "allocate"),
    *("StatQATCallback", "SNRMonitor", "ExportCallback", "DistillationCallback"),
    "ReportCallback",
    *("QuantRecipe", "QuantRule", "TensorSpec", "QuantSchedule"),
    *("get_format", "list_formats", "list_presets", "fake_quantize", "snr_db", "compensate"),
    *("advise", "sensitivity"),
    *("prepare", "remove", "freeze", "load_quantized", "quantized_loading", "place"),
)


def loaded_by(code: str) -> set[str]:
    """Packages in memory after some code in a process of its own."""
    ending = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + ending], capture_output=True, text=True, check=True
    )
    return {*done.stdout.split()}


def test_the_package_alone_loads_nothing() -> None:
    assert not {"torch", "lightning", "yaml"} & loaded_by("import statqat_lightning")


def test_what_needs_no_trainer_does_not_load_lightning() -> None:
    names = "get_format, fake_quantize, prepare, place, freeze, load_quantized, compensate"
    loaded = loaded_by(f"from statqat_lightning import {names}")
    assert "torch" in loaded
    assert not {"lightning", "pytorch_lightning", "torchmetrics", "onnx"} & loaded


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_there(name: str) -> None:
    assert name in dir(statqat_lightning)
    assert getattr(statqat_lightning, name) is getattr(statqat_lightning, name)


def test_the_version_is_that_of_the_installation() -> None:
    assert statqat_lightning.__version__ == importlib.metadata.version("statqat-lightning")
    assert "__version__" in dir(statqat_lightning)


def test_the_command_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "statqat_lightning", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = f"{statqat_lightning.__version__}, torch {torch.__version__}"
    assert done.stdout.strip() == f"statqat {versions}"


def test_rooms_are_there_without_an_import_of_their_own() -> None:
    code = "import statqat_lightning\nstatqat_lightning.quantizers.get_quantizer('analytic')"
    assert "torch" in loaded_by(code)


def test_type_checkers_see_the_names_that_a_program_gets() -> None:
    seen = {}
    for node in ast.walk(ast.parse(ROOT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and any(alias.asname for alias in node.names):
            seen |= {alias.asname: (node.module or "").partition(".")[2] for alias in node.names}
    assert seen == statqat_lightning._HOMES
    assert seen.keys() == set(PUBLIC)


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from statqat_lightning import *", names)
    assert {*PUBLIC} == names.keys() - {"__builtins__"}


def test_rooms_of_before_are_attributes_too() -> None:
    sys.modules.pop("statqat_lightning.quantized_model", None)
    vars(statqat_lightning).pop("quantized_model", None)
    with pytest.warns(DeprecationWarning, match="has moved to statqat_lightning.model"):
        found = statqat_lightning.quantized_model
    assert found.refresh is statqat_lightning.model.refresh


def test_a_wrong_name_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'StatQatCallback'"):
        statqat_lightning.StatQatCallback  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from statqat_lightning import nothing  # noqa: F401


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_give_the_modules_of_today(old: str) -> None:
    new = importlib.import_module(f"statqat_lightning.{MOVED[old]}")
    spec = new.__spec__
    sys.modules.pop(f"statqat_lightning.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"statqat_lightning.{old} has moved to "):
        found = importlib.import_module(f"statqat_lightning.{old}")
    assert found is new
    assert new.__spec__ is spec
    assert spec is not None
    assert spec.name == new.__name__ == f"statqat_lightning.{MOVED[old]}"


def test_old_imports_and_pickles_find_what_they_name() -> None:
    from statqat_lightning.recipes import QuantRule

    sys.modules.pop("statqat_lightning.recipe", None)
    with pytest.warns(DeprecationWarning, match="recipe has moved"):
        found = pickle.loads(b"cstatqat_lightning.recipe\nQuantRule\n.")
    assert found is QuantRule
