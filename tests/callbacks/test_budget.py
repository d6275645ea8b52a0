"""Formats within a budget: chosen before the first step, kept by checkpoints, alike on all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statqat_lightning import QuantRecipe, TensorSpec, load_quantized
from statqat_lightning.callbacks.allocation import _over_ranks, _width_of_ends
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice
from statqat_lightning.insight.loss_changes import LossChange
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.callbacks.digits import DigitsModule, held_out, loader, make_trainer, once, train

BITS = {f"int{n}": n for n in (2, 3, 4, 5, 6, 8)}


class Deep(DigitsModule):
    """Six layers: the first and the last keep their width, so four are left to choose for."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def formats_of(module: nn.Module) -> dict[str, tuple[str, str]]:
    return {
        name: (quantizers.weight.spec.format, quantizers.input.spec.format)
        for name, _, quantizers in quantized_layers(module)
        if quantizers.weight is not None and quantizers.input is not None
    }


def mean_bits(module: nn.Module) -> float:
    found = [
        (layer.weight.numel(), quantizers.weight.spec.format)
        for _, layer, quantizers in quantized_layers(module)
        if quantizers.weight is not None
    ]
    return sum(n * BITS[fmt] for n, fmt in found) / sum(n for n, _ in found)


def callback(budget: str | None = "4.5 bits", **options: Any) -> StatQATCallback:
    return StatQATCallback("int4", "int4", verbose=False, budget=budget, **options)


def test_weights_get_formats_within_the_budget_and_inputs_keep_theirs() -> None:
    torch.manual_seed(0)
    module, qat = Deep(), callback("4 bits")
    train(qat, module=module)
    assert qat.allocation is not None
    assert mean_bits(module) <= 4
    assert mean_bits(module) == pytest.approx(qat.allocation.cost)
    formats = formats_of(module)
    ends = [formats["net.0"], formats["net.17"]]
    assert ends == [("int8", "int8")] * 2
    inner = [own for name, own in formats.items() if name not in ("net.0", "net.17")]
    assert {given for _, given in inner} == {"int4"}
    assert len({weight for weight, _ in inner}) > 1 or inner[0][0] != "int4"
    assert all(q.ready for _, _, own in quantized_layers(module) for q in own.present())


def test_inputs_are_chosen_too_where_they_count() -> None:
    torch.manual_seed(0)
    module, qat = Deep(), callback("4.6 bits with inputs")
    train(qat, module=module)
    assert qat.allocation is not None
    places = {"net.0": 64, "net.17": 1}
    macs = {
        name: layer.weight.numel() * places.get(name, 64)
        for name, layer, _ in quantized_layers(module)
    }
    bits = sum(
        macs[name] * (BITS[weight] + BITS[given])
        for name, (weight, given) in formats_of(module).items()
    )
    assert bits / (2 * sum(macs.values())) == pytest.approx(qat.allocation.cost)
    assert qat.allocation.cost <= 4.6


def test_a_resumed_run_keeps_its_formats_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data = loader(shuffle=False)

    def run(qat: StatQATCallback, **options: Any) -> Deep:
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(0)
        module = Deep()
        train(qat, keep, module=module, data=data, max_epochs=2, **options)
        return module

    whole = run(callback("4 bits"))
    path = tmp_path / "epoch=0.ckpt"
    qat = callback("4 bits")
    resumed = run(qat, ckpt_path=path)
    assert qat.allocation is None  # nothing was chosen anew
    assert formats_of(resumed) == formats_of(whole)
    states = [tree_leaves([m.state_dict(), quantizer_state(m)]) for m in (whole, resumed)]
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    for other in (callback("4.2 bits"), callback(None)):
        with pytest.raises(ValueError, match="formats in the checkpoint were chosen for '4"):
            run(other, ckpt_path=path)
    loaded = load_quantized(Deep(), path)
    assert formats_of(loaded) == formats_of(whole)


def test_the_training_begins_as_one_with_that_recipe_would() -> None:
    """What chooses the formats leaves no trace: data, random numbers and weights go on as usual."""
    torch.manual_seed(0)
    first, qat = Deep(), callback("4 bits")
    train(qat, module=first, data=loader(shuffle=True))
    torch.manual_seed(0)
    second = Deep()
    recipe = qat.effective_recipe
    train(StatQATCallback(recipe=recipe, verbose=False), module=second, data=loader(shuffle=True))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_second_fit_keeps_the_formats() -> None:
    module, qat = Deep(), callback("4 bits")
    train(qat, module=module)
    before, allocation = formats_of(module), qat.allocation
    train(qat, module=module)
    assert formats_of(module) == before
    assert qat.allocation is allocation


