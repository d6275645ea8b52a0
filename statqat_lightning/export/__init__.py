"""Frozen models, the files they are written to, and the proof that those files are right."""

from statqat_lightning.export.artefacts import export_model as export_model
from statqat_lightning.export.checkpoints import export_checkpoint as export_checkpoint
from statqat_lightning.export.compressed_tensors import load_compressed as load_compressed
from statqat_lightning.export.compressed_tensors import save_compressed as save_compressed
from statqat_lightning.export.executorch import save_executorch as save_executorch
from statqat_lightning.export.frozen import FrozenLayer as FrozenLayer
from statqat_lightning.export.frozen import LeftInFloatWarning as LeftInFloatWarning
from statqat_lightning.export.frozen import freeze as freeze
from statqat_lightning.export.inspection import compare_files as compare_files
from statqat_lightning.export.inspection import inspect_file as inspect_file
from statqat_lightning.export.loading import load_checkpoint as load_checkpoint
from statqat_lightning.export.loading import load_quantized as load_quantized
from statqat_lightning.export.native import save_native as save_native
from statqat_lightning.export.onnx import ONNXExportError as ONNXExportError
from statqat_lightning.export.onnx import save_onnx as save_onnx
from statqat_lightning.export.program import save_program as save_program
from statqat_lightning.export.torchao import load_torchao as load_torchao
from statqat_lightning.export.torchao import save_torchao as save_torchao
from statqat_lightning.export.torchao import to_torchao as to_torchao
from statqat_lightning.export.tracing import ExportError as ExportError
from statqat_lightning.export.verify import ArtefactReport as ArtefactReport
from statqat_lightning.export.verify import ExportDifferenceError as ExportDifferenceError
from statqat_lightning.export.verify import ExportReport as ExportReport
