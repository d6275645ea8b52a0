from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec, advise, prepare
from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice, bits_of
from statqat_lightning.insight.wide_tables import in_width
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    quantizer_state,
    refresh,
    set_observing,
)
from tests.callbacks.digits import (
    Collections,
    DigitsModule,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    small_cnn,
)
from tests.insight.measured import measured_snr

FORMATS = ["int2", "int3", "int4", "int6", "int8", "fp4_e2m1", "fp8_e4m3", "nf4"]


def batches(number: int = 3) -> list[Any]:
    return [batch for batch, _ in zip(loader(shuffle=False), range(number), strict=False)]


def of_images(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def test_predicted_snr_is_what_is_measured_after_a_switch() -> None:
    # Pixels have 17 values, and a spectrum does not know where within its bins they lie.
    data = [(x + 0.1 * torch.randn_like(x), y) for x, y in batches()]
    model = small_cnn().eval()
    advice = advise(model, [x for x, _ in data], formats=FORMATS)
    assert [t.name for t in advice.tensors] == [
        f"{layer}/{role}" for layer in (0, 3, 8) for role in ("weight", "input")
    ]
    for fmt in FORMATS:
        truth = measured_snr(model, data, of_images, fmt)
        for tensor in advice.tensors:
            found = tensor.costs[fmt].deciding_snr_db
            assert found == pytest.approx(truth[tensor.name], abs=0.3), (fmt, tensor.name)


def test_zero_points_are_those_of_a_calibration_whatever_the_number_of_batches() -> None:
    model = nn.Sequential(nn.SiLU(), nn.Linear(8, 4))
    found = []
    for number in (1, 2, 3, 5, 8):
        data = [torch.randn(500, 8, generator=torch.manual_seed(i)) for i in range(number)]
        (_, tensor) = advise(model, data, formats=["int4"]).tensors
        found.append(tensor.costs["int4"].snr_db)
    assert max(found) - min(found) < 0.5  # a zero point is worth several dB here


class Several(nn.Module):
    """A layer of each kind of arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.normed = weight_norm(nn.Linear(4, 6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.conv(x)).relu())
        x = self.normed(x.flatten(2).transpose(1, 2)).transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(x.mean(0))
        return out


def test_multiply_accumulates_against_the_counter_of_torch() -> None:
    model, x = Several().eval(), torch.randn(4, 3, 16, 16)
    advice = advise(model, [x])
    macs = {tensor.layer: tensor.macs for tensor in advice.tensors}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counts = counter.get_flop_counts()
    for layer in ("conv", "depthwise", "up", "normed", "head"):
        expected = sum(counts[f"Several.{layer}"].values()) / 2 / len(x)
        assert macs[layer] == expected, layer
    # Of attention its projections; queries, keys and values are 10 x 10 places of the image.
    places = 10 * 10
    assert macs["attention"] == places * 3 * 6 * 6
    assert macs["attention.out_proj"] == places * 6 * 6
    assert {t.layer for t in advice.tensors if t.is_weight and not t.parameters} == set()


def test_the_model_its_buffers_and_random_numbers_stay_as_they_are() -> None:
    module = DigitsModule().train()
    module.net[0].weight.requires_grad_(False)
    prepare(module, "int4", "int4")
    set_observing(module, True)
    module.net(digits().tensors[0][:32])
    refresh(module)
    data = batches()  # a loader draws a number
    before = {
        "state": {name: x.clone() for name, x in module.state_dict().items()},
        "quantizers": quantizer_state(module),
        "rng": torch.get_rng_state(),
        "metric": (module.seen.update_count, float(module.seen.mean_value)),
    }
    advice = advise(module, data)
    after = {
        "state": module.state_dict(),
        "quantizers": quantizer_state(module),
        "rng": torch.get_rng_state(),
        "metric": (module.seen.update_count, float(module.seen.mean_value)),
    }
    assert_same(before, after)
    assert module.training
    assert not module.net[0].weight.requires_grad
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())
    # Frozen layers have a sensitivity like others.
    assert advice.tensors[0].costs["int2"].loss_change is not None


def test_quantizers_of_the_model_and_what_they_know_do_not_matter() -> None:
    model, data = small_cnn().eval(), [x for x, _ in batches()]
    plain = advise(model, data).to_dict()
    prepare(model, "int8", "int8")  # the recipe of the copy, whose quantizers would be kept
    set_observing(model, True)
    model(100 * data[0])
    refresh(model, search=True)
    assert advise(model, data).to_dict() == plain
    prepare(model, recipe=QuantRecipe([QuantRule("0", "int2", outputs="int8"), QuantRule("*")]))
    assert advise(model, data).to_dict() == plain


class WithoutIndex(DigitsModule):
    """Its step takes no number, returns a dictionary, and logs."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": super().training_step(batch, 0)}


