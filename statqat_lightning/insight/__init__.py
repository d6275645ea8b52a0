"""What is known of a quantized model: the SNR of its tensors, and what a recipe would make of it.

In comes a model with quantizers, whose statistics are there anyway; out come figures in dB by
tensor, summaries and plots. `plan_recipe` takes a float model, for what a recipe would do to it.
"""

from statqat_lightning.insight.plan import compare_recipes as compare_recipes
from statqat_lightning.insight.plan import plan_recipe as plan_recipe
