"""The interface of a file is that of inference, and its proof is on the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.input_warnings import ExportWarning
from statqat_lightning.export import export_model
from statqat_lightning.export.proof.verify import onnx_session
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import DigitsModule, digits, held_out, loader, statqat, train
from tests.export.models import calibrated, recipe_of

IMAGES, LABELS = digits().tensors
FAST: dict[str, Any] = {"measure_latency": False, "test_examples": 0}

# Networks of two layers, which keep 8 bits.
pytestmark = pytest.mark.filterwarnings("ignore:StatQAT model. no weight has int4")


def inputs_of(path: str = "m.onnx") -> list[str]:
    return [entry.name for entry in onnx_session(path).get_inputs()]


class Scores(dict[str, Tensor]):
    """As a Hugging Face model returns them."""


class LikeHuggingFace(DigitsModule):
    """Takes labels, and gives a loss with them."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.net(x)
        loss = {} if labels is None else {"loss": F.cross_entropy(scores, labels)}
        return loss | {"logits": scores}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0], labels=batch[1])["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self(batch[0], batch[1])["loss"])


def test_labels_that_the_forward_can_do_without_are_no_inputs(messages: Messages) -> None:
    for options in ({}, {"limit_val_batches": 0}):  # by position in validation, by name in training
        train(
            statqat(),
            ExportCallback("m", files=("onnx",), **FAST),
            module=LikeHuggingFace,
            limit_train_batches=1,
            **options,
        )
        assert inputs_of() == ["x"]
        assert [o.name for o in onnx_session("m.onnx").get_outputs()] == ["logits"]
        assert messages.about("files take no labels")
        messages.clear()


class DemandsTargets(LikeHuggingFace):
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, labels)


def test_labels_that_the_forward_demands_are_warned_of() -> None:
    export = ExportCallback("m", files=("native",), **FAST)
    with pytest.warns(ExportWarning, match=r"files take labels: labels, it seems.*example_input="):
        train(statqat(), export, module=DemandsTargets, limit_train_batches=1)


class LikeADetector(DigitsModule):
    """Wants targets in train mode, gives losses there, and detections in eval mode."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        scores = self.net(torch.stack(images))
        if not self.training:
            return [{"scores": row} for row in scores]
        if targets is None:
            raise ValueError("targets should not be None when in training mode")
        return F.cross_entropy(scores, torch.stack([target["label"] for target in targets]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self([*batch[0]], [{"label": label} for label in batch[1]])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self([*batch[0]])


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
def test_a_detector_takes_no_targets(options: dict[str, Any]) -> None:
    data = DataLoader(digits(), batch_size=2)
    train(
        statqat(),
        ExportCallback("m", files=("onnx",), **FAST),
        module=LikeADetector,
        data=data,
        validation=data,
        limit_train_batches=1,
        **{"limit_val_batches": 1} | options,
    )
    assert inputs_of() == ["images_0", "images_1"]


def test_a_call_of_validation_comes_before_one_of_training() -> None:
    class Augments(DigitsModule):
        def forward(self, x: Tensor, strength: float | None = None) -> Any:
            return self.net(x if strength is None else x + strength * torch.rand_like(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0], strength=0.1), batch[1])

    export = ExportCallback("m", **FAST)
    train(statqat(), export, module=Augments, limit_train_batches=1, num_sanity_val_steps=1)
    assert export.report is not None
    assert export.report.notes == ()  # it is not random


# Open dimensions


class FullyConvolutional(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).mean((2, 3))
        return out


@pytest.mark.parametrize(
    "dynamic",
    [{"x": {2: "height", -1: "width"}}, torch.rand(2, 1, 12, 16)],
    ids=["names", "second"],
)
def test_other_dimensions_can_be_open(dynamic: Any) -> None:
    export = ExportCallback("m", files=("onnx", "pt2"), dynamic=dynamic, **FAST)
    module, _ = train(
        statqat("int4", "int4"), export, module=FullyConvolutional, limit_train_batches=1
    )
    x = torch.rand(3, 1, 20, 9)
    with torch.no_grad():
        expected = module.eval()(x).numpy()
    (given,) = onnx_session("m.onnx").run(None, {"x": x.numpy()})
    assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()
    program = torch.export.load("m.pt2").module()
    assert np.abs(program(x).detach().numpy() - expected).max() < 1e-5
    (entry,) = onnx.load("m.onnx").graph.input
    names = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    titles = ["height", "width"] if isinstance(dynamic, dict) else ["x_2", "x_3"]
    assert names == ["batch", 1, *titles]
    assert export.report is not None
    assert f"x (batch, 1, {', '.join(titles)})" in str(export.report)
    assert [a.examples for a in export.report.artefacts] == [32 + (32, 2)["x_2" in titles]] * 2


def test_what_is_fixed_is_said() -> None:
    export = ExportCallback("m", files=("onnx", "pt2"), **FAST)
    train(statqat(), export, limit_train_batches=1)
    assert "Inputs: x (batch, 1, 8, 8). Sizes in numbers are fixed." in str(export.report)


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"image": {2: "height"}}, "got 'image', which is no input; expected of input"),
        ({"input": {4: "depth"}}, r"got dimension 4 of 'input'; expected of 0 to 3"),
        (torch.rand(5, 1, 8, 8), "a second example of the same sizes"),
        (torch.rand(5, 8), "a second example of other inputs"),
    ],
)
def test_dimensions_that_are_not_there_are_refused(dynamic: Any, said: str) -> None:
    model = calibrated(FullyConvolutional().net, recipe_of("int4"), IMAGES[:4])
    with pytest.raises(ValueError, match=said):
        export_model(model, "m", IMAGES[:4], dynamic=dynamic)


class Sentences(nn.Module):
    """Two inputs that share a length, and a mask: what nobody combined with open dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.body(self.words(ids))) * mask.unsqueeze(-1)
        out: Tensor = self.head(x.sum(1) / mask.sum(1, keepdim=True))
        return out


