"""A training step never makes the host wait for the device.

On a CPU nothing waits, so what would wait on a GPU is found by its kind: values read by the host,
shapes that depend on values, and values uploaded from the host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import statqat_lightning
from statqat_lightning import TensorSpec
from statqat_lightning.callbacks import qat
from statqat_lightning.fake_quant import samples
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.numerics import straight_through
from tests.callbacks.digits import DigitsModule, digits, scales, small_cnn, statqat, train

PACKAGE = str(Path(statqat_lightning.__file__).parent)

# By the name of the operation in aten.
DEPENDS_ON_VALUES = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "argwhere",
}  # fmt: skip
READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__",
    "__repr__", "__format__", "__contains__",
}  # fmt: skip
UPLOADS = {"tensor", "new_tensor", "as_tensor", "asarray", "from_numpy"}


class Waits(list[str]):
    """What would wait, with the line of the package that caused it; elsewhere nothing is noted."""

    def note(self, what: str, everywhere: bool) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self.append(f"{what} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        elif everywhere:
            self.append(what)


class Operations(TorchDispatchMode):
    def __init__(self, waits: Waits, everywhere: bool) -> None:
        super().__init__()
        self.waits, self.everywhere = waits, everywhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if name in DEPENDS_ON_VALUES or masked:
            self.waits.note(name, self.everywhere)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, waits: Waits, everywhere: bool) -> None:
        super().__init__()
        self.waits, self.everywhere = waits, everywhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        read = name in READS
        upload = name in UPLOADS and not isinstance(args[-1], Tensor)
        if name in ("__getitem__", "__setitem__"):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            upload = any(isinstance(part, list) for part in parts)
        if name == "to":
            read = any(str(part) == "cpu" for part in [*args[1:], *(kwargs or {}).values()])
        if read or upload:
            self.waits.note(name, self.everywhere)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(everywhere: bool = False) -> Iterator[Waits]:
    """Note what would wait; what the package is to blame for, or `everywhere`."""
    waits = Waits()
    with Operations(waits, everywhere), Functions(waits, everywhere):
        yield waits


x = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.to(device=torch.device("cpu")),
        lambda: bool(x[0]),
        lambda: float(x[0]),
        lambda: int(x[0]),
        lambda: [1, 2, 3][x[0].long()],
        lambda: f"{x}",
        lambda: x[x > 0],
        lambda: x.clone().__setitem__(x > 0, torch.ones(2)),
        lambda: x.masked_select(x > 0),
        lambda: x.nonzero(),
        lambda: torch.where(x > 0),
        lambda: x.unique(),
        lambda: x.equal(x + 1),
        lambda: 1.0 in x,
        lambda: x[[0, 2]],
        lambda: torch.tensor([1.0, 2.0]),
        lambda: x.new_tensor([1.0]),
        lambda: torch.as_tensor([1.0]),
        lambda: torch.repeat_interleave(torch.tensor([1, 2])),
    ],
)
def test_the_watch_notices(wait: Callable[[], Any]) -> None:
    with watching(everywhere=True) as waits:
        wait()
    assert waits


def test_the_watch_lets_pass_what_waits_for_nothing() -> None:
    index = torch.tensor([0, 2])
    with watching(everywhere=True) as waits:
        y = torch.where(x > 0, x, 0.0).clamp_(0, 1)[1:] + x.new_zeros(2)
        torch._foreach_copy_([y], [x[index]])
        torch.as_tensor(y, dtype=torch.float64)
        y.to(torch.float64)
    assert waits == []


class FirstInStep(Callback):
    """Begins to watch a step before all other callbacks, once the quantizers are settled."""

    def __init__(self, settled_at: int) -> None:
        self.settled_at = settled_at
        self.waits: list[str] = []
        self.num_steps = 0
        self.seen: list[dict[str, Tensor]] = []
        self.stack = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= self.settled_at:
            self.own = self.stack.enter_context(watching())


class LastInStep(Callback):
    def __init__(self, first: FirstInStep) -> None:
        self.first = first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.first.stack.close()
        if trainer.global_step > self.first.settled_at:
            self.first.waits += self.first.own
            self.first.num_steps += 1
            self.first.seen.append(scales(pl_module))


def spec(fmt: str, quantizer: str, **options: Any) -> TensorSpec:
    return TensorSpec(fmt, quantizer=quantizer, **options)


RECIPES: dict[str, tuple[Any, Any]] = {
    "the defaults": ("int8", "int8"),
    "few bits": ("int4", "int4"),
    # With the default tolerance, scales of E4M3 rest.
    "floats": ("fp4", spec("fp8", "iterative", tolerance=0.0)),
    "zero point": ("fp8", "fp4"),
    "groups": (TensorSpec("int4", "per_group:36"), "uint4"),
    "codebook": ("nf4", "int8"),
    "blocks": ("mxfp4", "int8"),
    "blocks and tensor": ("nvfp4", "int8"),
    "minmax": (spec("int4", "minmax"), spec("int8", "minmax")),
    "moving average": ("int4", spec("int8", "moving_average")),
    "percentile": (spec("int4", "percentile"), spec("int8", "percentile")),
    "grid": (spec("int4", "mse_grid"), spec("int8", "mse_grid")),
    "octav": (spec("int4", "octav"), spec("int8", "octav")),
    "iterative": (spec("int4", "iterative"), spec("int4", "iterative")),
    "learned": (spec("int4", "lsq"), spec("int4", "lsq")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_settled_step_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU has its own way through fake quantization, which may read what is there already.
    for module in (samples, straight_through):
        monkeypatch.setattr(module, "is_plain_cpu", lambda x: False)
    # Signs are decided in the first eight batches; weights are searched at every sixteenth.
    first = FirstInStep(settled_at=9)
    weights, inputs = RECIPES[name]
    callbacks = (
        first,
        statqat(weights, inputs, freeze_at=None, exclude=["net.0"]),
        LastInStep(first),
    )
    train(*callbacks, max_epochs=5, limit_val_batches=0)
    assert first.num_steps == 21
    assert sorted(set(first.waits)) == []
    moved = {n for n, scale in first.seen[0].items() if not scale.equal(first.seen[-1][n])}
    assert {tensor.rpartition("/")[2] for tensor in moved} == {"weight", "input"}


def test_one_reduction_over_ranks_for_all_layers() -> None:
    model = small_cnn()
    prepare(model, "int4", "int4")
    reduced: list[str] = []

    def reduce(tensor: Tensor, operation: str) -> Tensor:
        reduced.append(operation)
        return tensor

    for _ in range(10):
        reduced.clear()
        set_observing(model, True)
        model(digits().tensors[0][:32])
        set_observing(model, False)
        refresh(model, reduce=reduce)
    assert reduced == ["sum"]


class NaNInTheMiddle(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone()
        x[0, 0, 0, 0] = torch.nan if batch_idx == 3 else 0.5
        loss = super().training_step((x, y), batch_idx)
        return loss.nan_to_num()


@pytest.mark.filterwarnings("ignore::statqat_lightning.callbacks.qat.StatQATWarning")
@pytest.mark.parametrize(("between", "expected"), [(50, 0), (4, 2)])
def test_inputs_are_checked_for_nan_only_every_so_many_batches(
    between: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (samples, straight_through):
        monkeypatch.setattr(module, "is_plain_cpu", lambda x: False)
    monkeypatch.setattr(qat, "_BATCHES_BETWEEN_CHECKS", between)
    first = FirstInStep(settled_at=9)
    callback = statqat(None, "int4", freeze_at=None)
    train(first, callback, LastInStep(first), module=NaNInTheMiddle, max_epochs=3)
    # At the fourth of the six batches of an epoch, if at all; two of these batches are watched.
    assert len(first.waits) == expected
    assert all("input_warnings.py" in wait for wait in first.waits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU nothing waits")
@pytest.mark.parametrize("name", RECIPES)
def test_a_settled_step_does_not_wait_for_a_gpu(name: str) -> None:
    model = nn.Sequential(*small_cnn()[3:]).cuda()
    weights, inputs = RECIPES[name]
    prepare(model, weights, inputs, first_last_bits=None)
    batches = [torch.randn(32, 8, 8, 8, device="cuda").relu() for _ in range(40)]

    def step(batch: Tensor) -> None:
        set_observing(model, True)
        model(batch).square().mean().backward()
        set_observing(model, False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
        refresh(model)

    for batch in batches[:20]:
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[20:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
