from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import statqat_lightning.export.files.onnx as onnx_export

MODULES = {"pyyaml": "yaml"}  # where a package is imported under another name


def test_what_the_package_imports_is_what_it_declares(repository: Path) -> None:
    """What extras bring is imported in functions, so only the top level counts."""
    imported = set()
    for path in (repository / "statqat_lightning").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!;\[ ]", entry)[0].lower() for entry in project["dependencies"]]
    declared = {MODULES.get(name, name) for name in names}
    assert imported - set(sys.stdlib_module_names) - {"statqat_lightning"} == declared


def test_a_missing_extra_is_named_for_an_installation_and_for_a_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ModuleNotFoundError) as caught:
        onnx_export.require_packages()
    message = str(caught.value)
    assert "ONNX export needs no_such_package:" in message
    assert 'pip install "statqat-lightning[onnx]"' in message
    assert 'pip install ".[onnx]"' in message
