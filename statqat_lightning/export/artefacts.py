"""From a trained model to files that were checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export import runtimes
from statqat_lightning.export.compressed_tensors import FILES as COMPRESSED_FILES
from statqat_lightning.export.compressed_tensors import load_compressed, save_compressed
from statqat_lightning.export.divergence import first_divergence
from statqat_lightning.export.files import replacing, replacing_folder, size_of, with_ending
from statqat_lightning.export.frozen import freeze_quietly, frozen_layers, left_in_float, scale_name
from statqat_lightning.export.inputs import ForwardCall, outputs_of
from statqat_lightning.export.native import save_native
from statqat_lightning.export.onnx import ONNXExportError, require_packages, save_onnx
from statqat_lightning.export.plain import with_rounded_inputs
from statqat_lightning.export.program import save_program
from statqat_lightning.export.runtimes import Run, Runtime
from statqat_lightning.export.torchao import load_torchao, require_torchao, save_torchao
from statqat_lightning.export.tracing import ExportError
from statqat_lightning.export.verify import (
    ArtefactReport,
    Comparison,
    Example,
    ExportDifferenceError,
    ExportReport,
    class_axis,
    compare,
    latency,
    output_steps,
)
from statqat_lightning.insertion import quantized_layers, set_enabled
from statqat_lightning.recipe import QuantRecipe
from statqat_lightning.report import snr_by_tensor

_MOST_EXAMPLES = 256
_LATENCY_BATCH = 32
REPORT_ENDING = ".export.json"

NO_EXAMPLE = (
    "not written, because no input is known to trace the model with. Set example_input_array in "
    "the LightningModule, or give example_input."
)


@torch.no_grad()
def export_model(
    model: nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    module: str = "",
    recipe: QuantRecipe | None = None,
    onnx: bool = True,
    native: bool = True,
    program: bool = False,
    torchao: bool = False,
    compressed: bool = False,
    strict: bool = True,
    bound: float = 1.0,
    data: Iterable[Any] | None = None,
    most_data: int | None = 1000,
    measure_latency: bool = True,
) -> ExportReport:
    """Write the files of a quantized model, and compare each with the fake-quantized model.

    A file takes its name only after it was read back, run and found right; until then an older one
    stays. The model is not touched. What was found goes into `{path}.export.json`, too.

    Args:
        model: A model with quantizers.
        path: Where the files go: `model.onnx` and `model.safetensors` beside it, whether one of
            these endings is given or none. Another one belongs to the name: `run_0.1` becomes
            `run_0.1.onnx`.
        example: Input of one forward call, a real batch for a telling comparison: a tensor, a tuple
            of positional or a mapping of keyword arguments, or a `ForwardCall`.
        module: Name of the submodule that goes into all files but the native one, and that
            `example` belongs to; empty for the model itself. The native file always holds the whole
            model.
        recipe: The recipe of the training, for the record.
        onnx: Whether to write the `.onnx` file.
        native: Whether to write the `.safetensors` file.
        program: Whether to write the `.pt2` file, see `save_program`.
        torchao: Whether to write the `.torchao.pt` file, see `save_torchao`. It holds weights
            alone, and is compared with the model whose inputs are in float, like the next.
        compressed: Whether to write the folder `.compressed`, see `save_compressed`.
        strict: Whether a file that differs by more than the bound is refused.
        bound: Largest difference in output steps, see `ArtefactReport.max_steps`. A larger one is
            accepted if every layer by itself agrees: then values on the edge between two codes fell
            to the other side, as sums in another order make them, and a remark says so. The native
            file has to agree bit for bit.
        data: Batches `(inputs, labels)` or of inputs alone, for predictions and accuracy.
        most_data: Most examples of `data` to use; None for all.
        measure_latency: Whether to time the files against the float model.

    Returns:
        Paths, sizes and differences. A forward that cannot be exported is a note there, and the
        native file is written nevertheless.

    Raises:
        ExportDifferenceError: If a file differs, and `strict`; it names the first layer that does.
            All other files have been written then, and its `report` describes them.
        ValueError: If the model cannot be frozen, or has no submodule of that name.
        ModuleNotFoundError: If the extra `onnx` or `torchao` is needed and not installed.
        OSError: If a file cannot be written.
    """
    if onnx:
        require_packages()
    if torchao:
        require_torchao()
    reference = copy.deepcopy(model).cpu().eval()
    notes = [f"Left in float: {name} ({why})." for name, why in left_in_float(reference).items()]
    frozen = freeze_quietly(reference)
    try:
        part = reference.get_submodule(module)
    except AttributeError as error:
        raise ValueError(
            f"export: {type(model).__name__} has no submodule {module!r}; expected one of "
            f"{', '.join(name for name, _ in model.named_children())} or one below."
        ) from error
    call = None if example is None else ForwardCall.of(example).copy().with_batch(_MOST_EXAMPLES)
    examples = [Example(call, outputs_of(call.run(part)))] if call else []
    is_random = any(not _equal(e.outputs, outputs_of(e.call.run(part))) for e in examples)
    if is_random:
        notes.append(
            "The model gives other outputs each time, in eval mode, too: nothing can be proved."
        )
    if examples and data is not None and not is_random:
        try:
            examples += _labelled(part, examples[0], data, most_data)
        except Exception as error:
            # Their data loader is asked for a figure; the files do not hang on it.
            notes.append(f"No accuracy: the data failed with {type(error).__name__}: {error}")
    proof = _Proof(
        frozen.get_submodule(module),
        part,
        examples,
        strict and not is_random,
        bound,
        runtimes.float_model(reference, module) if call and measure_latency else None,
    )
    outside = [
        layer.name
        for layer in quantized_layers(reference)
        if module and not f"{layer.name}.".startswith(f"{module}.")
    ]
    whole = f"holds {module!r}; these quantized layers are outside: {', '.join(outside)}."
    reports: dict[str, ArtefactReport] = {}
    differing: list[ExportDifferenceError] = []
    chosen = {
        "native": native,
        "onnx": onnx,
        "program": program,
        "torchao": torchao,
        "compressed": compressed,
    }
    writers = _writers(frozen, reference, module, recipe)
    wanted = [writer for writer in writers if chosen[writer.kind]]
    for writer in wanted:
        if writer.needs_call and call is None:
            notes.append(f"{writer.title}: {NO_EXAMPLE}")
            continue
        if writer.needs_call and outside:
            notes.append(f"{writer.title}: {whole}")
        target = with_ending(path, writer.ending)
        try:
            with writer.replacing(target) as temporary:
                writer.write(temporary, call)
                found = proof.of(writer, temporary, target)
            reports[writer.kind] = found
        except ExportDifferenceError as error:
            differing.append(error)
            notes.append(f"{writer.title}: not written. {error}")
        except (ExportError, ONNXExportError) as error:
            notes.append(f"{writer.title}: not written. {error}")
    report = ExportReport(
        native=reports.get("native"),
        onnx=reports.get("onnx"),
        program=reports.get("program"),
        torchao=reports.get("torchao"),
        compressed=reports.get("compressed"),
        examples=(call.batch_size or 0) if call else 0,
        output_range=max(
            (float(t.float().abs().max()) for t in _outputs(examples[:1]) if t.numel()), default=0.0
        ),
        float_bytes=sum(4 * t.numel() for t in reference.state_dict().values()),
        notes=tuple(notes),
        accuracy=_accuracy(examples),
    )
    report.to_json(with_ending(path, REPORT_ENDING))
    if differing:
        differing[0].report = report
        raise differing[0]
    return report


@dataclass(frozen=True)
class _Writer:
    """How one kind of file is written, and what it is compared with.

    Attributes:
        kind: Field of `ExportReport`.
        title: Its name in notes.
        ending: Of its path.
        write: Writes it.
        load: Loads it as its runtime does.
        float_run: The float model in the same runtime.
        needs_call: Whether an input is needed to write it.
        exact: Whether it has to agree bit for bit.
        in_float32: Whether it computes in float32 whatever the model's precision.
        weights_only: Whether it leaves the rounding of inputs out.
        replacing: How its path is replaced.
    """

    kind: str
    title: str
    ending: str
    write: Callable[[Path, ForwardCall | None], None]
    load: Callable[[Path], Runtime]
    float_run: Callable[[nn.Module, ForwardCall], Run | None]
    needs_call: bool = True
    exact: bool = False
    in_float32: bool = False
    weights_only: bool = False
    replacing: Callable[[Path], AbstractContextManager[Path]] = replacing


def _writers(
    frozen: nn.Module, reference: nn.Module, module: str, recipe: QuantRecipe | None
) -> Iterator[_Writer]:
    part = frozen.get_submodule(module)

    def blank() -> nn.Module:
        plain = runtimes.float_model(reference, module)
        runtimes.forget_weights(plain)
        return plain

    def in_torch(plain: nn.Module, call: ForwardCall) -> Run:
        return runtimes.float_in_torch(plain)

    yield _Writer(
        "native",
        "Native file",
        ".safetensors",
        lambda path, call: save_native(
            frozen, path, recipe, module, snr_db=snr_by_tensor(reference)
        ),
        lambda path: runtimes.load_native(path, reference, module),
        in_torch,
        needs_call=False,
        exact=True,
    )
    yield _Writer(
        "onnx",
        "ONNX",
        ".onnx",
        lambda path, call: save_onnx(part, path, call),
        runtimes.load_onnx,
        runtimes.float_onnx,
        in_float32=True,
    )
    yield _Writer(
        "program",
        "torch.export",
        ".pt2",
        lambda path, call: save_program(part, path, call),
        runtimes.load_program,
        runtimes.float_program,
    )
    yield _Writer(
        "torchao",
        "torchao",
        ".torchao.pt",
        lambda path, call: save_torchao(part, path),
        lambda path: runtimes.in_torch("torchao", load_torchao(blank(), path), part),
        in_torch,
        needs_call=False,
        weights_only=True,
    )
    yield _Writer(
        "compressed",
        "compressed-tensors",
        ".compressed",
        lambda path, call: save_compressed(part, path),
        lambda path: runtimes.in_torch("load_compressed", load_compressed(blank(), path), part),
        in_torch,
        needs_call=False,
        weights_only=True,
        replacing=lambda path: replacing_folder(path, COMPRESSED_FILES),
    )


@dataclass
class _Proof:
    """Compares files with the fake-quantized model."""

    frozen: nn.Module
    part: nn.Module
    examples: list[Example]
    strict: bool
    bound: float
    plain: nn.Module | None

    def of(self, writer: _Writer, path: Path, target: Path) -> ArtefactReport:
        """Load a file, run it, compare it and time it.

        Raises:
            ExportDifferenceError: If it differs, and `strict`.
        """
        frozen, examples, remarks = self.frozen, self.examples, []
        if writer.weights_only and (rounded := with_rounded_inputs(frozen)):
            frozen, examples = self._without_inputs()
            remarks.append(
                "weights only, and compared with the model whose inputs are in float; these layers "
                f"round their inputs: {', '.join(name or '(the model)' for name in rounded)}."
            )
        try:
            runtime = writer.load(path)
            comparison = compare(runtime, examples)
        except Exception as error:
            raise ExportDifferenceError(
                f"{target}: what was written cannot be loaded and run: {type(error).__name__}: "
                f"{error} The file was not kept."
            ) from error
        if runtime.batch is not None and examples:
            remarks.append(f"The forward fixes its batch size: {runtime.batch} only.")
        divergence = None
        bound = 0.0 if writer.exact else self.bound
        # Not `max_steps > bound`: that is false for NaN.
        if examples and not comparison.max_steps <= bound:
            divergence = self._located(writer, runtime, frozen, examples)
            if divergence is None and not writer.exact and math.isfinite(comparison.max_steps):
                remarks.append(
                    f"differs by {comparison.max_steps:.3g} steps, but each layer by itself "
                    "agrees: values on the edge between two codes fell to the other side."
                )
            else:
                text = (
                    f"{target}: differs from the fake-quantized model by "
                    f"{comparison.max_difference:.3g}, {comparison.max_steps:.3g} output steps "
                    f"(bound {bound:g}). First at {divergence or 'no layer that can be told'}."
                )
                if self.strict:
                    raise ExportDifferenceError(
                        f"{text} The file was not kept; strict=False keeps it."
                    )
                remarks.append(f"not proved. {text}")
        times = self._times(writer, runtime)
        return ArtefactReport(
            path=str(target),
            bytes=size_of(path),
            max_difference=comparison.max_difference,
            agreement=comparison.agreement,
            max_steps=comparison.max_steps,
            snr_db=comparison.snr_db,
            accuracy=comparison.accuracy,
            examples=comparison.examples,
            runtime=runtime.name,
            milliseconds=times and times[0],
            float_milliseconds=times and times[1],
            divergence=divergence,
            remarks=tuple(remarks),
        )

    def _without_inputs(self) -> tuple[nn.Module, list[Example]]:
        """The model whose inputs are in float, and what it makes of the examples."""
        part = copy.deepcopy(self.part)
        set_enabled(part, inputs=False)
        frozen = copy.deepcopy(self.frozen)
        for _, layer in frozen_layers(frozen):
            for role in layer.frozen_activations:
                del layer._buffers[scale_name(role)]
            layer.frozen_activations = {}
        return frozen, [
            Example(e.call, outputs_of(e.call.run(part)), e.labels) for e in self.examples
        ]

    def _located(
        self, writer: _Writer, runtime: Runtime, frozen: nn.Module, examples: list[Example]
    ) -> str | None:
        """The first layer that differs, on the first example on which one does."""
        frozen = copy.deepcopy(frozen)
        for example in examples:
            call = example.call
            if runtime.batch is not None:
                call = call.with_batch(runtime.batch, least=runtime.batch)
            outputs = runtime.run(call)
            layers = runtime.layer_outputs(call)
            if writer.in_float32:
                frozen, call = frozen.float(), call.to_float32()
            if divergence := first_divergence(frozen, call, layers, outputs):
                return str(divergence)
        return None

    def _times(self, writer: _Writer, runtime: Runtime) -> tuple[float, float] | None:
        if self.plain is None or not self.examples:
            return None
        batch = runtime.batch or _LATENCY_BATCH
        call = self.examples[0].call.with_batch(batch, least=runtime.batch or 1)
        float_run = writer.float_run(self.plain, call)
        return latency(runtime.run, float_run, call) if float_run is not None else None


def _labelled(
    part: nn.Module, first: Example, data: Iterable[Any], most: int | None
) -> Iterator[Example]:
    """Examples from batches that fit the forward and its predictions."""
    tensors = first.call.leaves()
    outputs = first.outputs
    if len(tensors) != 1 or not outputs or class_axis(outputs[0]) is None:
        return
    kind, left = tensors[0], math.inf if most is None else most
    for batch in data:
        inputs, labels = (
            batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        )
        if left <= 0 or not isinstance(inputs, Tensor):
            return
        if (
            inputs.shape[1:] != kind.shape[1:]
            or inputs.is_floating_point() != kind.is_floating_point()
        ):
            return
        call = first.call.map(lambda t, x=inputs: x.detach().cpu().to(kind.dtype))
        call = call.with_batch(None if math.isinf(left) else int(left))
        wanted = outputs_of(call.run(part))
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            labels = labels[: call.batch_size].cpu()
            predicted = wanted[0].argmax(class_axis(wanted[0]))
            labels = labels if labels.shape == predicted.shape else None
        else:
            labels = None
        left -= call.batch_size or 0
        yield Example(call, wanted, labels)


def _accuracy(examples: list[Example]) -> float | None:
    comparison = Comparison(output_steps(examples))
    for example in examples:
        comparison.add(example, example.outputs)
    return comparison.accuracy


def _outputs(examples: list[Example]) -> list[Tensor]:
    return [tensor for example in examples for tensor in example.outputs]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )
