"""One row of the table: trains a public module, exports it, resumes it, and watches its weights.

    python -m tests.public.one NAME RESULT.json

Each question is answered by itself: what fails costs its own column.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from statqat_lightning import ExportCallback, StatQATCallback, load_quantized
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.public.modules import CASES, Case, loader
from tests.public.probe import Row, WeightProbe, disagreements

EPOCHS = 2
PROBED_BATCH = 3
_OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": EPOCHS,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


class SeedEachBatch(Callback):
    """The same random numbers in a batch, whatever has been drawn before."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Keep(Callback):
    """Keeps the module as it was and the batches as they came: what a library makes itself."""

    def __init__(self) -> None:
        self.start: LightningModule | None = None
        self.module: LightningModule | None = None
        self.batches: list[Any] = []
        self.problem = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = pl_module
        if self.start is None:
            try:
                self.start = copy.deepcopy(pl_module)
            except Exception as error:
                self.problem = _short(error)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0:
            self.batches.append(copy.deepcopy(batch))


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(float(loss))


class Watch(Callback):
    """Puts the probe around one training step."""

    def __init__(self) -> None:
        self.probe: WeightProbe | None = None
        self._batches = 0
        self._stack = contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1  # an epoch may have one alone
        if self._batches == PROBED_BATCH:
            self.probe = WeightProbe(pl_module)
            self._stack.enter_context(self.probe.watching(batch))

    def on_before_zero_grad(self, *args: Any) -> None:
        self._stack.close()

    def on_before_backward(self, *args: Any) -> None:
        self._stack.close()

    def on_train_batch_end(self, *args: Any) -> None:
        self._stack.close()

    def on_exception(self, *args: Any) -> None:
        self._stack.close()


class Guarded(ExportCallback):
    """The export, whose errors are kept and do not end the fit."""

    problem = ""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        with self._guard():
            super().setup(*args, **kwargs)

    def on_fit_start(self, *args: Any) -> None:
        with self._guard():
            super().on_fit_start(*args)

    def on_fit_end(self, *args: Any) -> None:
        if not self.problem:
            with self._guard():
                super().on_fit_end(*args)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.problem = _short(error)


def fit(
    module: Any, data: Any, *callbacks: Callback, keep: Path | None = None, resume: Any = None
) -> None:
    """A plain Trainer of the module's own Lightning, for modules that are trained by one.

    Args:
        module: The module.
        data: Its training data.
        *callbacks: The callbacks.
        keep: A folder for a checkpoint of every epoch.
        resume: The checkpoint to go on from.
    """
    theirs: Any = lightning.pytorch
    if any(cls.__module__.startswith("pytorch_lightning.") for cls in type(module).__mro__):
        import pytorch_lightning as theirs
    more = []
    if keep is not None:
        kept = theirs.callbacks.ModelCheckpoint(keep, filename="{epoch}", save_top_k=-1)
        more.append(kept)
    with tempfile.TemporaryDirectory() as folder:
        trainer = theirs.Trainer(
            callbacks=[*callbacks, *more],
            default_root_dir=folder,
            enable_checkpointing=keep is not None,
            **_OPTIONS,
        )
        trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)


