"""What the advisor predicts of networks that know CIFAR-10, and what is measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from statqat_lightning import advise, sensitivity
from statqat_lightning.insight.trials import predicted_by_layer
from tests.insight.images import cross_entropy, in_batches, mobilenet, resnet20, training_images
from tests.insight.measured import measured_snr

FORMATS = ["int2", "int3", "int4", "int6", "int8", "fp4_e2m1", "fp8_e4m3", "nf4"]


def of_images(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


@pytest.mark.cifar
def test_predicted_snr_is_measured_after_a_switch_of_resnet20(
    repository: Path, shared_data: Path
) -> None:
    model = resnet20(repository, shared_data)
    batches = in_batches(training_images(shared_data, 1024))
    advice = advise(model, batches, loss=cross_entropy, sensitivity="none", formats=FORMATS)
    assert len(advice.tensors) == 40
    for fmt in FORMATS:
        truth = measured_snr(model, batches, of_images, fmt)
        found = {t.name: t.costs[fmt].deciding_snr_db for t in advice.tensors}
        assert {name for name in found if not abs(found[name] - truth[name]) <= 0.3} == set(), fmt


def rank_correlations(model: nn.Module, batches: list[Any], formats: list[str]) -> list[float]:
    """Spearman's of the predicted change of the loss by layer and the one in the trial."""
    advice = advise(model, batches, loss=cross_entropy, formats=formats)
    trials = sensitivity(model, batches, loss=cross_entropy, formats=formats, progress=False)
    found = []
    for fmt in formats:
        predicted = predicted_by_layer(advice, fmt)
        measured = {row.layer: row.alone for row in trials.rows if row.format == fmt}
        assert predicted.keys() == measured.keys()
        pairs = [(predicted[name], measured[name]) for name in measured]
        found.append(float(spearmanr(*zip(*pairs, strict=True)).statistic))
    return found


@pytest.mark.cifar
def test_predicted_changes_of_the_loss_rank_the_layers_of_resnet20(
    repository: Path, shared_data: Path
) -> None:
    model = resnet20(repository, shared_data)
    batches = in_batches(training_images(shared_data, 1024))
    assert min(rank_correlations(model, batches, ["int2", "int4"])) >= 0.8


@pytest.mark.cifar
@pytest.mark.slow
def test_predicted_changes_of_the_loss_rank_the_layers_of_mobilenet(shared_data: Path) -> None:
    """Depthwise layers, gates, HardSwish: trained for two minutes, and then asked."""
    model = mobilenet(training_images(shared_data, 8192), 400)
    batches = in_batches(training_images(shared_data, 1024))
    with torch.no_grad():
        losses = [float(cross_entropy(model, batch)) for batch in batches]
    assert sum(losses) / len(losses) < 1.8  # it knows something: chance is 2.3
    assert min(rank_correlations(model, batches, ["int2", "int4"])) >= 0.8
