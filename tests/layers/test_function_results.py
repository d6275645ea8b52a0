"""Results of functions that a forward calls itself, rounded in order, whatever runs inside it."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.export import freeze, save_native, save_onnx, save_program
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.layers.function_results import FunctionCountWarning, is_result
from statqat_lightning.layers.quantized_layer import attached
from statqat_lightning.model.insertion import is_prepared_by, prepare, recipe_of, remove
from statqat_lightning.model.quantized_model import load_quantizer_state, quantizer_state
from statqat_lightning.model.recording import record
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import observed


class Inner(nn.Module):
    """It adds, too: none of its sums is one of the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + 2
        return out + 0.5


class Block(nn.Module):
    """Sums in all spellings, and an activation that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner, self.act = nn.Linear(4, 4), Inner(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x + self.linear(x))
        x = self.act(torch.add(x, self.inner(x)))
        x += 1.0
        x.add_(0.3)
        out: Tensor = self.act(torch.cat((x, F.relu(x - 1)), -1))
        return out


RESULTS = {"add": "int8", "add_1": "int4", "add_3": "int8", "act_call_1": "int4", "cat": "int8"}


def block_by_hand(block: Block, x: Tensor) -> Tensor:
    """What the block is to compute, without any mode."""

    def rounded(name: str, x: Tensor) -> Tensor:
        quantizer = attached(block).results[name]
        return fake_quantize(x, quantizer.qparams, quantizer.fmt)

    linear, inner = block.linear, block.inner
    x = torch.relu(rounded("add", x + linear(x)))
    x = torch.relu(rounded("add_1", x + (inner.linear(x) + 2 + 0.5)))
    x = rounded("act_call_1", x) + 1.0
    x = rounded("add_3", x + 0.3)
    return torch.relu(rounded("cat", torch.cat((x, torch.relu(x - 1)), -1)))


def quantized() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), nn.Linear(8, 4), Block()).eval(), torch.randn(16, 4)
    rules = [QuantRule("type:Block", results=RESULTS), QuantRule("*", "int8", "int8")]
    return observed(model, QuantRecipe(rules), x), x


def test_each_is_rounded_and_nothing_else() -> None:
    model, x = quantized()

    given = model(x)

    first, middle, last = model
    assert torch.equal(given, block_by_hand(last, middle(block_by_hand(first, x))))


def test_gradients_pass_where_values_are_not_clipped() -> None:
    torch.manual_seed(0)

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            x.add_(0.25)
            return x

    model, x = nn.Sequential(Sum(), nn.Linear(4, 2)), torch.randn(64, 4, requires_grad=True)
    observed(model, QuantRecipe([QuantRule("0", results={"add": "int4"})]), x)
    quantizer = attached(model[0]).results["add"]

    model[0](x).sum().backward()

    limit = float(quantizer.fmt.max * quantizer.scale)
    low = float(quantizer.fmt.min * quantizer.scale)
    inside = (x + 0.25 <= limit) & (x + 0.25 >= low)
    assert 0 < inside.sum() < inside.numel()
    assert x.grad is not None
    assert torch.equal(x.grad, inside.to(x.grad.dtype))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(fullgraph: bool) -> None:
    model, x = quantized()
    torch._dynamo.reset()

    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)

    assert torch.equal(compiled(x), model(x))


def test_frozen_copied_and_saved(tmp_path: Path) -> None:
    model, x = quantized()
    expected = model(x)

    assert torch.equal(freeze(model)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)

    save_native(model, tmp_path / "a.safetensors")
    loaded = load_quantized(
        nn.Sequential(Block(), nn.Linear(8, 4), Block()), tmp_path / "a.safetensors"
    )
    assert torch.equal(loaded(x), expected)
    save_program(model, tmp_path / "a.pt2", x)
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), expected)
    save_onnx(model, tmp_path / "a.onnx", x)
    session = onnx_session(tmp_path / "a.onnx")
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(given), expected, atol=1e-5)


def test_state_and_recipe_come_back(tmp_path: Path) -> None:
    model, x = quantized()
    recipe = recipe_of(model)
    recipe.to_yaml(tmp_path / "a.yaml")

    again = nn.Sequential(Block(), nn.Linear(8, 4), Block()).eval()
    again.load_state_dict(model.state_dict())
    prepare(again, recipe=tmp_path / "a.yaml")
    load_quantizer_state(again, quantizer_state(model))

    assert is_prepared_by(again, recipe)
    assert torch.equal(again(x), model(x))
    assert not is_prepared_by(again, QuantRecipe.default("int8", "int8"))


def test_the_report_names_them() -> None:
    model = nn.Sequential(Block())

    report = prepare(model, recipe=QuantRecipe([QuantRule("0", results=RESULTS)]))

    rows = {row.name: row for row in report.rows if row.output}
    assert [*rows] == [f"0.{name}" for name in RESULTS]
    assert rows["0.add_1"].output == "int4 or uint4 per_tensor iterative"
    assert {row.type for row in rows.values()} == {"function"}


def test_removed_without_a_trace() -> None:
    model, x = quantized()
    remove(model)

    plain = nn.Sequential(Block(), nn.Linear(8, 4), Block()).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_a_forward_that_calls_other_functions_than_at_first_warns() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.1 if self.training else x
            return x + 1

    model, x = nn.Sequential(Changing(), nn.Linear(4, 4)).eval(), torch.randn(8, 4)
    observed(model, QuantRecipe([QuantRule("0", results={"add": "int8"})]), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)

    with pytest.warns(FunctionCountWarning, match=r"^0: its forward ran 'add' 2 times, at first 1"):
        model.train()(x)


def test_in_several_threads_at_once() -> None:
    model, x = quantized()
    expected, wrong = model(x), []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(i for i in range(30) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_in_a_child_leaves_nothing_behind() -> None:
    model, x = quantized()
    expected, inner = model(x), model[0].inner
    inner.forward = lambda x: 1 / 0

    with pytest.raises(ZeroDivisionError):
        model(x)
    del inner.forward

    assert torch.equal(model(x), expected)


def test_the_recording_gives_the_names_that_rounding_goes_by() -> None:
    model, x = Block(), torch.randn(2, 4)

    flow = record(model, lambda: model(x))

    made = [o.outputs[0].made_in for o in flow.operations if o.outputs]
    own = [role for place in made if place is not None and place[0] == "" for role in [place[1]]]
    assert own == [
        *("linear_call", "add", "act_call", "add_1", "act_call_1", "add_2", "add_3"),
        *("sub", "relu", "cat", "act_call_2"),
    ]
    assert all(map(is_result, own))


@pytest.mark.parametrize("name", ["weight", "input", "output", "query", "weight_hh_l0"])
def test_names_of_other_tensors_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}' in results; expected the name of a funct"):
        QuantRule("block", results={name: "int8"})


def test_layers_have_no_results() -> None:
    with pytest.raises(ValueError, match=r"^0: rule '0' gives results of add, but Linear calls no"):
        prepare(
            nn.Sequential(nn.Linear(2, 2)),
            recipe=QuantRecipe([QuantRule("0", "int8", results={"add": "int8"})]),
        )
