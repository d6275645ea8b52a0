"""What the report says, what training computes and what files hold is one and the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from statqat_lightning import (
    ExportCallback,
    QuantRecipe,
    QuantRule,
    StatQATCallback,
    TensorSpec,
)
from statqat_lightning.callbacks.qat import StatQATWarning
from statqat_lightning.layers.quantized_layer import is_quantized
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    statqat,
    train,
)

# A layer that never runs is named when calibration is over, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:StatQAT never"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Block(nn.Module):
    """Reads the weight of its own layer, as a Swin block does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias).relu()


class ReadsWeights(DigitsModule):
    """A weight that a block reads, a block under three names, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        shared = Block(16)
        blocks = nn.ModuleList([shared] * 3)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), *blocks, nn.Linear(16, 16), nn.Linear(16, 10)
        )
        self.never = nn.Linear(16, 16)


def weight_rows(callback: StatQATCallback) -> dict[str, str | None]:
    assert callback.report is not None
    return {row.name: row.weight for row in callback.report.rows}


def test_report_training_and_files_agree_on_a_weight_that_is_read(tmp_path: Path) -> None:
    callback = StatQATCallback("int4", "int8", first_last_bits=None, verbose=False)
    export = ExportCallback(tmp_path / "m.onnx", measure_latency=False)
    module, _ = train(callback, export, module=ReadsWeights)
    assert callback.report is not None
    rows = {row.name: row for row in callback.report.rows}
    assert rows["net.2.qkv"].weight == "int4 per_channel analytic"
    assert rows["net.2.qkv"].input is None
    assert "read by 'net.2'" in rows["net.2.qkv"].remark
    assert rows["never"].reason == "never ran"
    assert export.report is not None
    assert export.report.native is not None
    assert export.report.native.max_difference == 0
    assert export.report.onnx is not None
    assert export.report.onnx.agreement == 1
    assert any("never/weight (never ran)" in note for note in export.report.notes)
    # What was trained: the product with the quantized weight.
    module.eval()
    x = held_out().dataset.tensors[0][:8]
    hidden = module.net[1](x.flatten(1))
    weight = quantizer_of(module, "net.2.qkv/weight")(module.net[2].qkv.weight)
    by_hand = hidden
    for _ in range(3):
        by_hand = F.linear(by_hand, weight, module.net[2].qkv.bias).relu()
    assert torch.equal(module.net[2:5](hidden), by_hand)


def test_a_resumed_run_reads_the_same_weights_and_equals_the_whole_run() -> None:
    length: dict[str, Any] = {"max_epochs": 3, "data": loader(shuffle=False)}
    saver = ModelCheckpoint(filename="{epoch}", save_top_k=-1)
    whole, run = train(
        statqat("int4", "int8"), saver, SeedEachBatch(), module=ReadsWeights, **length
    )
    first = next(Path().rglob("epoch=0.ckpt"))
    resumed, part = train(
        *(statqat("int4", "int8"), SeedEachBatch()),
        **{"module": ReadsWeights, "ckpt_path": str(first), "seed": 99, **length},
    )
    assert part.losses == run.losses[STEPS_PER_EPOCH:]
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(quantizer_state(resumed), quantizer_state(whole))
    # A fresh module that is only evaluated has the quantized reads, too.
    fresh = ReadsWeights()
    make_trainer(statqat("int4", "int8")).test(fresh, held_out(), ckpt_path=str(first))
    assert quantizer_of(fresh, "net.2.qkv/weight").read_by == ("net.2",)


def test_weights_alone_that_never_run_are_a_warning() -> None:
    callback = statqat("int4", None)
    with pytest.warns(StatQATWarning, match="never: never ran in training"):
        module, _ = train(callback, module=ReadsWeights, limit_val_batches=0)
    assert weight_rows(callback)["never"] is None
    assert weight_rows(callback)["net.2.qkv"] is not None
    assert not quantizer_of(module, "never/weight").enabled


class ReadsInStep(DigitsModule):
    """The step itself multiplies with a weight: no file will hold that product."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(F.linear(self(x), self.head.weight), y)


