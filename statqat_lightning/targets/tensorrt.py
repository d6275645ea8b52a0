"""TensorRT.

Source: "Working with quantized types" in the documentation of TensorRT 10 (explicit quantization).
What a file has to keep to, by the source of onnx-tensorrt 10.1, is in `export.tensorrt_rules`.

- Codes are symmetric int8, those of inputs, too.
- Inputs of products are rounded, and the other term of a sum, but nothing between a convolution and
  what is computed with it.
- What is concatenated has one scale.
"""

from __future__ import annotations

from statqat_lightning.targets.base import CLIPPING, SMOOTH, Target

TARGET = Target(
    name="tensorrt",
    title="TensorRT",
    fused=(*CLIPPING, *SMOOTH),
    sums_in_float=True,
    concatenates_codes=True,
    unsigned_codes=False,
    zero_points=False,
    signed_codes=True,
)
