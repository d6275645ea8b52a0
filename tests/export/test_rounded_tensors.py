"""Rounded tensors of a file that ONNX Runtime computes in integers, beside the frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.export.proof.divergence import Roundings, first_rounding, rounded_places
from statqat_lightning.export.proof.onnx_runtime import load_onnx
from statqat_lightning.export.proof.verify import ExportDifferenceError
from tests.targets.test_biases import residual


@pytest.fixture
def found(tmp_path: Path) -> tuple[nn.Module, ForwardCall, Roundings, list[Tensor]]:
    """A folded frozen model, and what ONNX Runtime makes of it."""
    model, _, x = residual()
    call = ForwardCall.of(x)
    save_onnx(model, tmp_path / "model.onnx", x)
    runtime = load_onnx(tmp_path / "model.onnx")
    assert runtime.roundings is not None
    frozen = fold_batch_norm(freeze(model), call).model
    return frozen, call, runtime.roundings(call), runtime.run(call)


def test_every_place_is_shown_and_follows_from_the_ones_before(found: Any) -> None:
    frozen, call, roundings, outputs = found

    assert {*roundings} == {*rounded_places(frozen)}
    assert len(roundings) == 9
    assert first_rounding(frozen, call, roundings, outputs) is None


def test_to_show_them_changes_no_output(found: Any) -> None:
    frozen, _, roundings, outputs = found

    # The last rounded tensor is all that the output depends on.
    last = roundings["head", "input"][0]
    expected = nn.functional.linear(last, frozen.head.weight, frozen.head.bias)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, scale: x + 2 * scale * (torch.arange(x.numel()).view(x.shape) == 5),
        lambda x, scale: x + scale,
        lambda x, scale: x * torch.nan,
    ],
    ids=["two codes at one place", "one code everywhere", "NaN"],
)
def test_what_does_not_follow_is_named(found: Any, change: Any) -> None:
    frozen, call, roundings, outputs = found
    place = "blocks.0.conv2", "input"
    scale = frozen.get_submodule("blocks.0.conv2").input_scale

    wrong = {**roundings, place: [change(roundings[place][0], scale)]}
    divergence = first_rounding(frozen, call, wrong, outputs)

    assert divergence is not None
    assert (divergence.layer, divergence.role) == place
    assert "the rounded input of layer 'blocks.0.conv2'" in str(divergence)


def test_one_code_at_one_place_is_a_flip(found: Any) -> None:
    frozen, call, roundings, outputs = found
    place = "head", "input"
    flipped = roundings[place][0].clone()
    flipped[0, 0] += frozen.head.input_scale
    outputs = [nn.functional.linear(flipped, frozen.head.weight, frozen.head.bias)]

    assert first_rounding(frozen, call, {**roundings, place: [flipped]}, outputs) is None


def test_what_comes_after_the_last_is_checked(found: Any) -> None:
    frozen, call, roundings, outputs = found

    divergence = first_rounding(frozen, call, roundings, [outputs[0] + 1])

    assert str(divergence).startswith("what comes after the last layer")


def test_a_wrong_layer_of_an_integer_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnx.numpy_helper

    import statqat_lightning.export.proof.writers as writers

    def damaged(model: nn.Module, path: Path, call: Any, **options: Any) -> None:
        save_onnx(model, path, call, **options)
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if tensor.name == "model.blocks.1.conv1.weight_codes":
                codes = -onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
        onnx.save(proto, path)

    monkeypatch.setattr(writers, "save_onnx", damaged)
    model, _, x = residual()

    with pytest.raises(ExportDifferenceError, match=r"First at layer 'blocks.1.conv1'"):
        export_model(model, tmp_path / "model", x, files=("onnx",), measure_latency=False)
    assert not (tmp_path / "model.onnx").exists()