def test_lengths_that_inputs_share_have_one_name() -> None:
    def sentences(count: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randint(50, (count, length)), torch.ones(count, length)

    model = calibrated(Sentences(), recipe_of("int8", "int8"), *sentences(8, 12))
    first, second = sentences(8, 12), sentences(8, 21)
    report = export_model(
        model, "m", first, dynamic=second, files=("native", "onnx", "pt2"), measure_latency=False
    )
    assert "ids (batch, ids_1), mask (batch, ids_1)" in str(report)
    ids, mask = sentences(3, 33)
    with torch.no_grad():
        expected = model.eval()(ids, mask).numpy()
    (given,) = onnx_session("m.onnx").run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()


# The data of the proof


class OfDicts(torch.utils.data.Dataset[Any]):
    """As MONAI has it: a dict a sample, labels as floats with an axis of their own."""

    def __init__(self, **names: str) -> None:
        self.image, self.label = names.get("image", "image"), names.get("label", "label")

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = LABELS[index].float().unsqueeze(0)
        return {self.image: IMAGES[index], self.label: label, "name": f"scan {index}"}


class TakesDicts(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            image, label, *_ = batch.values()
            batch = image, label.squeeze(1).long()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, dict) and "a" in batch:
            batch = next(part for part in batch.values() if part is not None)
        if not isinstance(batch, dict):
            self(batch[0])
        else:
            self(next(iter(batch.values())))


@pytest.mark.parametrize("kind", ["dict batches", "other names", "dict of loaders", "combined"])
def test_accuracy_is_found_in_batches_and_loaders_of_any_structure(kind: str) -> None:
    batches: Any = DataLoader(OfDicts(), batch_size=32)
    combined = CombinedLoader({"a": held_out(), "b": held_out()}, "max_size")
    iter(combined)  # or it has no length, which `train` asks for
    validation: Any = {
        "dict batches": batches,
        "other names": DataLoader(OfDicts(image="scan", label="target"), batch_size=32),
        "dict of loaders": {"a": held_out(), "b": held_out()},
        "combined": combined,
    }[kind]
    export = ExportCallback("m", files=("native",), measure_latency=False, test_examples=None)
    module, _ = train(
        statqat(), export, module=TakesDicts, validation=validation, limit_train_batches=1
    )
    with torch.no_grad():
        right = (module.eval()(IMAGES).argmax(1) == LABELS).float().mean().item()
    assert export.report is not None
    assert export.report.accuracy == pytest.approx(right)
    assert export.report.notes == ()


class ChangesBatches(DigitsModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize(
    ("data", "module", "said"),
    [
        (held_out(), ChangesBatches, "on_after_batch_transfer changes batches on their way"),
        (DataLoader(IMAGES, batch_size=32), TakesDicts, "the batches have no labels"),
        (
            DataLoader(OfDicts(image="image_label"), batch_size=32),
            TakesDicts,
            "batches are dicts of image_label, label, in which x cannot be told",
        ),
    ],
)
def test_where_there_is_no_accuracy_a_note_says_why(
    data: Any, module: type[DigitsModule], said: str
) -> None:
    class Quiet(module):  # type: ignore[valid-type, misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch if isinstance(batch, Tensor) else next(iter(batch.values()))) if not (
                isinstance(batch, list)
            ) else self(batch[0])

    export = ExportCallback("m", files=("native",), measure_latency=False)
    train(statqat(), export, module=Quiet, validation=data, limit_train_batches=1)
    assert export.report is not None
    assert export.report.accuracy is None
    (note,) = export.report.notes
    assert note.startswith(f"No accuracy: {said}")


def test_without_a_validation_set_the_way_to_the_test_set_is_told() -> None:
    export = ExportCallback("m", files=("native",), measure_latency=False)
    import lightning as L

    from tests.callbacks.digits import make_trainer

    L.seed_everything(1, verbose=False)

    class NoValidation(DigitsModule):
        validation_step = None  # type: ignore[assignment]

    make_trainer(statqat(), export, limit_train_batches=1).fit(NoValidation(), loader())
    assert export.report is not None
    assert export.report.notes == (
        "No accuracy: there is no validation set; data='test' takes the test set.",
    )
    assert Path("m.safetensors").exists()
