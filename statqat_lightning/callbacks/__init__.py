"""Lightning callbacks: they decide when, never how."""

from statqat_lightning.callbacks.distillation import DistillationCallback as DistillationCallback
from statqat_lightning.callbacks.export import ExportCallback as ExportCallback
from statqat_lightning.callbacks.loading import quantized_loading as quantized_loading
from statqat_lightning.callbacks.qat import StatQATCallback as StatQATCallback
from statqat_lightning.callbacks.qat import StatQATWarning as StatQATWarning
from statqat_lightning.callbacks.report import ReportCallback as ReportCallback
from statqat_lightning.callbacks.snr_monitor import SNRMonitor as SNRMonitor
