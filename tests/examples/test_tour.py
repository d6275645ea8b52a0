"""The notebook of the tour: it is clean, and its cells run one after the other."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.export.fresh import REPOSITORY, run_fresh

NOTEBOOK = REPOSITORY / "examples" / "tour.ipynb"

# As a notebook does: all cells in one namespace; what the last expression of one gives is shown.
RUN = """
import ast, contextlib, io, json, pathlib, sys

names, shown, printed = {"__name__": "__main__"}, [], io.StringIO()
for source in json.loads(sys.argv[1]):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    if value is not None:
        forms = [f for f in ("html", "png") if getattr(value, f"_repr_{f}_", lambda: None)()]
        shown.append([type(value).__name__, forms, str(value)])
found = {"shown": shown, "printed": printed.getvalue()}
pathlib.Path("found.json").write_text(json.dumps(found))
"""


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(kind)]


def test_it_holds_nothing_but_text_and_code() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert len(cells("code")) <= 15
    lines = "\n".join([*sources("markdown"), *sources("code")]).splitlines()
    assert max(map(len, lines)) <= 100


def test_its_code_is_python_without_magics() -> None:
    for source in sources("code"):
        assert ast.parse(source).body


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(sources("markdown")))
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
def test_its_cells_run_in_order() -> None:
    run_fresh(RUN, json.dumps(sources("code")))
    found = json.loads(Path("found.json").read_text())
    assert [(name, forms) for name, forms, _ in found["shown"]] == [
        ("str", []),
        ("FormatTable", ["html"]),
        ("str", []),
        ("InsertionReport", ["html"]),
        ("Figure", ["png"]),
        ("QuantRecipe", ["html"]),
        ("str", []),
        ("ExportReport", ["html"]),
    ]
    texts = [text for name, _, text in found["shown"] if name == "str"]
    percents = [float(text.partition("%")[0]) for text in texts]
    assert min(percents) >= 96
    assert min(percents[1:]) >= percents[0] - 1.5  # 4 bits cost little
    # Files have the accuracy of the module that they were made of.
    files = re.findall(r"from \.\w+: +([\d.]+)%", found["printed"])
    assert [float(percent) for percent in files] == [percents[-1]] * 2
    decibels = dict(re.findall(r"(net\.\S+) +([\d.]+) dB", found["printed"]))
    # The best 16 even steps give a normal density 20.2 dB (J. Max, 1960).
    assert 15 < float(decibels["net.1.0/weight"]) < 25
    assert float(decibels["net.5/weight"]) > 35
    assert {file.name for file in Path("outputs/tour").iterdir()} == {
        *("digits.safetensors", "digits.onnx", "digits.export.json")
    }
