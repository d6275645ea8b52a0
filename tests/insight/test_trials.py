from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, QuantRule, advise, prepare, sensitivity
from statqat_lightning.insight.trials import LayerTrial, Trials, predicted_by_layer
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    quantizer_state,
    refresh,
    set_enabled,
    set_observing,
)
from tests.callbacks.digits import DigitsModule, assert_same, loader, small_cnn

LAYERS = ["0", "3", "8"]
Batch = tuple[Tensor, Tensor]


def batches() -> list[Any]:
    return [batch for batch, _ in zip(loader(shuffle=False), range(2), strict=False)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(model: nn.Module, data: list[Batch], layers: list[str], fmt: str) -> float:
    """The loss of a model of which some layers are quantized, prepared and calibrated as usual."""
    model = copy.deepcopy(model).eval()
    inputs = None if fmt == "mxfp4" else fmt
    rules = [QuantRule("*", fmt, inputs)]
    prepare(model, recipe=QuantRecipe(rules))
    set_enabled(model, weights=False, inputs=False)
    with torch.no_grad():
        for batch in data:
            set_observing(model, True)
            loss(model, batch)
            set_observing(model, False)
            refresh(model, weights=False, search=True)
        refresh(model, inputs=False, search=True)
        for layer in quantized_layers(model):
            for quantizer in layer.quantizers.present():
                quantizer.enabled = layer.name in layers
        return sum(float(loss(model, batch)) for batch in data) / len(data)


@pytest.mark.parametrize("order", [["int3", "mxfp4"], ["mxfp4", "int3"]])
def test_trials_are_networks_quantized_by_hand(order: list[str]) -> None:
    model, data = small_cnn(), batches()
    trials = sensitivity(model, data, loss=loss, formats=order, progress=False)
    truth = by_hand(model, data, [], "int3")
    assert trials.baseline == pytest.approx(truth, rel=1e-6)
    assert [(row.layer, row.format) for row in trials.rows] == [
        (layer, fmt) for fmt in order for layer in LAYERS
    ]
    for fmt in order:
        everything = by_hand(model, data, LAYERS, fmt)
        assert trials.everything[fmt] == pytest.approx(everything - truth, abs=1e-6)
    for row in trials.rows:
        others = [name for name in LAYERS if name != row.layer]
        assert row.alone == pytest.approx(
            by_hand(model, data, [row.layer], row.format) - truth, abs=1e-6
        )
        assert row.all_but == pytest.approx(
            by_hand(model, data, others, row.format) - truth, abs=1e-6
        )
        assert row.alone != 0


class Counting:
    """A metric that counts its calls."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, model: nn.Module, batch: Batch) -> float:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return float((model(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_resumed_trial_measures_nothing_twice() -> None:
    model, data = small_cnn(), batches()
    whole = Counting()
    options: dict[str, Any] = {"formats": ["int2", "int4"], "progress": False}
    expected = sensitivity(model, data, whole, **options)
    # The model is run three times over the batches before any trial: to see what it reads of its
    # weights (one batch), to observe its inputs, and for the metric in float.
    before = 1 + 2 * len(data)
    assert whole.calls == before + 2 * (2 * len(LAYERS) + 1) * len(data)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, data, Counting(before + 4 * len(data) + 1), resume="t.json", **options)
    kept = json.loads(Path("t.json").read_text())["values"]
    assert len(kept) == 4
    rest = Counting()
    found = sensitivity(model, data, rest, resume="t.json", **options)
    assert rest.calls == whole.calls - 4 * len(data)
    assert found == expected
    again = Counting()
    assert sensitivity(model, data, again, resume=Path("t.json"), **options) == expected
    assert again.calls == before
    # Another format adds to what is there.
    more = Counting()
    sensitivity(model, data, more, resume="t.json", formats=["int4", "int3"], progress=False)
    assert more.calls == before + (2 * len(LAYERS) + 1) * len(data)
    assert [p.name for p in Path().iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"version": 1, "layers": [', "not a file of trials (JSONDecodeError"),
        (b"\xff\xfe", "not a file of trials (UnicodeDecodeError"),
        (b"[]", "not a file of trials (TypeError"),
        (b'{"version": 1, "layers": 3, "baseline": 1.0, "values": {}}', "not a file of trials"),
        (b'{"version": 1, "layers": [], "baseline": "x", "values": {}}', "not a file of trials"),
        (b'{"version": 1, "layers": [], "baseline": 1.0, "values": []}', "not a file of trials"),
        (b'{"version": 1, "layers": [], "baseline": 1, "values": {"a": null}}', "not a file"),
        (b'{"version": 9, "layers": [], "baseline": 1.0, "values": {}}', "got version 9 of a"),
        (b'{"version": 1, "layers": ["a"], "baseline": 1.0, "values": {}}', "of another model"),
    ],
)
def test_a_file_that_is_none_of_ours_is_one_clear_error(content: bytes, said: str) -> None:
    Path("t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^t\.json: ") as caught:
        sensitivity(small_cnn(), batches(), loss=loss, resume="t.json", progress=False)
    assert said in str(caught.value)
    assert "Name another" in str(caught.value)
    assert Path("t.json").read_bytes() == content


def test_trials_of_other_weights_are_told_by_their_loss() -> None:
    options: dict[str, Any] = {"loss": loss, "resume": "t.json", "progress": False}
    sensitivity(small_cnn(), batches(), **options)
    with pytest.raises(ValueError, match="trials of another model, or of other batches: there"):
        sensitivity(small_cnn(), batches(), **options)


def test_the_model_its_buffers_and_random_numbers_stay_as_they_are() -> None:
    module, data = DigitsModule().train(), batches()
    prepare(module, "int4", "int4")

    def state() -> dict[str, Any]:
        return {
            "state": {name: x.clone() for name, x in module.state_dict().items()},
            "quantizers": quantizer_state(module),
            "rng": torch.get_rng_state(),
            "metric": (module.seen.update_count, float(module.seen.mean_value)),
        }

    before = state()
    trials = sensitivity(module, data, progress=False)
    assert_same(before, state())
    assert module.training
    assert [row.layer for row in trials.rows] == ["net.0", "net.3", "net.8"]


def test_all_trials_see_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def noisy(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() + torch.rand(())

    data = [torch.randn(8, 4)]
    # The noise is of the order of 1, changes at int8 are not.
    found = sensitivity(model, data, noisy, formats=["int8"], progress=False)
    assert all(abs(row.alone) < 0.05 for row in found.rows)


def test_layers_that_are_left_out_or_never_run_have_no_trial() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "idle": nn.Linear(2, 2)})

    def metric(model: Any, batch: Tensor) -> Tensor:
        return model["b"](model["a"](batch)).square().mean()

    trials = sensitivity(model, [torch.randn(8, 4)], metric, exclude=["b"], progress=False)
    assert [row.layer for row in trials.rows] == ["a"]
    assert trials.rows[0].all_but == 0
    assert trials.rows[0].alone == trials.everything["int4"]


def test_what_is_wrong_is_said() -> None:
    model, data = small_cnn(), batches()
    with pytest.raises(ValueError, match="sensitivity: got no metric; expected metric=lambda"):
        sensitivity(model, data)
    with pytest.raises(ValueError, match="sensitivity: got no batches"):
        sensitivity(model, [], loss=loss)
    with pytest.raises(ValueError, match="got 'int44'"):
        sensitivity(model, data, loss=loss, formats="int44")
    with pytest.raises(ValueError, match="gets the copy as its argument `model`"):
        sensitivity(model, data, lambda m, b: loss(model, b))


def test_tables_pictures_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model, data = small_cnn(), batches()
    trials = sensitivity(model, data, loss=loss, formats=["int2", "int4"])
    assert "sensitivity" in capsys.readouterr().err  # the bar
    lines = str(trials).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"float: {trials.baseline:.4g}"
    assert lines[2].split() == [
        "0",
        *(
            f"{x:+.3g}"
            for row in (trials.rows[0], trials.rows[3])
            for x in (row.alone, row.all_but)
        ),
    ]
    assert lines[-1].split()[:2] == ["(all", "layers)"]
    assert json.loads(trials.to_json())["rows"][0] == {
        "layer": "0",
        "format": "int2",
        "alone": trials.rows[0].alone,
        "all_but": trials.rows[0].all_but,
    }
    bars = trials.plot(path="bars.png").axes[0]
    assert [bar.get_width() for bar in bars.patches] == [row.alone for row in trials.rows]
    advice = advise(model, data, loss=loss, formats=["int2", "int4"])
    axes = trials.plot(advice, path="against.png").axes
    predicted = predicted_by_layer(advice, "int2")
    offsets = axes[0].collections[0].get_offsets().tolist()
    assert offsets == [[predicted[row.layer], row.alone] for row in trials.rows[:3]]
    assert {p.name for p in Path().iterdir()} == {"bars.png", "against.png"}
    # Of a format that was not tried there is nothing to show, and of others there is.
    one = advise(model, data, loss=loss, formats=["int4"])
    assert [len(axis.collections) for axis in trials.plot(one).axes] == [0, 1]
    without = advise(model, [x for x, _ in data], formats=["int4"])
    with pytest.raises(ValueError, match="advice without predicted losses of these layers"):
        trials.plot(without)


def test_wide_tables_are_cut() -> None:
    name = "model.encoder.layers.11.self_attention.output_projection"
    formats = ["int2", "int3", "int4", "int6", "int8"]
    rows = tuple(LayerTrial(name, fmt, 1.234567e-05, 123.4567) for fmt in formats)
    text = str(Trials(1.0, dict.fromkeys(formats, 1.0), rows))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("all but") == 5
