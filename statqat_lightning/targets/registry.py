"""All targets, by name."""

from __future__ import annotations

from statqat_lightning._words import did_you_mean
from statqat_lightning.targets import executorch, onnxruntime, openvino, tensorrt

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
        raise ValueError(
            f"target: got {target!r}; expected None or one of {', '.join(TARGETS)}."
            f"{did_you_mean(target, TARGETS)}"
        )
    return target
