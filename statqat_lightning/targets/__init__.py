"""Runtimes that quantizers can be placed for: a file each, with its rules and their sources."""

from __future__ import annotations

from statqat_lightning.targets import executorch, onnxruntime, openvino, tensorrt
from statqat_lightning.targets.base import CLIPPING as CLIPPING
from statqat_lightning.targets.base import LARGEST as LARGEST
from statqat_lightning.targets.base import Target as Target

TARGETS = {
    module.TARGET.name: module.TARGET for module in (onnxruntime, openvino, tensorrt, executorch)
}
"""All of them, by name."""

AUTO = "auto"
"""In place of a target: that of the files which the training is to end with."""


def check_target(target: str | None) -> str | None:
    """The name of a target as it is.

    Raises:
        ValueError: If there is no such target.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: got {target!r}; expected None or one of {', '.join(TARGETS)}.")
    return target
