from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import statqat_lightning.export.files.native as native
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.files.native import read_header, save_native
from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.packing import pack
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.formats import block_format_names, format_names
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from statqat_lightning.recipes.recipe import QuantRecipe
from tests.callbacks.digits import DigitsModule, held_out, loader, make_trainer, small_cnn, statqat
from tests.export.fresh import run_fresh
from tests.export.models import (
    FORMATS_AND_GRANULARITIES,
    Everything,
    calibrated,
    images,
    outputs,
    recipe_of,
    small_net,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def model() -> nn.Module:
    return calibrated(Everything(), recipe_of("int4", "int4"), images())


@pytest.mark.parametrize(("fmt", "granularity"), FORMATS_AND_GRANULARITIES)
def test_every_format_and_granularity_reloads_bit_equal(
    fmt: str, granularity: str, path: Path
) -> None:
    make = (lambda: small_net()[2:]) if granularity.startswith("per_group") else Everything
    x = torch.randn(8, 8, 8, 8) if granularity.startswith("per_group") else images()
    model = calibrated(make(), recipe_of(fmt, fmt, granularity), x)
    save_native(model, path)
    again = load_quantized(make(), path)
    assert torch.equal(again(x), outputs(model, x))
    # Codes, not only outputs: dequantized weights quantize to the codes they came from.
    for (_, a, qa), (_, b, qb) in zip(
        quantized_layers(again), quantized_layers(model), strict=True
    ):
        assert qa.weight is not None
        assert qb.weight is not None
        codes = [
            q.fmt.encode(q.fmt.round(q.granularity.view(weight_of(m)) / q.scale))
            for m, q in ((a, qa.weight), (b, qb.weight))
        ]
        assert torch.equal(*codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_reload_bit_equal(dtype: torch.dtype, path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)

    x = torch.randn(16, 12, dtype=dtype)
    model = calibrated(make(), recipe_of("int8", "int8"), x)
    save_native(model, path)
    assert torch.equal(load_quantized(make(), path)(x), outputs(model, x))


def test_the_layout_is_the_documented_one(model: nn.Module, path: Path) -> None:
    recipe = recipe_of("int4", "int4")
    save_native(model, path, recipe, module="net")
    header = read_header(path)
    tensors = safetensors.torch.load_file(path)
    frozen = freeze(model).state_dict()
    assert header["file_version"] == 1
    assert header["module"] == "net"
    assert QuantRecipe.from_dict(header["recipe"]) == recipe
    entry = header["layers"]["conv2d"]
    assert entry["weight"] == {
        "format": "int4",
        "granularity": "per_channel",
        "axis": 0,
        "spec": {"format": "int4"},
        "shape": [8, 4, 3, 3],
        "dtype": "float32",
    }
    assert entry["input"]["format"] == "uint4"
    assert entry["input"]["scale"] == tensors["conv2d.input_scale"].item()
    assert torch.equal(tensors["conv2d.weight_codes"], pack(frozen["conv2d.weight_codes"], 4))
    assert tensors.keys() == frozen.keys()
    for name in frozen.keys() - {f"{layer}.weight_codes" for layer in header["layers"]}:
        assert torch.equal(tensors[name], frozen[name])


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        *((fmt, None) for fmt in ("int4", "int4_full", "uint4", "fp4", "fp4_e3m0", "nf4", "sf4")),
        ("int4", "per_tensor"),
        ("int4", "per_group:128"),
        ("mxfp4", None),
    ],
)
def test_four_bits_take_at_most_014_of_float32(
    fmt: str, granularity: str | None, path: Path
) -> None:
    model = calibrated(nn.Linear(256, 256), recipe_of(fmt, None, granularity), torch.randn(4, 256))
    save_native(model, path)
    tensors = safetensors.torch.load_file(path)
    size = sum(t.numel() * t.itemsize for n, t in tensors.items() if n.startswith("weight"))
    assert size <= 0.14 * 4 * 256 * 256


FRESH = """
import sys
import torch
from torch import nn
from statqat_lightning.export import load_quantized

x = torch.load("x.pt")
for number, expected in enumerate(torch.load("outputs.pt")):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    outputs = load_quantized(model, f"{number}.safetensors")(x)
    assert torch.equal(outputs, expected), number
"""


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_bits_for_every_format_and_granularity() -> None:
    weights = [name for name in format_names() if not name.startswith("levels")]
    kinds = [(fmt, g) for fmt in weights for g in ("per_channel", "per_tensor", "per_group:16")]
    kinds += [("levels:-1,-0.25,0,0.5", g) for g in ("per_channel", "per_tensor", "per_group:32")]
    kinds += [("fp5_e2m2", "per_channel"), *((fmt, None) for fmt in block_format_names())]
    x = torch.randn(6, 64)
    expected = []
    for number, (fmt, granularity) in enumerate(kinds):
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        inputs = None if granularity is None else fmt
        model = calibrated(net, recipe_of(fmt, inputs, granularity), x)
        save_native(model, f"{number}.safetensors")
        expected.append(outputs(model, x))
    torch.save(x, "x.pt")
    torch.save(expected, "outputs.pt")
    run_fresh(FRESH)