def test_beside_a_target_places_stay_and_the_file_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    module = Deep()
    module.example_input_array = torch.rand(2, 1, 8, 8)
    qat = StatQATCallback("int8", "int8", verbose=False, budget="7 bits", target="onnxruntime")
    export = ExportCallback(tmp_path / "model", files=("onnx",))
    train(qat, export, module=module)
    assert mean_bits(module) <= 7
    assert any(q.output is not None for _, _, q in quantized_layers(module))
    assert export.report is not None
    assert export.report.onnx is not None
    assert export.report.onnx.agreement == 1.0


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="budget: got 'four'; expected"):
        callback("four")
    lsq = TensorSpec("int4", quantizer="lsq")
    with pytest.raises(ValueError, match="with learned scales"):
        StatQATCallback(lsq, lsq, budget="4 bits")
    with pytest.raises(ValueError, match="for weights in codebook formats; expected all of one"):
        train(StatQATCallback("nf4", "int8", first_last_bits=None, budget="4 bits", verbose=False))
    trainer = make_trainer(callback())
    with pytest.raises(ValueError, match=r"may be readable only once\. Choose ahead"):
        trainer.fit(DigitsModule(), once(), held_out())
    with pytest.raises(ValueError, match=r"budget of 1\.000 bits a weight; expected at least"):
        train(callback("1 bits"), module=Deep())


class SwitchedOn(Callback):
    """Whether weights are quantized, and their widths, in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        own = [q.weight for _, _, q in quantized_layers(pl_module)]
        self.seen.append((any(q.enabled for q in own), min(q.fmt.bits for q in own)))


def test_a_schedule_holds_for_the_formats_that_were_chosen() -> None:
    watch, schedule = SwitchedOn(), {"weights_at": 3, "widths": [(5, 8)]}
    qat = callback("4 bits", schedule=schedule)
    train(qat, watch, module=Deep())
    assert [on for on, _ in watch.seen[:5]] == [False] * 3 + [True] * 2
    assert {bits for _, bits in watch.seen[:5]} == {8}
    assert watch.seen[-1][1] < 8


def test_of_three_layers_the_first_and_the_last_keep_their_width() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(model, recipe=QuantRecipe.default("int4", "int4"))
    assert _width_of_ends(model) == 8
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(two, recipe=QuantRecipe.default("int4", "int4"))
    assert _width_of_ends(two) is None  # none is between them


def test_ranks_that_saw_other_layers_and_sizes_agree() -> None:
    def of_rank(macs: int, *losses: float | None) -> Advice:
        costs = {
            f"int{n}": FormatCost(9.0, None, None if x is None else LossChange(-x, x))
            for n, x in zip((4, 6, 8), losses, strict=True)
        }
        return Advice((TensorAdvice("a/weight", "a", "weight", True, 9, macs, costs, "a"),), 1)

    ranks = of_rank(100, 4.0, None, None), of_rank(300, 2.0, 1.0, None)
    tables: list[Tensor] = []

    def keep(table: Tensor, _: str) -> Tensor:
        tables.append(table)
        return table

    for own in ranks:
        _over_ranks(own, keep, 2, torch.device("cpu"))
    total = tables[0] + tables[1]
    agreed = [_over_ranks(own, lambda *_: total, 2, torch.device("cpu")) for own in ranks]
    assert agreed[0] == agreed[1]
    (tensor,) = agreed[0].tensors
    assert tensor.macs == 200
    changes = [cost.loss_change for cost in tensor.costs.values()]
    assert changes == [LossChange(-3.0, 3.0), LossChange(-1.0, 1.0), None]


def test_weights_alone_whose_quantizer_needs_no_inputs() -> None:
    qat = StatQATCallback(
        TensorSpec("int4", quantizer="minmax"), None, budget="4.5 bits", verbose=False
    )
    module = Deep()
    train(qat, module=module)
    assert qat.allocation is not None
    names = {f"{name}/weight" for name, _, _ in quantized_layers(module)}
    assert {*qat.allocation.formats} == names


def test_inputs_that_count_need_a_spectrum() -> None:
    blind = TensorSpec("int8", quantizer="minmax")
    qat = StatQATCallback("int4", blind, budget="5 bits with inputs", verbose=False)
    with pytest.raises(ValueError, match="'minmax', which keeps no energy spectrum"):
        train(qat, module=Deep())
