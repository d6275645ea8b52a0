"""Speed and SNR of what is deployed, against the quantizers of the runtimes themselves.

Public networks with random weights at W8A8, one thread, batch 1, in ONNX Runtime (against
`onnxruntime.quantization.quantize_static`: QDQ, per channel, MinMax), in OpenVINO (against NNCF)
and, if asked for, in ExecuTorch with XNNPACK (against PT2E; extra `executorch`). Speed is in units
of the float model in the same runtime, all variants in turns in one process; SNR is that of the
outputs to float on inputs that no method saw.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from common import positive
from deploy_networks import NETWORKS, find, network_of
from measuring import Journal, code_digest, measure, medians, ratio, versions_text

from statqat_lightning import QuantRecipe, place, prepare, snr_db
from statqat_lightning.export import export_model
from statqat_lightning.export.calls.forward_call import outputs_of
from statqat_lightning.export.proof import openvino_runtime
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.model.quantized_model import refresh, set_observing

CALIBRATION, PER_BATCH, TEST = 8, 4, 16
Arrays = list[np.ndarray[Any, Any]]
Run = Callable[[Tensor], Arrays]


def float_file(network: nn.Module, batch: Tensor, path: Path) -> None:
    """Write the float network as ONNX, its batch open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (batch,),
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    assert program is not None
    program.save(str(path))


@torch.no_grad()
def our_file(network: nn.Module, seen: list[Tensor], path: Path, target: str) -> list[str]:
    """Write the network as this package quantizes it, without training; what the report says."""
    model = copy.deepcopy(network)
    recipe = QuantRecipe.default("int8", "int8")
    prepare(model, recipe=place(model, recipe, lambda: model(seen[0]), target).recipe)
    set_observing(model, True)
    for batch in seen:
        model(batch)
        refresh(model)
    refresh(model, search=True)
    set_observing(model, False)
    mobile = target == "executorch"
    report = export_model(
        *(model, path, seen[0]),
        files="pte" if mobile else "onnx",
        target=target,
        strict=False,
        measure_latency=False,
    )
    return list(map(str, report.notes))


def static_file(source: Path, seen: list[Tensor], path: Path) -> Path:
    """Write, and give back, what ONNX Runtime's own static quantization makes of the float file."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(seen)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:  # its symbolic shapes fail on some networks, the optimizer does not
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return path


def nncf_model(source: Path, seen: list[Tensor]) -> Any:
    """What NNCF makes of the float file."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(source)
    transformer = "sdpa" in {o.get_type_name() for o in model.get_ops()}
    return nncf.quantize(
        model,
        nncf.Dataset([{"x": b.numpy()} for b in seen]),
        subset_size=len(seen),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )


def executorch_program(module: nn.Module, one: Tensor) -> bytes:
    """A module in ExecuTorch, with XNNPACK for whatever it takes."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(module, (one,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    data: bytes = lowered.to_executorch().buffer
    return data


def pt2e_program(network: nn.Module, seen: list[Tensor], one: Tensor) -> bytes:
    """What PT2E and XNNPACK's own quantizer make of the network."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(network, (one,)).module(), quantizer)
    for batch in seen:
        for row in batch.split(1):
            prepared(row)
    return executorch_program(convert_pt2e(prepared), one)


