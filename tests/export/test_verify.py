from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import statqat_lightning.export.proof.writers as writers
from statqat_lightning.export import ExportDifferenceError, export_model
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.export.proof.divergence import (
    Moved,
    first_divergence,
    moved_codes,
    record_layers,
)
from statqat_lightning.export.proof.latency import medians_in_turns
from statqat_lightning.export.proof.onnx_runtime import load_onnx, onnx_session
from tests.export.models import calibrated, images, outputs, recipe_of, small_net

LAYERS = ["0", "2", "5", "7"]


@pytest.fixture
def model() -> nn.Module:
    return calibrated(small_net(), recipe_of("int4", "int8"), images(32))


def export(model: nn.Module, **options: Any) -> Any:
    return export_model(model, "model", images(16), **{"measure_latency": False} | options)


@pytest.mark.timed
def test_the_figures_are_those_of_the_files(model: nn.Module) -> None:
    x, labels = images(40), torch.randint(10, (40,))
    example = images(16)
    report = export_model(
        model, "model", example, data=[(x[:30], labels[:30]), (x[30:], labels[30:])]
    )
    wanted = [outputs(model, example).numpy(), outputs(model, x).numpy()]
    given = [onnx_session("model.onnx").run(None, {"input": t.numpy()})[0] for t in (example, x)]
    errors = np.concatenate([(a - b).ravel() for a, b in zip(given, wanted, strict=True)])
    signal = np.concatenate([w.ravel() for w in wanted])
    found = report.onnx
    assert found is not None
    # Sums over other batch sizes may differ in the last digit.
    assert found.max_difference == pytest.approx(np.abs(errors).max(), rel=0.1)
    step = np.abs(signal).max() / 127
    assert found.max_steps == pytest.approx(found.max_difference / step, rel=1e-5)
    snr = 10 * np.log10(np.square(signal).sum() / np.square(errors).sum())
    assert found.snr_db == pytest.approx(snr, abs=1)
    assert found.agreement == 1
    assert found.examples == 56
    assert found.bytes == Path("model.onnx").stat().st_size
    right = (given[1].argmax(1) == labels.numpy()).mean()
    assert found.accuracy == pytest.approx(right)
    assert report.accuracy == pytest.approx((wanted[1].argmax(1) == labels.numpy()).mean())
    assert found.runtime.startswith("ONNX Runtime 1.")
    assert found.milliseconds is not None
    assert found.float_milliseconds is not None
    assert found.speedup == found.float_milliseconds / found.milliseconds > 0
    assert report.native is not None
    assert (report.native.max_steps, report.native.snr_db) == (0, math.inf)

    # The same in the file beside them, in JSON that any parser takes, and in the table.
    text = Path("model.export.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert stored["native"]["snr_db"] == "inf"
    assert stored["onnx"]["max_steps"] == found.max_steps
    assert f"{found.accuracy:.2%}" in str(report)
    assert report.metrics()["export/onnx/agreement"] == 1
    assert "export/native/snr_db" not in report.metrics()


def test_data_is_cut_to_the_number_asked_for(model: nn.Module) -> None:
    batches = [(images(10), torch.zeros(10, dtype=torch.long))] * 9
    report = export(model, files=("native",), data=batches, most_data=25)
    assert report.native.examples == 16 + 25


@pytest.mark.parametrize(
    "batch", [(torch.randn(4, 3), torch.zeros(4)), "text", (images(4), torch.randn(4, 2))]
)
def test_data_of_another_kind_gives_no_accuracy(model: nn.Module, batch: Any) -> None:
    report = export(model, files=("native",), data=[batch])
    assert report.accuracy is None
    assert report.native.agreement == 1


def test_data_that_fails_does_not_take_the_files_along(model: nn.Module) -> None:
    def failing() -> Any:
        yield (images(4), torch.zeros(4, dtype=torch.long))
        raise OSError("disk gone")

    report = export(model, files=("native",), data=failing())
    assert "No accuracy: the data failed with OSError: disk gone" in report.notes
    assert Path("model.safetensors").exists()


# Files that differ


def damage_onnx(monkeypatch: pytest.MonkeyPatch, layer: str, factor: float) -> None:
    """Let the writer of `.onnx` files get the scale of one layer's weights wrong."""
    save = writers.save_onnx

    def wrong(model: nn.Module, path: Path, example: Any, **options: Any) -> None:
        save(model, path, example, **options)
        proto = onnx.load(path)
        (scale,) = (i for i in proto.graph.initializer if i.name == f"model.{layer}.weight_scale")
        array = onnx.numpy_helper.to_array(scale) * np.float32(factor)
        scale.CopyFrom(onnx.numpy_helper.from_array(array, scale.name))
        onnx.save(proto, path)

    monkeypatch.setattr(writers, "save_onnx", wrong)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_layer_of_a_wrong_onnx_file_is_named(
    model: nn.Module, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model.onnx").write_bytes(b"old")
    damage_onnx(monkeypatch, layer, 1.5)
    with pytest.raises(ExportDifferenceError, match=rf"First at layer '{layer}': ") as caught:
        export(model)
    assert Path("model.onnx").read_bytes() == b"old"
    # All else is written, and known.
    report = caught.value.report
    assert report is not None
    assert report.onnx is None
    assert report.native is not None
    assert Path("model.safetensors").exists()
    assert (
        f"First at layer '{layer}'" in json.loads(Path("model.export.json").read_text())["notes"][0]
    )


def test_not_strict_keeps_the_file_and_says_so(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_onnx(monkeypatch, "5", 1.5)
    report = export(model, strict=False)
    assert report.onnx.divergence.startswith("layer '5': ")
    assert report.onnx.max_steps > 1
    assert "not proved. model.onnx: differs" in str(report)
    assert Path("model.onnx").exists()


def test_a_difference_within_the_bound_is_accepted(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_onnx(monkeypatch, "7", 1.04)
    report = export(model, bound=9)
    assert 1 < report.onnx.max_steps < 9  # 4 % of at most 127 steps, and flips
    assert report.onnx.remarks == ()
    with pytest.raises(ExportDifferenceError, match=r"\(bound 1\).*layer '7'"):
        export(model)


def test_the_first_layer_of_a_wrong_program_is_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = writers.save_program

    def wrong(model: Any, path: Path, example: Any) -> None:
        model = freeze(calibrated(small_net(), recipe_of("int4", "int8"), images(32)))
        model[0].load_state_dict(frozen[0].state_dict())
        model[0].frozen_activations = frozen[0].frozen_activations
        save(model, path, example)

    frozen: Any = freeze(model)
    monkeypatch.setattr(writers, "save_program", wrong)
    with pytest.raises(ExportDifferenceError, match=r"model.pt2: .*First at layer '2': "):
        export(model, files=("native", "pt2"))


def test_the_first_layer_of_a_wrong_native_file_is_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = writers.save_native

    def wrong(model: Any, path: Path, *args: Any, **options: Any) -> None:
        model[5].bias += 1
        save(model, path, *args, **options)
        model[5].bias -= 1

    monkeypatch.setattr(writers, "save_native", wrong)
    with pytest.raises(ExportDifferenceError, match=r"model.safetensors: .*First at layer '5': "):
        export(model, files=("native",))


def test_nan_is_a_difference(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_onnx(monkeypatch, "7", math.nan)
    with pytest.raises(ExportDifferenceError, match=r"by nan, nan output steps.*layer '7'"):
        export(model)


def test_what_comes_after_the_last_layer_is_checked(model: nn.Module) -> None:
    call = ForwardCall.of(images(4))
    frozen = freeze(model)
    layers = record_layers(frozen, LAYERS, call)
    right: Tensor = frozen(*call.args)
    assert first_divergence(frozen, call, layers, [right]) is None
    divergence = first_divergence(frozen, call, layers, [right + right.abs().max()])
    assert str(divergence).startswith("what comes after the last layer: ")
    assert str(first_divergence(frozen, call, {}, [right * math.nan])).startswith("what comes")


def test_a_value_that_falls_to_the_other_side_is_no_error_of_a_layer(model: nn.Module) -> None:
    call = ForwardCall.of(images(4))
    frozen: Any = freeze(model)
    layers = {name: [*values] for name, values in record_layers(frozen, LAYERS, call).items()}
    scale = frozen[7].input_scale
    x = frozen[6](layers["5"][0])
    flipped = x.clone()
    flipped[0, 3] += scale  # one code further
    layers["7"] = [frozen[7](flipped)]
    assert not torch.equal(layers["7"][0], frozen[7](x))
    assert first_divergence(frozen, call, layers, [layers["7"][0]]) is None
    flipped[0] += 4 * scale
    layers["7"] = [frozen[7](flipped)]
    divergence = first_divergence(frozen, call, layers, [layers["7"][0]])
    assert divergence is not None
    assert divergence.layer == "7"


def test_flips_above_the_bound_are_accepted_with_a_remark(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every difference is above this bound, and every layer follows from what came before.
    report = export(model, bound=-1)
    assert report.onnx.divergence is None
    # Counted here in other words: codes of the rounded inputs, of the file and of the model.
    call = ForwardCall.of(images(16))
    shown = load_onnx(Path("model.onnx")).roundings
    assert shown is not None
    counted = sum(t.numel() for tensors in shown(call).values() for t in tensors)
    assert f"{counted} rounded values that were compared" in report.onnx.remarks[0]


def test_values_that_fell_to_the_other_side_are_counted(model: nn.Module) -> None:
    call = ForwardCall.of(images(4))
    frozen: Any = freeze(model)
    places = {(name, "input"): frozen[int(name)] for name in LAYERS}
    shown: dict[tuple[str, str], list[Tensor]] = {}
    for place, layer in places.items():
        handle = layer.register_forward_pre_hook(
            lambda module, args, place=place: shown.setdefault(place, []).append(
                module.rounded("input", args[0]).clone()
            )
        )
        call.run(frozen)
        handle.remove()
    total = sum(t.numel() for (t,) in shown.values())
    assert moved_codes(frozen, call, {}, shown) == Moved(0, total)
    scale = frozen[5].input_scale
    shown["5", "input"][0][0, :3] += scale
    shown["7", "input"][0][1, 0] -= frozen[7].input_scale
    assert moved_codes(frozen, call, {}, shown) == Moved(4, total)


def test_onnx_layers_are_found_in_the_file(model: nn.Module) -> None:
    export(model)
    x = images(3)
    call = ForwardCall.of(x)
    found = load_onnx(Path("model.onnx")).layer_outputs(call)
    expected = record_layers(freeze(model), LAYERS, call)
    assert found.keys() == expected.keys()
    for name in LAYERS:
        (ours,), (theirs,) = expected[name], found[name]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-2 * ours.abs().max()


def test_a_forward_that_fixes_its_batch_is_compared_on_that_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # One product a value: kernels for 3 and for 7 rows add in different orders.
            self.fc = nn.Linear(1, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.stack([2 * row for row in x]))
            return out

    model = calibrated(Fixed(), recipe_of("int4", "int8"), torch.randn(2, 1))
    report = export_model(model, "model", torch.randn(7, 1), files=("native", "onnx", "pt2"))
    assert report.program is not None
    assert report.program.remarks == ("The forward fixes its batch size: 3 only.",)
    assert (report.program.max_steps, report.program.examples) == (0, 6)
    assert report.onnx is not None
    assert report.onnx.remarks == ("The forward fixes its batch size: 7 only.",)
    graph = onnx.load("model.onnx").graph
    for value, shape in ((graph.input[0], [7, 1]), (graph.output[0], [7, 4])):
        assert [d.dim_value for d in value.type.tensor_type.shape.dim] == shape


def test_a_file_that_does_not_run_is_an_error(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        writers, "save_onnx", lambda model, path, *args, **options: path.write_bytes(b"nothing")
    )
    with pytest.raises(ExportDifferenceError, match=r"model.onnx: what .* cannot be loaded and"):
        export(model)
    assert not Path("model.onnx").exists()
    assert Path("model.safetensors").exists()


def test_a_random_model_is_reported_and_nothing_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            return out + torch.rand(4)

    model = calibrated(Random(), recipe_of("int4"), torch.randn(2, 4))
    report = export_model(model, "model", torch.randn(2, 4), files=("native",))
    assert "other outputs each time, in eval mode" in report.notes[0]
    assert report.native is not None


def test_medians_are_taken_in_turns() -> None:
    order: list[int] = []
    first, second = medians_in_turns(lambda: order.append(1), lambda: order.append(2), 0, least=3)
    assert order == [1, 2] * 4  # one round to warm up
    assert first > 0
    assert second > 0


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.timed
def test_weights_alone_are_compared_with_inputs_in_float() -> None:
    x = torch.randn(8, 16)
    model = calibrated(linears(), recipe_of("int4", "int3"), x)
    report = export_model(model, "model", x, files=("native", "torchao", "compressed-tensors"))
    for found, path in (
        (report.torchao, "model.torchao.pt"),
        (report.compressed, "model.compressed"),
    ):
        assert found is not None
        assert (found.path, found.max_difference) == (path, 0)
        assert "these layers round their inputs: 0, 2." in found.remarks[0]
        assert found.bytes > 0
        assert found.speedup is not None
    assert "model.compressed" in str(report)


@pytest.mark.parametrize(("file", "kind"), [("torchao",) * 2, ("compressed-tensors", "compressed")])
def test_the_first_layer_of_wrong_weights_is_named(
    file: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 16)
    model = calibrated(linears(), recipe_of("int4", "int3"), x)
    save = getattr(writers, f"save_{kind}")

    def wrong(model: Any, path: Path) -> None:
        model[2].weight_scale *= 1.5
        save(model, path)
        model[2].weight_scale /= 1.5

    monkeypatch.setattr(writers, f"save_{kind}", wrong)
    with pytest.raises(ExportDifferenceError, match="First at layer '2': "):
        export_model(model, "model", x, files=("native", file))
    assert {f.name for f in Path().iterdir()} == {"model.safetensors", "model.export.json"}


def test_what_a_writer_cannot_hold_is_a_note(model: nn.Module) -> None:
    report = export(model, files=("native", "compressed-tensors"))
    assert report.compressed is None
    assert report.notes[0].startswith("compressed-tensors: not written. compressed-tensors (pack-")
    assert Path("model.safetensors").exists()
