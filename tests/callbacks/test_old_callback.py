"""What made Lightning's own quantization callback unusable, one test (at least) for each report.

Lightning removed `QuantizationAwareTraining` in 2.0 (PR 16750) because of "many issues that make
the callback useless". The numbers are those of Lightning's issues and pull requests. Three more
have their tests elsewhere: README snippets (#8570) in `tests/examples`, pruning (#11047) in
`test_neighbours.py`, ranks with different data (pytorch #33648, #38081, #85627) in `test_ddp.py`.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import statqat_lightning
from statqat_lightning import (
    ExportCallback,
    QuantRecipe,
    QuantRule,
    StatQATCallback,
    load_quantized,
)
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
)
from tests.callbacks.digits import (
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    small_cnn,
    statqat,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*")


# 16609: the default arguments crashed on a newer torch


def test_16609_the_defaults_construct_and_fit() -> None:
    module = DigitsModule()
    trainer = Trainer(
        callbacks=StatQATCallback(),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(), held_out())
    assert len(quantized_layers(module)) == 3


def test_16609_nothing_of_torch_ao_is_used() -> None:
    for path in Path(statqat_lightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert not ast.unparse(node).startswith("torch.ao"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "torch.ao" not in ast.unparse(node), path


# 15862, 7926, 8677: forward was replaced by a wrapper of one argument


class TokenClassifier(LightningModule):
    """Integer token ids, a mask and a flag, passed by position, by keyword and by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, pool: bool = False) -> Tensor:
        self.seen.append(ids.dtype)
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask)
        out: Tensor = self.head(hidden.mean(1) if pool else hidden[:, 0])
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, y = batch
        return F.cross_entropy(self(ids, mask=mask, pool=True), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids, mask, y = batch
        self.log("val_loss", F.cross_entropy(self(ids=ids, mask=mask, pool=True), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        ids, _, y = batch
        self.log("test_loss", F.cross_entropy(self(ids), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0], pool=True)
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def sentences() -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (32, 7), generator=generator)
    mask = torch.arange(7) >= torch.randint(3, 8, (32, 1), generator=generator)
    return DataLoader(TensorDataset(ids, mask, ids[:, 0] % 3), batch_size=8)


def test_15862_keywords_masks_and_integer_ids() -> None:
    module, trainer = TokenClassifier(), make_trainer(statqat("int8", "int8"))
    trainer.fit(module, sentences(), sentences())
    trainer.test(module, sentences(), verbose=False)
    predicted = trainer.predict(module, sentences())
    assert predicted is not None
    assert set(module.seen) == {torch.int64}
    names = {name for name, _, _ in quantized_layers(module)}
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"} <= names
    assert "embed" not in names  # never its ids, and its weight only by request


# 12896: the live model was converted at the end of the fit


class Predicting(DigitsModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out


def test_12896_after_fit_and_export_the_module_is_evaluated_in_every_way(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    export = ExportCallback(tmp_path / "model.onnx", files=("native",))
    trainer = make_trainer(statqat(), keep, export, max_epochs=2)
    module = Predicting()
    trainer.fit(module, loader(), held_out())
    (best,) = trainer.test(dataloaders=held_out(), ckpt_path="best", verbose=False)
    (validated,) = trainer.validate(dataloaders=held_out(), ckpt_path="best", verbose=False)
    assert best["test_loss"] == validated["val_loss"]
    trainer.test(module, held_out(), verbose=False)
    assert trainer.predict(module, held_out()) is not None
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert list(module.state_dict()) == list(DigitsModule().state_dict())


# 7552: the exported model lacked the quantization of its input


def test_7552_the_exported_model_quantizes_its_input(tmp_path: Path) -> None:
    export = ExportCallback(tmp_path / "model.onnx")
    module, _ = train(statqat("int8", "int8"), export)
    graph = onnx.load(tmp_path / "model.onnx").graph
    (image,) = (value.name for value in graph.input)
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    value = image
    while True:  # nothing but clipping comes before the input is quantized
        # torch 2.8 also writes where the size of the batch is read.
        users = [node for node in graph.node if value in node.input]
        (node,) = (node for node in users if node.op_type != "Shape")
        if node.op_type == "QuantizeLinear":
            break
        assert node.op_type in ("Min", "Max")
        (value,) = node.output
    x = digits().tensors[0][:16]
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (theirs,) = session.run(None, {image: x.numpy()})
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(theirs), module(x), rtol=1e-3, atol=0.05)


# 6457: checkpoints of the quantized module did not load


def test_6457_checkpoints_load_with_and_without_the_callback(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    module, _ = train(statqat(), keep)
    path = tmp_path / "last.ckpt"
    plain = DigitsModule.load_from_checkpoint(path, strict=True)
    assert not quantized_layers(plain)
    assert_same(dict(plain.state_dict()), dict(module.state_dict()))
    loaded = load_quantized(DigitsModule(), path)
    assert_same(quantizer_state(loaded), quantizer_state(module))


# 7427: a second fit was impossible


def test_7427_a_second_fit_with_the_same_and_with_a_new_trainer() -> None:
    module, callback = DigitsModule(), statqat()
    trainer = make_trainer(callback)
    counts = []
    for fit in range(3):
        if fit == 2:
            trainer = make_trainer(statqat())
        trainer.fit_loop.max_epochs = (fit % 2) + 1
        trainer.fit(module, loader(), held_out())
        assert [type(m).__mro__[1] for _, m, _ in quantized_layers(module)] == [
            nn.Conv2d,
            nn.Conv2d,
            nn.Linear,
        ]
        counts.append(activation_quantizers(module)[0].observer.num_batches.item())
    assert counts == sorted(set(counts))


# 8507: observers were trained on validation data, the sanity check included


def test_8507_evaluation_in_between_leaves_statistics_bit_equal() -> None:
    states = []
    for evaluate in (False, True):
        module = Predicting()
        torch.manual_seed(3)
        module.load_state_dict(DigitsModule().state_dict())
        options = {"limit_val_batches": None if evaluate else 0}
        trainer = make_trainer(statqat(), SeedEachBatch(), num_sanity_val_steps=2, **options)
        trainer.fit(module, loader(shuffle=False), held_out())
        if evaluate:
            trainer.validate(module, held_out(), verbose=False)
            trainer.test(module, held_out(), verbose=False)
            trainer.predict(module, held_out())
        trainer = make_trainer(statqat(), SeedEachBatch(), num_sanity_val_steps=2, **options)
        trainer.fit(module, loader(shuffle=False), held_out())
        states.append(copy.deepcopy(quantizer_state(module)))
    assert_same(states[0], states[1])


# 10968: the documented call after the fit raised


def test_10968_the_module_is_called_like_any_other_after_the_fit() -> None:
    module, _ = train(statqat())
    x = digits().tensors[0][:4]
    assert module(x).shape == (4, 10)
    if torch.cuda.is_available():
        assert module.cuda()(x.cuda()).shape == (4, 10)


# 12890: BatchNorm was fused as if in eval mode


def test_12890_batch_norm_trains_as_ever_and_nothing_is_fused() -> None:
    module, _ = train(statqat(), max_epochs=2)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [int(n.num_batches_tracked or 0) for n in norms] == [12, 12]
    assert all(n.training for n in norms)


# 8068, 12899: whole models only


def test_8068_layers_are_chosen_by_glob_type_and_name() -> None:
    recipe = QuantRecipe(
        [
            QuantRule("net.8"),
            QuantRule("net.0", "int8", "int8"),
            QuantRule("type:Conv2d", "int2", "uint4"),
        ]
    )
    module, _ = train(StatQATCallback(recipe=recipe, verbose=False))
    formats = {
        name: (q.weight and q.weight.fmt.name, q.input and q.input.fmt.name)
        for name, _, q in quantized_layers(module)
    }
    assert formats["net.3"] == ("int2", "uint4")
    assert formats["net.0"][0] == "int8"
    assert "net.8" not in formats


# 7551: backbones from elsewhere


class Backbone(nn.Module):
    """As a library has it: nothing of Lightning, layers under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_cnn()[:7]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Wrapped(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Backbone(), nn.Flatten(), nn.Linear(72, 10))


class FrozenBackbone(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("kind", [Wrapped, FrozenBackbone])
def test_7551_a_backbone_from_elsewhere_trainable_or_frozen(kind: type[DigitsModule]) -> None:
    module, _ = train(statqat(), module=kind, max_epochs=2)
    names = [name for name, _, _ in quantized_layers(module)]
    assert names == ["net.0.body.0", "net.0.body.3", "net.2"]
    assert all(q.ready and q.observer.num_batches > 12 for q in activation_quantizers(module))


# lambdas in the state


def test_the_state_is_plain_data(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="plain")
    train(statqat(), keep)
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    module = DigitsModule()
    statqat_lightning.prepare(module, "int4", "int4")
    load_quantizer_state(module, checkpoint["statqat_lightning"]["quantizers"])


# 14447: no hook transforms a module before its weights are loaded

ORDER = [
    "Callback.setup",
    "LightningModule.setup",
    "LightningModule.configure_model",
    "LightningModule.on_load_checkpoint",
    "Callback.on_load_checkpoint",
    "Callback.load_state_dict",
    "LightningModule.configure_optimizers",
    "Callback.on_fit_start",
    "Callback.on_sanity_check_start",
    "Callback.on_train_start",
    "Callback.on_train_batch_start",
    "LightningModule.training_step",
    "Callback.on_before_optimizer_step",
    "Callback.on_train_batch_end",
    "Callback.on_train_epoch_end",
    "Callback.on_train_end",
    "Callback.on_fit_end",
    "Callback.teardown",
]


class Log(list[str]):
    def note(self, name: str) -> None:
        if name not in self:
            self.append(name)


def recording(base: type, names: list[str], log: Log) -> Any:
    """A subclass of `base` that notes when its hooks are called."""

    def hook(name: str) -> Any:
        inherited = getattr(base, name)

        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.note(f"{kind}.{name}")
            return inherited(self, *args, **kwargs)

        return noting

    kind = "Callback" if issubclass(base, Callback) else "LightningModule"
    return type(f"Noting{kind}", (base,), {name: hook(name) for name in names})


class Stateful(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"some": 1}


def test_14447_hooks_come_in_the_order_that_insertion_relies_on(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="one")
    train(Stateful(), keep)
    log = Log()
    ours = [name.partition(".")[2] for name in ORDER if name.startswith("Callback")]
    theirs = [name.partition(".")[2] for name in ORDER if name.startswith("Lightning")]
    callback = recording(Stateful, ours, log)
    callback.__qualname__ = "Stateful"  # the key of its state
    module = recording(DigitsModule, theirs, log)()
    trainer = make_trainer(callback(), max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader(), held_out(), ckpt_path=tmp_path / "one.ckpt")
    assert log == ORDER, (
        f"Lightning {L.__version__} calls its hooks in another order than the versions that "
        "StatQATCallback was written for. Quantizers are inserted after LightningModule.setup and "
        "configure_model, their state is read in LightningModule.on_load_checkpoint, before "
        "weights are loaded, and scales move in Callback.on_train_batch_end. Look at "
        "StatQATCallback.setup and at what has moved."
    )