def in_executorch(data: bytes) -> tuple[Run, Counter[str]]:
    """A program in ExecuTorch; its kernels are XNNPACK's own."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)
    method = program.load_method("forward")

    def run(x: Tensor) -> Arrays:
        assert program is not None, "it has to outlive its method"
        return [output.numpy().copy() for output in method.execute([x.contiguous()])]

    return run, Counter()


def in_onnxruntime(path: Path) -> tuple[Run, Counter[str]]:
    """A file in ONNX Runtime, and the operators of its optimized graph."""
    import onnx

    optimized = path.with_suffix(".optimized.onnx")
    session = onnx_session(path, optimized)
    name = session.get_inputs()[0].name
    nodes = onnx.load(optimized, load_external_data=False).graph.node
    return lambda x: session.run(None, {name: x.numpy()}), Counter(n.op_type for n in nodes)


def in_openvino(model: Any) -> tuple[Run, Counter[str]]:
    """A file or a model in OpenVINO, and its layers by type and precision."""
    compiled = openvino_runtime.compiled(model)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Arrays:
        found = request.infer({0: x.numpy()})
        return [found[output] for output in compiled.outputs]

    kernels = openvino_runtime.kernels(compiled)
    return run, Counter(f"{kernel.kind} {kernel.precision}" for kernel in kernels)


def mean_snr_db(wanted: list[Tensor], found: Arrays) -> float:
    """Of all outputs together, each in units of its own energy."""
    each = [snr_db(a, torch.from_numpy(b)) for a, b in zip(wanted, found, strict=True)]
    return float(-10 * torch.stack([10 ** (-snr / 10) for snr in each]).mean().log10())


LOADERS: dict[str, Callable[[Any], tuple[Run, Counter[str]]]] = {
    "ort": in_onnxruntime,
    "ov": in_openvino,
    "et": in_executorch,
}


@torch.no_grad()
def measured(name: str, runtimes: list[str], rounds: int) -> dict[str, Any]:
    """Figures of one network: by variant speed in units of float, SNR, kernels."""
    network, make = network_of(name)
    seen = [make(PER_BATCH) for _ in range(CALIBRATION)]
    test, one = make(TEST), make(1)
    wanted = outputs_of(network(test))
    row: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    # ONNX Runtime's quantizer leaves files in the working directory when it is interrupted.
    with tempfile.TemporaryDirectory(prefix="deploy") as name_of_folder, chdir(name_of_folder):
        folder = Path(name_of_folder)
        source = folder / "float.onnx"
        float_file(network, seen[0], source)

        def ours(target: str) -> Path:
            path = folder / f"{target}.{'pte' if target == 'executorch' else 'onnx'}"
            row[f"{target} notes"] = our_file(network, seen, path, target)
            return path

        makers: dict[str, Callable[[], Any]] = {
            "ort float": lambda: source,
            "ort StatQAT": lambda: ours("onnxruntime"),
            "ort static": lambda: static_file(source, seen, folder / "static.onnx"),
            "ov float": lambda: source,
            "ov StatQAT": lambda: ours("openvino"),
            "ov NNCF": lambda: nncf_model(source, seen),
            "et float": lambda: executorch_program(network, one),
            "et StatQAT": lambda: ours("executorch").read_bytes(),
            "et PT2E": lambda: pt2e_program(network, seen, one),
        }
        for variant, maker in makers.items():
            runtime = variant.split()[0]
            if runtime not in runtimes:
                continue
            try:
                run, kernels = LOADERS[runtime](maker())
                found = [run(x) for x in test.split(1)]
                joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
                row[variant] = {"snr": mean_snr_db(wanted, joined), "kernels": dict(kernels)}
            except Exception as error:
                row[variant] = {"error": f"{type(error).__name__}: {error}"[:300]}
            else:
                runs[variant] = run
        seconds = measure({v: (lambda r=r: r(one)) for v, r in runs.items()}, rounds, turn=0.02)
    for variant, median in medians(seconds).items():
        row[variant]["speed"] = ratio(seconds, f"{variant.split()[0]} float", variant)
        row[variant]["ms"] = 1000 * median
    return row


PAIRS = {
    "ort StatQAT": "ORT: ours",
    "ort static": "static",
    "ov StatQAT": "OV: ours",
    "ov NNCF": "NNCF",
    "et StatQAT": "ET: ours",
    "et PT2E": "PT2E",
}


def line(name: str, row: dict[str, Any]) -> str:
    """Speed and SNR of a network in each runtime."""
    parts = [f"{name:26}"]
    for variant in PAIRS:
        found = row.get(variant)
        if found is None:
            continue
        text = "error" if "error" in found else f"{found['speed']:.2f} {found['snr']:5.1f}"
        parts.append(f"{text:>12}")
    return "".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=[*NETWORKS],
        metavar="NAME",
        help="of the table, or any other as timm:NAME or torchvision:NAME, with :SIZE of images",
    )
    parser.add_argument("--runtimes", nargs="+", choices=tuple(LOADERS), default=["ort", "ov"])
    parser.add_argument("--rounds", type=positive, default=40, help="turns of each variant")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/deploy.json"))
    args = parser.parse_args()
    for name in args.networks:
        try:
            find(name)
        except ValueError as error:
            parser.error(f"--networks: {error}.")
    if "ov" in args.runtimes and importlib.util.find_spec("nncf") is None:
        parser.error('OpenVINO is compared with NNCF: pip install "statqat-lightning[bench]"')
    if "et" in args.runtimes and importlib.util.find_spec("executorch") is None:
        parser.error('ExecuTorch is missing: pip install "statqat-lightning[executorch]"')
    return args


def main() -> None:
    args = parse_arguments()
    common.start(args, "timm", "transformers")
    logging.disable(logging.WARNING)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.output)
    print(f"W8A8, batch 1, {args.threads} threads: speed in units of float, SNR in dB")
    print(versions_text())
    shown = [title for variant, title in PAIRS.items() if variant.split()[0] in args.runtimes]
    print(f"{'':26}" + "".join(f"{title:>12}" for title in shown))
    what = code_digest(Path(__file__)), args.runtimes, args.rounds, args.threads
    for name in args.networks:
        key = f"{name} {what}"  # results of other code or options are others
        if key not in journal.entries:
            journal.add(key, measured(name, args.runtimes, args.rounds))
        print(line(name, journal.entries[key]), flush=True)


if __name__ == "__main__":
    main()
