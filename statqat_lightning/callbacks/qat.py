"""`StatQATCallback`: decides when quantizers are inserted, observe, are refreshed and freeze.

One class makes the file long: its hooks share the state of a run, and a reader wants them in the
order in which the Trainer calls them. What they do is in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from statqat_lightning.callbacks.allocation import choose_formats, with_formats
from statqat_lightning.callbacks.averaging import Averaging
from statqat_lightning.callbacks.calibration import (
    calibrate,
    compensate_weights,
    reestimate_batch_norm,
)
from statqat_lightning.callbacks.checkpoint import (
    QuantizerEntry,
    give_back_scales,
    read_entry,
    target_in,
)
from statqat_lightning.callbacks.distillation import DistillationCallback
from statqat_lightning.callbacks.first_batch import (
    FirstBatch,
    LiveRecording,
    can_be_watched,
    look_at_first_batch,
    seen_in,
)
from statqat_lightning.callbacks.hooks import WrappedHook, WrappedHooks
from statqat_lightning.callbacks.input_warnings import InputWarnings
from statqat_lightning.callbacks.input_warnings import StatQATWarning as StatQATWarning
from statqat_lightning.callbacks.lightning_names import overrides
from statqat_lightning.callbacks.phases import Phases, is_last_batch
from statqat_lightning.callbacks.ranks import reduction_over_ranks, share_batch_norm
from statqat_lightning.callbacks.refusals import refuse_trainer
from statqat_lightning.callbacks.trial_run import CannotCalibrate
from statqat_lightning.export.freezing.stale_scales import remember_weights
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.insight.allocation import Allocation
from statqat_lightning.insight.budgets import Budget
from statqat_lightning.layers.module_names import modules_by_name, plain_name
from statqat_lightning.model.compensation import CompensationReport
from statqat_lightning.model.dataflow import takes_means_away
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.insertion_report import InsertionReport
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    follow_averaged_weights,
    idle_activations,
    knows_inputs,
    learned_by_key,
    load_quantizer_state,
    quantized_layers,
    refit_weights,
    refresh,
    set_centred,
    set_enabled,
    set_observing,
    set_recompute,
    switch_off_idle_layers,
)
from statqat_lightning.model.report_rows import rows_in_use
from statqat_lightning.model.weight_reads import Weight, set_readers
from statqat_lightning.recipes.recipe import DEFAULT, Default, QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import ROLES
from statqat_lightning.recipes.schedule import QuantSchedule, When
from statqat_lightning.targets.integer_kernels import IntegerKernel
from statqat_lightning.targets.registry import AUTO, check_target
from statqat_lightning.targets.settling import settle

_BATCHES_BETWEEN_CHECKS = 50  # for NaN in inputs: each check waits for the device


class StatQATCallback(Callback):
    """Turn the training of any LightningModule into quantization-aware training.

    Layers get fake quantizers after `LightningModule.setup` and `configure_model`, for every stage
    of the Trainer. Before the first step, a few training batches calibrate the inputs. At the end
    of every batch, what the inputs have gathered is summed over the ranks, and scales that are no
    longer near the best are chosen anew. Nothing is observed in validation, test or prediction.

    The module keeps its parameters, buffers, names and `state_dict` keys. Statistics and scales
    travel in the checkpoint under a key of their own, so float and quantized checkpoints load into
    each other strictly.

    Examples:
        >>> callback = StatQATCallback(weights="int4", activations="int4")

    Args:
        weights: Format name or `TensorSpec` of all weights; None leaves them in float. The default
            is `int8`: with per-channel scales it costs no accuracy worth mentioning.
        activations: Format name or `TensorSpec` of the inputs of all layers; None leaves them in
            float. The default is `int8`. A plain integer name stands for that width, *unsigned
            where the data is non-negative*, which wins a bit after a ReLU, and with a zero point
            where it reaches further on one side of zero, which wins as much after a SiLU or a GELU
            (see `TensorSpec`); plain `fp4` gets a zero point after a ReLU (`TensorSpec("fp4")` does
            not).
        recipe: A `QuantRecipe`, or the path of one in YAML, in place of `weights`, `activations`,
            `exclude` and `first_last_bits`.
        exclude: Patterns of layers that stay in float.
        first_last_bits: Least width of the first and last layer, 8 by default: they hold few
            weights, and errors there cost most. None treats them like all others.
        calibration_batches: Batches that calibrate inputs before the first step. Default 8: enough
            for a scale, and a small part of an epoch. Where the data can be read only once, the
            first step observes in float instead, and a message says so. A dataset with a random
            generator of its own is advanced by these batches.
        freeze_at: Moment from which scales and statistics stop, so that the last steps train the
            weights for exactly the quantizers that are exported: a share of the training, a number
            of steps, or a text such as `"2 epochs"`. Default 0.9, the last tenth; None never
            freezes.
        schedule: A `QuantSchedule`, or its entries as a dict, for all other phases: a later start
            of weights or inputs, widths that fall step by step, BatchNorm statistics. It has a
            `freeze_at` of its own.
        refresh_every: Batches between two refreshes. Default 1.
        momentum: Weight of the newest batch in the running statistics. Default 0.1, a window of
            about 20 batches.
        max_observed: Values of each input and batch that enter the statistics, default 4096; other
            ones in every batch.
        recompute_inputs: Quantize inputs again in the backward pass instead of keeping the
            quantized copies. Memory drops to nearly that of a float run, and a step takes longer,
            see docs/recipes.md. Results do not change. `torch.compile` and gradient checkpointing
            decide for themselves what they keep.
        enabled: False inserts quantizers, observes and reports, but rounds nothing: the results are
            those of a float run, bit for bit.
        verbose: Print the insertion report.
        target: Runtime whose integer kernels the model is trained for: `"onnxruntime"`,
            `"openvino"`, `"tensorrt"`, `"executorch"` (XNNPACK) or None.

            A target adds quantizers wherever the runtime needs a rounded tensor to stay in
            integers: at outputs of convolutions and terms of residual sums for ONNX Runtime, at
            outputs of all layers for ExecuTorch, behind activations for OpenVINO and TensorRT (see
            `targets`). One training batch, run before calibration, shows where; the checkpoint
            keeps the places. At the end of the fit, scales move by a thousandth at most, and biases
            for ONNX Runtime and ExecuTorch, to where the runtime computes the same codes as the
            model (see `targets.settle`). Formats without integer kernels are left as they are.

            The default, `"auto"`, takes the runtime of a file that an `ExportCallback` of the
            Trainer writes: ONNX Runtime if there is an `.onnx` file, or else ExecuTorch if there is
            a `.pte` file. It takes none for other files, if fewer than half of the layers have
            integer kernels, if scales are learned, or if no batch can be run ahead. A resumed run
            keeps the target that it had.
        compensate: Before the first step, round each weight so that later errors make up for
            earlier ones, on the calibration batches, see `compensate`: training starts from a
            better model. This takes some more passes over these batches and, for each layer, a
            matrix of the size of its inputs. A teacher of `DistillationCallback` stays the float
            model. A resumed run, or a second fit, keeps its weights.
        preset: Name of a preset such as `"w4a8"`, in place of `weights` and `activations`, see
            `list_presets`.

        budget: What the model may cost, such as `"4 bits"` a weight in the mean, see
            `Budget.parse`. Before the first step, each layer gets the format of its own that makes
            the least predicted loss within it, see `allocate`, among formats of the family that the
            weights have, integers or floats. Inputs keep theirs unless the budget counts them. It
            takes two passes over the calibration batches, one of them backwards. A resumed run, or
            a second fit, keeps its formats.

    Attributes:
        allocation: Which formats the budget has given; None before, and without.
        compensation: What was done to which weight for `compensate`; None before, and without.
        report: What was done to each layer, None before.
        placed: The recipe in force, if it differs from the given one: with a rule for each
            quantizer that the target adds, and without those that no tensor reaches. None
            otherwise.
        missed: What the last fit did not reach, such as the last phase of a schedule.

    Raises:
        ValueError: If an argument is out of range or names something unknown.
    """

    def __init__(
        self,
        weights: str | TensorSpec | None = DEFAULT,
        activations: str | TensorSpec | None = DEFAULT,
        recipe: QuantRecipe | str | Path | None = None,
        exclude: Sequence[str] = (),
        first_last_bits: int | Default | None = DEFAULT,
        calibration_batches: int = 8,
        freeze_at: When | None = DEFAULT,
        schedule: QuantSchedule | dict[str, Any] | None = None,
        refresh_every: int = 1,
        momentum: float = 0.1,
        max_observed: int = 4096,
        recompute_inputs: bool = False,
        enabled: bool = True,
        verbose: bool = True,
        target: str | None = AUTO,
        compensate: bool = False,
        budget: str | Budget | None = None,
        preset: str | None = None,
    ) -> None:
        if isinstance(weights, QuantRecipe):
            raise TypeError("StatQATCallback: got a QuantRecipe as weights; pass it as recipe=....")
        if calibration_batches < 1:
            raise ValueError(
                f"StatQATCallback: got calibration_batches={calibration_batches!r}; expected at "
                "least 1."
            )
        if refresh_every < 1:
            raise ValueError(
                f"StatQATCallback: got refresh_every={refresh_every!r}; expected at least 1."
            )
        if schedule is not None and freeze_at != DEFAULT:
            raise ValueError(
                f"StatQATCallback: got freeze_at={freeze_at!r} beside a schedule; set freeze_at in "
                "the schedule."
            )
        if isinstance(schedule, dict):
            schedule = QuantSchedule.from_dict(schedule)
        self.recipe = QuantRecipe.choose(
            recipe, weights, activations, exclude, first_last_bits, preset
        )
        self.target = target if target == AUTO else check_target(target)
        self._effective_target = None if target == AUTO else target
        if self._effective_target is not None and self._learns_scales():
            raise ValueError(
                f"StatQATCallback: got target={target!r} with learned scales (quantizer 'lsq'), "
                "which an optimizer has to know before a batch shows where they are. Use another "
                "quantizer, or place them ahead: "
                "recipe=place(model, recipe, lambda: model(example), target).recipe."
            )
        self.placed: QuantRecipe | None = None
        self.compensation: CompensationReport | None = None
        self.missed: list[str] = []
        self._kernels: tuple[IntegerKernel, ...] = ()
        self.calibration_batches = calibration_batches
        self.schedule = schedule or QuantSchedule(
            freeze_at=0.9 if freeze_at == DEFAULT else freeze_at
        )
        if compensate and not (enabled and self.schedule.quantizes_weights_at_once):
            raise ValueError(
                "StatQATCallback: got compensate=True, but weights are not quantized by their own "
                "formats from the first step on; leave out enabled=False, and weights_at and "
                "widths of the schedule, or compensate."
            )
        self.compensate = compensate
        self.budget = None if budget is None else Budget.parse(budget)
        if self.budget is not None and self._learns_scales():
            raise ValueError(
                f"StatQATCallback: got budget={budget!r} with learned scales (quantizer 'lsq'), "
                "which an optimizer has to know before a batch shows which formats are best. "
                "Choose ahead: recipe=allocate(advise(model, batches), budget).recipe."
            )
        self.allocation: Allocation | None = None
        self.phases = Phases(self.schedule)
        self.averaging = Averaging()
        self.refresh_every = refresh_every
        self.observer_config = ObserverConfig(momentum, max_observed)
        self.recompute_inputs = recompute_inputs
        self.enabled = enabled
        self.verbose = verbose
        self.report: InsertionReport | None = None
        self._hooks = WrappedHooks()
        self._fit_scales: Callable[[nn.Module], None] | None = refit_weights  # before anything runs
        self._follows_a_run = False
        self._compensation_due = False
        self._allocation_due = False
        self._last_step = -1
        self._last_boundary: int | None = None
        self._fitting = False
        self._announced = False
        self._rows: Mapping[str, Mapping[str, Any]] = {}  # what a batch has shown, for the report
        self._readers: Mapping[Weight, tuple[str, ...]] = {}
        self._watch_next = False
        self._recording: LiveRecording | None = None
        self._norms: Mapping[str, tuple[str, ...]] | None = None  # as a batch has shown them
        self._estimated_at = -1
        self._target_of_files: str | None = None
        self._is_decided = False  # whether `effective_target` is that of the module's training
        self._warnings = InputWarnings()

    # Insertion and checkpoints, in every stage

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning calls LightningModule.setup and configure_model after this hook and loads
        # weights after those, with no hook of ours in between: so the module's own hooks are
        # wrapped on the instance.
        refuse_trainer(trainer, self._learns_scales())
        self._hooks.unwrap()
        self._fitting = stage == "fit"
        self._target_of_files = _target_of_files(trainer) if self._fitting else None
        self.averaging = Averaging(trainer.callbacks if self._fitting else ())  # type: ignore[attr-defined]
        last = "configure_model" if overrides(pl_module, "configure_model") else "setup"
        self._hooks.wrap(pl_module, last, after=self._insert)
        self._hooks.wrap(pl_module, "on_save_checkpoint", after=self._write_entry)
        self._hooks.wrap(pl_module, "on_load_checkpoint", before=self._read_entry)

    def _learns_scales(self) -> bool:
        specs = [getattr(rule, role) for rule in self.recipe.rules for role in ROLES]
        return any(spec is not None and spec.quantizer == "lsq" for spec in specs)

    @property
    def effective_recipe(self) -> QuantRecipe:
        """The recipe in force: as placed for the target, once that is known."""
        return self.placed or self.recipe

    @property
    def effective_target(self) -> str | None:
        """The target in force: with "auto", what the checkpoint or the files of the fit want."""
        return self._effective_target

    def _insert(self, pl_module: LightningModule, *_: Any) -> None:
        before = [layer.quantizers for layer in quantized_layers(pl_module)]
        if not before:
            self.placed = self.allocation = None  # they were another module's
            self._is_decided = False
        if self.target == AUTO and not self._is_decided:
            self._effective_target = None if self._learns_scales() else self._target_of_files
        self.report, self._rows = None, {}
        self._prepare(pl_module)
        if self.averaging.replaces_weights_of_checkpoints and learned_by_key(pl_module):
            remove(pl_module)
            raise ValueError(
                "StatQATCallback: got learned scales (quantizer 'lsq') beside WeightAveraging, "
                "which copies the module before they are parameters of it. Use another quantizer, "
                "or leave one of the two out."
            )
        set_enabled(pl_module, weights=self.enabled, inputs=self.enabled)
        # Quantizers of an earlier run keep their scales, frozen ones above all. New ones have just
        # chosen theirs, but a checkpoint may still replace the weights.
        after = [layer.quantizers for layer in quantized_layers(pl_module)]
        self._fit_scales = refit_weights if before != after else None
        self._follows_a_run = False
        if before != after or not knows_inputs(pl_module):
            # Until a checkpoint is read, or it is done:
            self._compensation_due = self.compensate
            self._allocation_due = self.budget is not None
        self._announced = before == after

    def _prepare(self, pl_module: LightningModule) -> None:
        """Bring the module in line with the recipe in force; `report` keeps reasons and notes."""
        report = prepare(pl_module, recipe=self.effective_recipe, observer=self.observer_config)
        set_recompute(pl_module, self.recompute_inputs)
        if self.report is not None:
            # A placed recipe names what is quantized, and has forgotten why all else is not.
            known = {row.name: row.reason for row in self.report.rows if row.reason}
            left = [row.name for row in report.rows if row.reason and row.name in known]
            report = report.updated({name: {"reason": known[name]} for name in left})
            report = report.with_notes(self.report.notes)
        self.report = report.updated(self._rows)

    def _announce(self) -> None:
        """Print the report, once for each insertion."""
        if self.verbose and not self._announced:
            rank_zero_info(f"StatQAT: {self.report}")
        self._announced = True

    @property
    def _entry(self) -> QuantizerEntry:
        return QuantizerEntry(
            self.effective_recipe.to_dict(),
            self.phases.now.weights,
            self.phases.now.inputs,
            averaged=self.averaging.replaces_weights_of_checkpoints,
            placed_for=(
                (self.effective_target, self.recipe.to_dict())
                if self.placed or self.effective_target
                else None
            ),
            budget=None if self.budget is None else str(self.budget),
            bits=self.phases.now.bits,
        )

    def _write_entry(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._entry(pl_module, checkpoint)

    def _read_entry(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        budget = None if self.budget is None else str(self.budget)
        entry = read_entry(checkpoint, self.recipe, self.target, budget)
        if entry is None:
            self._fit_scales = refit_weights
            return
        self._effective_target, self._is_decided = target_in(entry), True
        if "placed_for" in entry or entry["recipe"] != self.recipe.to_dict():
            self.placed = QuantRecipe.from_dict(entry["recipe"])
            self._prepare(pl_module)
        self._compensation_due = self._allocation_due = False
        load_quantizer_state(pl_module, entry["quantizers"])
        give_back_scales(pl_module, checkpoint)
        weights, inputs = entry.get("quantized", (True, True))
        self.phases.resume(weights, inputs, entry.get("bits", 0))
        set_enabled(pl_module, weights and self.enabled, inputs and self.enabled)
        # The scales are those of the weights in training, which a later fit goes on with; whatever
        # else is done with the checkpoint is done with their average.
        averaged = entry.get("averaged", False) and not self._fitting
        self._fit_scales = follow_averaged_weights if averaged else None
        self._follows_a_run = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning calls this for checkpoints that hold more than weights, also where a module's
        # own hooks are out of reach.
        self._write_entry(pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        # Not empty, so that Lightning tells whoever resumes without this callback what is missing.
        return {"recipe": self.recipe.to_dict()}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._warnings.of_overflow(pl_module)  # it may be the reason
        self._let_go(pl_module)  # Lightning calls no teardown then

    def _let_go(self, pl_module: LightningModule) -> None:
        if self._recording is not None:
            self._recording.stop()
            self._recording = None
        set_observing(pl_module, False)
        self.phases.release()
        self._hooks.unwrap()
        if quantized_layers(pl_module):
            # The Trainer can still be told to save: with weights alone, the module's hook is the
            # only one it calls. It also serves later fits without this callback.
            WrappedHook(pl_module, "on_save_checkpoint", after=self._entry)
            if learned_by_key(pl_module):
                WrappedHook(pl_module, "on_load_checkpoint", before=give_back_scales)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def _start_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)
        if trainer.state.fn != "fit":
            self._announce()
        idle = idle_activations(pl_module)
        if idle and trainer.state.fn != "fit":
            self._warnings.once(
                ", ".join(idle),
                "unknown",
                "no statistics, so these inputs are evaluated in float. Train first, or load a "
                "checkpoint of a training with StatQATCallback: by `ckpt_path`, by "
                "`load_quantized(module, path)`, or by `load_from_checkpoint`, the library's own "
                "loading included, inside `with quantized_loading():`.",
            )

    def _start(self, pl_module: LightningModule) -> None:
        """Fit the scales of weights that came without scales of their own since insertion."""
        self._hooks.unwrap("setup", "configure_model")
        if self._fit_scales is not None:
            self._fit_scales(pl_module)
            self._fit_scales = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.averaging.enter_validation(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.averaging.leave_validation()

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)  # sharding strategies load checkpoints after `on_fit_start`
        self._last_step, self._last_boundary = trainer.global_step, None
        self.missed = []
        self._look_ahead(trainer, pl_module)
        self.phases.start(trainer, pl_module, self.enabled)
        self._warnings.start()
        self._add_notes(self.phases.warnings_ahead(trainer))
        # A resumed run or a second fit has its statistics; layers that did not run until then are
        # quantized once they have.
        if not knows_inputs(pl_module):
            self._calibrate(trainer, pl_module)
        if self._allocation_due:
            self._allocate(trainer, pl_module)
        if self._compensation_due:
            self._compensate(trainer, pl_module)
        self._announce()
        assert self.report is not None
        if self.budget is None:  # which chooses formats that the recipe does not name
            self._warnings.of_little(self.report, self.recipe)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._centre(trainer, pl_module)
        try:
            calibrate(trainer, pl_module, self.calibration_batches, reduction_over_ranks(trainer))
        except CannotCalibrate as reason:
            until = (
                "Inputs stay in float for the first batch; from then on they are quantized by what "
                "was seen so far."
                if activation_quantizers(pl_module)
                else "Scales of weights follow their inputs from the first step on."
            )
            note = f"StatQAT: no calibration ahead of training: {reason}. {until}"
            rank_zero_info(note)
            self._add_notes([note])
            return
        self._prepare(pl_module)  # by now the signs of formats are known
        self._warnings.of_idle_layers(pl_module)
        self._warnings.of_negatives(pl_module)

    def _allocate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._allocation_due = False
        assert self.budget is not None, "it is due"
        try:
            self.allocation = choose_formats(
                *(trainer, pl_module, self.budget, self.calibration_batches),
                reduction_over_ranks(trainer),
            )
        except CannotCalibrate as reason:
            raise ValueError(
                f"StatQATCallback: got budget={str(self.budget)!r}, but {reason}. Choose ahead: "
                "recipe=allocate(advise(model, batches), budget).recipe."
            ) from reason
        if self.verbose:
            rank_zero_info(f"StatQAT: {self.allocation.summary()}")
        self.placed = with_formats(pl_module, self.allocation.formats)
        remove(pl_module)  # so that nothing is known of inputs twice
        self._prepare(pl_module)
        set_readers(pl_module, self._readers)
        refit_weights(pl_module)  # as any run begins: the next searches come after as many steps
        self.phases.start(trainer, pl_module, self.enabled)  # of new quantizers, too
        self._calibrate(trainer, pl_module)

    def _compensate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compensation_due = False
        try:
            self.compensation = compensate_weights(
                trainer, pl_module, self.calibration_batches, reduction_over_ranks(trainer)
            )
        except CannotCalibrate as reason:
            raise ValueError(
                f"StatQATCallback: got compensate=True, but {reason}. Leave it out, or compensate "
                "ahead of the fit: prepare(module, recipe=...), batches, refresh(module), "
                "compensate(module, run)."
            ) from reason
        if self.verbose:
            rank_zero_info(f"StatQAT: {self.compensation}")
        kept = {plain_name(name) for name in pl_module.state_dict()}
        moved = [row.name for row in self.compensation.rows]
        self._warnings.of_weights_outside_checkpoints(
            [name for name in moved if name.replace("/", ".") not in kept]
        )

    def _add_notes(self, notes: Sequence[str]) -> None:
        assert self.report is not None
        self.report = self.report.with_notes(notes)

    def _look_ahead(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See in one batch where the target needs quantizers, and which weights are read how."""
        self._watch_next, self._norms = False, None
        try:
            seen = look_at_first_batch(
                *(trainer, pl_module, self.recipe, self.effective_target, self.placed),
                reduction_over_ranks(trainer),
                if_it_gains=self.target == AUTO and not self._is_decided,
            )
        except CannotCalibrate as reason:
            if self.target not in (None, AUTO):
                raise ValueError(
                    f"StatQATCallback: got target={self.target!r}, but no training batch can show "
                    f"where it needs quantizers: {reason}. Place them ahead: "
                    "recipe=place(model, recipe, lambda: model(example), target).recipe."
                ) from reason
            if self.effective_target is not None and not self._is_decided:
                self._add_notes(
                    [
                        f"Not placed for {self.effective_target}, whose files will run slower: no "
                        f"training batch can show where it needs quantizers: {reason}."
                    ]
                )
                self._effective_target = None
            self._watch_next = can_be_watched(trainer)
            return
        self._effective_target, self._is_decided = seen.target, True
        self._follow(pl_module, seen)

    def _follow(self, pl_module: LightningModule, seen: FirstBatch) -> None:
        """Bring quantizers and report in line with what a batch has shown."""
        self._kernels = seen.kernels
        if seen.recipe != self.effective_recipe:
            self.placed = seen.recipe
            self._prepare(pl_module)
            set_enabled(pl_module, weights=self.enabled, inputs=self.enabled)
        self._readers = seen.readers
        set_readers(pl_module, seen.readers)
        self._norms = seen.centred
        assert self.report is not None
        self._rows = seen.rows
        self.report = self.report.updated(seen.rows).with_notes(seen.notes)

    def _centre(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let means of outputs count but where a norm takes them away, in the mode it is in now.

        That is settled once for a run: where norms are frozen later on, what they keep holds the
        means that the scales of then have made. A resumed run goes on as it was.
        """
        if self._norms is None or self._follows_a_run:
            return
        modules = modules_by_name(pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        taught = [c.layers or () for c in callbacks if isinstance(c, DistillationCallback)]
        centred = [
            layer
            for layer, norms in self._norms.items()
            if all(takes_means_away(modules[name]) for name in norms)
            and not any(layer in layers for layers in taught)  # the loss sees their means
        ]
        set_centred(pl_module, centred)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._last_boundary is None:
            # Hooks of the module that have run since calibration may have frozen norms.
            self._centre(trainer, pl_module)
        if self._last_boundary is None or batch_idx == 0:
            self._last_boundary = batch_idx
        self.averaging.follow_training(trainer, pl_module, batch_idx)
        self.phases.enter(trainer, pl_module, self.enabled, batch_idx)
        set_observing(pl_module, True)
        if self._watch_next:
            self._watch_next, self._recording = False, LiveRecording(pl_module)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._recording is not None:
            self._recording.stop()  # optimizers multiply with weights, too

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        set_observing(pl_module, False)
        if self._recording is not None:
            flow, self._recording = self._recording.stop(), None
            placed = self.placed if self.effective_target is not None else None
            self._follow(pl_module, seen_in(flow, trainer, pl_module, self.recipe, placed=placed))
            self._centre(trainer, pl_module)
        if self._last_boundary is None:
            self._last_boundary = batch_idx  # Lightning starts no batch that is None, but ends it
        if trainer.fit_loop._should_accumulate():
            return  # scales change between optimizer steps only; accumulators add up meanwhile
        due = (batch_idx + 1) // self.refresh_every > self._last_boundary // self.refresh_every
        self._last_boundary = batch_idx + 1
        # The end of an epoch refreshes in any case: a checkpoint holds no half-filled accumulators.
        if not due and not trainer.is_last_batch:
            return
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        moved = stepped and not self.phases.now.frozen
        overflow = refresh(pl_module, weights=moved, reduce=reduction_over_ranks(trainer))
        self._warnings.remember(overflow)
        if (batch_idx + 1) % _BATCHES_BETWEEN_CHECKS == 0:
            self._warnings.of_overflow(pl_module)
        if is_last_batch(trainer):
            self._reestimate_batch_norm(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warnings.of_overflow(pl_module)
        self._warnings.of_negatives(pl_module)

    def _reestimate_batch_norm(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after the last step, if the schedule says so."""
        if self.schedule.batch_norm != "reestimate" or self._estimated_at == trainer.global_step:
            return
        self._estimated_at = trainer.global_step
        num_batches = self.schedule.batch_norm_batches
        try:
            reestimate_batch_norm(trainer, pl_module, num_batches, reduction_over_ranks(trainer))
        except CannotCalibrate as reason:
            self._warnings.once(
                "BatchNorm", "reestimate", f"statistics were not estimated again: {reason}."
            )
        else:
            rank_zero_info(
                f"StatQAT: BatchNorm statistics estimated again from {num_batches} batches or an "
                "epoch."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where the fit ends early (EarlyStopping, `max_time`), what was due at its end is due now.
        if missed := self.phases.finish(trainer, pl_module, self.enabled):
            self.missed = [missed]
            self._add_notes(self.missed)
            self._warnings.once("schedule", "missed", missed)
        self._reestimate_batch_norm(trainer, pl_module)
        self.phases.release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kernels and trainer.world_size > 1:
            share_batch_norm(trainer, pl_module)
        self.finish(pl_module)

    def finish(self, pl_module: LightningModule) -> None:
        """What is left to do when no step follows; a second call changes nothing.

        Scales of averaged weights, and scales and biases with which the target computes the same
        codes, see `settle`.
        """
        self.averaging.finish(pl_module)
        if self.enabled:
            idle = switch_off_idle_layers(pl_module)
            self._warnings.of_layers_that_never_ran(pl_module, idle)
            if self.effective_target is not None:
                settle(pl_module, self._kernels, self.effective_target)
        remember_weights(pl_module)
        if self.report is not None:
            self.report = self.report.updated(rows_in_use(pl_module))


def _target_of_files(trainer: Trainer) -> str | None:
    """The runtime of the first file that an `ExportCallback` of the Trainer will write."""
    from statqat_lightning.callbacks.export import ExportCallback  # which imports this module

    exports = [c for c in trainer.callbacks if isinstance(c, ExportCallback)]  # type: ignore[attr-defined]
    wanted = (each for export in exports for each in export.file_types)
    return next((kind.targets[0] for kind in wanted if kind.targets), None)