def test_scales_of_microscaling_blocks_take_a_byte(path: Path) -> None:
    model = calibrated(nn.Linear(64, 4), recipe_of("mxfp4"), torch.randn(4, 64))
    with torch.no_grad():  # the ends of what a byte of exponent can hold
        (layer,) = quantized_layers(model)
        quantizer: Any = layer.quantizers.weight
        quantizer.scale.view(-1)[:2] = torch.tensor([2.0**-127, 2.0**127])
        weight_of(layer.module)[0] = 0  # type: ignore[index]
    save_native(model, path)
    stored = safetensors.torch.load_file(path)["weight_scale"]
    assert stored.dtype == torch.uint8
    assert stored.flatten()[:2].tolist() == [0, 254]
    again = quantized_layers(load_quantized(nn.Linear(64, 4), path))[0].quantizers.weight
    assert again is not None
    assert torch.equal(again.scale, quantizer.scale)


def test_a_frozen_model_writes_the_same_file(model: nn.Module, path: Path, tmp_path: Path) -> None:
    save_native(model, path)
    save_native(freeze(model), tmp_path / "other.safetensors", snr_db=read_header(path)["snr_db"])
    assert path.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore::statqat_lightning.export.freezing.frozen.LeftInFloatWarning")
def test_what_was_left_in_float_stays_in_float(path: Path) -> None:
    model, x = calibrated(small_net(), recipe_of("int4", "int4"), images()), images()
    quantized_layers(model)[0].quantizers.weight.enabled = False  # type: ignore[union-attr]
    quantized_layers(model)[1].quantizers.input.ready = False  # type: ignore[union-attr]
    save_native(model, path)
    assert torch.equal(load_quantized(small_net(), path)(x), outputs(model, x))


