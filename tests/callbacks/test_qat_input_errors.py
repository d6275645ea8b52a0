"""Bad input is refused by name, or reported once, and harms no statistic."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from tests.callbacks.digits import DigitsModule, digits, loader, quantizer_of, statqat, train


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: statqat("int9"), "'int9'.*Did you mean.*int"),
        (lambda: statqat("fp4_e2m2"), "'fp4_e2m2'.*Did you mean.*'fp4_e2m1'"),
        (lambda: statqat(activations="unit8"), "'unit8'.*Did you mean.*'uint8'"),
        (lambda: statqat(TensorSpec("int4", quantizer="analytc")), "Did you mean 'analytic'"),
        (
            lambda: statqat(TensorSpec("int4", granularity="per_chanel")),
            "'per_chanel'.*Did you mean 'per_channel'",
        ),
        (lambda: statqat(None, None), "at least one format"),
        (lambda: StatQATCallback(calibration_batches=0), "calibration_batches=0"),
        (lambda: StatQATCallback(refresh_every=0), "refresh_every=0"),
        (lambda: StatQATCallback(freeze_at=0.0), r"freeze_at=0\.0"),
        (lambda: StatQATCallback(freeze_at=1.5), r"freeze_at=1\.5"),
        (lambda: StatQATCallback(momentum=0.0), r"momentum: got 0\.0"),
        (lambda: StatQATCallback(max_observed=3), "max_observed: got 3"),
    ],
)
def test_invalid_arguments_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_recipe_in_the_place_of_weights_is_refused() -> None:
    recipe: Any = QuantRecipe.default()
    with pytest.raises(TypeError, match="recipe="):
        StatQATCallback(recipe)


def test_a_pattern_without_a_layer_names_near_misses_and_the_layers() -> None:
    with pytest.raises(ValueError, match=r"'net\.33'.*Did you mean.*'net\.3'") as refused:
        train(statqat(exclude=["net.33"]))
    assert "net.0, net.3, net.8" in str(refused.value)


class NoLayers(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Embedding(3, 2))


def test_a_module_without_a_quantizable_layer_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="NoLayers: no layer can be quantized") as refused:
        train(statqat(), module=NoLayers)
    assert "net.1 (BatchNorm1d)" in str(refused.value)
    assert "net.2 (Embedding)" in str(refused.value)


def test_a_recipe_that_leaves_all_in_float_is_refused() -> None:
    recipe = QuantRecipe([QuantRule("*")])
    with pytest.raises(ValueError, match=r"leaves all layers in float: net\.0, net\.3, net\.8"):
        train(StatQATCallback(recipe=recipe, verbose=False))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_refused_by_name() -> None:
    module = DigitsModule()
    module.net[8] = nn.LazyLinear(10)
    with pytest.raises(ValueError, match=r"Layers net\.8 are lazy"):
        train(statqat(), module=module)


def with_broken_pixels(value: float) -> Any:
    """The images, with one such pixel in the third batch."""
    images, labels = digits().tensors
    images = images.clone()
    images[2 * 32 + 5, 0, 3, 3] = value
    return loader(TensorDataset(images, labels), shuffle=False)


class KeepsLearning(DigitsModule):
    """Leaves a batch out whose loss is not finite, as a GradScaler would."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else loss.new_zeros((), requires_grad=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_input_is_reported_once_and_kept_out_of_the_statistics(value: float) -> None:
    module = KeepsLearning()
    for layer in module.net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats = False  # NaN would stay in its running mean
            layer.running_mean = layer.running_var = None
    callback = statqat(freeze_at=None, calibration_batches=2)
    with pytest.warns(StatQATWarning) as caught:
        module, witness = train(
            callback, module=module, data=with_broken_pixels(value), max_epochs=2
        )
    about = [str(w.message) for w in caught if "net.0/input" in str(w.message)]
    assert len(about) == 1
    assert "NaN" in about[0]
    for state in witness.states:
        for name, entry in state.items():
            for key, entry_value in entry.items():
                if isinstance(entry_value, Tensor):
                    assert entry_value.isfinite().all(), (name, key)
    # The other values of the batch count: the scale is that of a run without the pixel, nearly.
    clean, _ = train(
        statqat(freeze_at=None, calibration_batches=2), data=loader(shuffle=False), max_epochs=2
    )
    name = "net.0/input"
    torch.testing.assert_close(
        quantizer_of(module, name).scale, quantizer_of(clean, name).scale, rtol=0.02, atol=0.0
    )


def test_negatives_into_an_unsigned_format_are_counted_and_reported() -> None:
    images, labels = digits().tensors
    shifted = images - 0.25
    share = 100 * (shifted < 0).float().mean().item()
    recipe = QuantRecipe([QuantRule("net.0", inputs="uint8")])
    callback = StatQATCallback(recipe=recipe, momentum=1.0, verbose=False)
    with pytest.warns(StatQATWarning, match=r"net\.0/input.*% of the values are") as caught:
        train(callback, data=loader(TensorDataset(shifted, labels), shuffle=False), max_epochs=2)
    (warning,) = (w for w in caught if w.category is StatQATWarning)
    text = str(warning.message)
    # The share that is reported first is that of the last batch of calibration.
    last_batch = 100 * (shifted[-32:] < 0).float().mean().item()
    assert f" {last_batch:.3g} %" in text
    assert abs(share - last_batch) < 5
    assert "a signed format, for example TensorSpec('int8')" in text


def test_negatives_after_the_sign_is_settled_name_what_keeps_the_sign() -> None:
    images, labels = digits().tensors
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    images[-64:] -= 0.5
    data = loader(TensorDataset(images, labels), shuffle=False)
    assert len(data) > 8 + 2  # batches that decide
    with pytest.warns(StatQATWarning, match=r"net\.0/input.*are negative, and uint8") as caught:
        train(statqat("int8", "int8", calibration_batches=8), data=data)
    text = next(str(w.message) for w in caught if "net.0/input" in str(w.message))
    assert "Give this input TensorSpec('int8'), without unsigned_if_nonnegative" in text


def test_a_plain_integer_name_takes_the_signed_format_for_negative_data() -> None:
    images, labels = digits().tensors
    data = loader(TensorDataset(images - 0.5, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error", StatQATWarning)
        module, _ = train(statqat(), data=data)
    assert quantizer_of(module, "net.0/input").fmt.name == "int8"
    assert quantizer_of(module, "net.3/input").fmt.name == "uint4"


class CallsByKeyword(DigitsModule):
    """Calls a layer by the name of its argument, as float code may."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(input=self.net(x))
        return out


def test_layers_can_be_called_by_keyword() -> None:
    module: LightningModule
    module, witness = train(statqat(), module=CallsByKeyword)
    assert quantizer_of(module, "head/input").ready
    assert len(witness.losses) == 6


@pytest.mark.parametrize("name", ["BitsandbytesPrecision", "TransformerEnginePrecision"])
def test_precisions_that_replace_layers_are_refused(name: str) -> None:
    plugin = type(name, (Precision,), {})()
    with pytest.raises(ValueError, match=f"a Trainer with {name}"):
        train(statqat(), plugins=[plugin])
