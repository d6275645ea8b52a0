"""Modules of public libraries as their users write them: small, random, on made-up data.

Each function is one row of the table. It imports its library, so that this file can be read
without any of them, and downloads nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH, BATCHES = 4, 4
CLASSES = 5


@dataclasses.dataclass
class Case:
    """One row: a module and its data, or a library that trains by itself.

    Attributes:
        make: Makes the module from the random state; None where the library does.
        batches: The batches of an epoch, as `training_step` gets them.
        fit: Trains by the library's own means with these callbacks, and these options of the
            Trainer.
        options: Of `StatQATCallback`, where a row needs other ones than the defaults.
        reload: Saves what `fit` has trained last in a folder, and loads it, by the library's own
            means; returns the LightningModule in it, as trained and as loaded.
    """

    make: Callable[[], LightningModule] | None = None
    batches: Callable[[], Sequence[Any]] | None = None
    fit: Callable[[list[Callback], dict[str, Any]], None] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reload: Callable[[Path], tuple[LightningModule, LightningModule]] | None = None


@dataclasses.dataclass(frozen=True)
class Named:
    """A row by name, with the distribution it is about."""

    name: str
    distribution: str
    title: str
    build: Callable[[], Case]


CASES: dict[str, Named] = {}


def case(distribution: str, title: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        CASES[build.__name__] = Named(build.__name__, distribution, title, build)
        return build

    return register


class Task(LightningModule):
    """A network with a loss, as most users wrap one."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Batches(Dataset[Any]):
    """Batches that are made already."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def first(batch: Any) -> Any:
    """What a loader without batch size returns: the item itself."""
    return batch


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(Batches(batches), batch_size=None, collate_fn=first)


def classify(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def images(size: int = 32, channels: int = 3, classes: int = CLASSES) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, channels, size, size, generator=generator),
            torch.randint(0, classes, (BATCH,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def masks(size: int = 32, channels: int = 3, dims: int = 2, classes: int = CLASSES) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shape = (size,) * dims
    return [
        (
            torch.rand(BATCH, channels, *shape, generator=generator),
            torch.randint(0, classes, (BATCH, *shape), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def tokens(length: int = 12, words: int = 60) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(3, words, (BATCH, length), generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


# Few steps leave the outputs for noise nearly equal, and float rounding decides between them in a
# deep network of convolutions; training for the runtime leaves it nothing to decide.
FOR_ONNXRUNTIME = {"target": "onnxruntime"}


def of_images(
    make: Callable[[], nn.Module], options: dict[str, Any] | None = None, size: int = 32
) -> Case:
    return Case(lambda: Task(make(), classify), lambda: images(size), options=options or {})


def of_masks(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(lambda: Task(make(), classify), lambda: masks(**options))


# torchvision


@case("torchvision", "ResNet")
def torchvision_resnet() -> Case:
    from torchvision.models.resnet import BasicBlock, ResNet

    return of_images(
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), FOR_ONNXRUNTIME, size=64
    )


@case("torchvision", "MobileNetV3")
def torchvision_mobilenet() -> Case:
    from torchvision.models import mobilenet_v3_small

    return of_images(lambda: mobilenet_v3_small(num_classes=CLASSES))


@case("torchvision", "Swin")
def torchvision_swin() -> Case:
    from torchvision.models import SwinTransformer

    return of_images(
        lambda: SwinTransformer([2, 2], 16, [1, 1], [2, 4], [2, 2], num_classes=CLASSES)
    )


@case("torchvision", "Faster R-CNN")
def torchvision_faster_rcnn() -> Case:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    class Backbone(nn.Sequential):
        out_channels = 16

    def make() -> LightningModule:
        backbone = Backbone(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        model = FasterRCNN(
            backbone,
            min_size=64,
            max_size=64,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
            box_head=TwoMLPHead(16 * 49, 32),
            box_predictor=FastRCNNPredictor(32, 3),
        )
        return Task(model, lambda model, batch: torch.stack(list(model(*batch).values())).sum())

    def batches() -> list[Any]:
        torch.manual_seed(1)
        boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        return [([torch.rand(3, 64, 64)] * 2, [target] * 2) for _ in range(BATCHES)]

    return Case(make, batches)


# timm


@case("timm", "BEiT")
def timm_beit() -> Case:
    from timm.models.beit import Beit

    return of_images(
        lambda: Beit(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
        )
    )


@case("timm", "Swin V2")
def timm_swin_v2() -> Case:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return of_images(
        lambda: SwinTransformerV2(
            img_size=32,
            patch_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            num_classes=CLASSES,
        )
    )


@case("timm", "ConvNeXt")
def timm_convnext() -> Case:
    from timm.models.convnext import ConvNeXt

    return of_images(lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5))


@case("timm", "EfficientNet")
def timm_efficientnet() -> Case:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e4_c16"], ["ir_r1_k5_s2_e4_c24"]]
    return of_images(
        lambda: EfficientNet(
            decode_arch_def(blocks), num_classes=CLASSES, num_features=48, stem_size=8
        ),
        FOR_ONNXRUNTIME,
    )


@case("timm", "ViT")
def timm_vit() -> Case:
    from timm.models.vision_transformer import VisionTransformer

    return of_images(
        lambda: VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES)
    )


# transformers


def labelled(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers computes itself."""
    ids, labels = batch
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def causal(model: nn.Module, batch: Any) -> Tensor:
    ids, _ = batch
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@case("transformers", "BERT")
def transformers_bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return Case(lambda: Task(BertForSequenceClassification(config), labelled), tokens)


