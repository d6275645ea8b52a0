"""Quantization-aware training without an edit: `STATQAT_CONFIG=qat.yaml python train.py`.

Lightning asks this entry point of every installed package for callbacks when a Trainer is made.
"""

from __future__ import annotations

import inspect
import os
import weakref
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from statqat_lightning._words import did_you_mean, short
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.input_warnings import StatQATWarning
from statqat_lightning.callbacks.loading import install
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.callbacks.snr_monitor import SNRMonitor
from statqat_lightning.recipes.reading import named_in
from statqat_lightning.recipes.yaml_file import YamlFile, read_yaml

VARIABLE = "STATQAT_CONFIG"


def callbacks_from_environment() -> list[Callback]:
    """The callbacks that the file named by `STATQAT_CONFIG` describes; none if it is not set.

    The file is YAML. Its entries are the arguments of `StatQATCallback`, and two more:
    `snr_monitor` (true or false, default true) adds an `SNRMonitor`, `export` (a path) an
    `ExportCallback`.

    From then on, `load_from_checkpoint` restores quantizers, see `quantized_loading`.

    A Trainer whose callbacks include a `StatQATCallback` already is left as it is, with a warning.
    Lightning puts what this returns into the very list that a script gave to the Trainer; where
    that list is given to the next Trainer, too, the callbacks of the earlier one leave it.

    Example of a file:
        preset: w4a8
        schedule: {activations_at: 1 epoch}
        export: exported/model.onnx

    Raises:
        ValueError: If the file cannot be read, or holds an entry that is unknown or wrong; the
            message names the file.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        return []
    file = _read(Path(path))
    entries = dict(file.data or {})
    given = _callbacks_given()
    _drop(given)
    if any(isinstance(callback, StatQATCallback) for callback in given):
        rank_zero_warn(
            f"{VARIABLE}: {path} is not used: this Trainer has a StatQATCallback of its own.",
            category=StatQATWarning,
        )
        return []
    monitored, exported = entries.pop("snr_monitor", True), entries.pop("export", None)
    known = [*inspect.signature(StatQATCallback).parameters, "snr_monitor", "export"]
    if unknown := [name for name in entries if name not in known]:
        hint = did_you_mean(unknown[0], known, most=2)
        raise ValueError(
            f"{VARIABLE}: {file.at(unknown[0])}got unknown entries {short(unknown)}.{hint} Known: "
            f"{', '.join(known)}."
        )
    if not isinstance(monitored, bool):
        raise ValueError(
            f"{VARIABLE}: {file.at('snr_monitor')}got snr_monitor={short(monitored)}; expected "
            "true or false."
        )
    try:
        callbacks: list[Callback] = [StatQATCallback(**entries)]
        if exported is not None:
            callbacks.append(ExportCallback(exported))
    except (TypeError, ValueError) as error:
        keys = named_in(error, entries)
        where = file.at(*keys) if keys else f"{path}: "
        raise ValueError(f"{VARIABLE}: {where}{error}") from error
    if monitored and not any(isinstance(callback, SNRMonitor) for callback in given):
        callbacks.append(SNRMonitor())
    _made.update(callbacks)
    install()  # the script does not know that its checkpoints hold quantizers
    return callbacks


# All that were made here and still exist, to tell them from those that a script made.
_made: weakref.WeakSet[Callback] = weakref.WeakSet()


def _callbacks_given() -> list[Callback]:
    """The list that Lightning will extend, which it shows to no entry point.

    It is found in the frames of the calls that led here; elsewhere there is none, and it is empty.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "on_trainer_init":
            trainer = getattr(frame.f_locals.get("self"), "trainer", None)
            callbacks = getattr(trainer, "callbacks", None)
            return callbacks if isinstance(callbacks, list) else []
        frame = frame.f_back
    return []


def _drop(callbacks: list[Callback]) -> None:
    """Take out of a list, in place, what an earlier call has made."""
    callbacks[:] = [callback for callback in callbacks if callback not in _made]


def _read(path: Path) -> YamlFile:
    try:
        file = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE}: {path} cannot be read ({error}). Expected the path of a YAML file, "
            "relative to the directory the training is started in, or an empty value."
        ) from error
    if file.data is not None and not isinstance(file.data, dict):
        raise ValueError(
            f"{VARIABLE}: {file.at()}got a {type(file.data).__name__}; expected entries such as "
            "`weights: int4`."
        )
    return file