class Tied(nn.Module):
    """A head that shares its weight with an embedding in float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(self.embed(tokens))))
        return out


def test_a_weight_shared_with_a_layer_in_float(path: Path) -> None:
    tokens = torch.randint(16, (4, 5))
    model = calibrated(Tied(), recipe_of("int4", "int4"), tokens)
    save_native(model, path)
    again: Any = load_quantized(Tied(), path)
    assert again.head.weight is again.embed.weight
    assert torch.equal(again(tokens), outputs(model, tokens))


def test_memory_shared_in_the_state_is_written_once(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.a = nn.LayerNorm(4)
            self.b = nn.LayerNorm(4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(self.fc(x)))
            return out

    x = torch.randn(3, 4)
    model = calibrated(Twice(), recipe_of("int4"), x)
    save_native(model, path)
    assert read_header(path)["aliases"] == {"b.weight": "a.weight"}
    assert torch.equal(load_quantized(Twice(), path)(x), outputs(model, x))


def test_a_parametrized_weight_becomes_a_plain_one(path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))

    x = torch.randn(4, 8)
    model = calibrated(make(), recipe_of("int4", "int4"), x)
    save_native(model, path)
    assert torch.equal(load_quantized(make(), path)(x), outputs(model, x))


def test_a_part_of_the_saved_model_can_be_loaded(path: Path) -> None:
    whole = nn.ModuleDict({"net": Everything(), "aux": nn.Linear(3, 3)})
    x = images()
    calibrated(whole["net"], recipe_of("int4", "int4"), x)
    save_native(whole.eval(), path)
    part = load_quantized(Everything(), path)
    assert torch.equal(part(x), outputs(whole["net"], x))
    assert quantized_layers(part)[0].quantizers.weight.name == "conv3d/weight"  # type: ignore[union-attr]


def test_quantizers_the_model_had_before_are_replaced(model: nn.Module, path: Path) -> None:
    save_native(model, path)
    other = calibrated(Everything(), recipe_of("fp8", "int2"), images())
    x = images()
    assert torch.equal(load_quantized(other, path)(x), outputs(model, x))


def test_a_killed_write_leaves_the_old_file(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_native(model, path)
    before = path.read_bytes()

    def half(tensors: Any, to: Path, metadata: Any) -> None:
        Path(to).write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_native(model, path)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_replacing_gives_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"1")
    with replacing(tmp_path / "new" / "file") as temporary:
        temporary.write_bytes(b"1")
    modes = [(tmp_path / name).stat().st_mode for name in ("ordinary", "new/file")]
    assert modes[0] == modes[1]


# Bad files


def test_a_truncated_file(model: nn.Module, path: Path) -> None:
    save_native(model, path)
    data = path.read_bytes()
    for length in (len(data) - 100, 500, 9):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: not a whole"):
            load_quantized(Everything(), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a .safetensors file nor a checkpoint"):
        load_quantized(Everything(), path)


def test_a_foreign_file(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"another program wrote it. Expected a file by Export"):
        load_quantized(Everything(), path)
    path.write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match=r"begins with b'hello, th'"):
        load_quantized(Everything(), path)
    with pytest.raises(ValueError, match=r"got a folder"):
        load_quantized(Everything(), path.parent)
    with pytest.raises(FileNotFoundError):
        load_quantized(Everything(), path.with_name("none"))


def test_a_file_from_the_future(model: nn.Module, path: Path) -> None:
    save_native(model, path)
    rewrite(path, file_version=2, library_version="9.0")
    with pytest.raises(ValueError, match=r"got file version 2, written by statqat-lightning 9.0"):
        load_quantized(Everything(), path)


def rewrite(path: Path, **entries: Any) -> None:
    header = read_header(path) | entries
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={native.KEY: json.dumps(header)})


def test_another_model(model: nn.Module, path: Path) -> None:
    save_native(model, path)
    with pytest.raises(ValueError, match=r"none of the names in it is a name of Sequential"):
        load_quantized(small_net(), path)
    wrapped = nn.ModuleDict({"net": Everything()})
    with pytest.raises(ValueError, match=r"part of this model, with 'net.conv1d.bias'; pass"):
        load_quantized(wrapped, path)

    wider = Everything()
    wider.own = nn.Linear(64, 13)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"own.bias: shape \(12,\) in the file, \(13,\)"):
        load_quantized(wider, path)
    more = Everything()
    more.extra = nn.LayerNorm(3)
    with pytest.raises(ValueError, match=r"only in the model: extra.bias, extra.weight"):
        load_quantized(more, path)
    fewer = Everything()
    del fewer.conv1d
    with pytest.raises(ValueError, match=r"recipe does not fit the model.*'conv1d'"):
        load_quantized(fewer, path)


def test_damaged_codes_are_named(model: nn.Module, path: Path) -> None:
    save_native(model, path)
    tensors = safetensors.torch.load_file(path)
    metadata = {native.KEY: json.dumps(read_header(path))}
    shorter = tensors | {"own.weight_codes": tensors["own.weight_codes"][:-1].clone()}
    safetensors.torch.save_file(shorter, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"layer 'own': got 383 bytes of codes; expected 384"):
        load_quantized(Everything(), path)
    scalar = tensors | {"own.weight_scale": torch.ones(1)}
    safetensors.torch.save_file(scalar, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"layer 'own': got a scale of shape \(1,\)"):
        load_quantized(Everything(), path)
    del tensors["own.input_scale"]
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"layer 'own': input_scale is missing"):
        load_quantized(Everything(), path)


# Lightning checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DigitsModule]:
    module = DigitsModule()
    trainer = make_trainer(statqat("int4", "int4"))
    trainer.fit(module, loader(), held_out())
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    trainer.save_checkpoint(path)
    return path, module.eval()


def test_a_lightning_checkpoint(checkpoint: tuple[Path, DigitsModule]) -> None:
    path, trained = checkpoint
    x = images()
    again = load_quantized(DigitsModule(), path)
    assert torch.equal(again(x), outputs(trained, x))
    states = [quantizer_state(m) for m in (again, trained)]
    assert states[0].keys() == states[1].keys()
    assert not again.training


def test_a_lightning_checkpoint_into_the_bare_network(
    checkpoint: tuple[Path, DigitsModule],
) -> None:
    path, trained = checkpoint
    x = images()
    net = load_quantized(small_cnn(), path)
    assert torch.equal(net(x), outputs(trained, x))
    assert quantized_layers(net)[0].quantizers.weight.name == "0/weight"  # type: ignore[union-attr]


def test_bad_checkpoints(checkpoint: tuple[Path, DigitsModule], tmp_path: Path) -> None:
    data = torch.load(checkpoint[0], weights_only=True)
    path = tmp_path / "bad.ckpt"
    path.write_bytes(checkpoint[0].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"bad.ckpt: not a whole checkpoint"):
        load_quantized(DigitsModule(), path)
    torch.save({k: v for k, v in data.items() if k != native.KEY}, path)
    with pytest.raises(ValueError, match=r"trained without StatQATCallback"):
        load_quantized(DigitsModule(), path)
    torch.save({"model": 1}, path)
    with pytest.raises(ValueError, match=r"no 'state_dict' in it"):
        load_quantized(DigitsModule(), path)
    torch.save(data | {"odd": Odd()}, path)
    with pytest.raises(ValueError, match=r"load_checkpoint\(model, torch.load\("):
        load_quantized(DigitsModule(), path)
    wrong = data[native.KEY] | {"recipe": recipe_of("int8", "int8").to_dict()}
    torch.save(data | {native.KEY: wrong}, path)
    with pytest.raises(
        ValueError, match=r"is uint4 with scales of shape .* in the checkpoint, int8"
    ):
        load_quantized(DigitsModule(), path)


class Odd:
    """Not a type that `weights_only` lets through."""


@pytest.mark.parametrize(
    "fmt",
    ["int4_full", "fp4_e3m0", "fp5_e2m2", "nf4", "levels:-1,0,0.5", "mxfp8", "mxfp6", "nvfp4"],
)
def test_codebooks_and_blocks_reload_bit_equal(fmt: str, path: Path) -> None:
    x = images()
    model = calibrated(small_net(), recipe_of(fmt), x)
    save_native(model, path)
    again = load_quantized(small_net(), path)
    assert torch.equal(again(x), outputs(model, x))
    assert torch.equal(freeze(model)(x), outputs(model, x))
