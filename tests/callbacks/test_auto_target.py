"""`StatQATCallback(target="auto")`, the default: what is exported runs in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.recipes.recipe import TensorSpec
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    held_out,
    loader,
    make_trainer,
    once,
    statqat,
    train,
)
from tests.callbacks.test_target import PLACES, ResidualModule, places

FAST: dict[str, Any] = {"measure_latency": False, "test_examples": 0}


def as_it_comes(**options: Any) -> Any:
    return statqat("int8", "int8", **options)


def export(tmp_path: Path, **options: Any) -> ExportCallback:
    return ExportCallback(tmp_path / "m", **FAST | options)


def test_a_run_that_writes_onnx_is_one_for_onnxruntime(tmp_path: Path) -> None:
    callback, writer = as_it_comes(), export(tmp_path)
    module, _ = train(callback, writer, module=ResidualModule)
    named = statqat("int8", "int8", target="onnxruntime")
    same, _ = train(named, export(tmp_path / "other"), module=ResidualModule)

    assert (callback.target, callback.effective_target) == ("auto", "onnxruntime")
    assert places(module) == PLACES
    assert_same(dict(module.state_dict()), dict(same.state_dict()))
    assert str(callback.report) == str(named.report)
    assert writer.report is not None
    assert writer.report.onnx is not None
    assert not any("in float" in remark for remark in writer.report.onnx.remarks)


@pytest.mark.parametrize("options", [None, {"files": ("native",)}, {"files": ("native", "pt2")}])
def test_without_such_a_file_there_is_no_target(
    tmp_path: Path, options: dict[str, Any] | None
) -> None:
    callback = as_it_comes()
    others = [] if options is None else [export(tmp_path, **options)]
    module, _ = train(callback, *others, module=ResidualModule)
    plain, _ = train(statqat("int8", "int8", target=None), module=ResidualModule)

    assert callback.effective_target is None
    assert places(module) == places(plain) != PLACES
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize(
    ("files", "target"),
    [
        ({"files": ("native", "pte")}, "executorch"),
        ({"files": ("native", "onnx", "pte")}, "onnxruntime"),  # the first of the files
    ],
)
def test_a_pte_file_is_for_executorch(tmp_path: Path, files: dict[str, Any], target: str) -> None:
    pytest.importorskip("executorch")
    callback = as_it_comes()
    train(callback, export(tmp_path, strict=False, **files), module=ResidualModule)
    assert callback.effective_target == target


@pytest.mark.filterwarnings("ignore::statqat_lightning.callbacks.input_warnings.ExportWarning")
@pytest.mark.parametrize(
    "formats",
    [
        ("int4", "int4"),  # no integer kernels
        ("int8", None),
        ("int8", "nf4"),  # nothing that a file for a runtime can hold
        (TensorSpec("int8", quantizer="lsq"), "int8"),  # nobody knows ahead where
    ],
)
def test_formats_that_gain_nothing_have_no_target(tmp_path: Path, formats: Any) -> None:
    callback = statqat(*formats, first_last_bits=None)
    module, _ = train(callback, export(tmp_path, strict=False), limit_train_batches=2)
    plain, _ = train(statqat(*formats, first_last_bits=None, target=None), limit_train_batches=2)
    assert callback.effective_target is None
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))


def test_where_no_batch_can_be_looked_at_a_note_says_so(tmp_path: Path) -> None:
    callback = as_it_comes()
    writer = export(tmp_path)
    train(callback, writer, module=ResidualModule, data=once())
    assert callback.effective_target is None
    assert "Not placed for onnxruntime, whose files will run slower: no training batch" in " ".join(
        str(callback.report).split()
    )
    assert writer.report is not None
    assert writer.report.onnx is not None
    assert writer.report.onnx.max_steps < 1


# Checkpoints


def run_of(tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"data": loader(shuffle=False), "max_epochs": 3} | options
    return train(*callbacks, SeedEachBatch(), keeper, module=ResidualModule, **options)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, witness = run_of(tmp_path, as_it_comes(), export(tmp_path))
    checkpoint = tmp_path / "epoch=1.ckpt"
    # With or without an export: the checkpoint knows what the run was placed for.
    for others in ([export(tmp_path)], []):
        callback = as_it_comes()
        resumed, rest = run_of(tmp_path, callback, *others, ckpt_path=checkpoint, seed=99)
        assert callback.effective_target == "onnxruntime"
        assert places(resumed) == PLACES
        assert_same(rest.states, witness.states[-STEPS_PER_EPOCH:])
        assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_resumed_run_keeps_its_places_where_no_batch_can_be_looked_at(tmp_path: Path) -> None:
    run_of(tmp_path, as_it_comes(), export(tmp_path), max_epochs=1)
    callback, writer = as_it_comes(), export(tmp_path)
    resumed, _ = run_of(
        tmp_path, callback, writer, data=once(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2
    )
    assert callback.effective_target == "onnxruntime"
    assert places(resumed) == PLACES
    assert writer.report is not None
    assert writer.report.onnx is not None
    assert writer.report.onnx.max_steps < 1e-3
    entry = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)[CHECKPOINT_KEY]
    assert entry["placed_for"]["target"] == "onnxruntime"


def test_a_class_that_is_only_called_like_the_callback_is_none(tmp_path: Path) -> None:
    foreign = type("ExportCallback", (Callback,), {"files": ("native", "onnx")})
    callback = as_it_comes()
    train(callback, foreign(), module=ResidualModule)
    assert callback.effective_target is None


def test_a_run_without_a_target_goes_on_without_one(tmp_path: Path) -> None:
    whole, _ = run_of(tmp_path, statqat("int8", "int8", target=None))
    callback = as_it_comes()
    resumed, _ = run_of(
        tmp_path, callback, export(tmp_path), ckpt_path=tmp_path / "epoch=1.ckpt", seed=99
    )
    assert callback.effective_target is None
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_checkpoint_is_evaluated_as_it_was_placed(tmp_path: Path) -> None:
    run_of(tmp_path, as_it_comes(), export(tmp_path), max_epochs=1)
    callback, fresh = as_it_comes(), ResidualModule()
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make_trainer(callback, SeedEachBatch(), keeper).test(
        fresh, held_out(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
    )
    assert callback.effective_target == "onnxruntime"
    assert places(fresh) == PLACES


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int8", None)])
def test_a_target_that_changes_nothing_is_kept_in_checkpoints(
    tmp_path: Path, formats: tuple[str, str | None]
) -> None:
    def named() -> Any:
        return statqat(*formats, target="onnxruntime")

    keeper = ModelCheckpoint(tmp_path, filename="run", save_top_k=-1)
    train(named(), keeper, module=DigitsModule)
    entry = torch.load(tmp_path / "run.ckpt", weights_only=False)[CHECKPOINT_KEY]
    assert entry["placed_for"]["target"] == "onnxruntime"
    train(named(), keeper, module=DigitsModule, ckpt_path=tmp_path / "run.ckpt", max_epochs=2)


def test_a_second_fit_keeps_the_target_and_another_module_has_its_own(tmp_path: Path) -> None:
    callback = as_it_comes()
    module, _ = train(callback, export(tmp_path), module=ResidualModule)
    train(callback, module=module)
    assert (callback.effective_target, places(module)) == ("onnxruntime", PLACES)
    other, _ = train(callback, module=ResidualModule)
    assert callback.effective_target is None
    assert places(other) != PLACES
