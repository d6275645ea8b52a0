"""Quantization-aware training whose scales come from statistics, as PyTorch Lightning callbacks.

Names and rooms are imported when they are first used, so that whoever only quantizes tensors, loads
a file or asks the command line for help waits neither for Lightning nor for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from statqat_lightning._moved import MOVED, serve_old_names

if TYPE_CHECKING:
    from statqat_lightning.callbacks import DistillationCallback as DistillationCallback
    from statqat_lightning.callbacks import ExportCallback as ExportCallback
    from statqat_lightning.callbacks import ReportCallback as ReportCallback
    from statqat_lightning.callbacks import SNRMonitor as SNRMonitor
    from statqat_lightning.callbacks import StatQATCallback as StatQATCallback
    from statqat_lightning.callbacks import quantized_loading as quantized_loading
    from statqat_lightning.export import freeze as freeze
    from statqat_lightning.export import load_quantized as load_quantized
    from statqat_lightning.formats import get_format as get_format
    from statqat_lightning.formats import list_formats as list_formats
    from statqat_lightning.insight.advising import advise as advise
    from statqat_lightning.insight.allocation import allocate as allocate
    from statqat_lightning.insight.layer_snr import LayerSNR as LayerSNR
    from statqat_lightning.insight.trials import sensitivity as sensitivity
    from statqat_lightning.model import compensate as compensate
    from statqat_lightning.model import prepare as prepare
    from statqat_lightning.model import remove as remove
    from statqat_lightning.numerics import fake_quantize as fake_quantize
    from statqat_lightning.numerics import snr_db as snr_db
    from statqat_lightning.recipes import QuantRecipe as QuantRecipe
    from statqat_lightning.recipes import QuantRule as QuantRule
    from statqat_lightning.recipes import QuantSchedule as QuantSchedule
    from statqat_lightning.recipes import TensorSpec as TensorSpec
    from statqat_lightning.recipes import list_presets as list_presets
    from statqat_lightning.targets import place as place

serve_old_names()

_HOMES = {
    "DistillationCallback": "callbacks",
    "ExportCallback": "callbacks",
    "ReportCallback": "callbacks",
    "SNRMonitor": "callbacks",
    "StatQATCallback": "callbacks",
    "quantized_loading": "callbacks",
    "LayerSNR": "insight.layer_snr",
    "allocate": "insight.allocation",
    "advise": "insight.advising",
    "sensitivity": "insight.trials",
    "compensate": "model",
    "freeze": "export",
    "load_quantized": "export",
    "get_format": "formats",
    "list_formats": "formats",
    "fake_quantize": "numerics",
    "snr_db": "numerics",
    "prepare": "model",
    "remove": "model",
    "place": "targets",
    "QuantRecipe": "recipes",
    "QuantRule": "recipes",
    "TensorSpec": "recipes",
    "QuantSchedule": "recipes",
    "list_presets": "recipes",
}
__all__ = [*_HOMES]
_ROOMS = (
    *("formats", "numerics", "error_analysis", "quantizers", "fake_quant", "layers", "recipes"),
    *("model", "targets", "insight", "export", "callbacks"),
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        globals()[name] = getattr(home, name)
        return globals()[name]
    if name in _ROOMS or name in MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from statqat_lightning.export.files.native import library_version

        return library_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS, "__version__"})
