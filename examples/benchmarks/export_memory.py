"""Memory and time of an export of a large model, file by file (Linux).

Peaks are those of the whole process: the float model, libraries and all. The model has random
weights, scales from min-max, and inputs that one batch has calibrated.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from pathlib import Path

import torch
import torchvision

from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.files.registry import FILE_TYPES
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.recipes.recipe import TensorSpec

FILES = tuple(each.name for each in FILE_TYPES)


def memory(entry: str) -> float:
    """Gigabytes of the process now (`VmRSS`) or at most since `forget_peak` (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"no {entry} in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def quantized(name: str, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    for parameter in model.parameters():  # a head of zeros would leave nothing to compare
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, size, size)
    prepare(model, TensorSpec("int8", quantizer="minmax"), "int8")
    set_observing(model, True)
    with torch.no_grad():
        model(images)
    set_observing(model, False)
    refresh(model, search=True)
    return model, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="vit_l_16", help="of torchvision.models")
    parser.add_argument("--size", type=int, default=224, help="of images")
    parser.add_argument("--files", nargs="+", choices=FILES, default=["native", "onnx"])
    parser.add_argument("--target", default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, images = quantized(args.network, args.size)
    size = sum(4 * p.numel() for p in model.parameters()) / 1e9
    ctypes.CDLL(None).malloc_trim(0)
    print(f"{args.network}: {size:.2f} GB in float; process {memory('VmRSS'):.2f} GB")
    print(f"{'step':20} {'seconds':>7} {'peak, GB':>8} {'of float':>8}")
    steps: list[tuple[str, float]] = []

    def progress(what: str, done: int, total: int) -> None:
        if steps:
            before, start = steps[-1]
            peak = memory("VmHWM")
            print(f"{before:20} {time.time() - start:7.1f} {peak:8.2f} {peak / size:8.2f}")
        steps.append((what, time.time()))
        forget_peak()

    with tempfile.TemporaryDirectory() as folder:
        report = export_model(
            model,
            Path(folder, "model"),
            images,
            files=args.files,
            strict=False,
            target=args.target,
            progress=progress,
        )
    print(report)


if __name__ == "__main__":
    main()
