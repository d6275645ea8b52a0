"""The command line that the README shows, run as a user runs it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.export.fresh import REPOSITORY, run_fresh

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
callbacks = [qat, ExportCallback("exported/model", onnx=False)]
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
    source = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    module = source[source.index("class Classifier") : source.index("def callbacks")]
    imports = "import lightning as L\nimport torch\nfrom torch import nn\n\n\n"
    Path("classifier.py").write_text(imports + module)
    run_fresh(TRAIN)
    run_fresh(COMMANDS, json.dumps([command[1:] for command in commands]))
    report = json.loads(Path("exported/all.export.json").read_text())
    for kind in ("onnx", "program", "compressed"):
        assert report[kind]["agreement"] == 1
    module = torch.export.load("exported/all.pt2").module()
    assert module(torch.randn(3, 16)).shape == (3, 4)
