"""Which layer gets what, and when: rules by layer name or type, presets, YAML, and schedules.

In come names of layers; out comes the specification of each of their tensors. Nothing here touches
a model.
"""

from statqat_lightning.fake_quant.tensor_spec import TensorSpec as TensorSpec
from statqat_lightning.recipes.presets import list_presets as list_presets
from statqat_lightning.recipes.recipe import QuantRecipe as QuantRecipe
from statqat_lightning.recipes.rule import QuantRule as QuantRule
from statqat_lightning.recipes.schedule import QuantSchedule as QuantSchedule
