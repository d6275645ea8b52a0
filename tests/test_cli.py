from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn

from statqat_lightning import (
    QuantRecipe,
    advise,
    get_format,
    list_formats,
    list_presets,
    prepare,
)
from statqat_lightning.cli import main
from statqat_lightning.export import (
    compare_files,
    export_checkpoint,
    export_model,
    file_advice,
    inspect_file,
    load_quantized,
    save_native,
    save_onnx,
)
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.insight import plan_recipe
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.digits import DigitsModule, digits, held_out, loader, make_trainer, statqat
from tests.export.models import calibrated, images, recipe_of, small_net

IMAGES = digits().tensors[0][:16]


class Sized(DigitsModule):
    """Has hyper-parameters."""

    def __init__(self, width: int, extra: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net[-1] = nn.Sequential(nn.Linear(72, width), nn.Linear(width, 10))


def sized() -> DigitsModule:
    return Sized(12)


not_callable = 1


def no_module() -> dict[str, int]:
    return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sized]:
    module = Sized(12)
    trainer = make_trainer(statqat("int4", "int4"), limit_train_batches=3)
    trainer.fit(module, loader(), held_out())
    path = tmp_path_factory.mktemp("checkpoint") / "run.ckpt"
    trainer.save_checkpoint(path)
    return path, module.eval()


@pytest.fixture
def checkpoint(trained: tuple[Path, Sized]) -> Path:
    Path("run.ckpt").write_bytes(trained[0].read_bytes())
    return Path("run.ckpt")


