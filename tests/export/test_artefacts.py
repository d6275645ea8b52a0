from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from statqat_lightning.export import export_model
from statqat_lightning.model.insertion import prepare


@pytest.mark.parametrize(
    ("given", "stem"),
    [
        ("model", "model"),
        ("model.onnx", "model"),
        ("model.safetensors", "model"),
        ("run_0.1", "run_0.1"),
        ("run_0.2.onnx", "run_0.2"),
    ],
)
def test_only_the_endings_of_the_files_are_replaced(given: str, stem: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    prepare(model, "int4", None)
    report = export_model(model, f"exported/{given}", torch.randn(2, 4))
    assert (report.onnx_path, report.native_path) == (
        f"exported/{stem}.onnx",
        f"exported/{stem}.safetensors",
    )
    assert {path.name for path in Path("exported").iterdir()} == {
        f"{stem}.onnx",
        f"{stem}.safetensors",
        f"{stem}.export.json",
    }
