"""ONNX Runtime.

Source: the QDQ selectors of ONNX Runtime 1.32 (`qdq_selectors.cc`) and its documentation.

- `QLinearConv` takes a Relu or Clip in that the rounding behind it does anyway; a convolution runs
  in integers only if its output is rounded.
- Biases of convolutions are int32, in units of input scale times weight scale.
- A convolution in groups takes 2 to 10 times as long as in float where groups have 1, 2 or 4
  channels, and less than that from 8 on (measured on x86). With one channel in and out there is a
  kernel of its own.
- Sigmoid and Mul have kernels for codes, SiLU has none: it is rounded between the two.
"""

from __future__ import annotations

from statqat_lightning.targets.base import CLIPPING, Target

TARGET = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    fused=CLIPPING,
    rounds_outputs=True,
    adds_codes=True,
    splits_gates=True,
    least_group=8,
)