def test_a_weight_that_a_step_reads_stays_in_float_everywhere(tmp_path: Path) -> None:
    callback = statqat("int4", "int4")
    module, _ = train(callback, module=ReadsInStep, limit_val_batches=0)
    assert not is_quantized(module.head)
    assert callback.report is not None
    (row,) = (row for row in callback.report.rows if row.name == "head")
    assert row.weight is None
    assert "read outside of a forward" in row.reason


class FromAStream:
    """Batches that can be read once: no batch can be run ahead of training."""

    def __iter__(self) -> Any:
        return iter(loader())


def test_without_a_batch_ahead_the_first_real_one_shows_who_reads() -> None:
    callback = statqat("int4", "int8")
    module, run = train(callback, module=ReadsWeights, data=FromAStream(), limit_val_batches=0)
    assert quantizer_of(module, "net.2.qkv/weight").read_by == ("net.2",)
    assert weight_rows(callback)["net.2.qkv"] == "int4 per_channel analytic"
    assert weight_rows(callback)["never"] is None
    assert len(run.losses) == STEPS_PER_EPOCH


class CallsForward(DigitsModule):
    """Calls `forward` of a layer, and of its class, past all hooks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net[:-1]:
            x = type(layer).forward(layer, x)
        return self.net[-1].forward(x)


def test_a_forward_that_is_called_past_the_hooks_counts_as_a_call() -> None:
    # Which layers a norm follows, and what errors count there, only hooks show.
    weights = TensorSpec("int4", objective="weight")
    callback = statqat(weights, "int4")
    module, run = train(callback, module=CallsForward, limit_val_batches=0)
    _, usual = train(statqat(weights, "int4"), limit_val_batches=0)
    assert run.losses == usual.losses
    assert callback.report is not None
    assert [row.remark for row in callback.report.rows] == [""] * 5
    assert quantizer_of(module, "net.8/input").ready


class StartsLate(DigitsModule):
    """A layer that first runs after the scales are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.late(y) if self.trainer.global_step >= 8 else y


def test_a_layer_that_first_runs_after_the_freeze_is_named(tmp_path: Path) -> None:
    callback = statqat("int4", "int8", freeze_at=6)
    with pytest.warns(StatQATWarning, match=r"late/input.*(idle|did not run)"):
        train(callback, module=StartsLate, max_epochs=2, limit_val_batches=0)
    assert callback.report is not None
    (row,) = (row for row in callback.report.rows if row.name == "late")
    assert row.weight is not None
    assert row.input is None
    assert "no statistics" in row.remark


def test_a_layer_under_several_names_goes_by_each() -> None:
    callback = statqat("int4", "int8", exclude=["net.3.qkv"])
    module, _ = train(callback, module=ReadsWeights, limit_val_batches=0)
    assert not is_quantized(module.net[2].qkv)
    recipe = QuantRecipe([QuantRule("net.4.qkv", "int3"), QuantRule("*", "int8")])
    callback = StatQATCallback(recipe=recipe, verbose=False)
    train(callback, module=ReadsWeights, limit_val_batches=0)
    assert weight_rows(callback)["net.2.qkv"] == "int3 per_channel analytic"


class Masked(nn.Linear):
    """Has another name for its input than torch, and a mask beside it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        assert set(mask.unique().tolist()) <= {0.0, 0.75}, "the mask was quantized"
        return super().forward(x * mask)


class Keywords(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.keyword = Masked(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.keyword(mask=0.75 * (y > 0), x=y)


def test_by_keyword_the_input_is_quantized_and_not_the_mask() -> None:
    module, _ = train(statqat("int4", "int2"), module=Keywords, limit_val_batches=0)
    assert quantizer_of(module, "keyword/input").ready


class Complex(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Linear(10, 10, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.spectral(y.to(torch.complex64)).abs()


def test_complex_weights_are_left_in_float_by_name() -> None:
    callback = statqat("int4", "int4")
    train(callback, module=Complex, limit_val_batches=0)
    assert callback.report is not None
    reasons = {row.name: row.reason for row in callback.report.rows}
    assert reasons["spectral"] == "its weights are complex"


Foreign = type("Linear", (nn.Module,), {"__module__": "some_graphs.nn.dense"})


def test_a_class_that_shares_a_torch_name_is_told_apart() -> None:
    class Has(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.foreign = Foreign()
            self.foreign.weight = nn.Parameter(torch.zeros(3))

    callback = statqat()
    train(callback, module=Has, limit_val_batches=0)
    assert callback.report is not None
    types = {row.name: row.type for row in callback.report.rows}
    assert types["foreign"] == "some_graphs.nn.dense.Linear"
    assert types["net.8"] == "Linear"


# Copies of the module, in which calibration runs


class KeepsItsLoss(DigitsModule):
    """A tensor with its graph, a lock and a generator, as libraries keep them on a module."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.stream = (i for i in range(3))
        self.parts = {"history": [], "config": {"lock": threading.RLock()}}
        self.loss = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last_loss = loss
        self.parts["history"].append(loss)
        return loss


