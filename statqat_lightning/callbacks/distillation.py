"""Distillation: what the quantized network returns is drawn to what the float network returns."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statqat_lightning.callbacks.calibration import step_arguments
from statqat_lightning.callbacks.hooks import WrappedHooks
from statqat_lightning.callbacks.input_warnings import StatQATWarning
from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.callbacks.trial_copy import running, trial_copy
from statqat_lightning.export.wording import first_lines
from statqat_lightning.layers.module_names import plain_name
from statqat_lightning.model.compensation import share_on_grid
from statqat_lightning.model.distillation import (
    LayerOutputs,
    OutputLoss,
    class_dimension,
    fitting_temperature,
    in_float,
    kl_divergence,
    last_layer,
)
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.isolated_copy import CannotCopy, ReachesOriginal
from statqat_lightning.model.quantized_model import state_tensors

_MODULE = "LightningModule"
_LOGGED_AS = "distillation_loss"
AUTO = "auto"
_TIMED = range(1, 9)  # steps whose time is measured; the first one is another than those to come


class DistillationCallback(Callback):
    """Trains a quantized network to return what a float network, its teacher, returns.

    The teacher runs the batches of the training by its own `training_step`, in eval mode, without
    gradients, with the same random numbers, and without effect on the training: what it logs goes
    nowhere. What `training_step` returns becomes

        (1 - weight) * loss + weight * distillation

    where `distillation` is the loss between outputs of layers, the mean over all layers and their
    calls. It is logged as `distillation_loss`. The user's module needs no change.

    A Trainer may have several, for other layers and losses: each takes what comes out of those
    before it as the loss, runs a teacher of its own, and logs by its number, `distillation_loss_2`
    the second one.

    Labels say less than the float network knows, and a short training on few data can lose what
    that network has learned from many; that is why the labels count for nothing by default
    (NVIDIA, "Quantization-aware distillation", arXiv 2601.20088).

    Args:
        teacher: None for the module as it is in float when the fit begins; its weights are kept in
            checkpoints, so that a resumed run has the same teacher. Or a LightningModule, or the
            path of a checkpoint of a module of this class.
        layers: The names of the layers whose outputs are compared, or a mapping to their names in
            the teacher. None for the last layer with a weight that runs in the teacher's step.
        loss: "kl" for logits (Kullback-Leibler divergence, classes in the last dimension, in
            dimension 1 of convolutions), "mse" for features, or a function of the student's and the
            teacher's output, of one shape, that returns a scalar.
        weight: Of the distillation, above 0 and at most 1.
        temperature: Of "kl", above 0: the higher it is, the more do the less likely classes count.
            "auto" follows the logits, see `distillation.fitting_temperature`: high while they are
            far from the teacher's, lower as they come near. That is better than the default of 2
            where few bits leave much to learn and there is data to learn it from, and worse on a
            few hundred images, see `docs/evidence/accuracy.md`.

    Raises:
        ValueError: For an argument out of its range; at the start of a fit for manual optimization,
            a strategy that shards the module, or layers that do not exist.
    """

    def __init__(
        self,
        teacher: LightningModule | str | Path | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        loss: str | OutputLoss = "kl",
        weight: float = 1.0,
        temperature: float | str = 2.0,
    ) -> None:
        if not (teacher is None or isinstance(teacher, (str, Path)) or is_a(teacher, _MODULE)):
            raise ValueError(
                f"DistillationCallback: got a {type(teacher).__name__} as teacher; expected a "
                "LightningModule, the path of a checkpoint, or None for the module as it is when "
                "the fit begins."
            )
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(
                f"DistillationCallback: got layers={layers!r}; expected names of layers in a list, "
                "a mapping to their names in the teacher, or None for the last layer."
            )
        if not (loss in ("kl", "mse") if isinstance(loss, str) else callable(loss)):
            raise ValueError(
                f"DistillationCallback: got loss={loss!r}; expected 'kl', 'mse' or a function of "
                "two outputs."
            )
        if not 0 < weight <= 1:
            raise ValueError(
                f"DistillationCallback: got weight={weight}; expected above 0 and at most 1."
            )
        fixed = temperature if isinstance(temperature, (int, float)) else 0.0
        if temperature != AUTO and not 0 < fixed < float("inf"):
            raise ValueError(
                f"DistillationCallback: got temperature={temperature!r}; expected {AUTO!r} or a "
                "number above 0."
            )
        self.teacher = teacher
        self.layers = layers
        self.loss = loss
        self.weight = weight
        self.temperature = temperature
        self._hooks = WrappedHooks()
        self._run: _Run | None = None
        self._saved: dict[str, Tensor] | None = None
        self._logged_as = _LOGGED_AS

    @property
    def state_key(self) -> str:
        if self.layers is None and self.loss == "kl":
            return super().state_key
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "own")
        return self._generate_state_key(layers=self.layers and [*self.layers], loss=loss)

    @property
    def _copies(self) -> bool:
        """Whether the teacher is a copy of the module."""
        return not is_a(self.teacher, _MODULE)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._saved = None  # of an earlier fit; a checkpoint is read after this
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"DistillationCallback: {type(pl_module).__name__} optimizes manually, so no loss "
                "of its training_step is what it minimises. Add the loss of distillation there, or "
                "leave the callback out."
            )
        others = [c for c in trainer.callbacks if isinstance(c, DistillationCallback)]  # type: ignore[attr-defined]
        number = others.index(self) + 1
        self._logged_as = _LOGGED_AS if number == 1 else f"{_LOGGED_AS}_{number}"
        strategy = trainer.strategy
        if self._copies and not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"DistillationCallback: {type(strategy).__name__} shards the module, so it cannot "
                "be copied as a teacher. Give one: teacher=<a LightningModule with its weights>."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        if self.teacher is None and self._saved is None and share_on_grid(pl_module) > 0.5:
            rank_zero_warn(
                "DistillationCallback: the weights that the fit begins with are rounded already, "
                "as `compensate` leaves them, and a network that is its own teacher learns "
                "nothing. Give the float network: teacher=<a LightningModule or a checkpoint>; or "
                "let StatQATCallback(compensate=True) round them after the teacher was copied.",
                category=StatQATWarning,
            )
        teacher = self._make_teacher(trainer, pl_module)
        self._run = _Run(self, pl_module, teacher)
        self._hooks.wrap(pl_module, "training_step", around=_Around(self))

    def _make_teacher(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        source = pl_module if self._copies else self.teacher
        assert isinstance(source, torch.nn.Module)
        try:
            teacher = trial_copy(trainer, source)
        except CannotCopy as error:
            raise ValueError(
                f"DistillationCallback: {error}, so there is no teacher. Give one: "
                "teacher=<a LightningModule with its weights>."
            ) from error
        remove(teacher)
        state, where = self._saved, "the checkpoint that the fit resumes from"
        if isinstance(self.teacher, (str, Path)):
            where = str(self.teacher)
            state = _weights_in(self.teacher)
        if state is not None:
            try:
                _load(teacher, state)
            except RuntimeError as error:
                raise ValueError(
                    f"DistillationCallback: the teacher in {where} is no "
                    f"{type(pl_module).__name__} like the one that is trained: {error}"
                ) from error
        if not self._copies:
            teacher = trainer.precision_plugin.convert_module(teacher)  # type: ignore[assignment]
        return teacher.to(pl_module.device).requires_grad_(False).eval()

    def step(
        self, pl_module: LightningModule, training_step: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """What `training_step` returns, with the loss of distillation in its loss."""
        run = self._run
        if run is None:
            return training_step(*args, **kw)
        result, distillation = run.step(training_step, *args, **kw)
        if distillation is None:
            return result
        pl_module.log(self._logged_as, distillation.detach())
        if isinstance(result, Tensor):
            return (1 - self.weight) * result + self.weight * distillation
        loss = (1 - self.weight) * result["loss"] + self.weight * distillation
        return {**result, "loss": loss}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.clock.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.clock.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._run.text:
            rank_zero_info(f"Distillation: {self._run.text}.{self._run.clock}")
        self._let_go()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._hooks.unwrap()
        if self._run is not None:
            self._run.remove()
            if self.teacher is None:
                self._saved = self._run.state()  # for checkpoints that are saved after the fit
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        if self.teacher is not None:
            return {}
        teacher = self._saved if self._run is None else self._run.state()
        return {} if teacher is None else {"teacher": teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("teacher")


class _Around:
    """Runs `training_step` with a teacher; in a copy of the module it runs the step alone."""

    def __init__(self, callback: DistillationCallback | None) -> None:
        self._callback = callback

    def __deepcopy__(self, memo: Any) -> _Around:
        return _Around(None)

    def __call__(
        self, pl_module: LightningModule, training_step: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        if self._callback is None:
            return training_step(*args, **kw)
        return self._callback.step(pl_module, training_step, *args, **kw)


class _Run:
    """One fit: the teacher, and the layers whose outputs are compared.

    Attributes:
        text: What is compared with what, once that is known.
        clock: The time that the teacher takes.
    """

    def __init__(
        self,
        callback: DistillationCallback,
        pl_module: LightningModule,
        teacher: LightningModule,
    ) -> None:
        self._callback = callback
        self._pl_module = pl_module
        self._teacher = teacher
        self._student_outputs: LayerOutputs | None = None
        self._teacher_outputs: LayerOutputs | None = None
        self._losses: dict[str, OutputLoss] = {}
        self._writes: bool | None = None  # whether a step writes to its batch; None: not known yet
        self.text = ""
        self.clock = _Clock(pl_module.device)

    def step(self, training_step: Callable[..., Any], *args: Any, **kw: Any) -> tuple[Any, Any]:
        """What the module's step returns, and the loss of distillation; None where it has none."""
        if self._student_outputs is None:
            self._start(*copy.deepcopy(args), **copy.deepcopy(kw))
        students, teachers = self._student_outputs, self._teacher_outputs
        assert students is not None
        assert teachers is not None
        given = (args, kw)
        others, kw_of_teacher = given if self._writes is False else copy.deepcopy(given)
        known = self._writes is not None
        versions = [] if known else [_versions(x) for x in (given, (others, kw_of_teacher))]
        random = _collect_rng_states()
        with students.recording():
            result = training_step(*args, **kw)
        if not (isinstance(result, Tensor) or (isinstance(result, Mapping) and "loss" in result)):
            students.clear()
            return result, None  # a step that is left out, or what Lightning refuses
        calls = {name: len(found) for name, found in students.found.items()}
        with self.clock.teaching(), isolate_rng():
            _set_rng_states(random)
            with teachers.recording(until=calls):
                self._teach(*others, **kw_of_teacher)
        if not known:
            after = [_versions(x) for x in (given, (others, kw_of_teacher))]
            self._writes = None in versions or versions != after
        terms = []
        for name, ours in students.found.items():
            theirs = teachers.found[name]
            if not ours or len(ours) != len(theirs):
                raise ValueError(
                    f"DistillationCallback: layer {name!r} ran {len(ours)} times in a training "
                    f"step and {len(theirs)} times in the teacher's; expected the same number, and "
                    "at least 1. Name another layer: layers=[...]."
                )
            terms += [self._compare(name, *pair) for pair in zip(ours, theirs, strict=True)]
        students.clear()
        teachers.clear()
        return result, torch.stack(terms).mean()

    def _start(self, *args: Any, **kw: Any) -> None:
        """Find the layers, by a first run of the teacher that must not reach the module."""

        def teach() -> None:
            with running(self._pl_module):
                self._teach(*args, **kw)

        with isolate_rng():
            try:
                last = last_layer(self._teacher, teach)
            except ReachesOriginal as error:
                raise ValueError(f"DistillationCallback: {error}.") from error
        layers = self._callback.layers
        if layers is None:
            if last is None:
                raise ValueError(
                    "DistillationCallback: no layer with a weight ran in the teacher's "
                    "training_step. Name those to compare: layers=[...]."
                )
            layers = [plain_name(last)]
        pairs = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
        students = _modules(self._pl_module, pairs, "module")
        teachers = _modules(self._teacher, pairs.values(), "teacher")
        for name, module in students.items():
            self._losses[name] = self._loss_for(module)
        self._student_outputs = LayerOutputs(students)
        self._teacher_outputs = LayerOutputs(dict(zip(pairs, teachers.values(), strict=True)))
        self.text = self._described([*pairs])

    def _loss_for(self, module: torch.nn.Module) -> OutputLoss:
        if self._callback.loss == "kl":
            return functools.partial(self._divergence, dim=class_dimension(module))
        if self._callback.loss == "mse":
            return lambda student, teacher: F.mse_loss(in_float(student), in_float(teacher))
        assert not isinstance(self._callback.loss, str)
        return self._callback.loss

    def _divergence(self, student: Tensor, teacher: Tensor, dim: int) -> Tensor:
        temperature: Any = self._callback.temperature
        if temperature == AUTO:
            temperature = fitting_temperature(student, teacher, dim)
        return kl_divergence(student, teacher, temperature, dim)

    def _teach(self, *args: Any, **kw: Any) -> None:
        batch, *_ = args
        index = args[1] if len(args) > 1 else kw.get("batch_idx", 0)
        # As it is written: a compiled copy would be compiled anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self._teacher.training_step(*step_arguments(self._teacher, batch, index))

    def _compare(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"DistillationCallback: layer {name!r} returned shape {tuple(student.shape)}, its "
                f"teacher {tuple(teacher.shape)}; expected the same."
            )
        if not student.requires_grad:
            raise ValueError(
                f"DistillationCallback: the output of layer {name!r} has no gradient: it is frozen "
                "or runs under no_grad. Name another layer: layers=[...]."
            )
        with torch.autocast(student.device.type, enabled=False):
            return self._losses[name](student, teacher)

    def _described(self, layers: list[str]) -> str:
        parameters = [*self._teacher.parameters()]
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in parameters)
        loss = self._callback.loss if isinstance(self._callback.loss, str) else "own loss"
        degree = self._callback.temperature
        degree = degree if isinstance(degree, str) else f"{degree:g}"
        heat = f" at temperature {degree}" if loss == "kl" else ""
        names = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if layers[3:] else "")
        return (
            f"{loss}{heat} on the output of {names}, weight {self._callback.weight:g}; the "
            f"teacher has {count / 1e6:.2f} M parameters ({size / 1e6:.1f} MB)"
        )

    def state(self) -> dict[str, Tensor]:
        """The teacher's weights and buffers, on the CPU."""
        return {name: tensor.cpu() for name, tensor in state_tensors(self._teacher).items()}

    def remove(self) -> None:
        """Take the hooks off."""
        for outputs in (self._student_outputs, self._teacher_outputs):
            if outputs is not None:
                outputs.remove()


