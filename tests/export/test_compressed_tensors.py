from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from statqat_lightning.export import ExportError, load_compressed, save_compressed
from statqat_lightning.export.files.on_disk import replacing_folder
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.model.insertion import prepare
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import calibrated, images, outputs, recipe_of, small_net

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own imports
    pytest.importorskip(
        "compressed_tensors",
        minversion="0.20",
        reason="needs compressed-tensors 0.20, where a compressor is a class that needs no model",
    )
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig


def net(width: int = 40) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.LayerNorm(width), nn.Linear(width, 7))


def decompressed(folder: str) -> tuple[dict[str, Tensor], QuantizationConfig]:
    """Weights by their code, from nothing but the folder."""
    config = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config)
    tensors = safetensors.torch.load_file(Path(folder, "model.safetensors"))
    weights = {}
    for group in scheme.config_groups.values():
        for target in group.targets:  # type: ignore[union-attr]
            layer = target.removeprefix("re:^").removesuffix("$").replace("\\", "")
            own = {
                name: tensors[f"{layer}.{name}"]
                for name in PackedQuantizationCompressor.compression_param_names(group)
            }
            weights[layer] = PackedQuantizationCompressor.decompress(own, group)["weight"]
    return weights, scheme


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", [None, "per_tensor", "per_group:8"])
def test_their_package_reads_our_weights_to_the_bit(bits: int, granularity: str | None) -> None:
    x = torch.randn(8, 64)
    model = calibrated(net(), recipe_of(f"int{bits}", None, granularity), x)
    save_compressed(model, "m")
    weights, scheme = decompressed("m")
    frozen: Any = freeze(model)
    assert weights.keys() == {"0", "2"}
    for name, weight in weights.items():
        assert torch.equal(weight, frozen[int(name)].weight)
    assert scheme.format == "pack-quantized"
    assert torch.equal(load_compressed(net(), "m")(x), outputs(model, x))


@pytest.mark.parametrize("width", [1, 5, 8, 31, 32, 33, 63])
@pytest.mark.parametrize("fmt", ["int3_full", "int4_full", "int5", "int7", "int8_full"])
def test_their_packing_gives_the_same_words(width: int, fmt: str) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    model = nn.Sequential(nn.Linear(width, 6))
    prepare(model, recipe=recipe_of(fmt))
    save_compressed(model, "m")
    tensors = safetensors.torch.load_file("m/model.safetensors")
    frozen: Any = freeze(model)
    tensor = frozen[0].frozen_weights["weight"]
    integers = tensor.fmt.decode(frozen[0].weight_codes).to(torch.int8)
    assert torch.equal(tensors["0.weight_packed"], pack_to_int32(integers, tensor.fmt.bits))
    assert tensors["0.weight_shape"].tolist() == [6, width]
    assert tensors["0.weight_scale"].shape == (6, 1)


def test_layers_of_several_widths_and_in_float() -> None:
    model = nn.Sequential(net(), nn.Linear(7, 7), nn.Linear(7, 3))
    recipe = QuantRecipe(
        [
            QuantRule("0.0", weights=TensorSpec("int4", "per_group:16")),
            QuantRule("0.2", weights="int8"),
            QuantRule("1", weights="int8"),
        ]
    )
    prepare(model, recipe=recipe)
    save_compressed(model.eval(), "m", config={"model_type": "mine"})
    weights, scheme = decompressed("m")
    assert weights.keys() == {"0.0", "0.2", "1"}
    assert scheme.ignore == ["2"]
    assert len(scheme.config_groups) == 2
    assert json.loads(Path("m/config.json").read_text())["model_type"] == "mine"
    x = torch.randn(3, 64)
    again = load_compressed(nn.Sequential(net(), nn.Linear(7, 7), nn.Linear(7, 3)), "m")
    assert torch.equal(again(x), outputs(model, x))


@pytest.mark.parametrize("fmt", ["uint4", "fp4", "nf4", "mxfp4"])
def test_formats_that_it_cannot_hold_are_named(fmt: str) -> None:
    model = calibrated(net(), recipe_of(fmt), torch.randn(4, 64))
    with pytest.raises(ExportError, match=r"holds signed integers .*0 \(Linear, .*hold: 0, 2\."):
        save_compressed(model, "m")
    assert not Path("m").exists()


def test_convolutions_are_refused_by_name() -> None:
    model = calibrated(small_net(), recipe_of("int4"), images())
    with pytest.raises(ExportError, match=r"0 \(Conv2d, int4\), .*hold: 0, 2\."):
        save_compressed(model, "m")


def test_bad_folders() -> None:
    model = calibrated(net(), recipe_of("int4"), torch.randn(4, 64))
    save_compressed(model, "m")
    with pytest.raises(ValueError, match="m: does not fit Sequential"):
        load_compressed(nn.Sequential(net(), nn.Linear(3, 3)), "m")
    data = Path("m/model.safetensors").read_bytes()
    Path("m/model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match="m: not a whole folder"):
        load_compressed(net(), "m")
    with pytest.raises(FileNotFoundError):
        load_compressed(net(), "none")


def test_an_older_folder_is_replaced_whole_and_a_foreign_one_left_alone() -> None:
    for fmt in ("int4", "int8"):
        model = calibrated(net(), recipe_of(fmt), torch.randn(4, 64))
        save_compressed(model, "out/m")
        assert {f.name for f in Path("out/m").iterdir()} == {"model.safetensors", "config.json"}
        assert [f.name for f in Path("out").iterdir()] == ["m"]
    assert '"num_bits": 8' in Path("out/m/config.json").read_text()
    Path("out/m/thesis.tex").write_text("dear")
    with pytest.raises(OSError, match="'out/m' cannot be written: there is a folder with other"):
        save_compressed(model, "out/m")
    assert Path("out/m/thesis.tex").exists()
    Path("file").write_text("x")
    with pytest.raises(OSError, match="there is a file of that name"):
        save_compressed(model, "file")


def test_a_failed_write_leaves_the_old_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str, fail: bool = False) -> None:
        with replacing_folder(Path("m"), ("a", "b")) as folder:
            (folder / "a").write_text(text)
            if fail:
                raise KeyboardInterrupt
            (folder / "b").write_text(text)

    write("old")
    with pytest.raises(KeyboardInterrupt):
        write("new", fail=True)
    assert Path("m/b").read_text() == Path("m/a").read_text() == "old"
    # Where folders cannot be exchanged in one step:
    monkeypatch.setattr("statqat_lightning.export.files.on_disk._exchange", lambda *paths: False)
    write("new")
    assert Path("m/b").read_text() == Path("m/a").read_text() == "new"
    assert [f.name for f in Path().iterdir()] == ["m"]