def test_a_module_that_deepcopy_cannot_copy(tmp_path: Path, messages: Messages) -> None:
    class BeforeTheFit(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            pl_module.last_loss = pl_module(torch.rand(2, 1, 8, 8)).sum()

    callback, export = statqat("int4", "int4"), ExportCallback(tmp_path / "m.onnx")
    module, _ = train(BeforeTheFit(), callback, export, module=KeepsItsLoss, max_epochs=2)
    assert not messages.about("no calibration")
    assert len(module.parts["history"]) == 2 * STEPS_PER_EPOCH
    assert export.report is not None
    assert export.report.native is not None
    assert export.report.native.max_difference == 0


class Asks(DigitsModule):
    """What `training_step` may ask of its Trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"])
        if isinstance(self.logger, CSVLogger):
            self.logger.log_metrics({"direct": 1.0}, step=self.global_step)
        elif self.logger is not None:
            self.logger.experiment.add_scalar("direct", 1.0)  # a logger that takes anything
        assert isinstance(self.trainer, Trainer)
        assert self.trainer.max_epochs == 1
        loss = super().training_step(batch, batch_idx) * (1 + self.trainer.current_epoch)
        self.trainer.last_loss = float(loss.detach())  # type: ignore[attr-defined]
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.99)]


def test_the_copy_sees_the_trainer_and_changes_nothing_of_it(messages: Messages) -> None:
    class Start(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]
                self.touched = hasattr(trainer, "last_loss")

    start = Start()
    logger = CSVLogger("logs")
    train(statqat(), start, module=Asks, logger=logger, limit_val_batches=0)
    assert not messages.about("no calibration")
    assert start.rate == 0.05
    assert not start.touched
    logger.save()
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    direct = rows[0].split(",").index("direct")
    assert sum(bool(row.split(",")[direct]) for row in rows[1:]) == STEPS_PER_EPOCH


def test_a_copy_that_reaches_its_original_is_noticed(messages: Messages) -> None:
    module = DigitsModule()
    old = module.training_step
    calls = []

    def patched(batch: Any, batch_idx: int) -> Tensor:
        calls.append(batch_idx)
        return old(batch, batch_idx)

    module.training_step = patched  # type: ignore[method-assign]
    callback = statqat()
    make_trainer(callback, limit_val_batches=0).fit(module, loader(), held_out())
    (message,) = messages.about("no calibration")
    assert "training_step" in message
    # The BatchNorms of the module itself have seen the batches of training, and no others.
    assert int(module.net[1].num_batches_tracked) == STEPS_PER_EPOCH
    assert quantizer_of(module, "net.8/input").ready


def test_a_forward_that_reaches_the_original_is_noticed_in_the_copy(messages: Messages) -> None:
    module = DigitsModule()
    old = module.net[3].forward
    module.net[3].forward = lambda x: old(x)
    make_trainer(statqat(), limit_val_batches=0).fit(module, loader(), held_out())
    (message,) = messages.about("no calibration")
    assert "net.3.forward" in message


def test_hooks_of_loggers_do_not_fire_in_copies() -> None:
    fired = []

    def log_tensor(module: Any, args: Any, output: Any) -> None:
        fired.append(module)

    log_tensor.__module__ = "wandb.integration.torch.wandb_torch"
    module = DigitsModule()
    module.net[0].register_forward_hook(log_tensor)
    make_trainer(statqat(), limit_val_batches=0).fit(module, loader(), held_out())
    assert len(fired) == STEPS_PER_EPOCH
    assert all(found is module.net[0] for found in fired)


class ByHand(DigitsModule):
    """Manual optimization, which used to go without calibration."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        return loss


def test_manual_optimization_is_calibrated_and_moves_no_weight(messages: Messages) -> None:
    class Weights(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                self.found = pl_module.state_dict()["net.0.weight"].clone()
                self.ready = quantizer_of(pl_module, "net.8/input").ready

    weights, module = Weights(), ByHand()
    before = module.net[0].weight.detach().clone()
    make_trainer(statqat(), weights, limit_val_batches=0).fit(module, loader(), held_out())
    assert not messages.about("no calibration")
    assert torch.equal(weights.found, before)
    assert weights.ready


# Recipes and reports


def test_a_shadowed_rule_is_an_error() -> None:
    recipe = QuantRecipe([QuantRule("*", "int4"), QuantRule("net.8", "int8")])
    with pytest.raises(ValueError, match=r"'net\.8' matches only layers that an earlier rule"):
        train(StatQATCallback(recipe=recipe))


@pytest.mark.parametrize(
    "given", [{"weights": "int8"}, {"activations": "int8"}, {"first_last_bits": 8}]
)
def test_an_explicit_default_beside_a_recipe_is_an_error(given: dict[str, Any]) -> None:
    recipe = QuantRecipe([QuantRule("*", "int4")])
    with pytest.raises(ValueError, match=f"got {next(iter(given))}="):
        StatQATCallback(recipe=recipe, **given)


def test_little_that_is_quantized_is_a_warning_that_says_why() -> None:
    class Conv1D(nn.Module):
        """As in GPT-2: a Linear layer whose weight lies the other way round."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Mostly(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), Conv1D(), nn.ReLU(), nn.Linear(64, 10))

    callback = statqat("int8", "int8")
    with pytest.warns(StatQATWarning, match=r"only 13\.7 % .*Conv1D: type not supported \(86\.3 %"):
        train(callback, module=Mostly, limit_val_batches=0)


def test_nothing_at_the_width_that_was_asked_for_is_a_warning() -> None:
    class TwoLayers(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    with pytest.warns(StatQATWarning, match="no weight has int4"):
        train(statqat("int4", "int8"), module=TwoLayers, limit_val_batches=0)


def test_a_target_that_changes_nothing_says_so() -> None:
    callback = statqat("fp8_e4m3", "fp8_e4m3", target="onnxruntime")
    train(callback, limit_val_batches=0)
    assert "target='onnxruntime' changes nothing" in str(callback.report).replace("\n  ", " ")


def test_the_report_of_a_residual_network_is_short_and_narrow(messages: Messages) -> None:
    from torchvision.models import resnet18

    class ResNet18(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(num_classes=10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.expand(-1, 3, -1, -1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = StatQATCallback(target="onnxruntime", calibration_batches=1)
    trainer = make_trainer(callback, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(ResNet18(), loader())
    (printed,) = messages.about("layers quantized")
    lines = printed.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80
    assert "21 of 41 layers quantized" in lines[0]
    assert callback.report is not None
    assert len(callback.report.table().splitlines()) > 41
    rounded = [row for row in callback.report.rows if row.input == "rounded before"]
    assert rounded
    assert sum(row.parameters for row in callback.report.rows) == sum(
        p.numel() for p in resnet18(num_classes=10).parameters()
    )


class TwoEncoders(DigitsModule):
    """A transformer encoder whose layers are quantized, and one that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)]
        encoders = (nn.TransformerEncoder(layer, 1, enable_nested_tensor=False) for layer in layers)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Unflatten(1, (8, 8)), *encoders, nn.Flatten(), nn.Linear(64, 10)
        )
        self.kernels: list[bool] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            super().validation_step(batch, batch_idx)
        calls = {event.key: event.count for event in run.key_averages()}
        self.kernels.append(calls.get("aten::_transformer_encoder_layer_fwd", 0) == 1)


def test_an_encoder_in_float_keeps_the_kernel_that_reads_its_weights(messages: Messages) -> None:
    module, fast = TwoEncoders(), torch.backends.mha.get_fastpath_enabled()
    callback = statqat("int8", "int8", exclude=["net.3.*"], verbose=True)
    train(callback, module=module)
    assert module.kernels
    assert all(module.kernels)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert messages.about("layers quantized")
    assert not messages.about("Not run")
