"""Speed of exported networks in ONNX Runtime, beside the float network in the same process.

Random weights and inputs: time does not depend on them. Networks are placed for the runtime's
integer kernels (`target="onnxruntime"`) and, for comparison, not; the last rows multiply a vector
with a 4-bit matrix. The variants take turns, see `measuring.py`; a speedup is the median of rounds
of the float network's time by the variant's.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import positive
from measuring import measure, medians, ratio, write_results
from vision import ResNet20

from statqat_lightning import QuantRecipe, TensorSpec, prepare
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.onnx_runtime import float_onnx, layers_in_float
from statqat_lightning.model.quantized_model import quantized_layers, refresh, set_observing
from statqat_lightning.model.recording import record
from statqat_lightning.targets.integer_kernels import integer_kernels
from statqat_lightning.targets.placement import place_in
from statqat_lightning.targets.settling import settle

W8A8 = QuantRecipe.default("int8", "int8")
INT4 = QuantRecipe.default(TensorSpec("int4", "per_group:32"), None, first_last_bits=None)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(128, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float | None]] = {
    # how it is made, shape of the input, speedup aimed at
    "ResNet-20": (ResNet20, (64, 3, 32, 32), 2.0),
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=10), (4, 3, 224, 224), None),
    "MobileNetV3-small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        (4, 3, 224, 224),
        None,
    ),
    "MLP 256-1024-256": (mlp, (256, 256), 3.5),
    "encoder, 2 layers": (encoder, (8, 64, 128), None),
}
MATRIX = 2048
TURN = 0.02  # seconds of forwards of one network before that of another


def calibrated(model: nn.Module, recipe: QuantRecipe, x: Tensor) -> nn.Module:
    """A copy of a model with quantizers whose scales fit an input."""
    model = copy.deepcopy(model)
    prepare(model, recipe=recipe)
    set_observing(model, True)
    with torch.no_grad():
        model(x)
    refresh(model)
    set_observing(model, False)
    return model


def session(path: Path, threads: int, accuracy_level: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(
    model: nn.Module, x: Tensor, folder: Path, threads: int, accuracy_level: int = 0
) -> tuple[Callable[[], object], str]:
    """A forward of an exported model, and how many of its layers run in integers."""
    path = folder / "model.onnx"
    save_onnx(model, path, x)
    run = session(path, threads, accuracy_level)
    layers = len({layer.name for layer in quantized_layers(model) if layer.quantizers.weights})
    integer = layers - len({*layers_in_float(path)})
    feed = {run.get_inputs()[0].name: x.numpy()}
    return lambda: run.run(None, feed), f"{integer} of {layers}"


def variants(
    name: str, threads: int
) -> tuple[dict[str, Callable[[], object]], dict[str, str], float | None]:
    """Forwards by variant, layers in integers by variant, and the speedup aimed at."""
    torch.manual_seed(0)
    if name in NETWORKS:
        make, shape, aim = NETWORKS[name]
        model, x = make(), torch.randn(shape)
        with torch.no_grad():
            model.train()(x)  # BatchNorm statistics that fit
        model.eval()
        flow = record(model, lambda: model(x))
        target = place_in(flow, model, W8A8, "onnxruntime").recipe
        kernels = integer_kernels(flow)
        recipes = {"W8A8, target": (target, 0), "W8A8": (W8A8, 0)}
    else:
        model, x, aim = nn.Linear(MATRIX, MATRIX).eval(), torch.randn(1, MATRIX), 1.0
        kernels = ()
        recipes = {"int4, exact": (INT4, 0), "int4, inputs rounded": (INT4, 4)}
    plain = float_onnx(model, ForwardCall.of(x))
    assert plain is not None
    runs: dict[str, Callable[[], object]] = {"float": lambda: plain(ForwardCall.of(x))}
    integer = {"float": ""}
    with tempfile.TemporaryDirectory() as folder:
        for variant, (recipe, level) in recipes.items():
            quantized = calibrated(model, recipe, x)
            if variant == "W8A8, target":
                settle(quantized, kernels)  # as a training does at its end
            runs[variant], integer[variant] = in_onnxruntime(
                quantized, x, Path(folder), threads, level
            )
    return runs, integer, aim


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [*NETWORKS, f"{MATRIX} x {MATRIX} matrix"]
    parser.add_argument("--rounds", type=positive, default=30, help="passes of each variant")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each runtime")
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="what to run")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(
        f"ONNX Runtime {onnxruntime.__version__} on {platform.machine()}, {args.threads} threads, "
        f"{args.rounds} rounds, torch {torch.__version__}"
    )
    print(f"{'network':24} {'variant':22} {'ms':>8} {'speedup':>8}   layers in integers")
    results: dict[str, dict[str, dict[str, float | str]]] = {}
    for name in args.networks:
        runs, integer, aim = variants(name, args.threads)
        seconds = measure(runs, args.rounds, turn=TURN)
        middle = medians(seconds)
        results[name] = {}
        for number, variant in enumerate(runs):
            speedup = ratio(seconds, "float", variant)
            results[name][variant] = {
                "milliseconds": 1e3 * middle[variant],
                "speedup": speedup,
                "layers_in_integers": integer[variant],
            }
            missed = number == 1 and aim is not None and speedup < aim
            verdict = f"   below {aim}" if missed else ""
            print(
                f"{name:24} {variant:22} {1e3 * middle[variant]:8.3f} {speedup:8.2f}   "
                f"{integer[variant]}{verdict}"
            )
    write_results(args.output, threads=args.threads, rounds=args.rounds, networks=results)


if __name__ == "__main__":
    main()
