"""What a run shows of a model's dataflow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.dataflow import Dataflow, Value, record
from statqat_lightning.insertion import prepare


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