@case("transformers", "ALBERT")
def transformers_albert() -> Case:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return Case(lambda: Task(AlbertForSequenceClassification(config), labelled), tokens)


@case("transformers", "GPT-2")
def transformers_gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Case(lambda: Task(GPT2LMHeadModel(config), causal), tokens)


@case("transformers", "Llama")
def transformers_llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return Case(lambda: Task(LlamaForCausalLM(config), causal), tokens)


@case("transformers", "Mamba")
def transformers_mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=2)
    return Case(lambda: Task(MambaForCausalLM(config), causal), tokens)


@case("transformers", "T5")
def transformers_t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        ids, _ = batch
        value: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return value

    return Case(lambda: Task(T5ForConditionalGeneration(config), loss), tokens)


@case("transformers", "ViT")
def transformers_vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = model(pixel_values=batch[0], labels=batch[1]).loss
        return value

    return Case(lambda: Task(ViTForImageClassification(config), loss), images)


@case("transformers", "Wav2Vec2")
def transformers_wav2vec2() -> Case:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        num_labels=CLASSES,
        classifier_proj_size=16,
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = model(input_values=batch[0], labels=batch[1]).loss
        return value

    def batches() -> list[Any]:
        torch.manual_seed(1)
        return [(torch.randn(BATCH, 800), torch.randint(0, 5, (BATCH,))) for _ in range(BATCHES)]

    return Case(lambda: Task(Wav2Vec2ForSequenceClassification(config), loss), batches)


