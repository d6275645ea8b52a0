"""`ExportCallback`: decides when a trained model is written to files, and from what input."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from statqat_lightning.callbacks.lightning_names import is_a, overrides
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.files import ENDINGS, check_writable, with_ending
from statqat_lightning.export.frozen import refuse_weights_from_hooks
from statqat_lightning.export.inputs import ForwardCall
from statqat_lightning.export.kinds import KINDS, REPORT_ENDING
from statqat_lightning.export.loading import load_checkpoint
from statqat_lightning.export.verify import ExportDifferenceError, ExportReport
from statqat_lightning.isolated_copy import isolated_copy
from statqat_lightning.quantized_model import activation_quantizers, quantized_layers
from statqat_lightning.recipe import QuantRecipe

# ONNX Runtime's integer kernels flip a last bit now and then; less agreement is worth a warning.
_EXPECTED_AGREEMENT = 0.98


class ExportWarning(UserWarning):
    """A file is missing at the end of a training, or differs from the trained model."""


class ExportCallback(Callback):
    """Write the trained model to files that other programs run, and prove each of them.

    It works at the end of the fit, on a copy, on rank zero; the module stays as it was trained.
    Each file is read back, run by what will run it, and compared with the fake-quantized model
    before it takes its name: largest difference, SNR, agreement of predictions, accuracy on the
    test set (or else the validation set) if its batches are `(inputs, class labels)`, size, and
    speed against the float model. This goes to the console, to the loggers (`export/{kind}/...`)
    and into a file `.export.json` beside the others. Before training, it checks that the files can
    be written, and that there will be something to write.

    The native file holds the whole LightningModule. All others hold what ran in the first training
    step: the LightningModule if `training_step` calls `self(...)`, or else the outermost submodule
    that ran and has the most quantized layers, for example `self.net` in `self.net(x)`.

    With `fast_dev_run`, the files go to a folder `fast_dev_run` beside the others, so that a trial
    never replaces a trained model. Without any training step, inputs have no statistics, and
    nothing is written.

    Example:
        >>> callback = ExportCallback("exported/model.onnx")

    Args:
        path: Where the files go; `exported/model.onnx` stands for `exported/model.safetensors`,
            too, and so does `exported/model`. A number after a dot belongs to the name:
            `run_0.1` becomes `run_0.1.onnx`.
        best: Export the best checkpoint of the Trainer's `ModelCheckpoint` instead of the last
            weights.
        example_input: Input of one forward call: a tensor, a tuple of positional or a mapping of
            keyword arguments. None takes `example_input_array`, or else the first training batch.
        module: Name of the submodule that goes into all files but the native one; None for what
            ran, see above.
        onnx: Whether to write the `.onnx` file. It needs the extra `statqat-lightning[onnx]`.
        native: Whether to write the `.safetensors` file.
        program: Whether to write the `.pt2` file, which `torch.export.load` reads.
        torchao: Whether to write the `.torchao.pt` file: integer weights of Linear layers as
            torchao tensors. It needs the extra `statqat-lightning[torchao]`.
        compressed: Whether to write the folder `.compressed` for language-model runtimes: integer
            weights of Linear layers in the layout of compressed-tensors.
        strict: Whether a file that differs from the trained model is refused with an error (when
            all others have been written); False keeps it and warns. See `export_model`.
        test_examples: Most examples of the test or validation set to predict, by each file; None
            for all, 0 for none.
        measure_latency: Whether to time the files against the float model, in half a second each.

    Attributes:
        files: Whether to write each kind, by its argument.
        report: Paths, sizes and differences of the last export, None before.

    Raises:
        ValueError: If no file is asked for, or the path names a folder or has another ending;
            when training starts, if there is no such `module`, or a forward hook makes a weight.
        OSError: When training starts, if a file cannot be written.
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
        onnx: bool = True,
        native: bool = True,
        program: bool = False,
        torchao: bool = False,
        compressed: bool = False,
        strict: bool = True,
        test_examples: int | None = 1000,
        measure_latency: bool = True,
    ) -> None:
        self.files = {
            "onnx": onnx,
            "native": native,
            "program": program,
            "torchao": torchao,
            "compressed": compressed,
        }
        if not any(self.files.values()):
            raise ValueError("ExportCallback: got onnx=False and native=False; expected a file.")
        self.path = _checked(path)
        self.best = best
        self.example_input = example_input
        self.module = module
        self.strict = strict
        self.test_examples = test_examples
        self.measure_latency = measure_latency
        self.report: ExportReport | None = None
        self._capture: _Capture | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.report = None
        self._capture = None
        wanted = [kind for kind in KINDS if self.files[kind.field]]
        endings = [*(kind.ending for kind in wanted if not kind.files), REPORT_ENDING]
        check_writable(*(with_ending(self._target(trainer), ending) for ending in endings))
        for kind in wanted:
            kind.require()
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

    def _check_module(self, pl_module: LightningModule) -> None:
        names = [name for name, _ in pl_module.named_modules() if name]
        if not self.module or self.module in names:
            return
        near = difflib.get_close_matches(self.module, names)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"ExportCallback: {type(pl_module).__name__} has no submodule {self.module!r}.{hint} "
            f"Expected one of {', '.join(name for name, _ in pl_module.named_children())} or one "
            "below."
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is None and trainer.is_global_zero and self.example_input is None:
            self._capture = _Capture(pl_module, self.module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._capture is not None:
            self._capture.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._capture is not None:
            self._capture.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StatQATCallback):
                callback.finish(pl_module)  # its own turn may come later
        if reason := self._why_not(trainer, pl_module):
            rank_zero_info(f"ExportCallback: nothing written: {reason}")
            return
        module, example = self._example(pl_module)
        try:
            self.report = export_model(
                self._trained(trainer, pl_module),
                self._target(trainer),
                example,
                module=module,
                recipe=_recipe(trainer),
                **self.files,
                strict=self.strict,
                data=_evaluation_data(trainer, pl_module) if self.test_examples != 0 else None,
                most_data=self.test_examples,
                measure_latency=self.measure_latency,
                target=_target(trainer),
            )
        except ExportDifferenceError as error:
            self.report = error.report
            self._publish(trainer)
            raise
        finally:
            self._capture = None  # it holds a batch
        self._publish(trainer)
        self._warn()

    def _publish(self, trainer: Trainer) -> None:
        report = self.report
        if report is None:
            return
        rank_zero_info(f"StatQAT exported:\n{report}")
        rows, metrics = report.rows(), report.metrics()
        for logger in trainer.loggers:
            # Directly: `self.log` is not allowed at the end of a fit.
            if metrics:
                logger.log_metrics(metrics, step=trainer.global_step)
            if rows and is_a(logger, "WandbLogger"):
                columns = [*rows[0]]
                table = [[row[column] for column in columns] for row in rows]
                logger.log_table("export/files", columns=columns, data=table)  # type: ignore[attr-defined]
            elif rows and is_a(logger, "TensorBoardLogger"):
                logger.experiment.add_text("export/files", _markdown(rows), trainer.global_step)  # type: ignore[attr-defined]

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
        captured = self._capture.best() if self._capture is not None else None
        given = self.example_input
        if given is None and self.module is None:
            given = pl_module.example_input_array
        if given is not None:
            # A module whose forward was never written is exported by what ran in its place.
            own_forward = overrides(pl_module, "forward")
            fallback = "" if own_forward or captured is None else captured[0]
            return (self.module if self.module is not None else fallback), given
        return captured if captured is not None else (self.module or "", None)

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
        # This run has written the file itself, so it may hold any object.
        checkpoint = torch.load(best, map_location="cpu", weights_only=False)
        return load_checkpoint(isolated_copy(pl_module).cpu(), checkpoint, best)

    def _warn(self) -> None:
        report = self.report
        assert report is not None
        for kind in KINDS:
            if self.files[kind.field] and kind.field not in report.by_kind:
                rank_zero_warn(
                    f"ExportCallback: no {kind.ending} file. {' '.join(report.notes)}",
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
                    f"{difference:.3g}, agreement {agreement}. {' '.join(artefact.remarks)}",
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
            "written is said by onnx=..., native=... and the like."
        )
    return path


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _evaluation_data(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Batches of the test set of the data module or the module, or else of the validation set.

    Not where a hook changes batches on their way to the model: on this way there is no such hook.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    sources = [source for source in (datamodule, pl_module) if source is not None]
    hooks = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
    if any(_has_own(source, hook) for source in sources for hook in hooks):
        return
    given: Any = None
    for source in sources:
        if given is None and _has_own(source, "test_dataloader"):
            if source is datamodule:
                source.setup("test")
            given = source.test_dataloader()
    given = trainer.val_dataloaders if given is None else given
    loaders = given if isinstance(given, (list, tuple)) else [given]
    for loader in loaders:
        yield from loader if loader is not None else ()


def _has_own(source: object, hook: str) -> bool:
    """Whether a LightningModule or LightningDataModule overrides a hook."""
    own = getattr(type(source), hook, None)
    home = getattr(own, "__module__", "")
    return own is not None and home.partition(".")[0] not in ("lightning", "pytorch_lightning")


class _Capture:
    """Inputs of the outermost modules that run, from now until `stop`.

    A module is outermost if no other module is running when it is called. Those without quantized
    layers (losses, metrics) do not count.
    """

    def __init__(self, pl_module: LightningModule, module: str | None) -> None:
        self._handles: list[RemovableHandle] = []
        self._running: list[bool] = []
        self._calls: dict[str, ForwardCall] = {}
        self._sizes: dict[str, int] = {}
        chosen = {
            name: sub for name, sub in pl_module.named_modules() if module is None or name == module
        }
        for name, sub in chosen.items():
            self._sizes[name] = len(quantized_layers(sub))
            self._handles += [
                sub.register_forward_pre_hook(
                    partial(self._enter, name, pl_module), with_kwargs=True, prepend=True
                ),
                sub.register_forward_hook(self._leave, always_call=True),
            ]

    def stop(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def best(self) -> tuple[str, ForwardCall] | None:
        """Name and input of the one with the most quantized layers, None if none ran."""
        if not self._calls:
            return None
        name = max(self._calls, key=lambda name: self._sizes[name])
        return name, self._calls[name]

    def _enter(
        self, name: str, pl_module: LightningModule, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        is_forward = module is not pl_module or _runs_own_forward(pl_module)
        if is_forward and not any(self._running) and self._sizes[name] and name not in self._calls:
            self._calls[name] = ForwardCall(args, kwargs).copy()
        self._running.append(is_forward)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def _runs_own_forward(pl_module: LightningModule) -> bool:
    """Whether a call runs `forward`: a wrapper such as DDP calls the module for `training_step`."""
    forward: Callable[..., Any] | None = pl_module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(pl_module).forward


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


def _target(trainer: Trainer) -> str | None:
    callback = _statqat(trainer)
    return callback.target if callback is not None else None


def _statqat(trainer: Trainer) -> StatQATCallback | None:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return next((c for c in callbacks if isinstance(c, StatQATCallback)), None)
