"""What the benchmarks say of packages that they compare with, and how they write results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A module of the benchmarks, by name."""
    for folder in ("examples", "examples/benchmarks"):
        monkeypatch.syspath_prepend(repository / folder)
    return importlib.import_module


@pytest.fixture
def peers(load: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = importlib.import_module("peers")
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_what_can_be_imported_is_not_missing(peers: ModuleType) -> None:
    assert peers.missing("json") is None
    assert peers.versions()["torch"] == importlib.import_module("torch").__version__.split("+")[0]


def test_what_is_absent_says_how_to_get_it(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "brevitas", None)
    expected = 'brevitas is not installed: pip install "statqat-lightning[bench]"'
    assert peers.missing("brevitas") == expected
    assert peers.missing("no_such_package") == "no_such_package is not installed"


def test_what_is_broken_says_why(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    (tmp_path / "of_another_torch.py").write_text("raise OSError('undefined symbol: x')")
    assert peers.missing("needs_more") == (
        "needs_more cannot be imported: No module named 'no_such_package'"
    )
    assert peers.missing("of_another_torch") == (
        "of_another_torch cannot be imported: OSError: undefined symbol: x"
    )


def test_results_say_what_they_depend_on(load: object, tmp_path: Path) -> None:
    measuring = importlib.import_module("measuring")
    path = tmp_path / "new" / "results.json"
    measuring.write_results(path, rounds=3)
    results = json.loads(path.read_text())
    assert results["rounds"] == 3
    assert {"date", "machine", "versions"} <= results.keys()
    assert results["machine"]["cpu"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_what_cannot_be_written_leaves_the_file_before(load: object, tmp_path: Path) -> None:
    measuring = importlib.import_module("measuring")
    path = tmp_path / "results.json"
    measuring.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        measuring.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(SystemExit, match=f"{tmp_path.name}.*cannot be written"):
        measuring.write_json(tmp_path, {})