class _Clock:
    """How much of a step the teacher takes, measured over the first few steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._step = -1
        self._began: float | None = None
        self._whole = self._taught = 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def begin(self) -> None:
        self._step += 1
        if self._step in _TIMED:
            self._began = self._now()

    def end(self) -> None:
        if self._began is not None:  # a batch that is None ends without a start
            self._whole += self._now() - self._began
            self._began = None

    @contextmanager
    def teaching(self) -> Iterator[None]:
        if self._step not in _TIMED:
            yield
            return
        start = self._now()
        yield
        self._taught += self._now() - start

    def __str__(self) -> str:
        if not self._whole:
            return ""
        return f" It took {100 * self._taught / self._whole:.0f} % of a training step."


def _load(teacher: LightningModule, state: Mapping[str, Any]) -> None:
    """Load weights and buffers; what a module leaves out of its checkpoints stays as it is.

    Raises:
        RuntimeError: If names or shapes differ.
    """
    expected = state_tensors(teacher)
    given = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if teacher.strict_loading and given.keys() != expected.keys():
        parts = [
            f"{what} {', '.join(sorted(names)[:5])}"
            for what, names in (
                ("it lacks", expected.keys() - given.keys()),
                ("it has", given.keys() - expected.keys()),
            )
            if names
        ]
        raise RuntimeError("; ".join(parts))
    teacher.load_state_dict(given, strict=False)


def _weights_in(path: str | Path) -> dict[str, Tensor]:
    """The weights in a Lightning checkpoint, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"DistillationCallback: {path}: no such file.") from None
    except Exception as error:
        raise ValueError(
            f"DistillationCallback: {path} cannot be read as a checkpoint of weights and plain "
            f"data ({first_lines(str(error), 1)}). Load the module yourself: "
            "teacher=Module.load_from_checkpoint(...)."
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(
            f"DistillationCallback: no 'state_dict' in {path}; expected a Lightning checkpoint."
        )
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return state


def _modules(model: LightningModule, names: Any, role: str) -> dict[str, torch.nn.Module]:
    known = {plain_name(name): module for name, module in model.named_modules()}
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"DistillationCallback: the {role} has no layers {missing}; expected of "
            f"{', '.join([name for name in known if name][:40])}. Name them by layers=[...], or "
            "layers={name: name in the teacher}."
        )
    return {name: known[name] for name in names}


def _versions(batch: Any) -> list[int] | None:
    """A number of each tensor that grows when it is written to; None if some cannot be seen."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, (Tensor, int, float, str, bytes, type(None))) for leaf in leaves):
        return None
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
