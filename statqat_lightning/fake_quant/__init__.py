"""One tensor of one layer in training: its specification, fake quantizer, observer and scale.

In come the tensors of each forward; fake quantizers round them with the scale in force, and
observers add up statistics of a sample. `scale_refresh` turns these into new scales at batch end,
for all layers at once.
"""

from statqat_lightning.fake_quant.activation import (
    ActivationFakeQuantizer as ActivationFakeQuantizer,
)
from statqat_lightning.fake_quant.fake_quantizer import INPUT as INPUT
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT as OUTPUT
from statqat_lightning.fake_quant.fake_quantizer import WEIGHT as WEIGHT
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer as FakeQuantizer
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer as WeightFakeQuantizer
