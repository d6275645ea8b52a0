"""What a run shows of a model's dataflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.model.dataflow import Dataflow, Value
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.recording import record


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        y = self.block(x)
        y += x
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))
        return out


def flow_of(model: nn.Module) -> Dataflow:
    model.eval()
    return record(model, lambda: model(torch.randn(2, 1, 5, 5)))


def kinds(flow: Dataflow) -> list[str]:
    # What the run itself calls, to make an input, is outside.
    return [o.kind for o in flow.operations if o.inputs]


def made_by(flow: Dataflow, kind: str) -> Value:
    return next(o for o in flow.operations if o.kind == kind).outputs[0]


EXPECTED = [
    *("Conv2d", "BatchNorm2d", "relu", "Conv2d", "ReLU", "add"),
    *("adaptive_avg_pool2d", "flatten", "Linear", "output"),
]


def test_layers_and_functions_in_order() -> None:
    flow = flow_of(Net())

    assert kinds(flow) == EXPECTED
    assert [o.name for o in flow.operations if o.module is not None] == [
        *("conv", "norm", "block.0", "block.1", "head")
    ]


def test_layers_with_quantizers_are_what_they_were() -> None:
    model = Net()
    prepare(model, "int8", "int8")

    assert kinds(flow_of(model)) == EXPECTED


def test_who_reads_a_tensor_and_who_returned_it() -> None:
    flow = flow_of(Net())

    activation = made_by(flow, "relu")
    assert [o.kind for o in activation.consumers] == ["Conv2d", "add"]
    assert activation.shape == (2, 4, 5, 5)
    assert activation.taken_by == ["block", "block.0"]
    assert activation.returned_by == []
    assert made_by(flow, "ReLU").returned_by == ["block.1", "block"]
    assert made_by(flow, "Linear").returned_by == ["head", ""]


def test_an_operation_in_place_makes_a_new_value() -> None:
    flow = flow_of(Net())
    convolution, activation = (
        next(o for o in flow.operations if o.name == name) for name in ("block.0", "block.1")
    )

    assert activation.inputs == convolution.outputs
    assert activation.outputs != activation.inputs
    assert [o.kind for o in activation.outputs[0].consumers] == ["add"]


def test_custom_functions_and_views_are_read_from() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return Doubled.apply(y), y.detach()[0]

    readers = made_by(flow_of(Own()), "Conv2d").consumers

    assert {o.kind for o in readers} >= {"mul", "detach"}


def test_functions_outside_all_modules_are_the_callers() -> None:
    model = Net().eval()

    flow = record(
        model, lambda: F.cross_entropy(model(torch.ones(2, 1, 5, 5)) * 2, torch.ones(2).long())
    )

    assert [o.kind for o in made_by(flow, "Linear").consumers] == ["output"]


def test_the_model_is_left_as_it_was() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    record(model.eval(), lambda: model(torch.randn(2, 1, 5, 5)))

    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_that_run_twice_are_counted() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 1, 1), shared, nn.Conv2d(1, 1, 1), shared)

    calls = flow_of(model).calls

    assert calls["1"] == 2
    assert calls["0"] == 1


class Followed(nn.Module):
    """A convolution, and what comes next."""

    def __init__(self, *after: nn.Module, then: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.after = nn.Sequential(*after)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.after(self.then(self.conv(x)))


class Activated(nn.BatchNorm2d):
    """A norm that does more, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Twice(Both):
    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.norm(self.conv(x))
        return first + self.conv(x)


class Recurring(Both):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x + 1))


