"""The benchmark that trains a pretrained model: its figures, its methods, and that it goes on."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from statqat_lightning import DistillationCallback
from tests.examples.test_pretrained_language_model import CONTEXT, WORDS, Toy


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository / "examples")
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    module = importlib.import_module("language_model")
    monkeypatch.setattr(module.smollm2, "CONTEXT", CONTEXT)
    torch.manual_seed(0)
    model = Toy()

    def tokenizer(text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % WORDS for letter in text])

    monkeypatch.setattr(
        module.smollm2, "load_model", lambda folder: (copy.deepcopy(model).eval(), tokenizer)
    )
    monkeypatch.setattr(module.smollm2, "articles", lambda folder: ["abcdefg hijklm " * 20] * 20)
    return module


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> Any:
    command = ["language_model.py", "--model", ".", "--text", ".", "--output", str(output)]
    command += ["--float-steps", "4", "--steps", "6", "--accelerator", "cpu", "--lrs", "0.002"]
    command += ["--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    benchmark.main()
    return json.loads((output / "results.json").read_text())


def test_figures_are_what_they_are_called(benchmark: Any) -> None:
    torch.manual_seed(1)
    model, other = Toy().eval(), Toy().eval()
    held_out = torch.randint(WORDS, (3, CONTEXT))
    found = benchmark.figures(model, held_out, benchmark.log_probabilities(other, held_out))
    with torch.no_grad():
        p, q = (F.softmax(m(held_out).logits.double(), -1) for m in (other, model))
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean())
    )
    of_next = q[:, :-1].gather(-1, held_out[:, 1:, None])
    assert found["nats"] == pytest.approx(float(-of_next.log().mean()), rel=1e-4)
    itself = benchmark.figures(model, held_out, benchmark.log_probabilities(model, held_out))
    assert itself["kl"] == pytest.approx(0, abs=1e-6)
    assert itself["agreement"] == 1


@pytest.mark.slow
def test_every_method_trains_from_one_start(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    methods = [*benchmark.METHODS]
    results = run(benchmark, monkeypatch, tmp_path, "--rows", "INT3", "W4A8", "--methods", *methods)
    assert [line["method"] for line in results["rows"]] == methods * 2
    assert results["float"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["trained_float"]["nats"] < results["float"]["nats"]
    rows = {(line["row"], line["method"]): line for line in results["rows"]}
    for row in ("INT3", "W4A8"):
        for name in methods:
            line = rows[row, name]
            if reason := benchmark.METHODS[name].missing(benchmark.ROWS[row]):
                assert line["missing"] == reason
                continue
            assert line["before"]["kl"] > 1e-5
            assert math.isfinite(line["after"]["nats"])
            assert line["before"] != line["after"]
        # What is rounded is the same where only the training differs.
        for plain in ("StatQAT", "StatQAT compensated"):
            distilled = plain + (" distilled" if plain == "StatQAT" else ", distilled")
            assert rows[row, plain]["before"] == rows[row, distilled]["before"]
            assert rows[row, plain]["after"] != rows[row, distilled]["after"]
        start = rows[row, "StatQAT compensated"]["before"]
        assert start["kl"] < rows[row, "StatQAT"]["before"]["kl"]
    ours, learned = rows["INT3", "StatQAT"], rows["INT3", "LSQ from our scales"]
    assert learned["before"]["nats"] == pytest.approx(ours["before"]["nats"], rel=1e-3)
    assert rows["INT3", "LSQ"]["before"]["nats"] != pytest.approx(ours["before"]["nats"], rel=1e-3)


def test_the_teacher_is_the_float_model_whatever_the_training_starts_from(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teachers = []

    class Noted(DistillationCallback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            teachers.append(self._run.state())
            super().on_train_end(trainer, pl_module)

    monkeypatch.setattr(benchmark, "DistillationCallback", Noted)
    methods = ("StatQAT distilled", "StatQAT compensated, distilled")
    run(benchmark, monkeypatch, tmp_path, "--rows", "INT3", "--methods", *methods)
    (path,) = tmp_path.glob("float_*.pt")
    start = {f"model.{name}": value for name, value in torch.load(path).items()}
    assert len(teachers) == 2
    for teacher in teachers:
        torch.testing.assert_close(teacher, start, rtol=0, atol=0)


def test_it_goes_on_where_it_was_stopped(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = "--rows", "INT4", "--methods"
    first = run(benchmark, monkeypatch, tmp_path, *options, "min-max")
    both = run(benchmark, monkeypatch, tmp_path, *options, "min-max", "StatQAT")
    assert both["rows"][0] == first["rows"][0]
    monkeypatch.setattr(benchmark.Benchmark, "fit", None)  # nothing is left to be done
    assert run(benchmark, monkeypatch, tmp_path, *options, "min-max", "StatQAT") == both


def test_what_a_peer_has_no_form_for_is_said(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = run(
        benchmark, monkeypatch, tmp_path, "--rows", "NF4", "--methods", "OCTAV", "torchao"
    )
    assert all("missing" in line for line in results["rows"])
