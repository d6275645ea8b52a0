"""README and documentation: their code and commands run, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import statqat_lightning
from statqat_lightning import QuantRecipe, list_presets, prepare
from statqat_lightning.cli import main
from statqat_lightning.model.quantized_model import quantized_layers
from tests.export.fresh import REPOSITORY, run_fresh

DOCS = REPOSITORY / "docs"
FOLDERS = (REPOSITORY, DOCS, DOCS / "api", DOCS / "evidence")
PAGES = sorted(path for folder in FOLDERS for path in folder.glob("*.md"))
TABLES = {"compatibility.md"}
"""Pages that consist of wide tables."""

TRAIN = """
import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from statqat_lightning import ExportCallback, StatQATCallback
from classifier import Classifier

x = torch.randn(256, 16)
loader = DataLoader(TensorDataset(x, (x @ torch.randn(16, 4)).argmax(1)), batch_size=64)
qat = StatQATCallback(weights="int4", activations="int4")
callbacks = [qat, ExportCallback("exported/model", files=("native",))]
trainer = L.Trainer(max_epochs=1, callbacks=callbacks, logger=False, enable_progress_bar=False)
trainer.fit(Classifier(), loader)
trainer.save_checkpoint("qat.ckpt")
"""

COMMANDS = """
import json, sys
from statqat_lightning.cli import main

for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
"""
GUIDES = [
    page
    for page in PAGES
    if page.parent == DOCS and page.name not in TABLES and "```python" in page.read_text()
]


@pytest.mark.slow
def test_commands_of_the_readme_run() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    section = readme.partition("## Export\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = block.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines]
    assert {tuple(command[:2]) for command in commands} == {
        ("statqat", name) for name in ("export", "inspect", "compare")
    }
    write_classifier()
    run_fresh(TRAIN)
    run_fresh(COMMANDS, json.dumps([command[1:] for command in commands]))
    report = json.loads(Path("exported/all.export.json").read_text())
    for kind in ("onnx", "program", "compressed"):
        assert report[kind]["agreement"] == 1
    module = torch.export.load("exported/all.pt2").module()
    assert module(torch.randn(3, 16)).shape == (3, 4)


def write_classifier() -> None:
    """The module of the README, for commands."""
    readme = (REPOSITORY / "README.md").read_text()
    source = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    module = source[source.index("class Classifier") : source.index("def callbacks")]
    imports = "import lightning as L\nimport torch\nfrom torch import nn\n\n\n"
    Path("classifier.py").write_text(imports + module)


def test_commands_and_files_of_the_page_on_recipes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "recipes.md").read_text()
    write_classifier()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Path("recipe.yaml").write_text(recipe)
    (commands, shown) = re.findall(r"```sh\n(.*?)```\n```text\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.syspath_prepend(Path.cwd())
    codes = [main(shlex.split(command)[1:]) for command in commands.splitlines()]
    sys.modules.pop("classifier")
    assert codes == [0, 1]
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_commands_of_the_page_on_the_advisor() -> None:
    page = (DOCS / "advisor.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    inline = [text.replace("\n", " ") for text in re.findall(r"`(statqat\s[^`]+)`", page)]
    commands = [shlex.split(line) for line in (*blocks.splitlines(), *inline)]
    names = [command[1] for command in commands]
    assert names == ["advise", "advise", "sensitivity"]
    write_classifier()
    run_fresh(TRAIN + "\ntorch.save((x, torch.randint(0, 4, (256,))), 'batch.pt')")
    run_fresh(COMMANDS, json.dumps([command[1:] for command in commands]))
    assert json.loads(Path("advice.json").read_text())["tensors"]
    assert QuantRecipe.from_yaml("recipe.yaml").rules


def test_the_page_on_recipes_has_every_preset() -> None:
    page = (DOCS / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `?(\w+)`? \| (.+) \|$", page, re.MULTILINE)
    found = [(*row[:3], re.sub(r"\[(\w+)\]\(.*?\)", r"\1", row[3])) for row in rows]
    assert found == [
        (row.name, row.weights, row.activations or "float", row.about) for row in list_presets()
    ]


def python_of(page: Path) -> str:
    """The Python code of a page, which trains on less and logs nothing."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    for shown, quick in (("L.Trainer(", "L.Trainer(logger=False, "), ("4096", "512")):
        code = code.replace(shown, quick if "logger=" not in code else shown)
    return code


def run_readme() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(python_of(REPOSITORY / "README.md"), names)
    return names


def test_python_code_of_the_readme_runs() -> None:
    names = run_readme()
    assert Path("exported/model.onnx").exists()
    # The two files that the reader loads last hold the same model.
    with torch.no_grad():
        expected = names["model"](names["x"][:8]).numpy()
    assert abs(names["logits"] - expected).max() < 0.1 * abs(expected).max()
    # The recipe is for the module of the first block.
    prepare(module := names["Classifier"](), recipe=names["recipe"])
    assert {layer.name for layer in quantized_layers(module)} == {"body.0", "body.2"}


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_python_code_of_a_page_continues_that_of_the_readme(page: Path) -> None:
    exec(python_of(page), run_readme())


def anchors_of(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub and mkdocs turn them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert found.is_relative_to(REPOSITORY), target
        if anchor:
            assert anchor in anchors_of(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_at_most_100_columns(page: Path) -> None:
    lines = page.read_text().splitlines()
    is_exempt = page.name in TABLES
    assert not [line for line in lines if len(line) > 100 and not (is_exempt and line[0] == "|")]


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 140


def documented() -> dict[str, str]:
    """Names in the API reference, and where they are defined."""
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len({*paths}) == len(paths)
    return {path.rpartition(".")[2]: path for path in paths}


def test_the_reference_names_what_exists() -> None:
    for name, path in documented().items():
        home = importlib.import_module(path.rpartition(".")[0])
        assert getattr(home, name).__module__ == home.__name__


@pytest.mark.parametrize("room", ["", "export"])
def test_every_public_name_is_in_the_reference(room: str) -> None:
    home = importlib.import_module(f"statqat_lightning.{room}".rstrip("."))
    tree = ast.parse(Path(home.__file__ or "").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.asname for node in imports for alias in node.names if alias.asname}
    assert names
    assert names <= documented().keys()
    for name in names:
        path = documented()[name]
        assert getattr(home, name) is getattr(
            importlib.import_module(path.rpartition(".")[0]), name
        )


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    listed = {*re.findall(r"[\w/]+\.md", json.dumps(config["nav"]))}
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == statqat_lightning.__version__
