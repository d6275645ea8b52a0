"""Layers besides Linear and Conv: what is quantized of them, against arithmetic done by hand."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from statqat_lightning.export import freeze
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.layers.attention import attend
from statqat_lightning.layers.quantized_layer import attached
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import (
    idle_activations,
    quantized_layers,
    quantizer_state,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import Conv1D


def quantized(model: nn.Module, *args: Any, recipe: QuantRecipe | None = None) -> nn.Module:
    """The model with quantizers that know its input."""
    if recipe is None:
        prepare(model, "int4", "int8", first_last_bits=None)
    else:
        prepare(model, recipe=recipe)
    set_observing(model, True)
    model(*args)
    refresh(model)
    set_observing(model, False)
    return model


def rounded(quantizer: FakeQuantizer | None, x: Tensor) -> Tensor:
    assert quantizer is not None
    return fake_quantize(x, quantizer.qparams, quantizer.fmt)


@pytest.mark.parametrize(
    ("layer", "x", "function", "channels"),
    [
        (nn.ConvTranspose1d(4, 6, 3, 2), torch.randn(2, 4, 8), F.conv_transpose1d, 6),
        (nn.ConvTranspose2d(4, 6, 3, 2), torch.randn(2, 4, 5, 5), F.conv_transpose2d, 6),
        (nn.ConvTranspose3d(4, 6, 3, 2), torch.randn(2, 4, 3, 3, 3), F.conv_transpose3d, 6),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), torch.randn(2, 4, 5, 5), F.conv_transpose2d, 4),
        (nn.ConvTranspose2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5), F.conv_transpose2d, 4),
    ],
)
def test_transposed_convolutions(layer: Any, x: Tensor, function: Any, channels: int) -> None:
    quantized(layer, x)
    ours = layer._statqat
    assert ours.weight.scale.numel() == channels
    weight = rounded(ours.weight, layer.weight)
    expected = function(
        rounded(ours.input, x), weight, layer.bias, layer.stride, groups=layer.groups
    )
    assert torch.equal(layer(x), expected)
    # `output_size` is an argument that only this kind of layer has.
    bigger = layer(x, output_size=[n + (layer.stride[0] > 1) for n in expected.shape[2:]])
    assert bigger.shape[2] == expected.shape[2] + (layer.stride[0] > 1)
    set_observing(layer, True)
    layer(x).sum().backward()
    refresh(layer)
    assert layer.weight.grad is not None


def test_channels_of_a_transposed_convolution_are_its_second_axis() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    with torch.no_grad():
        layer.weight[:, 1] *= 100
    quantized(layer, torch.randn(1, 3, 4, 4))
    scale = quantized_layers(layer)[0].quantizers.weights["weight"].scale.flatten()
    assert scale.argmax() == 1
    assert scale[1] > 20 * scale[0]


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_quantized_weights(cls: type[nn.Module]) -> None:
    layer: Any = cls(4, 6, 2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    reference: Any = copy.deepcopy(layer)
    quantized(layer, x)
    ours = layer._statqat
    assert list(ours.weights) == [n for n in layer._flat_weights_names if n.startswith("weight")]
    with torch.no_grad():
        for name, quantizer in ours.weights.items():
            getattr(reference, name).copy_(rounded(quantizer, getattr(reference, name)))
    given, state = layer(x)
    expected, expected_state = reference(rounded(ours.input, x))
    assert torch.equal(given, expected)
    assert torch.equal(torch.stack([*state]), torch.stack([*expected_state]))
    given.sum().backward()
    assert all(getattr(layer, name).grad is not None for name in ours.weights)
    assert layer._flat_weights[0] is layer.weight_ih_l0
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x)[0], given)
    assert torch.equal(copy.deepcopy(layer)(x)[0], given)


def test_recurrent_layers_take_packed_sequences() -> None:
    layer = nn.GRU(4, 6)
    packed = pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    quantized(layer, packed, recipe=QuantRecipe([QuantRule("*", "int8", "int8", "int8")]))
    output, _ = layer(packed)
    assert isinstance(output, PackedSequence)
    quantizer = quantized_layers(layer)[0].quantizers.output
    assert quantizer is not None
    assert quantizer.ready
    assert torch.equal(output.data, rounded(quantizer, output.data))


@pytest.mark.parametrize("cls", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(cls: type[nn.Module]) -> None:
    layer: Any = cls(4, 6)
    reference: Any = copy.deepcopy(layer)
    x = torch.randn(5, 4)
    quantized(layer, x)
    ours = layer._statqat
    with torch.no_grad():
        for name, quantizer in ours.weights.items():
            getattr(reference, name).copy_(rounded(quantizer, getattr(reference, name)))
    given, expected = layer(x), reference(rounded(ours.input, x))
    pair = given if isinstance(given, tuple) else (given,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))


def attention_cases(every: int) -> list[Any]:
    """Settings of attention that differ in what its forward does."""
    cases = itertools.product(
        (False, True),  # batch first
        (False, True),  # biases of keys and values
        (False, True),  # a key of zeros
        (False, True),  # a batch
        (None, "bool", "float", "causal"),  # mask
        (False, True),  # padding
        (0, 1, 2, 3),  # three tensors, one, keys are values, other widths
        ((False, True), (True, True), (True, False)),  # weights returned, averaged
        (False, True),  # training
    )
    return list(cases)[::every]


@pytest.mark.parametrize("case", attention_cases(every=29))
def test_attention_taken_apart_is_that_of_torch_bit_for_bit(case: Any) -> None:
    compare_attention(case)


@pytest.mark.slow
def test_attention_taken_apart_is_that_of_torch_in_all_settings() -> None:
    for case in attention_cases(every=1):
        compare_attention(case)


def compare_attention(case: Any) -> None:
    first, more, zeros, batched, masked, padded, kind, (need, average), training = case
    torch.manual_seed(0)
    widths = {"kdim": 6, "vdim": 5} if kind == 3 else {}
    module = nn.MultiheadAttention(
        8, 2, 0.3, bias=not more, add_bias_kv=more, add_zero_attn=zeros, batch_first=first, **widths
    ).train(training)
    length, keys = 4, 4 if kind == 1 else 5

    def shaped(x: Tensor) -> Tensor:
        return x[0] if not batched else x if first else x.transpose(0, 1)

    query = shaped(torch.randn(3, length, 8))
    key = query if kind == 1 else shaped(torch.randn(3, keys, widths.get("kdim", 8)))
    value = key if kind in (1, 2) else shaped(torch.randn(3, keys, widths.get("vdim", 8)))
    masks = {
        "bool": torch.rand(length, keys) > 0.8,
        "float": torch.randn(6 if batched else 2, length, keys),
        "causal": torch.triu(torch.full((length, keys), -torch.inf), 1),
    }
    padding = torch.zeros(3, keys, dtype=torch.bool)
    padding[:, -1] = True
    padding = padding if batched else padding[0]
    mask = masks.get(masked)
    options = {
        "key_padding_mask": (padding if masked in (None, "bool") else padding.float())
        if padded
        else None,
        "need_weights": need,
        "attn_mask": mask,
        "average_attn_weights": average,
        "is_causal": masked == "causal",
    }
    results = []
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for run in (module, lambda *a, **k: attend(module, *a, lambda n: getattr(module, n), **k)):
            torch.manual_seed(1)
            results.append(run(query, key, value, **options))
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)
    (expected, wanted), (given, scores) = results
    assert torch.equal(given.nan_to_num(), expected.nan_to_num())
    assert (scores is None) == (wanted is None)
    assert scores is None or torch.equal(scores.nan_to_num(), wanted.nan_to_num())


def test_attention_quantizes_all_four_projections() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    quantized(layer, x, x, x)
    ours: Any = layer._statqat
    last: Any = layer.out_proj._statqat
    names = {"in_proj_weight", "query", "out_proj/weight", "out_proj/input"}
    set_observing(layer, True)
    layer(x, x, x)
    refresh(layer)
    set_observing(layer, False)
    assert set(snr_by_tensor(layer)) == names
    width = 8
    q, k, v = (
        F.linear(rounded(ours.inputs["query"], x), w, b).view(3, 5, 2, 4).transpose(1, 2)
        for w, b in zip(
            rounded(ours.weights["in_proj_weight"], layer.in_proj_weight).split(width),
            layer.in_proj_bias.split(width),
            strict=True,
        )
    )
    mixed = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).reshape(3, 5, 8)
    weight = rounded(last.weight, layer.out_proj.weight)
    expected = F.linear(rounded(last.input, mixed), weight, layer.out_proj.bias)
    # A value at the border of two codes may fall on the other side: a step of the output then.
    difference = (layer(x, x, x)[0] - expected).abs()
    assert difference.median() < 1e-6
    assert difference.max() < 0.1
    layer.train()
    set_observing(layer, True)
    layer(x, x, x)[0].sum().backward()
    assert layer.in_proj_weight.grad is not None
    assert layer.out_proj.weight.grad is not None


def test_one_tensor_in_three_places_is_quantized_once() -> None:
    layer = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    quantized(layer, x, x, x)
    inputs = quantized_layers(layer)[0].quantizers.inputs
    assert [name for name, q in inputs.items() if q.ready] == ["query"]
    assert idle_activations(layer) == []
    memory = torch.randn(7, 3, 8)
    layer = nn.MultiheadAttention(8, 2)
    quantized(layer, x, memory, memory)
    inputs = quantized_layers(layer)[0].quantizers.inputs
    assert [name for name, q in inputs.items() if q.ready] == ["query", "key"]


def test_attention_switched_off_is_the_float_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    reference = copy.deepcopy(layer)
    x = torch.randn(3, 5, 8)
    quantized(layer, x)
    assert not torch.equal(layer(x), reference(x))
    set_enabled(layer, weights=False, inputs=False)
    assert torch.equal(layer(x), reference(x))
    remove(layer)
    assert type(layer.self_attn) is nn.MultiheadAttention
    assert torch.equal(layer(x), reference(x))


def test_a_last_projection_alone_is_quantized() -> None:
    layer = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    recipe = QuantRecipe([QuantRule("out_proj", "int4", "int8")])
    prepare(layer, recipe=recipe)
    report = prepare(layer, recipe=recipe)
    assert [row.name for row in report.rows if not row.reason] == ["out_proj"]
    quantized(layer, x, x, x, recipe=recipe)
    assert idle_activations(layer) == []
    assert set(quantizer_state(layer)) == {"out_proj/weight", "out_proj/input"}


def test_embeddings_are_quantized_by_request() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))
    ids = torch.tensor([[1, 2], [3, 9]])
    report = prepare(model, "int4", "int8", first_last_bits=None)
    assert report.rows[0].reason == "no rule for its type or with its full name"
    for pattern in ("0", "type:Embedding"):
        rules = [QuantRule(pattern, weights="int4"), QuantRule("*", "int4", "int8")]
        report = prepare(model, recipe=QuantRecipe(rules))
        assert report.rows[0].weight == "int4 per_channel analytic"
        quantizer = quantized_layers(model)[0].quantizers.weight
        embedding: Any = model[0]
        assert torch.equal(embedding(ids), rounded(quantizer, embedding.weight)[ids])
        model(ids).sum().backward()
        remove(model)


def test_inputs_of_an_embedding_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="0: rule '0' gives inputs='int8', but the inputs of Emb"):
        prepare(model, recipe=QuantRecipe([QuantRule("0", "int4", "int8"), QuantRule("*", "int8")]))
    assert quantized_layers(model) == []


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (nn.Embedding(10, 8, sparse=True), "its gradients are sparse"),
        (nn.Embedding(10, 8, max_norm=1.0), "max_norm rewrites its weight in every forward"),
    ],
)
def test_embeddings_that_cannot_be_quantized(embedding: nn.Module, reason: str) -> None:
    model = nn.Sequential(embedding, nn.Linear(8, 3))
    report = prepare(model)
    assert report.rows[0].reason == reason


def test_first_and_last_do_not_count_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    report = prepare(model, "int4", "int4")
    formats = [(row.weight or "float").split()[0] for row in report.rows]
    assert formats == ["float", "int8", "int4", "int8"]


def test_outputs_of_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    rules = [
        QuantRule("type:BatchNorm2d", outputs="int8"),
        QuantRule("2", outputs="int4"),
        QuantRule("3", "int8", "int8", outputs=TensorSpec("int6")),
        QuantRule("*", "int8", "int8"),
    ]
    x = torch.randn(2, 3, 6, 6)
    quantized(model.eval(), x, recipe=QuantRecipe(rules))
    names = ["0/weight", "0/input", "1/output", "2/output", "3/weight", "3/input", "3/output"]
    assert list(quantizer_state(model)) == names
    results: list[Tensor] = []
    for part in model:
        results.append(part(results[-1] if results else x))
    for index, fmt in ((1, "int8"), (2, "uint4"), (3, "int6")):
        quantizer = next(q.output for n, _, q in quantized_layers(model) if n == str(index))
        assert isinstance(quantizer, ActivationFakeQuantizer)
        assert quantizer.fmt.name == fmt
        assert torch.equal(rounded(quantizer, results[index]), results[index])
    report = str(prepare(model, recipe=QuantRecipe(rules)))
    assert report.splitlines()[1].split()[-1] == "output"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("exclude", [[], ["*self_attn*"], ["*linear?"]])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_run_their_quantizers_in_evaluation(padded: bool, exclude: list[str]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]) if padded else None
    reference = copy.deepcopy(encoder).eval()
    recipe = QuantRecipe.default("int4", "int8", exclude, first_last_bits=None)
    quantized(encoder, x, recipe=recipe).eval()
    with torch.enable_grad():
        expected = encoder(x, src_key_padding_mask=mask)
    with torch.inference_mode():
        given = encoder(x, src_key_padding_mask=mask)
        fast = reference(x, src_key_padding_mask=mask)
    # Attention in float has a kernel of its own in evaluation, which rounds otherwise.
    close = 1e-6 if "*self_attn*" in exclude else 0.0
    torch.testing.assert_close(given, expected, rtol=0.0, atol=close)
    assert not torch.allclose(given, fast, atol=1e-4)
    with torch.inference_mode():
        frozen = freeze(encoder)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(frozen, given, rtol=0.0, atol=close)
    remove(encoder)
    assert encoder.use_nested_tensor
    with torch.inference_mode():
        again = encoder.eval()(x, src_key_padding_mask=mask)
    assert torch.equal(again, fast)


def compiled_cases() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return {
        "transposed": (nn.ConvTranspose2d(3, 4, 3, 2), torch.randn(2, 3, 6, 6)),
        "encoder": (encoder, torch.randn(2, 5, 8)),
        "cell": (nn.GRUCell(4, 6), torch.randn(5, 4)),
        "recurrent": (nn.GRU(4, 6), torch.randn(5, 2, 4)),
    }


@pytest.mark.parametrize("name", compiled_cases())
def test_compiled_layers_equal_eager_ones(name: str) -> None:
    layer, x = compiled_cases()[name]
    quantized(layer, x)
    torch._dynamo.reset()
    # Dynamo leaves recurrent layers to eager mode, with or without quantizers; that of torch 2.8
    # breaks the graph where a weight is hidden behind an attribute, too.
    old = torch.__version__.startswith("2.8.")
    whole = name == "encoder" or (name != "recurrent" and not old)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=whole)
    given, expected = compiled(x), layer(x)
    for a, b in zip(
        *((y if isinstance(y, tuple) else (y,)) for y in (given, expected)), strict=True
    ):
        if name == "cell":  # decomposed, where the eager layer is one kernel with its own exp
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp4_e2m1", "nf4"])
def test_a_linear_layer_of_transformers_is_that_of_torch_turned(weights: str) -> None:
    layer = Conv1D(12, 40)
    x = torch.randn(6, 5, 40) * torch.linspace(0.1, 3, 40) + 0.5  # channels of unequal energy
    recipe = QuantRecipe([QuantRule("*", weights, "int8")])
    models = [quantized(nn.Sequential(m), x, recipe=recipe) for m in (layer.as_linear(), layer)]
    scales = [layers.weight.scale.flatten() for m in models for layers in [attached(m[0])]]
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-5, atol=1e-5)
    loss = models[1](x).square().sum()
    loss.backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(freeze(models[1])(x), models[1](x), rtol=0, atol=0)
