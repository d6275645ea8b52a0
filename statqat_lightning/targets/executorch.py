"""ExecuTorch with XNNPACK.

Source: the partitioner of XNNPACK's backend in ExecuTorch 1.5 (`partition/config/`).

- A layer runs in integers only if its input and its output are int8, and sums, products and
  concatenations likewise.
- What it concatenates has one scale and zero point, which the result keeps.
- Biases are int32, in units of input scale times weight scale.
"""

from __future__ import annotations

from statqat_lightning.targets.base import CLIPPING, Target

TARGET = Target(
    name="executorch",
    title="ExecuTorch",
    fused=CLIPPING,
    rounds_outputs=True,
    rounds_all=True,
    adds_codes=True,
    concatenates_codes=True,
)
