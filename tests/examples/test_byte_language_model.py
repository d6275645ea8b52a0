"""The benchmark on language: its text, its model, and runs that can be stopped and repeated."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from statqat_lightning.model.quantized_model import quantized_layers

TINY = (
    *("--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--batch-size", "4"),
    *("--steps", "3", "--eval-bytes", "256", "--accelerator", "cpu"),
)


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of the benchmarks, by name."""
    monkeypatch.syspath_prepend(repository / "examples")
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    return importlib.import_module


def held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder like that of Python's standard library."""
    folder = tmp_path / "library"
    (folder / "package" / "test").mkdir(parents=True)
    for number in range(60):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(20)]
        (folder / "package" / f"module_{number}.py").write_text("".join(lines))
    (folder / "package" / "test" / "test_it.py").write_text("not to be read")
    return folder


def test_files_are_held_out_by_the_hash_of_their_names(load: Any, library: Path) -> None:
    train, test = load("byte_gpt").standard_library(library)
    text = {False: bytes(train.tolist()), True: bytes(test.tolist())}
    kinds = set()
    for path in (library / "package").glob("*.py"):
        kind = held_out(f"package/{path.name}")
        kinds.add(kind)
        assert path.read_bytes() + b"\0" in text[kind]
        assert path.read_bytes() not in text[not kind]
    assert kinds == {False, True}
    assert b"not to be read" not in text[False] + text[True]


def test_pythons_own_library_is_enough_text(load: Any) -> None:
    train, test = load("byte_gpt").standard_library()
    assert len(train) > 4_000_000
    assert 0.01 < len(test) / len(train) < 0.2


def test_the_model_sees_no_later_byte(load: Any) -> None:
    model = load("byte_gpt").ByteGPT(layers=2, width=16, heads=2, context=12)
    x = torch.randint(256, (3, 12))
    changed = x.clone()
    changed[:, 7:] = (x[:, 7:] + 1) % 256
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert (before[:, 7:] - after[:, 7:]).abs().amax() > 1e-3


def test_windows_are_the_text_and_the_same_for_a_seed(load: Any) -> None:
    byte_gpt = load("byte_gpt")
    text = torch.arange(200, dtype=torch.uint8)
    pieces = [byte_gpt.TrainingText(text, 10, 4, 3, seed) for seed in (0, 0, 1)]
    first, again, other = ([*piece.train_dataloader()] for piece in pieces)
    assert len(first) == 3
    for batch in first:
        assert batch.shape == (4, 11)
        assert torch.equal(batch.int() - batch[:, :1].int(), torch.arange(11).expand(4, -1).int())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    even = byte_gpt.even_windows(text, 60, 10)
    assert [int(window[0]) for window in (even[i] for i in range(len(even)))][:2] == [0, 37]