def run(name: str) -> dict[str, Any]:
    """All columns of a row."""
    named = CASES[name]
    result: dict[str, Any] = {
        "name": name,
        "library": named.distribution,
        "title": named.title,
        "version": version(named.distribution),
        "trains": False,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(0)
            _fill(result, named.build(), Path(folder))
        except Exception as error:
            traceback.print_exc()
            result.setdefault("problems", {})["fit"] = _short(error)
    ours = {str(w.message) for w in caught if "statqat" in f"{w.category.__module__} {w.message}"}
    ours |= {str(w.message) for w in caught if "StatQAT" in str(w.message)}
    result["warnings"] = sorted(re.sub(r"\s+", " ", text)[:500] for text in ours)
    return result


def _fill(result: dict[str, Any], case: Case, folder: Path) -> None:
    problems: dict[str, str] = result.setdefault("problems", {})
    statqat = StatQATCallback(verbose=False, **case.options)
    losses, watch, keep = Losses(), Watch(), Keep()
    native = Guarded(folder / "native", files=("native",), measure_latency=False)
    onnx = Guarded(folder / "onnx", files=("onnx",), measure_latency=False)
    own_fit = case.fit is not None
    callbacks = [keep, statqat, SeedEachBatch(), losses, watch, native, onnx]
    if own_fit:
        assert case.fit is not None
        options = _OPTIONS | {"enable_checkpointing": False, "default_root_dir": str(folder)}
        case.fit(callbacks, options)
        module = keep.module
    else:
        assert case.make is not None
        assert case.batches is not None
        torch.manual_seed(0)
        module = case.make()
        fit(module, loader(case.batches()), *callbacks)
    assert module is not None
    finite = bool(losses.losses) and all(torch.tensor(losses.losses).isfinite().tolist())
    result["steps"] = len(losses.losses)
    result["trains"] = finite and bool(quantized_layers(module))
    if not finite:
        problems["fit"] = f"losses {losses.losses[:8]}"
    _report(result, statqat, watch)
    _exports(result, native, onnx)
    start = _maker(case, keep)
    if start is None:
        problems["resumes"] = f"the module cannot be copied ahead of training: {keep.problem}"
        return
    if result["native"]:
        with _column(problems, "native") as ok:
            again = load_quantized(start(), folder / "native.safetensors")
            # A layer that never ran is missing there; see the probe's column for those.
            trained = quantizer_state(module)  # layers that never ran are in float in the file
            in_use = sorted(name for name, state in trained.items() if state["ran"])
            _same(sorted(quantizer_state(again)), in_use)
        result["native"] = ok()
    if case.reload is not None:
        with _column(problems, "reloads") as ok:
            _reload(case, folder)
        result["reloads"] = ok()
    make = (lambda: keep.batches) if own_fit else case.batches
    with _column(problems, "resumes") as ok:
        _resume(start, make, folder, case.options)
    result["resumes"] = ok()
    if not result["resumes"]:
        with _column({}, "resumes") as ok:
            _resume(start, make, folder / "float", None)
        result["float_resumes"] = ok()


def _reload(case: Case, folder: Path) -> None:
    """A script without an edit that saves and loads by the library's means keeps its quantizers."""
    assert case.fit is not None
    assert case.reload is not None
    config = folder / "qat.yaml"
    config.write_text("weights: int4\nverbose: false\nsnr_monitor: false\n", encoding="utf-8")
    os.environ["STATQAT_CONFIG"] = str(config)
    try:
        case.fit([], _OPTIONS | {"enable_checkpointing": False, "default_root_dir": str(folder)})
        trained, loaded = case.reload(folder)
    finally:
        del os.environ["STATQAT_CONFIG"]
    assert quantizer_state(trained), "not quantized"
    _same(quantizer_state(loaded), quantizer_state(trained))
    _same(loaded.state_dict(), trained.state_dict())


@contextlib.contextmanager
def _column(problems: dict[str, str], name: str) -> Iterator[Callable[[], bool]]:
    """Keep what goes wrong inside; yields what tells afterwards whether nothing did."""
    failed: list[str] = []
    try:
        yield lambda: not failed
    except Exception as error:
        traceback.print_exc()
        failed.append(_short(error))
        problems[name] = failed[0]


def _maker(case: Case, keep: Keep) -> Callable[[], LightningModule] | None:
    if case.make is not None:
        make = case.make

        def seeded() -> LightningModule:
            torch.manual_seed(0)
            return make()

        return seeded
    start = keep.start
    return None if start is None else lambda: copy.deepcopy(start)


def _resume(
    start: Callable[[], LightningModule],
    batches: Callable[[], Sequence[Any]] | None,
    folder: Path,
    options: dict[str, Any] | None,
) -> None:
    """The run that stops after an epoch and goes on equals the one that does not, bit for bit.

    Without options it is a float run.
    """
    assert batches is not None

    def ours() -> list[Callback]:
        if options is None:
            return [SeedEachBatch()]
        return [StatQATCallback(verbose=False, **options), SeedEachBatch()]

    def data() -> Any:
        return loader(copy.deepcopy(list(batches())))

    whole, rest = start(), start()
    fit(whole, data(), *ours(), keep=folder)
    fit(rest, data(), *ours(), keep=folder / "again", resume=folder / "epoch=0.ckpt")
    _same(whole.state_dict(), rest.state_dict())
    _same(quantizer_state(whole), quantizer_state(rest))


def _report(result: dict[str, Any], statqat: StatQATCallback, watch: Watch) -> None:
    report = statqat.report
    assert report is not None
    rows = [Row(row.name, row.weight is not None, row.type, row.reason) for row in report.rows]
    total = sum(row.parameters for row in report.rows)
    inside = sum(row.parameters for row in report.rows if row.weight is not None)
    result["share"] = round(inside / max(total, 1), 4)
    result["layers"] = [sum(r.quantized for r in rows), len(rows)]
    result["float"] = _left(rows)
    if watch.probe is None:
        result["probe"] = ["the probe has seen no step"]
        return
    result["probe"] = disagreements(watch.probe, rows)
    seen = watch.probe.uses.values()
    result["probed"] = [sum(bool(u.rounded) for u in seen), sum(bool(u.unrounded) for u in seen)]


def _left(rows: Sequence[Row]) -> list[str]:
    """What is in float, by name and type, without normalisation; numbers become stars."""
    found: dict[str, int] = {}
    for row in rows:
        if row.quantized or row.reason.startswith("normalisation") or "Norm" in row.type:
            continue
        name = re.sub(r"\d+", "*", row.name) or "(itself)"
        found[f"{name} ({row.type})"] = found.get(f"{name} ({row.type})", 0) + 1
    return [f"{name} x{n}" if n > 1 else name for name, n in found.items()]


def _exports(result: dict[str, Any], native: Guarded, onnx: Guarded) -> None:
    problems = result["problems"]
    result["native"] = result["onnx"] = False
    if native.problem:
        problems["native"] = native.problem
    elif native.report is None or native.report.native is None:
        problems["native"] = "no file: " + " ".join(native.report.notes if native.report else ())
    elif native.report.native.max_difference != 0:
        problems["native"] = f"differs by {native.report.native.max_difference:.3g}"
    else:
        result["native"] = True
    if onnx.problem:
        problems["onnx"] = onnx.problem
    elif onnx.report is None or onnx.report.onnx is None:
        problems["onnx"] = "no file: " + " ".join(onnx.report.notes if onnx.report else ())
    else:
        artefact = onnx.report.onnx
        result["onnx"] = artefact.divergence is None
        result["onnx_snr_db"] = round(min(float(artefact.snr_db), 999.0), 1)
        if artefact.divergence is not None:
            problems["onnx"] = " ".join(artefact.remarks)
    for name in ("native", "onnx"):
        if name in problems:
            problems[name] = _cut(problems[name])


def _same(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, Tensor):
        if not torch.equal(left, right) and not (left.isnan() == right.isnan()).all():
            raise AssertionError(f"{path} differs")
        if not torch.equal(left.nan_to_num(), right.nan_to_num()):
            raise AssertionError(f"{path} differs by {(left - right).abs().max():.3g}")
    elif isinstance(left, dict):
        if left.keys() != right.keys():
            raise AssertionError(f"{path} keys differ: {sorted(left.keys() ^ right.keys())[:4]}")
        for key in left:
            _same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        if len(left) != len(right) and all(isinstance(x, str) for x in (*left, *right)):
            raise AssertionError(f"{path} one has {sorted({*left} ^ {*right})}, the other has not")
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            _same(a, b, f"{path}/{i}")
    elif left != right:
        raise AssertionError(f"{path}: {left} and {right}")


def _short(error: BaseException) -> str:
    return _cut(f"{type(error).__name__}: {error}")


def _cut(text: str, most: int = 300) -> str:
    text = re.sub(r"(/[\w.-]+)+/(?=[\w.-]+)", "", text)  # folders of this machine
    text = re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"\s+", " ", text)).strip()
    return text if len(text) <= most else f"{text[:most]}…"


def main(name: str, path: str) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = run(name)
    result["seconds"] = round(time.perf_counter() - started)
    Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
