"""What a runtime needs, a file of rules each with its sources, and how a model is made to fit.

In come a float model, a recipe and a run; `place` gives the recipe with quantizers where the
runtime's integer kernels need them. `settle` moves scales and biases of a trained model to where
the runtime computes the same codes.
"""

from statqat_lightning.targets.base import Placement as Placement
from statqat_lightning.targets.base import Target as Target
from statqat_lightning.targets.placement import place as place
from statqat_lightning.targets.registry import AUTO as AUTO
from statqat_lightning.targets.registry import TARGETS as TARGETS
from statqat_lightning.targets.registry import check_target as check_target
from statqat_lightning.targets.settling import settle as settle
