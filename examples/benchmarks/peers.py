"""Packages that the benchmarks compare with: whether they can be used here, and which they are."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings

INSTALL = {
    "brevitas": 'pip install "statqat-lightning[bench]"',
    "modelopt": "pip install nvidia-modelopt",
    "quant_mp": "a clone of pi314ever/quant_mp, its src on PYTHONPATH; pip install loguru",
    "torchao": 'pip install "statqat-lightning[bench]"',
}
"""How to get them; torch.ao is a part of torch, for as long as it is."""

DISTRIBUTIONS = (
    *("torch", "lightning", "torchvision", "statqat-lightning", "brevitas", "torchao"),
    *("nvidia-modelopt", "quant_mp", "onnxruntime"),
)


def missing(package: str) -> str | None:
    """Why a package cannot be used here, in one line; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            how = f": {INSTALL[package]}" if package in INSTALL else ""
            return f"{package} is not installed{how}"
        return f"{package} cannot be imported: {error}"
    except Exception as error:  # what was built for another torch fails in many ways
        reason = str(error).strip().splitlines() or [""]
        return f"{package} cannot be imported: {type(error).__name__}: {reason[0][:90]}"
    return None


def versions() -> dict[str, str | None]:
    """Versions of all of them, None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
