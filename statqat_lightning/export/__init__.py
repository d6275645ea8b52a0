"""Frozen models, the files they are written to, and the proof that those files are right."""

from statqat_lightning.export.artefacts import export_model as export_model
from statqat_lightning.export.checkpoints import export_checkpoint as export_checkpoint
from statqat_lightning.export.file_advice import file_advice as file_advice
from statqat_lightning.export.file_comparison import compare_files as compare_files
from statqat_lightning.export.file_report import file_report as file_report
from statqat_lightning.export.files.compressed_tensors import load_compressed as load_compressed
from statqat_lightning.export.files.compressed_tensors import save_compressed as save_compressed
from statqat_lightning.export.files.executorch import save_executorch as save_executorch
from statqat_lightning.export.files.loading import load_checkpoint as load_checkpoint
from statqat_lightning.export.files.loading import load_quantized as load_quantized
from statqat_lightning.export.files.native import save_native as save_native
from statqat_lightning.export.files.onnx import ONNXExportError as ONNXExportError
from statqat_lightning.export.files.onnx import save_onnx as save_onnx
from statqat_lightning.export.files.program import save_program as save_program
from statqat_lightning.export.files.torchao import load_torchao as load_torchao
from statqat_lightning.export.files.torchao import save_torchao as save_torchao
from statqat_lightning.export.files.torchao import to_torchao as to_torchao
from statqat_lightning.export.files.tracing import ExportError as ExportError
from statqat_lightning.export.freezing.frozen import LeftInFloatWarning as LeftInFloatWarning
from statqat_lightning.export.freezing.frozen import freeze as freeze
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer as FrozenLayer
from statqat_lightning.export.inspection import inspect_file as inspect_file
from statqat_lightning.export.proof.report import ArtefactReport as ArtefactReport
from statqat_lightning.export.proof.report import ExportReport as ExportReport
from statqat_lightning.export.proof.verify import ExportDifferenceError as ExportDifferenceError
