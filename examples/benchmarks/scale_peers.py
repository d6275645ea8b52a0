"""The ways of choosing a scale that `scale_quality.py` compares: ours, baselines and peers.

A way takes rows `(n, m)`, each with a scale of its own, and a format, and returns scales `(n,)`; or
None where it has no form for them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable

import peers
import torch
from torch import Tensor, nn

from statqat_lightning import TensorSpec
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_activations
from statqat_lightning.formats import FloatFormat, Format, IntFormat
from statqat_lightning.numerics.granularity import PerChannel
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import get_quantizer

Way = Callable[[Tensor, Format], "Tensor | None"]

NUM_BATCHES = 8
"""Parts of a tensor that ways which watch a training see one after the other."""

OURS = ("analytic", "iterative", "iterative, observed")
BASELINE = "min-max"


def ways() -> tuple[dict[str, Way], dict[str, str]]:
    """All ways by name, and those that cannot run here with the reason."""
    found: dict[str, Way] = {
        "analytic": rule("analytic"),
        "iterative": rule("iterative"),
        "iterative, observed": observed("iterative"),
        BASELINE: rule("minmax"),
        "moving average, observed": observed("moving_average"),
        "percentile 99.99": rule("percentile"),
        "MSE grid, 100 points": rule("mse_grid"),
        "OCTAV": octav,
        "LSQ at its start": rule("lsq"),
    }
    missing = {}
    for name, package, make in (
        ("torch.ao histogram, observed", "torch.ao.quantization", histogram),
        ("Brevitas MSE", "brevitas", brevitas_mse),
        ("ModelOpt MSE", "modelopt", modelopt_mse),
        ("quant_mp analytic", "quant_mp", lambda: quant_mp("analytic")),
        ("quant_mp iterative", "quant_mp", lambda: quant_mp("iterative")),
    ):
        with quiet():
            if reason := peers.missing(package):
                missing[name] = reason
            else:
                found[name] = make()
    return found, missing


@contextlib.contextmanager
def quiet() -> object:
    """Without what peers say while they are imported and used."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def rule(name: str) -> Way:
    """A quantizer of ours that is given the tensor itself, as a weight is."""
    quantizer = get_quantizer(name)
    return lambda rows, fmt: quantizer.from_rows(rows, fmt)


def octav(rows: Tensor, fmt: Format) -> Tensor | None:
    if not isinstance(fmt, IntFormat | FloatFormat):
        return None
    return get_quantizer("octav").from_rows(rows, fmt)


def observed(name: str) -> Way:
    """A quantizer of ours as it calibrates an input: refreshed after every batch."""
    spec = {"quantizer": name}

    def choose(rows: Tensor, fmt: Format) -> Tensor | None:
        if len(rows) > 1:
            return None
        quantizer = ActivationFakeQuantizer(
            "", TensorSpec(fmt.name, **spec), ObserverConfig(), torch.device("cpu")
        )
        for batch in rows[0].chunk(NUM_BATCHES):
            quantizer.observe(batch, quantized=quantizer.ready)
            refresh_activations([quantizer], search=True)
        return quantizer.scale.reshape(1)

    return choose


def histogram() -> Way:
    """torch.ao's `HistogramObserver`, which knows integers and one scale for a tensor."""
    from torch.ao.quantization import HistogramObserver

    def choose(rows: Tensor, fmt: Format) -> Tensor | None:
        if len(rows) > 1 or not isinstance(fmt, IntFormat):
            return None
        symmetric = fmt.is_signed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            observer = HistogramObserver(
                dtype=torch.qint8 if symmetric else torch.quint8,
                qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
                quant_min=int(fmt.min),
                quant_max=int(fmt.max),
            )
            for batch in rows[0].chunk(NUM_BATCHES):
                observer(batch)
            scale, _ = observer.calculate_qparams()
        return scale.reshape(1)

    return choose


def brevitas_mse() -> Way:
    """Brevitas's MSE scales: of weights, and of inputs where the format is unsigned.

    Their time includes the layer that they need.
    """
    import brevitas.nn as qnn
    from brevitas.quant import float_quant_ocp, scaled_int

    def choose(rows: Tensor, fmt: Format) -> Tensor | None:
        sharing = "PerTensor" if len(rows) == 1 else "PerChannel"
        if isinstance(fmt, IntFormat) and fmt.is_signed and fmt.min == -fmt.max:
            base = getattr(scaled_int, f"Int8Weight{sharing}FloatMSE")
            facts = {"bit_width": fmt.bits}
        elif isinstance(fmt, FloatFormat):
            base = getattr(float_quant_ocp, f"FpOCPWeight{sharing}FloatMSE")
            facts = {
                "bit_width": fmt.bits,
                "exponent_bit_width": fmt.exponent_bits,
                "mantissa_bit_width": fmt.mantissa_bits,
            }
        elif isinstance(fmt, IntFormat) and not fmt.is_signed and len(rows) == 1:
            with quiet(), torch.no_grad():
                identity = qnn.QuantIdentity(
                    scaled_int.Uint8ActPerTensorFloatMSE,
                    bit_width=fmt.bits,
                    return_quant_tensor=True,
                )
                observed: Tensor = identity(rows[0]).scale
            return observed.detach().reshape(1)
        else:
            return None
        quantizer = type("Quantizer", (base,), facts)
        with quiet(), torch.no_grad():
            layer: nn.Module = qnn.QuantLinear(
                rows.shape[1], len(rows), bias=False, weight_quant=quantizer
            )
            layer.weight.copy_(rows)
            scale: Tensor = layer.quant_weight().scale
        return scale.detach().reshape(-1)

    return choose


def modelopt_mse() -> Way:
    """ModelOpt's `MseCalibrator` at its defaults; it knows no grids and is given ours."""
    from modelopt.torch.quantization.calib import MseCalibrator

    def choose(rows: Tensor, fmt: Format) -> Tensor | None:
        def quantize(x: Tensor, amax: Tensor) -> Tensor:
            return fake_quantize(x, QParams(amax / fmt.max, None, PerChannel()), fmt)

        with torch.no_grad():
            calibrator = MseCalibrator(rows.abs().amax(1, keepdim=True), 0, quant_func=quantize)
            calibrator.collect(rows)
            amax: Tensor = calibrator.compute_amax()
        return amax.reshape(-1) / fmt.max

    return choose


def quant_mp(name: str) -> Way:
    """What the authors of StatQAT published; iterations start at min-max, as in their training.

    Its integers are signed and have one negative code more; floats are on our grids.
    """
    from loguru import logger
    from quant_mp import datatypes
    from quant_mp.algs import get_algorithm

    logger.disable("quant_mp")
    steps = {"iterative": {"num_iters": 16}}  # the most that its configurations have
    algorithm = get_algorithm(name, algorithm_init_kwargs=steps.get(name))
    start = get_algorithm("minmax")

    def choose(rows: Tensor, fmt: Format) -> Tensor | None:
        theirs = getattr(datatypes, fmt.name, None)
        if theirs is None:
            return None
        scale = rows.new_ones(len(rows), 1)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # codebooks are fitted to random numbers
            scale, _ = start.fit_params(theirs, rows, scale)
            scale, _ = algorithm.fit_params(theirs, rows, scale)
        return scale.reshape(-1) * theirs.max_value / fmt.max

    return choose