@pytest.fixture(autouse=True)
def path_of_modules() -> Iterator[None]:
    before = [*sys.path]
    yield
    sys.path[:] = before


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command fails with."""
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("statqat: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("module", ["tests.test_cli.Sized", "tests.test_cli:sized"])
def test_export_of_a_checkpoint(
    module: str, checkpoint: Path, trained: tuple[Path, Sized], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(IMAGES, "x.pt")
    arguments = ["export", "run.ckpt", "--module", module, "--to", "native,pt2", "--input", "x.pt"]
    assert main([*arguments, "--output", "out/m"]) == 0
    assert "out/m.pt2" in capsys.readouterr().out
    assert {f.name for f in Path("out").iterdir()} == {*("m.safetensors", "m.pt2", "m.export.json")}
    with torch.no_grad():
        expected = trained[1](IMAGES)
        assert torch.equal(load_quantized(Sized(12), "out/m.safetensors")(IMAGES), expected)
        assert torch.equal(torch.export.load("out/m.pt2").module()(IMAGES), expected)


def test_export_of_a_part_on_random_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "run.ckpt", "--module", "tests.test_cli:sized", "--submodule", "net.8"]
    assert main([*arguments, "--to", "pt2", "--input-shape", "4,72"]) == 0
    assert torch.export.load("run.pt2").module()(torch.randn(2, 72)).shape == (2, 10)


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(image)
        return out.mean((2, 3))


class Resizable(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(AnySize(), nn.Linear(4, 10))


def test_export_with_open_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(statqat("int8", "int8"), limit_train_batches=1)
    module = Resizable()
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint("run.ckpt")
    arguments = ["export", "run.ckpt", "--module", "tests.test_cli.Resizable", "--to", "onnx,pt2"]
    arguments += ["--input-shape", "2,1,8,8"]
    assert main([*arguments, "--dynamic", "x:2=height,3=width", "--output", "open"]) == 0
    assert main([*arguments, "--output", "fixed"]) == 0
    wide = torch.rand(3, 1, 9, 12)
    expected = module.eval()(wide)
    assert torch.allclose(torch.export.load("open.pt2").module()(wide), expected, atol=1e-5)
    (given,) = onnx_session("open.onnx").run(None, {"x": wide.numpy()})
    assert torch.allclose(torch.from_numpy(given), expected, atol=0.02)
    shapes = [[*onnx_session(f"{name}.onnx").get_inputs()[0].shape] for name in ("open", "fixed")]
    assert shapes == [["batch", 1, "height", "width"], ["batch", 1, 8, 8]]
    capsys.readouterr()
    for given, said in (
        ("x", "--dynamic: got 'x'; expected an input and its dimensions, such as x:2=height"),
        ("x:a=b", "got 'x:a=b'"),
        ("y:2=height", "x"),
    ):
        assert said in fails(capsys, *arguments, "--dynamic", given)


def test_export_without_an_input_writes_what_it_can_and_says_how(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = fails(capsys, "export", "run.ckpt", "--module", "tests.test_cli.Sized")
    assert "not all files were written" in text
    assert "give --input" in text
    assert Path("run.safetensors").exists()
    assert not Path("run.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.ckpt", "--module", "tests.test_cli.Sized"], "none.ckpt: no such file"),
        (["run.ckpt", "--module", "Sized"], "expected package.Module or package:factory"),
        (["run.ckpt", "--module", "no_such.Thing"], "No module named 'no_such'"),
        (["run.ckpt", "--module", "tests.test_cli.Gone"], "has no class or function of it"),
        (["run.ckpt", "--module", "tests.test_cli:not_callable"], "has no class or function"),
        (["run.ckpt", "--module", "math.sqrt"], "cannot be made from the hyper-parameters"),
        (
            ["run.ckpt", "--module", "tests.test_cli:no_module"],
            "made a dict; expected an nn.Module",
        ),
        (["run.ckpt", "--module", "torch.nn.Identity"], "does not fit the model"),
        (["run.ckpt", "--module", "a.b", "--to", "tflite"], "got tflite; expected of native, onnx"),
        (["run.ckpt", "--module", "a.b", "--input-shape", "4,x"], "got '4,x'; expected sizes"),
    ],
)
def test_bad_exports_are_one_line(
    arguments: list[str], expected: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fails(capsys, "export", *arguments)


def test_objects_in_a_checkpoint_need_trust(checkpoint: Path) -> None:
    data = torch.load(checkpoint, weights_only=True)
    torch.save(data | {"odd": Path("an object")}, "odd.ckpt")
    with pytest.raises(ValueError, match="may not trust"):
        export_checkpoint("odd.ckpt", Sized, files=("native",))
    report = export_checkpoint("odd.ckpt", Sized, files=("native",), trust=True)
    assert report.native_path == "odd.safetensors"


def test_inspect_a_native_file(
    trained: tuple[Path, Sized], capsys: pytest.CaptureFixture[str]
) -> None:
    module = trained[1]
    recipe = recipe_of("int4", "int4")
    save_native(module, "m.safetensors", recipe)
    found = inspect_file("m.safetensors")
    assert (found.kind, found.bytes) == ("native", Path("m.safetensors").stat().st_size)
    assert found.recipe == recipe.to_dict()
    assert [*found.layers] == ["net.0", "net.3", "net.8.0", "net.8.1"]
    entry = found.layers["net.3"]["weight"]
    assert (entry.format, entry.bits, entry.granularity) == ("int4", 4, "per_channel")
    for name, decibels in snr_by_tensor(module).items():
        layer, _, role = name.rpartition("/")
        assert found.layers[layer][role].snr_db == pytest.approx(decibels, abs=1e-3)
    assert main(["inspect", "m.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m.safetensors: native, ")
    assert lines[1:3] == ["recipe:", "  *: weights int4, inputs int4"]
    assert any(line.startswith("net.3    int4 per_channel ") for line in lines)
    assert repr(found) == f"<Inspection: {lines[0]}, 4 layers>"
    html = found._repr_html_()
    assert html.startswith(f"<p>{lines[0]}</p>")
    assert [*re.findall(r"<tr><td[^>]*>([^<]*)<", html)] == [*found.layers]
    assert html.endswith(f"<p>{escape(f'Recipe: {recipe!r}')}</p>")


def test_inspect_a_checkpoint(trained: tuple[Path, Sized]) -> None:
    found = inspect_file(trained[0])
    assert found.kind == "checkpoint"
    expected = snr_by_tensor(trained[1])
    seen = {
        f"{layer}/{role}": entry.snr_db
        for layer, entries in found.layers.items()
        for role, entry in entries.items()
    }
    assert seen == pytest.approx(expected, abs=1e-3)
    assert {str(e["weight"].granularity) for e in found.layers.values()} == {"per_channel"}


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "mxfp8"])
def test_inspect_measures_the_blocks_of_transposed_convolutions(fmt: str) -> None:
    """Their blocks run along the first axis, which the weight reduces over, and not the second."""
    module = DigitsModule()
    up = nn.ConvTranspose2d(8, 32, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(32, 6, 3)
    module.net = nn.Sequential(nn.Conv2d(1, 8, 3), *up, nn.Flatten(), nn.Linear(486, 10))
    trainer = make_trainer(statqat(fmt, first_last_bits=None), limit_train_batches=1)
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint("m.ckpt")
    save_native(module, "m.safetensors", recipe_of(fmt))
    weights = {f"net.{name}": module.net[name].weight.detach().double() for name in (0, 1, 3, 5)}
    quantized = load_quantized(copy.deepcopy(module), "m.safetensors")
    for path in ("m.ckpt", "m.safetensors"):
        found = inspect_file(path).layers
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            noise = quantized.get_submodule(name).weight.detach().double() - weight
            truth = float(10 * torch.log10(weight.square().sum() / noise.square().sum()))
            assert truth > 12
            assert found[name]["weight"].snr_db == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize(
    ("weights", "bits", "kind"), [("int4", 4, "int8"), ("int8", 8, "int8"), ("nf4", 4, "uint4")]
)
def test_inspect_an_onnx_file(weights: str, bits: int, kind: str) -> None:
    model = calibrated(small_net(), recipe_of(weights, "int8"), images())
    save_onnx(model, "m.onnx", images())
    found = inspect_file("m.onnx")
    assert [*found.layers] == ["0", "2", "5", "7"]
    entry = found.layers["5"]["weight"]
    assert (entry.format, entry.bits, entry.granularity) == (kind, bits, "24 scales")
    assert found.layers["2"]["input"].format == "uint8"


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        *(("int4", g) for g in (None, "per_tensor", "per_group:4")),
        *((fmt, None) for fmt in ("uint4", "fp8", "fp4", "nf4")),
    ],
)
def test_files_of_one_model_are_equal(fmt: str, granularity: str | None) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    x = torch.randn(8, 4, 4, 4)
    model = calibrated(net, recipe_of(fmt, None, granularity), x)
    save_native(nn.ModuleDict({"net": model}).eval(), "a.safetensors")
    save_onnx(model, "b.onnx", x)
    compared = compare_files("a.safetensors", "b.onnx")
    assert compared.equal
    assert [*compared.snr_db] == ["net.0", "net.2"]


def test_a_checkpoint_equals_its_export(trained: tuple[Path, Sized]) -> None:
    export_model(trained[1], "m", files=("native",))
    assert compare_files(trained[0], "m.safetensors").equal


def test_compare_tells_how_far_apart_two_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    net = small_net()
    files = {"int8": "a.safetensors", "int4": "b.safetensors"}
    weights = []
    for fmt, path in files.items():
        model = calibrated(net, recipe_of(fmt), images())
        save_native(model, path)
        weights.append([weight_of(layer).double() for _, layer in frozen_layers(freeze(model))])
    compared = compare_files(*files.values())
    assert not compared.equal
    for decibels, x, y in zip(compared.snr_db.values(), *weights, strict=True):
        expected = 10 * math.log10(float(x.square().sum() / (x - y).square().sum()))
        assert decibels == pytest.approx(expected)
    assert main(["compare", *files.values()]) == 0
    out = capsys.readouterr().out
    assert "times the first" in out
    assert repr(compared) == "<FileComparison: a.safetensors and b.safetensors, different weights>"
    html = compared._repr_html_()
    assert all(f"<p>{line}</p>" in html for line in out.splitlines()[:2])
    assert f'right">{compared.snr_db["5"]:.1f} dB</td>' in html
    assert f"{compared.snr_db['5']:.1f} dB" in out


def test_bad_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = calibrated(small_net(), recipe_of("int4"), images())
    save_native(model, "m.safetensors")
    data = Path("m.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-9])
    Path("text.safetensors").write_text("hello, this is text")
    Path("cut.onnx").write_bytes(b"\x08\x0a\x12\xff")
    assert "cut.safetensors: not a whole" in fails(capsys, "inspect", "cut.safetensors")
    assert "neither a .safetensors" in fails(capsys, "inspect", "text.safetensors")
    assert "not a whole .onnx file" in fails(capsys, "inspect", "cut.onnx")
    assert "none.onnx: no such file" in fails(capsys, "inspect", "none.onnx")
    assert "none" in fails(capsys, "compare", "m.safetensors", "none")
    other = calibrated(
        nn.Sequential(nn.Conv2d(1, 1, 1)).append(nn.Flatten()), recipe_of("int4"), images()
    )
    named = nn.ModuleDict({"other": other}).eval()
    save_native(named, "other.safetensors")
    assert "shape (8, 1, 3, 3) in" in fails(capsys, "compare", "m.safetensors", "other.safetensors")


def test_unknown_commands_exit_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["transmogrify"])
    assert caught.value.code == 2


def test_presets_prints_the_table_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert capsys.readouterr().out == f"{list_presets()}\n"


RECIPE = "extends: w4a8\nrules:\n- {pattern: net.3, weights: int2, inputs: int8}\n"


def test_plan_says_what_layers_get(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE)
    module = "tests.test_cli:sized"
    assert main(["plan", module, "--recipe", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert out == f"{plan_recipe(sized(), QuantRecipe.from_yaml('r.yaml'))}\n"
    rows = {line.split()[0]: line.split()[3:] for line in out.splitlines()[1:7]}
    assert rows["net.3"] == ["int2", "int8|uint8"]
    assert rows["net.8.0"] == ["int4", "int8|uint8"]
    assert max(map(len, out.splitlines())) <= 80
    # Inputs of random numbers, and a runtime that wants more than inputs rounded.
    arguments = ["--preset", "w8a8", "--input-shape", "2,1,8,8", "--target", "onnxruntime", "--all"]
    assert main(["plan", module, *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-2:] == ["output", "remark"]
    table = {line[0]: " ".join(line) for line in lines[1:] if line}
    assert table["net.0"].startswith("net.0 Conv2d")
    assert table["net.5"].startswith("net.5 ReLU 0 float float int8_full or uint8")


class WithExample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(2, 2)
        self.example_input_array = {"x": torch.zeros(3, 4)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def test_plan_takes_the_example_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tests.test_cli.WithExample"]) == 0
    assert "idle Linear (6): never ran" in capsys.readouterr().out
    said = fails(capsys, "plan", "tests.test_cli.WithExample", "--input-shape", "1,2")
    assert "WithExample fails on the input: RuntimeError" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tests.test_cli:sized", "--recipe", "none.yaml"], "none.yaml"),
        (["tests.test_cli:sized", "--recipe", "w4a8"], "names a preset; expected preset='w4a8'"),
        (["tests.test_cli:sized", "--recipe", "heads.yaml"], "heads.yaml:1: Patterns ['heads']"),
        (["tests.test_cli:sized", "--preset", "w4"], "preset: got 'w4'. Did you mean"),
        (["tests.test_cli.Sized"], "Sized cannot be called without arguments: Sized.__init__()"),
        (["tests.test_cli:sized", "--target", "onnxruntime"], "without an input: what a target"),
        (["no_such.Thing"], "No module named 'no_such'"),
    ],
)
def test_bad_plans_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("heads.yaml").write_text("rules: [{pattern: heads}]")
    assert expected in fails(capsys, "plan", *arguments)


def test_diff_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE)
    assert main(["diff", "r.yaml", "r.yaml"]) == 0
    assert capsys.readouterr().out == "The recipes have the same rules.\n"
    assert main(["diff", "w4a8", "r.yaml", "--module", "tests.test_cli:sized"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["--- w4a8", "+++ r.yaml"]
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert changed == ["+{pattern: net.3, weights: int2, inputs: int8}"]
    assert [line.split() for line in lines[-2:]] == [
        ["layer", "tensor", "first", "second"],
        ["net.3", "weight", "int4", "int2"],
    ]
    assert "none.yaml" in fails(capsys, "diff", "w4a8", "none.yaml")
    assert "no layer" in fails(capsys, "diff", "w8a8", "r.yaml", "--module", "torch.nn.Identity")


def test_formats_prints_the_table_of_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    assert capsys.readouterr().out == f"{list_formats()}\n"


def test_report_writes_a_page_of_a_checkpoint_and_of_a_native_file(
    checkpoint: Path, trained: tuple[Path, Sized], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(checkpoint)]) == 0
    assert re.fullmatch(r"run\.ckpt\.html: \d+ layers, \d+\.\d kB\n", capsys.readouterr().out)
    text = Path("run.ckpt.html").read_text(encoding="utf-8").replace("<wbr>", "")
    for name in inspect_file(checkpoint).layers:
        assert f'<span class="name">{name}</span>' in text
    save_native(trained[1], "model.safetensors")
    assert main(["report", "model.safetensors", "-o", "pages/own.html"]) == 0
    assert "model.safetensors" in Path("pages/own.html").read_text(encoding="utf-8")


def test_report_says_what_it_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.ckpt" in fails(capsys, "report", "nowhere.ckpt")
    assert "expected the checkpoint of the training" in fails(capsys, "report", "model.onnx")
    torch.save({"state_dict": {}}, "float.ckpt")
    assert "without StatQATCallback" in fails(capsys, "report", "float.ckpt")


class Plain(DigitsModule):
    """Can be made without arguments."""


def saved_batches() -> list[str]:
    arguments = []
    for number, (x, y) in enumerate(loader(shuffle=False)):
        if number < 2:
            torch.save((x, y), f"batch{number}.pt")
            arguments += ["--batch", f"batch{number}.pt"]
    return arguments


def test_advise_of_a_checkpoint_needs_no_class(
    checkpoint: Path, trained: tuple[Path, Sized], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "run.ckpt"]) == 0
    advice = file_advice("run.ckpt")
    assert capsys.readouterr().out == f"{advice}\n"
    arguments = ["--target-db", "18", "--json", "a.json", "-o", "r.yaml", "--formats", "int4, int8"]
    assert main(["advise", "run.ckpt", *arguments]) == 0
    advice = file_advice("run.ckpt", ["int4", "int8"])
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines[:-2]) == advice.text(18.0)
    assert max(map(len, lines)) <= 80
    assert lines[-2:] == ["a.json: 8 tensors", f"r.yaml: {len(advice.recipe(18.0).rules)} rules"]
    assert json.loads(Path("a.json").read_text()) == json.loads(advice.to_json())
    assert QuantRecipe.from_yaml("r.yaml") == advice.recipe(18.0)
    assert main(["plan", "tests.test_cli:sized", "--recipe", "r.yaml"]) == 0


def test_advise_of_a_module_predicts_the_loss(
    checkpoint: Path, trained: tuple[Path, Sized], capsys: pytest.CaptureFixture[str]
) -> None:
    batches = saved_batches()
    model = ["--module", "tests.test_cli.Sized", "--checkpoint", "run.ckpt"]
    assert main(["advise", *model, *batches, "--target-db", "20", "-o", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Predicted change of the loss, in thousandths\n")
    # The same as from Python with the float model of the checkpoint.
    module = Sized(12)
    module.load_state_dict(torch.load("run.ckpt", weights_only=True)["state_dict"])
    data = [torch.load(f"batch{number}.pt", weights_only=True) for number in range(2)]
    assert advise(module, data).text(20.0) in out
    assert main(["advise", *model, *batches, "--snr"]) == 0
    assert capsys.readouterr().out.startswith("Predicted SNR in dB; of a weight")
    # Weights of a float training, and those that the module is made with.
    torch.save(Plain().state_dict(), "weights.pt")
    plain = ["--module", "tests.test_cli.Plain"]
    assert main(["advise", *plain, "--checkpoint", "weights.pt", *batches]) == 0
    assert main(["advise", *plain, *batches, "--formats", "int4"]) == 0


def test_sensitivity_of_a_module_goes_on_where_it_stopped(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--module", "tests.test_cli.Sized", "--checkpoint", "run.ckpt", *saved_batches()]
    arguments = ["sensitivity", *model, "--formats", "int2,int4", "--resume", "t.json"]
    assert main([*arguments, "--json", "s.json"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == [
        *("net.0", "net.3", "net.8.0", "net.8.1")
    ]
    found = json.loads(Path("s.json").read_text())
    assert len(found["rows"]) == 8
    kept = Path("t.json").read_bytes()
    assert main([*arguments, "--json", "s.json"]) == 0
    assert capsys.readouterr().out == out
    assert Path("t.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["advise"], "advise: expected a checkpoint, or --module package.Module and --batch FILE"),
        (["sensitivity"], "sensitivity: expected --module package.Module and --batch FILE"),
        (["advise", "none.ckpt"], "none.ckpt: no such file"),
        (["advise", "run.ckpt", "-o", "r.yaml"], "-o: got no --target-db; expected the SNR"),
        (
            ["advise", "run.ckpt", "--module", "a.b"],
            "got run.ckpt beside --module, --checkp",
        ),
        (["advise", "run.ckpt", "--formats", "int44"], "format: got 'int44'"),
        (["advise", "run.ckpt", "--formats", ","], "got no formats"),
        (["advise", "run.ckpt", "--target-db", "99", "-o", "r.yaml"], "keeps a tensor at 99 dB"),
        (["advise", "--module", "tests.test_cli.Plain", "--batch", "no.pt"], "no.pt"),
        (
            ["advise", "--module", "tests.test_cli.Plain", "--batch", "odd.pt"],
            "odd.pt: the checkpoint holds objects",
        ),
        (
            [
                *("advise", "--module", "tests.test_cli.Plain", "--checkpoint", "run.ckpt"),
                *("--batch", "x.pt"),
            ],
            "run.ckpt",
        ),
        (
            [
                *("advise", "--module", "tests.test_cli.Plain", "--checkpoint", "x.pt"),
                *("--batch", "x.pt"),
            ],
            "x.pt: got a Tensor; expected a Lightning checkpoint, or a state_dict",
        ),
        (
            [
                *("advise", "--module", "tests.test_cli.Plain", "--checkpoint", "none.pt"),
                *("--batch", "x.pt"),
            ],
            "none.pt: no such file",
        ),
    ],
)
def test_bad_advice_is_one_line(
    arguments: list[str], expected: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(IMAGES, "x.pt")
    torch.save({"odd": Path("an object")}, "odd.pt")
    assert expected in fails(capsys, *arguments)
    assert not Path("r.yaml").exists()


def test_allocate_writes_a_recipe_within_the_budget(
    trained: tuple[Path, Sized], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    checkpoint = str(trained[0])
    arguments = ["allocate", checkpoint, "--budget", "7.7 bits", "--inputs", "int8"]
    assert main([*arguments, "-o", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "bits a weight of 7.700 bits a weight" in said
    assert "at most" in said
    assert max(map(len, said.splitlines()[:-2])) <= 80
    module = Sized(12)
    prepare(module, recipe=recipe)
    weights = [(m.weight.numel(), q.weight) for _, m, q in quantized_layers(module) if q.weight]
    bits = sum(n * get_format(q.spec.format).bits for n, q in weights)
    assert bits / sum(n for n, _ in weights) <= 7.7
    assert "expected at least" in fails(capsys, "allocate", checkpoint, "--budget", "1 bits")
    assert "budget: got '4'" in fails(capsys, "allocate", checkpoint, "--budget", "4")