@case("diffusers", "UNet2D")
def diffusers_unet() -> Case:
    from diffusers import DDPMScheduler, UNet2DModel

    schedule = DDPMScheduler()

    def make() -> LightningModule:
        return Task(
            UNet2DModel(
                sample_size=16,
                block_out_channels=(16, 32),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
                layers_per_block=1,
            ),
            loss,
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        clean, _ = batch
        noise, steps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        return F.mse_loss(model(schedule.add_noise(clean, noise, steps), steps).sample, noise)

    return Case(make, lambda: images(16))


@case("open_clip_torch", "CLIP")
def open_clip_clip() -> Case:
    from open_clip.model import CLIP

    def make() -> LightningModule:
        return Task(
            CLIP(
                embed_dim=16,
                vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
                text_cfg={
                    "context_length": 12,
                    "vocab_size": 60,
                    "width": 32,
                    "heads": 2,
                    "layers": 2,
                },
            ),
            loss,
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        image, text, scale = model(*batch)
        logits = scale * image @ text.T
        return F.cross_entropy(logits, torch.arange(len(logits)))

    def batches() -> list[Any]:
        return [(x, ids) for (x, _), (ids, _) in zip(images(), tokens(), strict=True)]

    return Case(make, batches)


# MONAI


@case("monai", "UNet")
def monai_unet() -> Case:
    from monai.networks.nets import UNet

    return of_masks(lambda: UNet(2, 1, CLASSES, (8, 16, 32), (2, 2), num_res_units=2), channels=1)


@case("monai", "SwinUNETR")
def monai_swin_unetr() -> Case:
    from monai.networks.nets import SwinUNETR

    return of_masks(
        lambda: SwinUNETR(
            in_channels=1,
            out_channels=CLASSES,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            feature_size=12,
            spatial_dims=2,
        ),
        channels=1,
        size=64,
    )


@case("segmentation-models-pytorch", "Unet")
def smp_unet() -> Case:
    from segmentation_models_pytorch import Unet

    return of_masks(
        lambda: Unet(
            "mobilenet_v2",
            encoder_depth=3,
            encoder_weights=None,
            decoder_channels=(32, 16, 8),
            classes=CLASSES,
        )
    )


@case("segmentation-models-pytorch", "Segformer")
def smp_segformer() -> Case:
    from segmentation_models_pytorch import Segformer

    return of_masks(lambda: Segformer("mit_b0", encoder_weights=None, classes=CLASSES), size=64)


def _backbone() -> nn.Module:
    """The first half of a ResNet, up to its pooled features."""
    from torchvision.models.resnet import BasicBlock, ResNet

    parts = list(ResNet(BasicBlock, [1, 1, 1, 1]).children())
    return nn.Sequential(*parts[:5], nn.AdaptiveAvgPool2d(1))


@case("lightly", "SimCLR")
def lightly_simclr() -> Case:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = _backbone()
            self.projection_head = SimCLRProjectionHead(64, 64, 16)
            self.criterion = NTXentLoss()

        def forward(self, x: Tensor) -> Any:
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (x0, x1), _ = batch
            loss = self.criterion(self(x0), self(x1))
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def batches() -> list[Any]:
        return [((x, x.flip(3)), y) for x, y in images()]

    return Case(SimCLR, batches)


@case("lightly", "BYOL")
def lightly_byol() -> Case:
    import copy

    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class BYOL(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = _backbone()
            self.projection_head = BYOLProjectionHead(64, 64, 16)
            self.prediction_head = BYOLPredictionHead(16, 32, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x: Tensor) -> Any:
            y = self.backbone(x).flatten(start_dim=1)
            return self.prediction_head(self.projection_head(y))

        def forward_momentum(self, x: Tensor) -> Any:
            y = self.backbone_momentum(x).flatten(start_dim=1)
            return self.projection_head_momentum(y).detach()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            update_momentum(self.backbone, self.backbone_momentum, m=0.99)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
            (x0, x1), _ = batch
            p0, z0, p1, z1 = (
                self(x0),
                self.forward_momentum(x0),
                self(x1),
                self.forward_momentum(x1),
            )
            return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    def batches() -> list[Any]:
        return [((x, x.flip(3)), y) for x, y in images()]

    return Case(BYOL, batches)


# Forecasting


def series(length: int = 60, groups: int = 3) -> Any:
    """A table of a few sines: `series`, `time_idx`, `value`, `date`."""
    import numpy as np
    import pandas as pd

    generator = np.random.default_rng(0)
    frames = [
        pd.DataFrame(
            {
                "series": f"s{g}",
                "time_idx": np.arange(length),
                "value": (
                    5 + np.sin(np.arange(length) / 4 + g) + generator.normal(0, 0.1, length)
                ).astype("float32"),
                "date": pd.date_range("2020-01-01", periods=length, freq="D"),
            }
        )
        for g in range(groups)
    ]
    return pd.concat(frames, ignore_index=True)


def _forecasting(model: str, **options: Any) -> Case:
    import pytorch_forecasting as pf

    table = series()
    reals = ["value"]
    dataset = pf.TimeSeriesDataSet(
        table,
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        min_encoder_length=12,
        max_prediction_length=4,
        static_categoricals=["series"] if model != "NBeats" else [],
        time_varying_unknown_reals=reals,
    )

    def make() -> Any:
        torch.manual_seed(0)
        return getattr(pf, model).from_dataset(dataset, log_interval=-1, **options)

    def batches() -> list[Any]:
        torch.manual_seed(1)
        batches = list(dataset.to_dataloader(train=True, batch_size=8, num_workers=0))
        return batches[:BATCHES]

    return Case(make, batches)


@case("pytorch-forecasting", "Temporal Fusion Transformer")
def pytorch_forecasting_tft() -> Case:
    return _forecasting(
        "TemporalFusionTransformer",
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        dropout=0.0,
        optimizer="adam",
    )


@case("pytorch-forecasting", "DeepAR")
def pytorch_forecasting_deepar() -> Case:
    return _forecasting("DeepAR", hidden_size=8, rnn_layers=2, dropout=0.0, optimizer="adam")


@case("pytorch-forecasting", "N-BEATS")
def pytorch_forecasting_nbeats() -> Case:
    return _forecasting("NBeats", widths=[16, 16], backcast_loss_ratio=0.1, optimizer="adam")


def _neuralforecast(model: str, **options: Any) -> Case:
    def fit(callbacks: list[Callback], trainer: dict[str, Any]) -> None:
        from neuralforecast import NeuralForecast, models

        frame = series().rename(columns={"series": "unique_id", "date": "ds", "value": "y"})
        frame = frame[["unique_id", "ds", "y"]]
        trainer = dict(trainer)
        epochs = trainer.pop("max_epochs")
        made = getattr(models, model)(
            h=4,
            input_size=12,
            max_steps=epochs * BATCHES,
            batch_size=BATCH,
            windows_batch_size=16,
            **options,
            **trainer,
        )
        forecast = NeuralForecast([made], freq="D")
        forecast.models[0].trainer_kwargs["callbacks"] = callbacks  # it copies what it is given
        forecast.fit(frame)

    return Case(fit=fit)


@case("neuralforecast", "NHITS")
def neuralforecast_nhits() -> Case:
    return _neuralforecast("NHITS", mlp_units=[[16, 16]] * 3)


@case("neuralforecast", "PatchTST")
def neuralforecast_patchtst() -> Case:
    return _neuralforecast(
        "PatchTST",
        hidden_size=16,
        n_heads=2,
        encoder_layers=1,
        patch_len=4,
        stride=2,
        linear_hidden_size=16,
    )


def _darts(model: str, **options: Any) -> Case:
    trained: list[Any] = []

    def fit(callbacks: list[Callback], trainer: dict[str, Any]) -> None:
        import darts.models
        from darts import TimeSeries

        frame = series(groups=1)
        values = TimeSeries.from_dataframe(frame, "date", "value")
        trainer = dict(trainer)
        epochs = trainer.pop("max_epochs")
        made = getattr(darts.models, model)(
            input_chunk_length=12,
            output_chunk_length=4,
            n_epochs=epochs,
            batch_size=11,
            pl_trainer_kwargs={**trainer, "callbacks": callbacks},
            random_state=0,
            **options,
        )
        made.fit(values.astype("float32"))
        trained.append(made)

    def reload(folder: Path) -> tuple[LightningModule, LightningModule]:
        made = trained[-1]
        made.save(str(folder / "model.pt"))
        return made.model, type(made).load(str(folder / "model.pt")).model

    return Case(fit=fit, reload=reload)


@case("darts", "TCN")
def darts_tcn() -> Case:
    return _darts("TCNModel", num_filters=4, weight_norm=True, dropout=0.0)


@case("darts", "TiDE")
def darts_tide() -> Case:
    return _darts("TiDEModel", hidden_size=16, decoder_output_dim=4, temporal_decoder_hidden=8)


def _gluonts(model: str, **options: Any) -> Case:
    def fit(callbacks: list[Callback], trainer: dict[str, Any]) -> None:
        import gluonts.torch
        from gluonts.dataset.pandas import PandasDataset

        trainer = {k: v for k, v in trainer.items() if k != "enable_checkpointing"}
        frame = series().set_index("date")
        dataset = PandasDataset.from_long_dataframe(
            frame[["series", "value"]], target="value", item_id="series", freq="D"
        )
        estimator = getattr(gluonts.torch, model)(
            prediction_length=4,
            context_length=12,
            batch_size=BATCH,
            num_batches_per_epoch=BATCHES,
            trainer_kwargs={**trainer, "callbacks": callbacks},
            **options,
        )
        estimator.train(dataset)

    return Case(fit=fit)


@case("gluonts", "DeepAR")
def gluonts_deepar() -> Case:
    return _gluonts("DeepAREstimator", freq="D", hidden_size=8, dropout_rate=0.0)


@case("gluonts", "SimpleFeedForward")
def gluonts_feed_forward() -> Case:
    return _gluonts("SimpleFeedForwardEstimator", hidden_dimensions=[16, 16])


# Other fields


@case("scvi-tools", "SCVI")
def scvi_scvi() -> Case:
    def fit(callbacks: list[Callback], trainer: dict[str, Any]) -> None:
        import anndata
        import numpy as np
        import scvi

        counts = np.random.default_rng(0).poisson(2.0, (64, 30)).astype("float32")
        data = anndata.AnnData(counts)
        scvi.model.SCVI.setup_anndata(data)
        model = scvi.model.SCVI(data, n_hidden=16, n_latent=4)
        trainer = dict(trainer)
        options = {"devices": trainer.pop("devices")}
        model.train(
            **options,
            accelerator=trainer.pop("accelerator"),
            batch_size=16,
            train_size=1.0,
            callbacks=callbacks,
            **trainer,
        )

    return Case(fit=fit)


@case("chemprop", "MPNN")
def chemprop_mpnn() -> Case:
    import numpy as np
    from chemprop import data, models
    from chemprop import nn as parts

    smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "CCBr", "CO", "CC"]
    points = [
        data.MoleculeDatapoint.from_smi(s, np.array([float(len(s))])) for s in smiles for _ in "12"
    ]

    def make() -> Any:
        return models.MPNN(
            parts.BondMessagePassing(d_h=16, depth=3),
            parts.MeanAggregation(),
            parts.RegressionFFN(input_dim=16, hidden_dim=16),
            batch_norm=True,
        )

    def batches() -> list[Any]:
        dataset = data.MoleculeDataset(points)
        return list(data.build_dataloader(dataset, BATCH, shuffle=False, num_workers=0))

    return Case(make, batches)


def _graphs() -> list[Any]:
    from torch_geometric.data import Batch, Data

    torch.manual_seed(1)

    def graph() -> Any:
        edges = torch.randint(0, 6, (2, 10))
        return Data(x=torch.randn(6, 8), edge_index=edges, y=torch.randint(0, CLASSES, (1,)))

    return [Batch.from_data_list([graph() for _ in range(BATCH)]) for _ in range(BATCHES)]


class GraphClassifier(nn.Module):
    """A network of a library's layers with a head of PyTorch's, as in its examples."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.encoder(x, edge_index), batch))


def _of_graphs(encoder: Callable[[], nn.Module]) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch.x, batch.edge_index, batch.batch), batch.y)

    return Case(lambda: Task(GraphClassifier(encoder()), loss), _graphs)


@case("torch_geometric", "GCN")
def pyg_gcn() -> Case:
    from torch_geometric.nn import GCN

    return _of_graphs(lambda: GCN(8, 16, 2, 16))


@case("torch_geometric", "GAT")
def pyg_gat() -> Case:
    from torch_geometric.nn import GAT

    return _of_graphs(lambda: GAT(8, 16, 2, 16, heads=2))


@case("torch_geometric", "GIN")
def pyg_gin() -> Case:
    from torch_geometric.nn import GIN

    return _of_graphs(lambda: GIN(8, 16, 2, 16))


def _tabular(config: Callable[[], Any]) -> Case:
    trained: list[Any] = []

    def fit(callbacks: list[Callback], trainer: dict[str, Any]) -> None:
        import numpy as np
        import pandas as pd
        from pytorch_tabular import TabularModel
        from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

        generator = np.random.default_rng(0)
        frame = pd.DataFrame(generator.normal(size=(64, 4)), columns=list("abcd"))
        frame["kind"] = generator.choice(["x", "y", "z"], 64)
        frame["label"] = (frame["a"] > 0).astype(int)
        trainer = dict(trainer)
        model = TabularModel(
            data_config=DataConfig(
                target=["label"], continuous_cols=list("abcd"), categorical_cols=["kind"]
            ),
            model_config=config(),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                max_epochs=trainer.pop("max_epochs"),
                accelerator=trainer.pop("accelerator"),
                devices=trainer.pop("devices"),
                batch_size=16,
                progress_bar="none",
                checkpoints=None,
                load_best=False,
                early_stopping=None,
                trainer_kwargs={
                    key: value
                    for key, value in trainer.items()
                    if key
                    not in (
                        "enable_progress_bar",
                        "enable_checkpointing",
                        "logger",
                        "default_root_dir",
                    )
                },
            ),
        )
        model.fit(train=frame, validation=frame, callbacks=callbacks)
        trained.append(model)

    def reload(folder: Path) -> tuple[LightningModule, LightningModule]:
        from pytorch_tabular import TabularModel

        model = trained[-1]
        model.save_model(str(folder / "tabular"))
        return model.model, TabularModel.load_model(str(folder / "tabular")).model

    return Case(fit=fit, reload=reload)


@case("pytorch-tabular", "CategoryEmbedding")
def pytorch_tabular_category() -> Case:
    def config() -> Any:
        from pytorch_tabular.models import CategoryEmbeddingModelConfig

        return CategoryEmbeddingModelConfig(task="classification", layers="16-16")

    return _tabular(config)


@case("pytorch-tabular", "FT-Transformer")
def pytorch_tabular_ft_transformer() -> Case:
    def config() -> Any:
        from pytorch_tabular.models import FTTransformerConfig

        return FTTransformerConfig(
            task="classification", input_embed_dim=16, num_heads=2, num_attn_blocks=2
        )

    return _tabular(config)


@case("anomalib", "STFPM")
def anomalib_stfpm() -> Case:
    from unittest import mock

    import timm
    from anomalib.data import ImageBatch
    from anomalib.models import Stfpm

    made = timm.create_model

    def untrained(*args: Any, **kwargs: Any) -> Any:
        return made(*args, **{**kwargs, "pretrained": False})

    def make() -> Any:
        with mock.patch.object(timm, "create_model", untrained):  # nothing is downloaded
            return Stfpm(backbone="resnet18", layers=["layer1", "layer2"])

    def batches() -> list[Any]:
        torch.manual_seed(1)
        return [ImageBatch(image=torch.rand(BATCH, 3, 64, 64)) for _ in range(BATCHES)]

    return Case(make, batches)


@case("vit-pytorch", "SimpleViT")
def vit_pytorch_simple() -> Case:
    from vit_pytorch import SimpleViT

    return of_images(
        lambda: SimpleViT(
            image_size=32, patch_size=8, num_classes=CLASSES, dim=32, depth=2, heads=2, mlp_dim=64
        )
    )


@case("x-transformers", "Decoder")
def x_transformers_decoder() -> Case:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    def make() -> LightningModule:
        return Task(
            AutoregressiveWrapper(
                TransformerWrapper(
                    num_tokens=60,
                    max_seq_len=16,
                    attn_layers=Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True),
                )
            ),
            lambda model, batch: model(batch[0]),
        )

    return Case(make, tokens)


@case("neuraloperator", "FNO")
def neuraloperator_fno() -> Case:
    from neuralop.models import FNO

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        return F.mse_loss(model(x), x)

    return Case(
        lambda: Task(FNO(n_modes=(4, 4), hidden_channels=8, in_channels=3, out_channels=3), loss),
        lambda: images(16),
    )


@case("accelerate", "a network with a forward of its own")
def accelerate_prepared() -> Case:
    """Accelerate puts a forward on the instance, here by its hooks."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    def make() -> LightningModule:
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 256, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 5)
        )
        add_hook_to_module(net[3], ModelHook())
        return Task(net, classify)

    return Case(make, lambda: images(16))
