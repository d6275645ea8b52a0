"""Quantization-aware training whose scales come from statistics, as PyTorch Lightning callbacks."""

from statqat_lightning.callbacks import DistillationCallback as DistillationCallback
from statqat_lightning.callbacks import ExportCallback as ExportCallback
from statqat_lightning.callbacks import SNRMonitor as SNRMonitor
from statqat_lightning.callbacks import StatQATCallback as StatQATCallback
from statqat_lightning.callbacks import quantized_loading as quantized_loading
from statqat_lightning.compensation import compensate as compensate
from statqat_lightning.export import freeze as freeze
from statqat_lightning.export import load_quantized as load_quantized
from statqat_lightning.formats import get_format as get_format
from statqat_lightning.functional import fake_quantize as fake_quantize
from statqat_lightning.functional import snr_db as snr_db
from statqat_lightning.insertion import prepare as prepare
from statqat_lightning.insertion import remove as remove
from statqat_lightning.placement import place as place
from statqat_lightning.recipe import QuantRecipe as QuantRecipe
from statqat_lightning.recipe import QuantRule as QuantRule
from statqat_lightning.recipe import TensorSpec as TensorSpec
from statqat_lightning.schedule import QuantSchedule as QuantSchedule
