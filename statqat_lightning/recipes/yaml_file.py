"""YAML files that people write: what stands in them, and on which line.

Reading is strict where a mistake would go unseen (a key given twice), and bounded where a small
file could stand for a huge value (aliases).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from statqat_lightning._words import short

_MOST_BYTES = 1_000_000
_MOST_NODES = 10_000
"""Values that a file with aliases may stand for, each counted as often as it is named."""


@dataclass(frozen=True)
class YamlFile:
    """A file that was read.

    Attributes:
        path: The file.
        data: What it holds; None if it is empty.
        node: The same as YAML's own tree, which knows lines.
    """

    path: Path
    data: Any
    node: yaml.Node | None

    def at(self, *keys: str | int) -> str:
        """Where an entry stands, to begin a message with: `recipe.yaml:7: `.

        Args:
            *keys: Keys and indices that lead to it. Where there is no such entry, it is the line of
                the innermost one that there is.
        """
        node, line = self.node, 0 if self.node is None else self.node.start_mark.line
        for key in keys:
            found = _child(node, key)
            if found is None:
                break
            line, node = found
        return f"{self.path}:{line + 1}: "


def _child(node: yaml.Node | None, key: str | int) -> tuple[int, yaml.Node] | None:
    """Line and value of an entry of a mapping or a list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value == str(key):
                return name.start_mark.line, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        value = node.value[key]
        return value.start_mark.line, value
    return None


def read_yaml(path: str | Path) -> YamlFile:
    """Read a file of one YAML document, in plain types only.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not YAML in UTF-8, larger than 1 MB, names a key twice, or has aliases
            that stand for more than 10 000 values; the message names file and line.
    """
    path = Path(path)
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path}: larger than 1 MB; expected a YAML file that people write.")
    text = _decoded(path, content)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check(node)
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{where}: {said}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}:{line}: {error.reason}; expected plain text.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply; expected a few levels.") from error
    return YamlFile(path, data, node)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "the file is UTF-16" if wide else f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise ValueError(f"{path}:{line}: {found}; save the file as UTF-8.") from error


class _Loader(yaml.SafeLoader):
    """Names the place of values that cannot be made, too, such as the 31st of February."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _mistake(f"got {short(node.value)}, which is no valid {kind}", node) from error


def _mistake(said: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


def _check(root: yaml.Node | None) -> None:
    """Refuse keys that come twice, and aliases that stand for too much."""
    sizes: dict[int, int | None] = {}  # None: still being counted

    def count(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _mistake("an alias stands for a value that it is part of", node)
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            total += sum(count(key) + count(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(map(count, node.value))
        sizes[id(node)] = total
        return total

    if root is None:
        return
    total = count(root)
    if total > max(_MOST_NODES, len(sizes)):
        raise _mistake(
            f"aliases stand for more than {_MOST_NODES} values; write out what is meant", root
        )


def _refuse_twice(node: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        earlier = first.setdefault((key.tag, key.value), key)
        if earlier is not key:
            line = earlier.start_mark.line + 1
            raise _mistake(f"got the entry {short(key.value)} twice, first on line {line}", key)
