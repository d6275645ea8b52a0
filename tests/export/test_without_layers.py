"""Proofs of files whose runtime shows no layers, such as ExecuTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from statqat_lightning import TensorSpec
from statqat_lightning.export import freeze
from statqat_lightning.export.calls.forward_call import ForwardCall, outputs_of
from statqat_lightning.export.files.registry import FILE_TYPES
from statqat_lightning.export.proof.proof import Proof
from statqat_lightning.export.proof.runtimes import Runtime
from statqat_lightning.export.proof.verify import Example, ExportDifferenceError
from statqat_lightning.export.proof.writers import Writer
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing

(PTE,) = (each for each in FILE_TYPES if each.name == "pte")


class InAnotherOrder(TorchFunctionMode):
    """Adds up the products of linear layers as another runtime may: in two halves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = args
        return x[:, ::2] @ weight[:, ::2].T + (x[:, 1::2] @ weight[:, 1::2].T + bias)


@pytest.fixture(scope="module")
def chaotic() -> tuple[nn.Module, nn.Module, Tensor]:
    """A deep network in which one code more or less grows, frozen, and its inputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(64, 64), nn.Tanh()]
        nn.init.normal_(layers[-2].weight, std=3 / 8)  # type: ignore[arg-type]
    model, x = nn.Sequential(*layers).eval(), torch.randn(512, 64)
    prepare(model, "int8", TensorSpec("int8"))
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    return model, freeze(model), x


def proof_of(chaotic: Any, run: Any, shows: Any = lambda call: {}) -> Any:
    model, frozen, x = chaotic
    with torch.no_grad():
        examples = [Example(ForwardCall.of(x), [model(x)])]
    runtime = Runtime("a runtime", run, shows)
    writer = Writer(PTE, lambda path, call: None, lambda path: runtime, lambda *_: None)
    proof = Proof(frozen, model, examples, True, 1.0, None, None)
    return proof.of(writer, Path(__file__), Path("m.pte"))


def test_a_file_as_good_as_the_model_itself_is_accepted(chaotic: Any) -> None:
    def run(call: ForwardCall) -> list[Tensor]:
        with InAnotherOrder():
            return outputs_of(call.run(chaotic[1]))

    report = proof_of(chaotic, run)

    assert report.max_steps > 1
    (remark,) = report.remarks
    assert "a runtime shows no layers. From the model in float64 the file differs by" in remark


@pytest.mark.parametrize("factor", [1.01, 1.1])
def test_a_file_that_is_worse_is_refused(chaotic: Any, factor: float) -> None:
    def run(call: ForwardCall) -> list[Tensor]:
        return [factor * output for output in outputs_of(call.run(chaotic[1]))]

    with pytest.raises(ExportDifferenceError, match=r"m\.pte: differs from"):
        proof_of(chaotic, run)


def test_a_runtime_that_shows_its_layers_is_judged_by_them(chaotic: Any) -> None:
    def run(call: ForwardCall) -> list[Tensor]:
        with InAnotherOrder():
            return outputs_of(call.run(chaotic[1]))

    def shows(call: ForwardCall) -> Any:
        return {"0": [1.1 * chaotic[1][0](*call.args)]}

    with pytest.raises(ExportDifferenceError, match=r"First at layer '0'"):
        proof_of(chaotic, run, shows)
