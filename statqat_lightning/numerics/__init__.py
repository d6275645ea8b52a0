"""Arithmetic on tensors: which elements share a scale, rounding to a grid and back, gradients, SNR.

In come tensors, a scale and a format; out come codes, or values on the grid with a gradient for
training. Functions only: no module, file or logger.
"""

from statqat_lightning.numerics.granularity import get_granularity as get_granularity
from statqat_lightning.numerics.learned import learned_fake_quantize as learned_fake_quantize
from statqat_lightning.numerics.qparams import QParams as QParams
from statqat_lightning.numerics.qparams import dequantize as dequantize
from statqat_lightning.numerics.qparams import quantize as quantize
from statqat_lightning.numerics.snr import snr_db as snr_db
from statqat_lightning.numerics.straight_through import GRADIENTS as GRADIENTS
from statqat_lightning.numerics.straight_through import fake_quantize as fake_quantize
