"""`ExportCallback`: decides when a trained model is written to files, and from what input.

One class makes the file long: a third of it is what its arguments mean, and its hooks share the
state of a run.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from statqat_lightning._words import did_you_mean
from statqat_lightning.callbacks.captured_calls import CapturedCalls, call_in_inference
from statqat_lightning.callbacks.evaluation_data import EvaluationData, evaluation_batches
from statqat_lightning.callbacks.export_progress import export_progress
from statqat_lightning.callbacks.input_warnings import ExportWarning
from statqat_lightning.callbacks.lightning_names import is_a, overrides
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.loading import load_checkpoint
from statqat_lightning.export.files.on_disk import check_writable
from statqat_lightning.export.files.registry import (
    ENDINGS,
    REPORT_ENDING,
    FileName,
    wanted,
    with_ending,
)
from statqat_lightning.export.foresight import (
    complex_parameters,
    refuse_uncopyable,
    tied_in_two_formats,
)
from statqat_lightning.export.freezing.frozen import refuse_weights_from_hooks
from statqat_lightning.export.freezing.stale_scales import remember_weights
from statqat_lightning.export.proof.report import ExportReport
from statqat_lightning.export.wording import first_lines, in_short, some
from statqat_lightning.model.isolated_copy import isolated_copy
from statqat_lightning.model.quantized_model import activation_quantizers, quantized_layers
from statqat_lightning.recipes.recipe import QuantRecipe

# ONNX Runtime's integer kernels flip a last bit now and then; less agreement is worth a warning.
_EXPECTED_AGREEMENT = 0.98


class ExportCallback(Callback):
    """Write the trained model to files that other programs run, and prove each of them.

    It works at the end of the fit, on a copy, on rank zero; the module stays as it was trained.
    Each file is read back, run by what will run it, and compared with the fake-quantized model
    before it takes its name: largest difference, SNR, agreement of predictions, accuracy on the
    validation set if inputs and class labels can be told in its batches, size, and speed against
    the float model. This goes to the console, to the loggers (`export/{kind}/...`) and in full into
    a file `.export.json` beside the others. A bar shows how far it is where it takes more than five
    seconds.

    Nothing that goes wrong with one file costs another one, or the report. What can be known ahead
    is said before training: a place that cannot be written, a module that cannot be copied, weights
    that no file can hold.

    The native file holds the whole LightningModule. All others hold what ran in the first step of
    validation, the sanity check included, or without any in the first training step: the
    LightningModule if the step calls `self(...)`, or else the outermost submodule that ran and has
    the most quantized layers, for example `self.net` in `self.net(x)`. Labels that the forward can
    do without are left out.

    With `fast_dev_run`, the files go to a folder `fast_dev_run` beside the others, so that a trial
    never replaces a trained model, and are not timed. Without any training step, inputs have no
    statistics, and nothing is written.

    Examples:
        >>> callback = ExportCallback("exported/model.onnx")

    Args:
        path: Where the files go; `exported/model.onnx` stands for `exported/model.safetensors`,
            too, and so does `exported/model`. A number after a dot belongs to the name:
            `run_0.1` becomes `run_0.1.onnx`.
        best: Export the best checkpoint of the Trainer's `ModelCheckpoint` instead of the last
            weights.
        example_input: Input of one forward call: a tensor, a tuple of positional or a mapping of
            keyword arguments. None takes `example_input_array`, or else what the first step of
            validation or training gave.
        module: Name of the submodule that goes into all files but the native one; None for what
            ran, see above.
        files: Which files to write, by name; None for `("native", "onnx")`.

            - `native`: `.safetensors`, which `load_quantized` reads;
            - `onnx`: `.onnx` for ONNX Runtime, OpenVINO and TensorRT, with the extra `onnx`;
            - `pt2`: `.pt2`, which `torch.export.load` reads;
            - `pte`: `.pte` for ExecuTorch, for batches of one, with the extra `executorch`;
            - `torchao`: `.torchao.pt`, integer weights of Linear layers as torchao tensors, with
              the extra `torchao`;
            - `compressed-tensors`: a folder `.compressed` for language-model runtimes, integer
              weights of Linear layers.
        onnx: Deprecated, for `files`.
        native: Deprecated, for `files`.
        program: Deprecated, for `files`.
        executorch: Deprecated, for `files`.
        torchao: Deprecated, for `files`.
        compressed: Deprecated, for `files`.
        strict: Whether a file that differs from the trained model is refused, and whatever went
            wrong raised when all others have been written; False keeps it, warns, and never ends a
            training with an error. See `export_model`.
        test_examples: Most examples of the validation or test set to predict, by each file; None
            for all, 0 for none.
        measure_latency: Whether to time the files against the float model, in half a second each.
        data: Which set the examples are of, `"validation"` or `"test"`; that one calls
            `setup("test")` of a data module.
        dynamic: Which dimensions beside the batch `.onnx` and `.pt2` files leave open, see
            `export_model`: `{"x": {2: "height", 3: "width"}}`, or a second example.

    Attributes:
        file_types: The types of files to write, see `registry`.
        report: Paths, sizes and differences of the last export, None before.

    Raises:
        ValueError: If no file is asked for, the path names a folder or has another ending, or there
            is no such `data`; when training starts, if there is no such `module`, a forward hook
            makes a weight, the module cannot be copied, or, if `strict`, the native file cannot
            hold it, because layers share a weight in two formats.
        OSError: When training starts, if a file cannot be written; at the end, if it could not be
            after all, and `strict`.
        ExportDifferenceError: At the end, if a file differs and `strict`; it names the first layer
            that does.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        best: bool = False,
        example_input: Any = None,
        module: str | None = None,
        files: Collection[FileName] | None = None,
        onnx: bool | None = None,
        native: bool | None = None,
        program: bool | None = None,
        executorch: bool | None = None,
        torchao: bool | None = None,
        compressed: bool | None = None,
        strict: bool = True,
        test_examples: int | None = 1000,
        measure_latency: bool = True,
        data: EvaluationData = "validation",
        dynamic: Any = None,
    ) -> None:
        self.file_types = wanted(
            *("ExportCallback", files),
            native=native,
            onnx=onnx,
            program=program,
            executorch=executorch,
            torchao=torchao,
            compressed=compressed,
        )
        if data not in (sets := get_args(EvaluationData)):
            raise ValueError(
                f"ExportCallback: got data={data!r}; expected {' or '.join(map(repr, sets))}."
                f"{did_you_mean(data, sets)}"
            )
        self.path = _checked(path)
        self.best = best
        self.example_input = example_input
        self.module = module
        self.strict = strict
        self.test_examples = test_examples
        self.measure_latency = measure_latency
        self.data = data
        self.dynamic = dynamic
        self.report: ExportReport | None = None
        self._fitting = False
        self._in_training: CapturedCalls | None = None
        self._in_evaluation: CapturedCalls | None = None

    @property
    def files(self) -> tuple[FileName, ...]:
        """Names of the files to write."""
        return tuple(each.name for each in self.file_types)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit" and trainer.is_global_zero
        if not self._fitting:
            return
        self.report = None
        self._in_training = self._in_evaluation = None
        endings = [*(each.ending for each in self.file_types if not each.files), REPORT_ENDING]
        check_writable(*(with_ending(self._target(trainer), ending) for ending in endings))
        for each in self.file_types:
            each.require()
        if self.best and trainer.checkpoint_callback is None and not _is_trial(trainer):
            raise ValueError(
                "ExportCallback: got best=True, but the Trainer has no ModelCheckpoint. Add one "
                "with a monitor, or leave best out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now there are quantizers: StatQATCallback inserts them after `setup`.
        self._check_module(pl_module)
        if reason := _why_never(trainer, pl_module):
            rank_zero_warn(
                f"ExportCallback: nothing will be written: {reason}", category=ExportWarning
            )
        else:
            refuse_weights_from_hooks(pl_module)
            refuse_uncopyable(pl_module)
            self._check_weights(pl_module)

    def _check_weights(self, pl_module: LightningModule) -> None:
        """Say what is known now of weights that files cannot hold at the end."""
        if "native" in self.files and (tied := tied_in_two_formats(pl_module)):
            text = (
                f"ExportCallback: the native file cannot hold {tied}: layers that share a weight "
                "need one format. Give them one, leave one of them in float, or write no native "
                "file (files=...)."
            )
            if self.strict:
                raise ValueError(text)
            rank_zero_warn(text, category=ExportWarning)
        if names := complex_parameters(pl_module):
            rank_zero_warn(
                f"ExportCallback: complex parameters stay in float: {some(names)}. .onnx files "
                "hold none.",
                category=ExportWarning,
            )

    def _check_module(self, pl_module: LightningModule) -> None:
        names = [name for name, _ in pl_module.named_modules() if name]
        if not self.module or self.module in names:
            return
        hint = did_you_mean(self.module, names, most=3)
        raise ValueError(
            f"ExportCallback: {type(pl_module).__name__} has no submodule {self.module!r}.{hint} "
            f"Expected one of {', '.join(name for name, _ in pl_module.named_children())} or one "
            "below."
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._in_training is None and self._fitting and self.example_input is None:
            self._in_training = CapturedCalls(pl_module, self.module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._in_evaluation is None and self._fitting and self.example_input is None:
            self._in_evaluation = CapturedCalls(pl_module, self.module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for capture in (self._in_training, self._in_evaluation):
            if capture is not None:
                capture.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        statqat = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, StatQATCallback)
        ]
        for callback in statqat:
            callback.finish(pl_module)  # its own turn may come later
        if reason := self._why_not(trainer, pl_module):
            rank_zero_info(f"ExportCallback: nothing written: {reason}")
            return
        if not statqat:
            remember_weights(pl_module)
        try:
            self._export(trainer, pl_module)
        except Exception as error:
            if self.strict:
                raise
            rank_zero_warn(
                f"ExportCallback: the export stopped with {in_short(error)}", category=ExportWarning
            )
        finally:
            self._in_training = self._in_evaluation = None  # they hold a batch
        if self.report is not None:
            self._warn(self.report)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, example = self._example(pl_module)

        def take(report: ExportReport) -> None:
            self.report = report
            self._publish(trainer, report)

        with export_progress(trainer) as progress:
            export_model(
                self._trained(trainer, pl_module),
                self._target(trainer),
                example,
                module=module,
                recipe=_recipe(trainer),
                files=self.files,
                strict=self.strict,
                data=self._batches(trainer, pl_module),
                most_data=self.test_examples,
                measure_latency=self.measure_latency and not _is_trial(trainer),
                target=_target(trainer),
                dynamic=self.dynamic,
                progress=progress,
                on_report=take,
                remarks=_remarks(trainer),
            )

    def _batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Any] | None:
        if self.test_examples == 0:
            return None
        return evaluation_batches(trainer, pl_module, self.data)

    def _publish(self, trainer: Trainer, report: ExportReport) -> None:
        rank_zero_info(f"StatQAT exported:\n{report}")
        for logger in trainer.loggers:
            try:
                _log(logger, report, trainer.global_step)
            except Exception as error:
                rank_zero_warn(
                    f"ExportCallback: {type(logger).__name__} did not take the report: "
                    f"{in_short(error)}",
                    category=ExportWarning,
                )

    def _target(self, trainer: Trainer) -> Path:
        trial = "fast_dev_run" if _is_trial(trainer) else ""
        return self.path.parent / trial / self.path.name

    def _why_not(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        if reason := _why_never(trainer, pl_module):
            return reason
        quantizers = activation_quantizers(pl_module)
        if quantizers and not any(q.ready for q in quantizers):
            return "no training step ran, so there are no statistics of the inputs."
        if not any(
            q.enabled and q.ready
            for layer in quantized_layers(pl_module)
            for q in layer.quantizers.present()
        ):
            return "all quantizers are switched off."
        return None

    def _example(self, pl_module: LightningModule) -> tuple[str, Any]:
        """Name of the submodule to export, and an input for it."""
        captured = self._captured()
        given = self.example_input
        if given is None and self.module is None:
            given = pl_module.example_input_array
        if given is not None:
            # A module whose forward was never written is exported by what ran in its place.
            own_forward = overrides(pl_module, "forward")
            fallback = "" if own_forward or captured is None else captured[0]
            return (self.module if self.module is not None else fallback), given
        if captured is None:
            return self.module or "", None
        name, call = captured
        return name, call_in_inference(pl_module.get_submodule(name), call)

    def _captured(self) -> tuple[str, ForwardCall] | None:
        """What ran in evaluation, or else in training; in training if that is more of the model."""
        found = [
            capture
            for capture in (self._in_evaluation, self._in_training)
            if capture is not None and capture.best() is not None
        ]
        return max(found, key=CapturedCalls.size).best() if found else None

    def _trained(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """The module as it is now, or a copy with the state of the best checkpoint."""
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") if self.best else ""
        if not best:
            if self.best and not _is_trial(trainer):
                rank_zero_warn(
                    "ExportCallback: ModelCheckpoint has kept no checkpoint; the last weights are "
                    "exported.",
                    category=ExportWarning,
                )
            return pl_module
        try:
            # This run has written the file itself, so it may hold any object.
            checkpoint = torch.load(best, map_location="cpu", weights_only=False)
            return load_checkpoint(isolated_copy(pl_module).cpu(), checkpoint, best)
        except Exception as error:
            rank_zero_warn(
                f"ExportCallback: the best checkpoint cannot be exported, the last weights are: "
                f"{in_short(error)}",
                category=ExportWarning,
            )
            return pl_module

    def _warn(self, report: ExportReport) -> None:
        for kind in self.file_types:
            if kind.field not in report.by_kind:
                own = [note for note in report.notes if note.startswith(f"{kind.title}: not ")]
                why = first_lines(" ".join(own or report.notes))
                rank_zero_warn(
                    f"ExportCallback: no {kind.ending} file. {why}",
                    category=ExportWarning,
                )
        if report.native is not None and report.native.max_difference > 0:
            rank_zero_warn(
                f"ExportCallback: {report.native.path} differs by "
                f"{report.native.max_difference:.3g}; expected 0. Is the forward "
                "random in eval mode, or does it read what is no parameter and no buffer?",
                category=ExportWarning,
            )
        for artefact in report.artefacts:
            if artefact is report.native:
                continue
            agreement, difference = artefact.agreement, artefact.max_difference
            low = agreement is not None and agreement < _EXPECTED_AGREEMENT
            if low or artefact.divergence is not None:
                rank_zero_warn(
                    f"ExportCallback: {artefact.path} differs from the trained model by "
                    f"{difference:.3g}, agreement {agreement}. "
                    f"{first_lines(' '.join(map(str, artefact.remarks)))}",
                    category=ExportWarning,
                )


def _checked(path: str | Path) -> Path:
    path, given = Path(path), str(path)
    if not path.name or given.endswith(("/", os.sep)):
        raise ValueError(
            f"ExportCallback: got path {given!r}, which names a folder; expected a file in it, "
            f"such as {str(path / 'model.onnx')!r}."
        )
    if path.suffix not in ENDINGS and path.suffix[1:2].isalpha():
        raise ValueError(
            f"ExportCallback: got path {given!r} with the ending {path.suffix!r}; expected "
            f"{' or '.join(ENDINGS)}, or none: {str(path.with_suffix(''))!r}. Which files are "
            "written is said by files=(...)."
        )
    return path


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _log(logger: Any, report: ExportReport, step: int) -> None:
    rows, metrics = report.rows(), report.metrics()
    # Directly: `self.log` is not allowed at the end of a fit.
    if metrics:
        logger.log_metrics(metrics, step=step)
    if rows and is_a(logger, "WandbLogger"):
        figures = report.figures()
        data = [[*row.values()] for row in figures]
        logger.log_table("export/files", columns=[*figures[0]], data=data)
    elif rows and is_a(logger, "TensorBoardLogger"):
        logger.experiment.add_text("export/files", _markdown(rows), step)


def _why_never(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why nothing can be written, as far as it is known before training."""
    if not quantized_layers(pl_module):
        return "the module has no quantizers. Add StatQATCallback to the Trainer."
    if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        return (
            f"{type(trainer.strategy).__name__} shards the module. Export from the checkpoint: "
            "export_model(load_quantized(model, checkpoint), path, example)."
        )
    return None


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _recipe(trainer: Trainer) -> QuantRecipe | None:
    callback = _statqat(trainer)
    return callback.effective_recipe if callback is not None else None


def _remarks(trainer: Trainer) -> list[str]:
    callback = _statqat(trainer)
    return callback.missed if callback is not None else []


def _target(trainer: Trainer) -> str | None:
    callback = _statqat(trainer)
    return callback.effective_target if callback is not None else None


def _statqat(trainer: Trainer) -> StatQATCallback | None:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return next((c for c in callbacks if isinstance(c, StatQATCallback)), None)