def test_losses_of_training_steps() -> None:
    torch.manual_seed(1)
    plain, other = DigitsModule(), WithoutIndex()
    other.load_state_dict(plain.state_dict())
    of_step = advise(plain, batches())
    assert of_step.has_losses
    assert advise(other, loader(shuffle=False)).num_batches == len(loader())
    assert advise(other, batches()).to_dict() == of_step.to_dict()
    own = advise(plain, batches(), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert own.to_dict() == of_step.to_dict()
    named = [{"a": (x[:20], y[:20]), "b": (x[20:], y[20:])} for x, y in batches()]
    together = Collections()
    together.load_state_dict(plain.state_dict())
    assert advise(together, named).has_losses
    assert not advise(plain, batches(), sensitivity="none", loss=None).has_losses
    # One that has been trained and still has its Trainer.
    make_trainer(limit_train_batches=1).fit(plain, loader(), held_out())
    assert advise(plain, batches()).has_losses


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * scale
        return out


def test_batches_are_handed_on_as_arguments() -> None:
    model, x, scale = Named(), torch.randn(5, 4), torch.ones(1)
    found = [
        advise(model, [b]).to_dict() for b in ((x, scale), [x, scale], {"scale": scale, "x": x})
    ]
    assert found[0]["tensors"] == found[1]["tensors"]
    assert found[0]["tensors"][0]["costs"] == found[2]["tensors"][0]["costs"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.c.weight = self.a.weight
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(10 * self.b(self.a(x)).relu())
        return out


def test_recipes_hold_for_tied_weights_excluded_layers_and_those_that_did_not_run() -> None:
    model, x = Tied(), torch.randn(64, 6)
    advice = advise(model, [x], exclude=["b"])
    assert {t.layer for t in advice.tensors} == {"a", "c"}
    assert advice.skipped["idle"] == "did not run on these batches"
    assert advice.left_out == ("b", "idle")
    chosen = advice.cheapest(18.0)
    assert chosen["a/weight"] == chosen["c/weight"]
    for decibels in (18.0, 25.0, 40.0):
        # Layers that it says nothing of are in float, and the recipe is accepted.
        report = prepare(fresh := Tied(), recipe=advice.recipe(decibels))
        assert {layer.name for layer in quantized_layers(fresh)} == {"a", "c"}
        assert report.num_quantized == 2
    with pytest.raises(ValueError, match="expected at least one, best a few"):
        advise(model, [])
    with pytest.raises(ValueError, match=r"no format keeps a tensor at 99 dB; the best reaches \d"):
        advice.recipe(99.0)


def test_a_rule_has_a_format_that_suits_all_weights_of_its_layer() -> None:
    lstm = nn.LSTM(4, 8, batch_first=True)
    nn.init.constant_(lstm.weight_hh_l0, 0.1)  # which any format holds
    advice = advise(lstm, [torch.randn(8, 5, 4)])
    alone = {
        t.name: [f for f, c in t.costs.items() if c.deciding_snr_db >= 20] for t in advice.tensors
    }
    assert alone["weight_hh_l0"][0] == "int2"
    assert alone["weight_ih_l0"][0] != "int2"
    chosen = advice.cheapest(20.0)
    assert chosen["weight_hh_l0"] == chosen["weight_ih_l0"] == alone["weight_ih_l0"][0]
    assert advice.recipe(20.0).rules[-1].weights == TensorSpec(alone["weight_ih_l0"][0])


def test_what_is_wrong_is_said() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"sensitivity": "fischer"},
            "got sensitivity='fischer'; expected one of fisher, none. D",
        ),
        ({"sensitivity": "fisher"}, "got sensitivity='fisher' without a loss"),
        ({"formats": ["int44"]}, "format: got 'int44'"),
        ({"formats": []}, "advise: got no formats"),
        ({"exclude": ["nothing"]}, "Patterns \\['nothing'\\]"),
        ({"loss": lambda m, b: model(b).sum()}, "It|gets the copy as its argument `model`"),
    ]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            advise(model, [x], **options)
    with pytest.raises(ValueError, match="no layer can be quantized"):
        advise(nn.Sequential(nn.ReLU()), [x])