@pytest.fixture
def run(
    load: Any,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Runs the benchmark in this process: its text, its results, the folder."""

    def run(output: str, *arguments: str) -> tuple[str, dict[str, Any]]:
        module = load("byte_language_model")
        monkeypatch.setattr(module, "STEPS_BETWEEN_SAVES", 4)
        options = ("--text", str(library), "--output", output, *TINY, *arguments)
        monkeypatch.setattr(sys, "argv", ["byte_language_model.py", *options])
        module.main()
        return capsys.readouterr().out, json.loads(Path(output, "results.json").read_text())

    return run


@pytest.mark.slow
def test_a_run_prints_its_table_and_is_not_repeated(
    run: Any, load: Any, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ("INT4", "INT4-tensor", "W4A8")
    options = ("--float-steps", "10", "--formats", *formats, "--lrs", "1e-3", "1e-2")
    output, results = run("out", *options)
    assert [line.split(":")[0] for line in output.splitlines()[-4:-2]] == ["INT4", "INT4-tensor"]
    assert [(row["formats"], row["method"]) for row in results["rows"]] == [
        (name, method) for name in formats for method in ("StatQAT", "min-max", "LSQ")
    ]
    for row in results["rows"]:
        assert row["lr"] in (1e-3, 1e-2)
        assert row["post_training_loss"] == row["post_training"] - results["float"]
        assert row["trained_loss"] == row["trained"] - results["float_continued"]
        assert abs(row["trained"] - results["float_continued"]) < 0.5
    assert len({row["trained"] for row in results["rows"]}) == 9  # no method is another in disguise

    # Bits per byte by hand, from the float weights that were kept.
    byte_gpt = load("byte_gpt")
    (path,) = Path("out").glob("float_*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    model = byte_gpt.ByteGPT(1, 16, 2, 8)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    windows = byte_gpt.even_windows(byte_gpt.standard_library(library)[1], 256, 8)
    text = torch.stack([windows[i] for i in range(len(windows))]).long()
    with torch.no_grad():
        logits = model(text[:, :-1]).double()
    nats = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    assert results["float"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)

    def never(*args: Any) -> None:
        raise AssertionError("everything was done before")

    monkeypatch.setattr(byte_gpt.LanguageModel, "training_step", never)
    monkeypatch.setattr(byte_gpt.LanguageModel, "test_step", never)
    assert run("out", *options)[1] == results


@pytest.mark.slow
def test_what_is_evaluated_is_quantized(
    run: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("byte_gpt").LanguageModel
    step, formats = module.test_step, []

    def looking(self: Any, *args: Any) -> None:
        formats.append(
            {
                layer.name.removeprefix("model."): [
                    q.fmt.name for q in layer.quantizers.present() if q.ready and q.enabled
                ]
                for layer in quantized_layers(self)
            }
        )
        step(self, *args)

    monkeypatch.setattr(module, "test_step", looking)
    run("out", "--float-steps", "5", "--formats", "W4A8", "--methods", "min-max")
    kinds = [seen for i, seen in enumerate(formats) if i == 0 or seen != formats[i - 1]]
    assert kinds[0] == {}  # float, and float continued
    for seen in kinds[1:]:  # post-training, and trained
        assert seen["blocks.0.up"] == ["int4", "int8"]
        assert seen["head"] == ["int8", "int8"]
    assert len(formats) % 4 == 0
    assert sum(seen == {} for seen in formats) == len(formats) // 2


@pytest.mark.slow
def test_stopped_float_training_goes_on_to_the_same_weights(
    run: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--float-steps", "10", "--formats", "INT4", "--methods", "StatQAT")
    _, whole = run("whole", *options)
    module, step = load("byte_gpt").LanguageModel, load("byte_gpt").LanguageModel.training_step
    steps = []

    def stopping(self: Any, *args: Any) -> Any:
        steps.append(int(self.global_step))
        if len(steps) == 7:  # after the checkpoint of step 4
            raise RuntimeError("stopped")
        return step(self, *args)

    monkeypatch.setattr(module, "training_step", stopping)
    with pytest.raises(RuntimeError, match="stopped"):
        run("parts", *options)
    _, parts = run("parts", *options)
    assert steps[:11] == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert parts["float"] == whole["float"]
    assert parts["rows"][0]["trained"] == whole["rows"][0]["trained"]


@pytest.mark.parametrize(
    ("ours", "other", "said"),
    [
        (0.01, 0.04, "loses 0.25 of what min-max loses; at most 0.5: holds"),
        (0.03, 0.04, "loses 0.75 of what min-max loses; at most 0.5: does not hold"),
        (-0.01, -0.02, "there is nothing to halve"),
        (-0.0001, 0.0006, "which is noise"),
    ],
)
def test_the_verdict(load: Any, ours: float, other: float, said: str) -> None:
    losses = {"StatQAT": ours, "min-max": other}
    rows = [
        {"formats": "INT4", "method": method, "trained_loss": loss}
        for method, loss in losses.items()
    ]
    byte_language_model = load("byte_language_model")
    assert said in byte_language_model.verdict({"rows": rows}, "INT4")
    assert byte_language_model.verdict({"rows": rows[:1]}, "INT4") is None
    assert byte_language_model.verdict({"rows": rows}, "INT3") is None


def test_learned_scales_have_their_own_learning_rate_and_no_decay(load: Any) -> None:
    from statqat_lightning import TensorSpec, prepare

    byte_gpt = load("byte_gpt")
    module = byte_gpt.LanguageModel(byte_gpt.ByteGPT(1, 16, 2, 8), lr=1.0, scale_lr=0.25)
    prepare(module, TensorSpec("int4", quantizer="lsq"), None)
    trainer = type("Trainer", (), {"max_steps": 10})()
    module._trainer = trainer
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in module.named_parameters()}
    groups = [({names[id(p)] for p in g["params"]}, g) for g in optimizer.param_groups]
    assert set().union(*(own for own, _ in groups)) == set(names.values())
    for own, group in groups:
        for name in own:
            learned = name.endswith("_scale")
            assert group["initial_lr"] == (0.25 if learned else 1.0)
            matrix = dict(module.named_parameters())[name].dim() > 1 and not learned
            assert group["weight_decay"] == (0.1 if matrix else 0.0)
