"""Advice from a checkpoint, without the class of its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from statqat_lightning import StatQATCallback, TensorSpec
from statqat_lightning.export import file_advice, save_native
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.digits import DigitsModule, held_out, loader, make_trainer, statqat
from tests.export.models import recipe_of

FORMATS = ("int2", "int4", "int8", "fp4_e2m1", "mxfp4")


def trained(callback: StatQATCallback, path: str = "run.ckpt") -> DigitsModule:
    torch.manual_seed(1)
    module = DigitsModule()
    trainer = make_trainer(callback, limit_train_batches=6)
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint(path)
    return module.eval()


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:9"])
def test_of_the_format_in_force_it_says_what_was_measured(granularity: str) -> None:
    # Least error of the weight itself, as a file knows it.
    weights = TensorSpec("int4", granularity, objective="weight")
    module = trained(statqat(weights, "int4", first_last_bits=None))
    advice = file_advice("run.ckpt", FORMATS)
    truth = snr_by_tensor(module)
    found = {tensor.name: tensor for tensor in advice.tensors}
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        # Inputs were measured in training, where scales rest.
        tolerance = 0.05 if tensor.is_weight else 1.5
        assert tensor.costs["int4"].snr_db == pytest.approx(truth[name], abs=tolerance), name
        decibels = [tensor.costs[fmt].snr_db for fmt in ("int2", "int4", "int8")]
        assert decibels == sorted(decibels)
        assert ("mxfp4" in tensor.costs) == tensor.is_weight
    assert not advice.has_losses
    assert advice.num_batches == 0
    sizes = {
        f"{layer.name}/weight": layer.module.weight.numel() for layer in quantized_layers(module)
    }
    assert {name: t.parameters for name, t in found.items() if t.is_weight} == sizes


def test_weights_of_other_granularities_are_measured_by_hand() -> None:
    module = trained(statqat(TensorSpec("int8", "per_tensor"), "int8", first_last_bits=None))
    advice = file_advice("run.ckpt", ["int3"])
    for layer in quantized_layers(module):
        weight = layer.module.weight.detach().double()
        levels = torch.arange(-3.0, 4.0, dtype=torch.float64)
        scales = torch.linspace(0.05, 1, 400) * float(weight.abs().max()) / 1.5
        errors = []
        for scale in scales.double():
            nearest = (weight.flatten()[:, None] - scale * levels).abs().amin(1)
            errors.append(nearest.square().sum())
        best = float(10 * torch.log10(weight.square().sum() / torch.stack(errors).amin()))
        (tensor,) = [t for t in advice.tensors if t.name == f"{layer.name}/weight"]
        assert tensor.costs["int3"].snr_db == pytest.approx(best, abs=0.05)


@pytest.mark.filterwarnings("ignore:StatQAT idle/input. did not run in calibration")
def test_inputs_without_spectra_and_layers_that_never_ran_have_no_row() -> None:
    class Idle(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    module = Idle()
    trainer = make_trainer(
        statqat("int4", TensorSpec("int4", quantizer="minmax"), first_last_bits=None),
        limit_train_batches=1,
    )
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint("run.ckpt")
    advice = file_advice("run.ckpt")
    assert {t.name for t in advice.tensors} == {f"net.{i}/weight" for i in (0, 3, 8)}
    assert advice.left_out == ("idle",)


def test_what_is_no_checkpoint_of_ours_is_said() -> None:
    module = trained(statqat())
    save_native(module, "m.safetensors", recipe_of("int4", "int4"))
    torch.save({"state_dict": module.state_dict()}, "float.ckpt")
    torch.save([1], "list.ckpt")
    Path("cut.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:500])
    for path, said in (
        ("m.safetensors", "a file of codes, which are rounded already; expected the checkpoint"),
        ("float.ckpt", "a float model, whose inputs nobody has seen"),
        ("list.ckpt", "no 'state_dict' in it"),
        ("cut.ckpt", "not a whole"),
    ):
        with pytest.raises(ValueError, match=said):
            file_advice(path)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: no such file"):
        file_advice("none.ckpt")
    with pytest.raises(ValueError, match="got 'int44'"):
        file_advice("run.ckpt", ["int44"])
