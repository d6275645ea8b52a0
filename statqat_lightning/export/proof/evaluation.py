"""Batches of a user's data as inputs of a forward and labels of its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from statqat_lightning.export.calls.dimensions import Dynamic, looks_like_labels
from statqat_lightning.export.calls.forward_call import outputs_of
from statqat_lightning.export.proof.verify import Example, class_axis
from statqat_lightning.export.wording import in_short


class NoAccuracy(Exception):
    """Data without which, or with which, no accuracy can be told; the message is the reason."""


class Evaluation:
    """Examples from a user's data, and why there are none.

    Attributes:
        reason: Why no predictions are compared with labels; empty if some are.
        skipped: Batches that the forward, or the sizes that are fixed in files, leave out.
    """

    def __init__(self, part: nn.Module, first: Example, dynamic: Dynamic, most: int | None) -> None:
        self.reason = ""
        self.skipped = 0
        self._part, self._first = part, first
        self._left = math.inf if most is None else most
        self._names = first.call.names(part)
        self._open = [{*dynamic.get(name, {})} for name in self._names]

    def examples(self, data: Iterable[Any]) -> Iterator[Example]:
        """Examples from batches that fit the forward.

        A batch is the inputs and then the labels, as a tuple or list, or a mapping that names
        them, or inputs alone. Whatever goes wrong ends the examples, and is the `reason`.
        """
        labelled = batches = 0
        try:
            if not self._first.outputs or class_axis(self._first.outputs[0]) is None:
                raise NoAccuracy("the first output holds no scores of classes")
            for batch in data:
                if self._left <= 0:
                    break
                batches += 1
                example = self._example(batch)
                if example is None:
                    self.skipped += 1
                    continue
                self._left -= example.call.batch_size or 0
                labelled += example.labels is not None
                yield example
            if not batches:
                raise NoAccuracy("there are no batches")
            if self.skipped == batches:
                raise NoAccuracy("no batch has the sizes of the example, or runs")
            if not labelled:
                raise NoAccuracy("the batches have no labels of the shape of the predictions")
        except NoAccuracy as reason:
            self.reason = f"{reason}."
        except Exception as error:
            # Their data loader is asked for a figure; the files do not hang on it.
            self.reason = f"the data failed with {in_short(error)}"

    def _example(self, batch: Any) -> Example | None:
        inputs, labels = self._told_apart(batch)
        given = self._first.call.tensors()
        if not all(map(self._fits, inputs, given, self._open)):
            return None
        tensors = iter(inputs)

        def replaced(tensor: Tensor) -> Tensor:
            return next(tensors).detach().cpu().to(tensor.dtype)

        call = self._first.call.map(replaced)
        call = call.with_batch(None if math.isinf(self._left) else int(self._left))
        try:
            wanted = outputs_of(call.run(self._part))
        except Exception:
            if call.batch_size == self._first.call.batch_size:
                raise
            return None  # a forward may fix the size of its batch
        return Example(call, wanted, _as_predictions(labels, wanted, call.batch_size))

    @staticmethod
    def _fits(inputs: Tensor, known: Tensor, opened: set[int]) -> bool:
        if inputs.dim() != known.dim() or inputs.is_floating_point() != known.is_floating_point():
            return False
        sizes = enumerate(zip(inputs.shape, known.shape, strict=True))
        return all(a == b or n == 0 or n in opened for n, (a, b) in sizes)

    def _told_apart(self, batch: Any) -> tuple[list[Tensor], Any]:
        """The inputs in a batch, and what may be labels."""
        count = len(self._names)
        if isinstance(batch, Mapping):
            return self._of_mapping(batch)
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(parts) == 2 and isinstance(parts[0], Mapping):
            inputs, _ = self._of_mapping(parts[0])
            return inputs, parts[1]
        inputs = [leaf for leaf in tree_flatten(list(parts[:count]))[0] if _is_tensor(leaf)]
        if len(inputs) != count or len(parts) not in (count, count + 1):
            raise NoAccuracy(
                f"batches are {_in_words(batch)}; expected {count} "
                f"{'input' if count == 1 else 'inputs'} and then labels, or a dict of them"
            )
        return inputs, parts[count] if len(parts) > count else None

    def _of_mapping(self, batch: Mapping[Any, Any]) -> tuple[list[Tensor], Any]:
        tensors = {key: value for key, value in batch.items() if _is_tensor(value)}
        inputs = [tensors[name] for name in self._names if name in tensors]
        if len(inputs) < len(self._names):
            inputs = self._by_shape(tensors)
        used = {id(tensor) for tensor in inputs}
        rest = {key: value for key, value in tensors.items() if id(value) not in used}
        named = [value for key, value in rest.items() if looks_like_labels(str(key))]
        whole = [value for value in rest.values() if not value.is_floating_point()]
        labels = next((found[0] for found in (named, whole) if len(found) == 1), None)
        return inputs, labels

    def _by_shape(self, tensors: Mapping[Any, Tensor]) -> list[Tensor]:
        """The only tensor that can be the only input."""
        (known, *others), (opened, *_) = self._first.call.tensors(), self._open
        fitting = [
            tensor
            for key, tensor in tensors.items()
            if self._fits(tensor, known, opened) and not looks_like_labels(str(key))
        ]
        if others or len(fitting) != 1:
            raise NoAccuracy(
                f"batches are dicts of {', '.join(map(str, tensors))}, in which "
                f"{', '.join(self._names)} cannot be told"
            )
        return fitting


def _as_predictions(labels: Any, wanted: list[Tensor], size: int | None) -> Tensor | None:
    """Labels as indices of classes, in the shape of the predictions; None if they are none."""
    if not _is_tensor(labels):
        return None
    predicted = wanted[0].argmax(class_axis(wanted[0]))
    found = labels[:size].detach().cpu() if labels.dim() else labels.detach().cpu()
    if found.dim() == predicted.dim() + 1 and found.shape[1] == 1:
        found = found.squeeze(1)  # (N, 1, H, W) of segmentation
    if found.is_floating_point() and not bool((found == found.round()).all()):
        return None
    return found.long() if found.shape == predicted.shape else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _in_words(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}s of {', '.join(type(part).__name__ for part in batch)}"
    return f"of type {type(batch).__name__}"


@torch.no_grad()
def accuracy_of(examples: list[Example]) -> float | None:
    """Share of right predictions of the model that the examples are of; None without labels."""
    right = total = 0
    for example in examples:
        axis = class_axis(example.outputs[0]) if example.outputs else None
        if axis is not None and example.labels is not None:
            predicted = example.outputs[0].argmax(axis)
            right += int((predicted == example.labels).sum())
            total += predicted.numel()
    return right / total if total else None