class Masked(Both):
    """What a comparison reads, means of channels included, is not centred."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) * (y > 0)


class Looked(Both):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen = float(y.detach_().mean()) if self.training else y.numpy()
        return self.norm(y)


class Adaptive(nn.InstanceNorm2d):
    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * style


class Styled(nn.Module):
    """Of two arguments, the norm takes the means of the first away."""

    def __init__(self, of_style: bool) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)
        self.norm, self.of_style = Adaptive(4), of_style

    def forward(self, x: Tensor) -> Tensor:
        pair = self.other(x), self.conv(x)
        out: Tensor = self.norm(*(pair if self.of_style else reversed(pair)))
        return out


class ByAnother(Both):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight) + self.norm(self.conv(x))


def norm_with(**attributes: Any) -> nn.BatchNorm2d:
    """A BatchNorm that somebody has changed, as Lightning's BaseFinetuning does."""
    norm = nn.BatchNorm2d(4)
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: Followed(nn.BatchNorm2d(4)),
    "SyncBatchNorm": lambda: Followed(nn.SyncBatchNorm(4)),
    "a subclass": lambda: Followed(Activated(4)),
    "InstanceNorm": lambda: Followed(nn.InstanceNorm2d(4)),
    "nothing between": lambda: Followed(nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()),
    "two calls": Recurring,
    "momentum None": lambda: Followed(nn.BatchNorm2d(4, momentum=None)),
    "InstanceNorm in evaluation": lambda: Followed(nn.InstanceNorm2d(4).eval()),
}
NOT_FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "frozen BatchNorm": lambda: Followed(nn.BatchNorm2d(4).eval()),
    "GroupNorm": lambda: Followed(nn.GroupNorm(2, 4)),
    "ReLU": lambda: Followed(nn.ReLU(), nn.BatchNorm2d(4)),
    "ReLU in place": lambda: Followed(nn.ReLU(inplace=True), nn.BatchNorm2d(4)),
    "Dropout": lambda: Followed(nn.Dropout(), nn.BatchNorm2d(4)),
    "a write": lambda: Followed(nn.BatchNorm2d(4), then=lambda x: x.add_(1)),
    "a function": lambda: Followed(nn.BatchNorm2d(4), then=torch.relu),
    "a custom function": lambda: Followed(nn.BatchNorm2d(4), then=Doubled.apply),
    "no norm": Followed,
    "the norm and another": Both,
    "a norm of one call": Twice,
    "another reader of the weight": ByAnother,
    "a comparison": Masked,
    "a look at the values": Looked,
    "stale means": lambda: Followed(norm_with(track_running_stats=False)),
    "momentum 0": lambda: Followed(norm_with(momentum=0.0)),
    "InstanceNorm by what it keeps": lambda: Followed(
        nn.InstanceNorm2d(4, track_running_stats=True).eval()
    ),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("operations", [False, True])
@pytest.mark.parametrize("name", [*FOLLOWED, *NOT_FOLLOWED])
def test_layers_whose_means_a_norm_takes_away(name: str, operations: bool, quantized: bool) -> None:
    model = (FOLLOWED | NOT_FOLLOWED)[name]()
    if quantized:
        prepare(model, "int8", "int8")

    flow = record(model, lambda: model(torch.randn(2, 1, 5, 5)), operations)

    assert flow.centred.keys() == ({"conv"} if name in FOLLOWED else set())


def test_of_two_arguments_of_a_norm_the_first_is_centred() -> None:
    x = torch.randn(2, 1, 5, 5)
    found = {
        of_style: record(model, lambda model=model: model(x), operations=False).centred
        for of_style, model in ((of_style, Styled(of_style)) for of_style in (False, True))
    }
    assert found == {False: {"conv": ("norm",)}, True: {"other": ("norm",)}}


@pytest.mark.parametrize(("shape", "centred"), [((6, 4), True), ((6, 3, 4), False)])
def test_channels_must_be_those_of_the_norm(shape: tuple[int, ...], centred: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    flow = record(model, lambda: model(torch.randn(shape)), operations=False)

    assert flow.centred == ({"0": ("1",)} if centred else {})


def test_in_evaluation_and_in_inference_mode_nothing_is_taken_away() -> None:
    model = Net()
    x = torch.randn(2, 1, 5, 5)
    assert record(model, lambda: model(x), operations=False).centred == {"conv": ("norm",)}
    assert not record(model.eval(), lambda: model(x), operations=False).centred

    with torch.inference_mode():
        flow = record(model.train(), lambda: model(x), operations=False)

    assert not flow.centred