class NeedsTrainer(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) / self.trainer.max_epochs


class Manual(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)


def test_steps_without_a_loss_are_named() -> None:
    with pytest.raises(ValueError, match=r"NeedsTrainer.training_step needs its Trainer"):
        advise(NeedsTrainer(), batches())
    with pytest.raises(ValueError, match=r"Manual.training_step: got NoneType from it; expected a"):
        advise(Manual(), batches())


def test_tensors_of_zeros_and_infinities_leave_the_table_readable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    nn.init.constant_(model[1].weight, 1.0)
    advice = advise(model, [torch.randn(32, 4)])
    data = json.loads(advice.to_json())
    costs = {row["name"]: row["costs"] for row in data["tensors"]}
    assert {c["snr_db"] for c in costs["0/weight"].values()} == {None}
    assert "nan" not in str(advice)
    assert advice.cheapest(10.0)["0/weight"] is None
    assert advice.tensors[2].costs["int4"].snr_db > 100
    assert advice.cheapest(10.0)["1/weight"] == "int2"


def made_up() -> Advice:
    costs = {name: FormatCost(6.0 * bits_of(name)) for name in ("int8", "fp4_e2m1", "int4", "int2")}
    name = "encoder.layers.11.attention.projection.of.values"
    row = TensorAdvice(f"{name}/weight", name, "weight", True, 100, 10, costs, "w")
    return Advice((row,), 1)


def test_printed_tables_fit_the_console_and_mark_the_choice() -> None:
    advice = made_up()
    assert advice.cheapest(24.0) == {advice.tensors[0].name: "fp4_e2m1"}  # the one named first
    lines = advice.text(24.0).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Predicted SNR in dB"
    assert lines[2].split()[1:] == ["48.0", "24.0*", "24.0", "12.0"]
    assert (
        lines[-1] == "* the cheapest format of at least 24 dB. Weights then take 4.0 bits a value."
    )
    assert "None reaches it for" in advice.text(50.0)
    assert advice._repr_html_().startswith("<p>Predicted SNR in dB</p>")
    assert repr(advice) == "<Advice: 1 tensors, 1 batches>"
    names = [f"format{i:02}" for i in range(20)]
    wide = in_width([["tensor", *names], ["a" * 40 + "end", *["1.0"] * 20]])
    assert max(map(len, wide)) <= 80
    assert sum(line.count("format") for line in wide) == 20
    assert all("..." in line and "end" in line for line in wide[1::3])


def test_recipes_name_the_layers_that_differ_from_most() -> None:
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), torch.randn(64, 6)
    advice = advise(model, [x], formats=["int4", "int8", "mxfp4"])
    assert all(set(t.costs) == {"int4", "int8"} for t in advice.tensors if not t.is_weight)
    recipe = advice.recipe(30.0)
    assert recipe == QuantRecipe([QuantRule("*", "int8", "int8")])
    prepare(model, recipe=recipe)
