"""A whole model: putting quantizers in and taking them out, and switches over all of them.

In come a model and a recipe; `prepare` inserts what the recipe says, after a recorded run
(`dataflow`) has shown what each layer really reads. `compensate` rounds weights so that errors make
up for each other, `distillation` compares with a float teacher.
"""

from statqat_lightning.model.compensation import compensate as compensate
from statqat_lightning.model.insertion import prepare as prepare
from statqat_lightning.model.insertion import remove as remove
from statqat_lightning.model.quantized_model import refresh as refresh
from statqat_lightning.model.quantized_model import set_enabled as set_enabled
from statqat_lightning.model.quantized_model import set_observing as set_observing
