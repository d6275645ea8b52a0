"""Weights that a module reads without calling their layer are quantized where they are read."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from statqat_lightning import freeze, load_quantized, prepare, remove
from statqat_lightning.export.files.native import save_native
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.quantized_layer import attached, is_quantized
from statqat_lightning.model.quantized_model import load_quantizer_state, quantizer_state


class Reader(nn.Module):
    """Attention-like: one layer is called, the weights of two are read, as in a Swin block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.qkv = nn.Linear(8, 8)
        self.proj = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.first(x), self.qkv.weight, self.qkv.bias)
        return x.relu() @ self.proj.weight.t()


class Tied(nn.Module):
    """An embedding whose weight is the output head, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(tokens)).relu(), self.embed.weight)


class Nested(nn.Module):
    """The reader is called twice, and reads once more after the layer itself has run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.reader = Calls(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.reader(x)) + self.inner.weight.sum(1) * x


class Calls(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.kept = [inner]  # in a list, so it is no child

    def forward(self, x: Tensor) -> Tensor:
        (inner,) = self.kept
        return inner(x) + F.linear(x, inner.weight)


def quantizer(model: nn.Module, layer: str) -> WeightFakeQuantizer:
    found = attached(model.get_submodule(layer)).weight
    assert found is not None
    return found


def by_hand(model: Any, x: Tensor) -> Tensor:
    """What `Reader` is with each weight quantized."""
    first, qkv, proj = (
        quantizer(model, n)(model.get_submodule(n).weight) for n in ("first", "qkv", "proj")
    )
    x = F.linear(F.linear(x, first, model.first.bias), qkv, model.qkv.bias)
    return x.relu() @ proj.t()


def test_a_weight_that_is_read_is_quantized_where_it_is_read() -> None:
    model, x = Reader(), torch.randn(7, 6)
    expected = model(x)
    report = prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    rows = {row.name: row for row in report.rows}
    assert rows["qkv"].weight == rows["first"].weight == "int4 per_channel analytic"
    assert "read by the model" in rows["qkv"].remark
    assert "read by" not in rows["first"].remark
    y = model(x)
    assert torch.equal(y, by_hand(model, x))
    assert not torch.allclose(y, expected)
    # Straight through: the gradients of the weights are those of the product by hand.
    y.square().sum().backward()
    read = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    by_hand(model, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(read[name], parameter.grad, rtol=1e-6, atol=1e-6)
        assert parameter.grad.abs().sum() > 0
    # Outside of a forward, the attribute is the parameter.
    assert model.qkv.weight is dict(model.named_parameters())["qkv.weight"]
    remove(model)
    assert torch.equal(model(x), expected)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_without_a_run_the_weight_stays_in_float_as_before() -> None:
    model, x = Reader(), torch.randn(7, 6)
    prepare(model, "int4", None, first_last_bits=None)
    model(x)
    assert attached(model.first).ran
    assert not attached(model.qkv).ran


def test_an_embedding_as_head_has_one_quantizer_for_both() -> None:
    model, tokens = Tied(), torch.randint(12, (3, 4))
    recipe = {"weights": "int4", "activations": None, "first_last_bits": None}
    prepare(model, **recipe, run=lambda: model(tokens))
    assert not is_quantized(model.embed)  # nobody asked for it
    from statqat_lightning import QuantRecipe, QuantRule

    rules = QuantRecipe([QuantRule("embed", "int4"), QuantRule("*", "int4")])
    report = prepare(model, recipe=rules, run=lambda: model(tokens))
    assert {row.name: row.remark for row in report.rows}["embed"] == (
        "its weight is also read by the model"
    )
    table = quantizer(model, "embed")(model.embed.weight)
    body = quantizer(model, "body")(model.body.weight)
    hidden = F.linear(table[tokens], body, model.body.bias).relu()
    assert torch.equal(model(tokens), F.linear(hidden, table))


def test_readers_inside_readers_and_layers_that_run_as_well() -> None:
    model, x = Nested(), torch.randn(4, 8)
    prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    assert set(quantizer(model, "inner").read_by) == {"", "reader"}
    w = quantizer(model, "inner")(model.inner.weight)

    def once(x: Tensor) -> Tensor:
        return F.linear(x, w, model.inner.bias) + F.linear(x, w)

    assert torch.equal(model(x), once(once(x)) + w.sum(1) * x)
    assert "weight" not in vars(model.inner)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_read_their_own_weights(copier: Any) -> None:
    model, x = Reader(), torch.randn(7, 6)
    prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    copied = copier(model)
    with torch.no_grad():
        model.qkv.weight.zero_()
        model.proj.weight.zero_()
    assert torch.equal(copied(x), by_hand(copied, x))
    assert copied(x).abs().sum() > 0


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model, x = Reader(), torch.randn(7, 6)
    prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    with pytest.raises(RuntimeError):
        model(torch.randn(7, 3))
    assert model.qkv.weight is model._modules["qkv"]._parameters["weight"]
    assert not attached(model.qkv).shown
    assert torch.equal(model(x), by_hand(model, x))


def test_state_files_and_the_frozen_model_agree(tmp_path: Any) -> None:
    model, x = Reader(), torch.randn(7, 6)
    prepare(model, "int3", None, first_last_bits=None, run=lambda: model(x))
    model.eval()
    expected = model(x)
    assert torch.equal(freeze(model)(x), expected)
    save_native(model, tmp_path / "m.safetensors")
    assert torch.equal(load_quantized(Reader(), tmp_path / "m.safetensors")(x), expected)
    other = Reader()
    other.load_state_dict(model.state_dict())
    prepare(other, "int3", None, first_last_bits=None)
    assert not torch.equal(other(x), expected)
    load_quantizer_state(other, quantizer_state(model))
    assert torch.equal(other(x), expected)


def test_a_parametrized_weight_that_is_read() -> None:
    model, x = Reader(), torch.randn(7, 6)
    weight_norm(model.qkv)
    report = prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    assert torch.equal(model(x), by_hand(model, x))
    # 9.9 % of such a network used to be counted as quantized.
    assert report.share_quantized == 1.0
    assert [row.name for row in report.rows] == ["first", "qkv", "proj"]


# What is compiled as a whole runs its hooks outside of the graph, where torch looks at `.grad`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_reader(inside: bool) -> None:
    reader, x = Reader(), torch.randn(7, 6)
    model = nn.Sequential(reader) if inside else reader
    prepare(model, "int4", None, first_last_bits=None, run=lambda: model(x))
    # Dynamo of torch 2.8 splits the graph where the attribute is put back.
    whole = torch.__version__ >= "2.9"  # a TorchVersion, which knows that 2.15 is later
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    y = compiled(x)
    torch.testing.assert_close(y, by_hand(reader, x))
    y.sum().backward()
    compiled_grad = reader.qkv.weight.grad
    reader.qkv.weight.grad = None
    by_hand(reader, x).sum().backward()
    torch.testing.assert_close(compiled_grad, reader.qkv.weight.grad)
    assert "weight" not in vars(reader.qkv)


def add_one(module: Any, x: Tensor) -> Tensor:
    return module.__class__.__mro__[-2].__mro__ and module._old_forward(x) + 1


def test_a_forward_on_the_instance_as_accelerate_puts_it() -> None:
    model, x = Reader(), torch.randn(7, 6)
    model.first._old_forward = model.first.forward
    model.first.forward = functools.partial(add_one, model.first)
    expected = model(x)
    report = prepare(model, "int4", "int8", first_last_bits=None, run=lambda: model(x))
    row = next(row for row in report.rows if row.name == "first")
    assert row.weight == "int4 per_channel analytic"
    assert row.input is None
    assert "replaced on the instance" in row.remark
    y = model(x)
    assert not torch.allclose(y, expected)
    first = quantizer(model, "first")(model.first.weight)
    hidden = F.linear(x, first, model.first.bias) + 1
    qkv, proj = (quantizer(model, n)(model.get_submodule(n).weight) for n in ("qkv", "proj"))
    assert torch.equal(y, F.linear(hidden, qkv, model.qkv.bias).relu() @ proj.t())
    assert torch.equal(freeze(model.eval())(x), model(x))
