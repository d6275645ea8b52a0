"""Where modules were before: old imports go on working, and so do pickles, which name them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "granularity": "numerics.granularity",
    "functional": "numerics",
    "tensor_spec": "fake_quant.tensor_spec",
    "fake_quantizer": "fake_quant",
    "observers": "fake_quant.observers",
    "input_moments": "fake_quant.input_moments",
    "scale_refresh": "fake_quant.scale_refresh",
    "layer_kinds": "layers.layer_kinds",
    "quantized_layer": "layers.quantized_layer",
    "attention": "layers.attention",
    "fast_paths": "layers.fast_paths",
    "recompute": "layers.recompute",
    "module_hooks": "layers.module_hooks",
    "module_names": "layers.module_names",
    "function_results": "layers.function_results",
    "weight_views": "layers.weight_views",
    "batch_norm": "layers.batch_norm",
    "recipe": "recipes.recipe",
    "schedule": "recipes.schedule",
    "quantized_model": "model.quantized_model",
    "isolated_copy": "model.isolated_copy",
    "insertion": "model.insertion",
    "insertion_report": "model.insertion_report",
    "dataflow": "model.dataflow",
    "weight_reads": "model.weight_reads",
    "compensation": "model.compensation",
    "distillation": "model.distillation",
    "placement": "targets.placement",
    "integer_kernels": "targets.integer_kernels",
    "ties": "targets.rounding_ties",
    "biases": "targets.biases",
    "report": "insight.snr",
    "plots": "insight.plots",
    "error_analysis.samples": "error_analysis.empirical",
    "export.frozen": "export.freezing.frozen",
    "export.light_copy": "export.freezing.light_copy",
    "export.folding": "export.freezing.folding",
    "export.plain": "export.freezing.dequantized",
    "export.stale": "export.freezing.stale_scales",
    "export.native": "export.files.native",
    "export.packing": "export.files.packing",
    "export.loading": "export.files.loading",
    "export.onnx": "export.files.onnx",
    "export.onnx_files": "export.files.onnx_files",
    "export.onnx_graph": "export.files.onnx_graph",
    "export.operators": "export.files.onnx_operators",
    "export.program": "export.files.program",
    "export.executorch": "export.files.executorch",
    "export.torchao": "export.files.torchao",
    "export.compressed_tensors": "export.files.compressed_tensors",
    "export.tracing": "export.files.tracing",
    "export.kinds": "export.files.registry",
    "export.inputs": "export.calls.forward_call",
    "export.interface": "export.calls.dimensions",
    "export.verify": "export.proof.verify",
    "export.divergence": "export.proof.divergence",
    "export.runtimes": "export.proof.runtimes",
    "export.openvino_runtime": "export.proof.openvino_runtime",
    "export.tensorrt_rules": "export.proof.tensorrt_rules",
    "export.latency": "export.proof.latency",
    "export.evaluation": "export.proof.evaluation",
    "export.writers": "export.proof.writers",
}
"""New names of modules by their old ones, below the package."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module of today under its name of before, one and the same object."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"{spec.name} has moved to {new}. Public names are best imported from {PACKAGE}.",
            DeprecationWarning,
            stacklevel=2,
        )
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._specs[module.__name__]  # not that of the old name


def serve_old_names() -> None:
    """Let imports find modules under the names that they had before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
