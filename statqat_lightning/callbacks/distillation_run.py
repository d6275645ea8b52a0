"""What a distillation keeps while a Trainer runs: the teacher's outputs, losses, time."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statqat_lightning.callbacks.trial_copy import running
from statqat_lightning.callbacks.trial_run import step_arguments
from statqat_lightning.export.wording import first_lines
from statqat_lightning.layers.module_names import plain_name
from statqat_lightning.model.distillation import (
    LayerOutputs,
    OutputLoss,
    class_dimension,
    fitting_temperature,
    in_float,
    kl_divergence,
    last_layer,
)
from statqat_lightning.model.isolated_copy import ReachesOriginal
from statqat_lightning.model.quantized_model import state_tensors

if TYPE_CHECKING:
    from statqat_lightning.callbacks.distillation import DistillationCallback

AUTO: Final = "auto"
_TIMED = range(1, 9)  # steps whose time is measured; the first one is another than those to come


class AroundSteps:
    """Runs `training_step` with a teacher; in a copy of the module it runs the step alone."""

    def __init__(self, callback: DistillationCallback | None) -> None:
        self._callback = callback

    def __deepcopy__(self, memo: Any) -> AroundSteps:
        return AroundSteps(None)

    def __call__(
        self, pl_module: LightningModule, training_step: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        if self._callback is None:
            return training_step(*args, **kw)
        return self._callback.step(pl_module, training_step, *args, **kw)


class DistillationRun:
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
        temperature = self._callback.temperature
        degree = temperature if isinstance(temperature, str) else f"{temperature:g}"
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


def load_teacher(teacher: LightningModule, state: Mapping[str, Any]) -> None:
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


def weights_in(path: str | Path) -> dict[str, Tensor]:
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
