"""`load_from_checkpoint`, which knows nothing of quantizers, and libraries that call it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch.core.saving as saving
import pytest
import torch

from statqat_lightning import StatQATCallback, TensorSpec, load_quantized, quantized_loading
from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.qat import StatQATWarning
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.callbacks.digits import (
    DigitsModule,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    statqat,
)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[DigitsModule, Path]:
    module, path = DigitsModule(), tmp_path / "qat.ckpt"
    trainer = make_trainer(statqat())
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint(path)
    return module, path


def predicted(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        outputs: torch.Tensor = module.eval()(digits().tensors[0])
    return outputs


def test_lightning_still_builds_modules_where_we_look() -> None:
    """A canary: what `quantized_loading` replaces."""
    assert callable(saving._load_state)
    assert saving._load_from_checkpoint.__globals__ is vars(saving)


def test_learned_scales_load_strictly(tmp_path: Path) -> None:
    """They are parameters of the layers in training, and no more so than others in the file."""
    module, path = DigitsModule(), tmp_path / "lsq.ckpt"
    spec = TensorSpec("int4", quantizer="lsq")
    trainer = make_trainer(StatQATCallback(weights=spec, activations=spec))
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint(path)
    expected = predicted(module)
    plain = DigitsModule.load_from_checkpoint(path, strict=True)
    assert not quantized_layers(plain)
    assert not torch.equal(predicted(plain), expected)
    with quantized_loading():
        again = DigitsModule.load_from_checkpoint(path, strict=True)
    assert torch.equal(predicted(again), expected)
    assert torch.equal(predicted(load_quantized(DigitsModule(), path)), expected)
    # What is saved again is the same, and trains on.
    after = make_trainer(StatQATCallback(weights=spec, activations=spec), max_epochs=2)
    after.fit(again.train(), loader(), held_out(), ckpt_path=path)
    assert not torch.equal(predicted(again), expected)


def test_a_checkpoint_loads_with_its_quantizers(trained: tuple[DigitsModule, Path]) -> None:
    module, path = trained
    assert not quantized_layers(DigitsModule.load_from_checkpoint(path))
    before = saving._load_state
    with quantized_loading(), quantized_loading():
        again = DigitsModule.load_from_checkpoint(path)
    assert saving._load_state is before
    assert again.training
    assert torch.equal(predicted(again), predicted(module))
    assert_same(quantizer_state(again), quantizer_state(module))
    assert torch.equal(predicted(again), predicted(load_quantized(DigitsModule(), path)))


def test_a_loaded_module_is_saved_with_its_quantizers(
    trained: tuple[DigitsModule, Path], tmp_path: Path
) -> None:
    """As by a library that saves what it has loaded, with a Trainer without the callback."""
    module, path = trained
    with quantized_loading():
        again = DigitsModule.load_from_checkpoint(path)
    trainer = make_trainer()
    trainer.validate(again, held_out(), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    third = load_quantized(DigitsModule(), tmp_path / "again.ckpt")
    assert torch.equal(predicted(third), predicted(module))


def test_a_loaded_module_goes_on_under_the_callback(trained: tuple[DigitsModule, Path]) -> None:
    module, path = trained
    with quantized_loading():
        again = DigitsModule.load_from_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StatQATWarning)
        make_trainer(statqat()).test(again, held_out(), verbose=False)
    assert torch.equal(predicted(again), predicted(module))
    make_trainer(statqat()).fit(again.train(), loader(), held_out())
    assert all(q.ready for _, _, layer in quantized_layers(again) for q in layer.present())


def test_a_float_checkpoint_loads_as_ever(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit(DigitsModule(), loader(), held_out())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with quantized_loading():
        again = DigitsModule.load_from_checkpoint(tmp_path / "float.ckpt")
    assert not quantized_layers(again)


def test_a_module_that_differs_is_loaded_in_float_with_a_warning(
    trained: tuple[DigitsModule, Path],
) -> None:
    class Longer(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(3, 3)

    _, path = trained
    with (
        quantized_loading(),
        pytest.warns(StatQATWarning, match=r"Longer: loaded in float.*more"),
        pytest.warns(UserWarning, match="not in the checkpoint"),
    ):
        again = Longer.load_from_checkpoint(path, strict=False)
    assert not quantized_layers(again)


def test_under_statqat_config_it_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[DigitsModule, Path]
) -> None:
    module, path = trained
    (tmp_path / "qat.yaml").write_text("weights: int4\nactivations: int4\nverbose: false\n")
    monkeypatch.setattr(saving, "_load_state", saving._load_state)  # put back afterwards
    monkeypatch.setenv("STATQAT_CONFIG", str(tmp_path / "qat.yaml"))
    trainer = make_trainer()
    assert any(isinstance(c, StatQATCallback) for c in trainer.callbacks)  # type: ignore[attr-defined]
    again = DigitsModule.load_from_checkpoint(path)
    assert torch.equal(predicted(again), predicted(module))
    assert CHECKPOINT_KEY in torch.load(path, weights_only=True)


def test_what_was_loaded_without_is_told_how_to_load(trained: tuple[DigitsModule, Path]) -> None:
    _, path = trained
    module = DigitsModule.load_from_checkpoint(path)
    with pytest.warns(StatQATWarning, match=r"load_quantized.*load_from_checkpoint.*quantized_loa"):
        make_trainer(statqat()).test(module, held_out(), verbose=False)
