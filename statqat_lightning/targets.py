"""What runtimes need of a model so that their integer kernels run it, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    Attributes:
        name: As it is given to `StatQATCallback` and `export_model`.
        title: As it is written.
        fused: Kinds of functions that it computes together with the layer before them, so that what
            they return is rounded and not what they take.
        rounds_outputs: Whether a convolution runs in integers only if its output is rounded,
            whoever reads it.
        rounds_all: Whether that holds for linear layers, too, and for what the model returns.
        adds_codes: Whether biases are added to sums of products of codes, and so rounded to
            multiples of input scale times weight scale.
        sums_in_float: Whether it adds other terms to the float32 sums of a layer, ahead of rounding
            and without rounding those.
        concatenates_codes: Whether it concatenates integers only if one scale serves them all.
        splits_gates: Whether it computes activations such as SiLU as a product of their input with
            a gate, in integers if that is rounded, too.
        unsigned_codes: Whether what is never negative may be unsigned.
        signed_codes: Whether signed inputs and outputs are int8 around 0, and not uint8 around 128.
        needs_biases: Whether it computes convolutions without a bias wrongly.
    """

    name: str
    title: str
    fused: tuple[str, ...]
    rounds_outputs: bool = False
    rounds_all: bool = False
    adds_codes: bool = False
    sums_in_float: bool = False
    concatenates_codes: bool = False
    splits_gates: bool = False
    unsigned_codes: bool = True
    signed_codes: bool = False
    needs_biases: bool = False


CLIPPING = ("relu", "ReLU", "relu6", "ReLU6")
"""Clipping that is part of rounding to unsigned integers."""
LARGEST = {"relu6": 6.0, "ReLU6": 6.0}
"""The largest value that functions of some kinds return."""
_SMOOTH = (
    *("silu", "SiLU", "hardswish", "Hardswish", "gelu", "GELU", "sigmoid", "Sigmoid"),
    *("hardsigmoid", "Hardsigmoid", "tanh", "Tanh", "elu", "ELU", "mish", "Mish"),
    *("leaky_relu", "LeakyReLU"),
)

TARGETS = {
    target.name: target
    for target in (
        # QDQ selectors of ONNX Runtime 1.32: QLinearConv takes a Relu or Clip that rounding does.
        Target(
            name="onnxruntime",
            title="ONNX Runtime",
            fused=CLIPPING,
            rounds_outputs=True,
            adds_codes=True,
            splits_gates=True,
        ),
        # OpenVINO 2026.4, low precision transformations and fusing of the CPU plugin: functions of
        # single values run on the float32 sums of a layer, as do the bias and a residual sum. With
        # rounding between a convolution and a sum, a third of the codes of the sum were off. Zero
        # points of inputs cost convolutions a fifth of their time. Where several read the float
        # output of a convolution in int8 that has no bias, some get it without its scale.
        Target(
            name="openvino",
            title="OpenVINO",
            fused=(*CLIPPING, *_SMOOTH),
            sums_in_float=True,
            concatenates_codes=True,
            signed_codes=True,
            needs_biases=True,
        ),
        # TensorRT 10, explicit quantization in its documentation: codes are symmetric int8; inputs
        # of products are rounded, and the other term of a sum, but nothing between a convolution
        # and what is computed with it. What a file has to keep to is in `export.tensorrt_rules`.
        Target(
            name="tensorrt",
            title="TensorRT",
            fused=(*CLIPPING, *_SMOOTH),
            sums_in_float=True,
            concatenates_codes=True,
            unsigned_codes=False,
            signed_codes=True,
        ),
        # XNNPACK in ExecuTorch 1.5: its partitioner takes a layer in integers only if its input and
        # its output are int8, and sums, products and concatenations likewise.
        Target(
            name="executorch",
            title="ExecuTorch",
            fused=CLIPPING,
            rounds_outputs=True,
            rounds_all=True,
            adds_codes=True,
        ),
    )
}
"""Runtimes that quantizers can be placed for, by name."""


AUTO = "auto"
"""In place of a target: that of the files which the training is to end with."""


def check_target(target: str | None) -> str | None:
    """The name of a target as it is.

    Raises:
        ValueError: If there is no such target.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: got {target!r}; expected None or one of {', '.join(TARGETS)}.")
    return target
