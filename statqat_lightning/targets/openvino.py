"""OpenVINO.

Source: the low precision transformations and the fusing of the CPU plugin of OpenVINO 2026.4, and
what its compiled graphs show.

- Functions of single values run on the float32 sums of a layer, as do the bias and a residual sum.
  With rounding between a convolution and a sum, a third of the codes of the sum were off.
- What is concatenated stays in integers only with one scale.
- Zero points of inputs cost convolutions a fifth of their time.
- Where several read the float output of a convolution in int8 that has no bias, some get it without
  its scale.
"""

from __future__ import annotations

from statqat_lightning.targets.base import CLIPPING, SMOOTH, Target

TARGET = Target(
    name="openvino",
    title="OpenVINO",
    fused=(*CLIPPING, *SMOOTH),
    sums_in_float=True,
    concatenates_codes=True,
    signed_codes=True,
    needs_biases=True,
)
