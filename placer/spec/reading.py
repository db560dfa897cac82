"""Files a person wrote -> plain data that still knows the line of every key.

YAML 1.2, TOML and JSON come in through here. Everything is hostile until read: size, nesting, aliases,
duplicate keys and the encoding are checked before anything is built from the text.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from placer.errors import InputError, nearest

MAX_FILE_BYTES = 4 * 2**20
MAX_DEPTH = 40

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Plain data read from a file, with where each key stood."""

    data: Any
    file: str
    digest: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that relative paths in this file start from."""
        return Path(self.file).parent

    def line(self, path: KeyPath) -> int | None:
        """Return the line of `path`, or of its nearest ancestor that has one; None where lines are not kept."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None

    def error(self, path: KeyPath, message: str) -> InputError:
        """Return the error to raise for what stands at `path`."""
        return InputError(message, file=self.file, key=format_key(path) or None, line=self.line(path))


def format_key(path: KeyPath) -> str:
    """Return `hosts[2].gpus` for `("hosts", 2, "gpus")`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_document(path: str | Path) -> Document:
    """Read a YAML, TOML or JSON file, chosen by its ending.

    Raises InputError when the file cannot be read, is not UTF-8, is larger than 4 MiB, nests deeper than 40
    levels, repeats a key, uses an alias, or does not parse.
    """
    path = Path(path)
    text = read_text(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"found the ending `{path.suffix}`, expected `.yaml`, `.toml` or `.json`", file=str(path)
        )
    try:
        data, lines = readers[path.suffix.lower()](text, str(path))
    except RecursionError:
        raise InputError(f"nests deeper than {MAX_DEPTH} levels", file=str(path)) from None
    return Document(data=data, file=str(path), digest=digest, lines=lines)


def read_text(path: str | Path, limit: int = MAX_FILE_BYTES) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes; raise InputError otherwise."""
    path = Path(path)
    try:
        if not path.exists():
            raise InputError("no such file", file=str(path))
        if not path.is_file():
            raise InputError("is not a file", file=str(path))
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    if len(raw) > limit:
        raise InputError(f"is larger than {limit / 2**20:g} MiB, the most that is read", file=str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}", file=str(path)
        ) from None


def validate(model: type[Model], document: Document, data: Any = None, at: KeyPath = ()) -> Model:
    """Return `data` (by default the whole document) as a `model`.

    Raises InputError for the first thing that does not fit, with its key path and line, what was found, what
    was expected and the nearest right name.
    """
    try:
        return model.model_validate(document.data if data is None else data)
    except ValidationError as error:
        raise _first_error(error, model, document, at) from None


def _first_error(
    error: ValidationError, model: type[BaseModel], document: Document, at: KeyPath
) -> InputError:
    details = error.errors(include_url=False)
    # The deepest error is the one in the branch of a union that the user meant.
    first = max(
        details,
        key=lambda item: (
            _in_document(at + _clean(item["loc"], document, at), document),
            -details.index(item),
        ),
    )
    path = at + _clean(first["loc"], document, at)
    found = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        hint = nearest(str(path[-1]), known) or (f"; known keys: {', '.join(sorted(known))}" if known else "")
        return document.error(path, f"unknown key `{path[-1]}`{hint}")
    if kind == "missing":
        return document.error(path[:-1], f"the key `{path[-1]}` is missing")
    if kind in ("value_error", "assertion_error"):
        return document.error(path, str(first.get("ctx", {}).get("error", first["msg"])))
    if kind in ("literal_error", "enum"):
        expected = str(first.get("ctx", {}).get("expected", ""))
        names = re.findall(r"'([^']*)'", expected)
        return document.error(path, f"found {_show(found)}, expected {expected}{nearest(str(found), names)}")
    return document.error(path, f"found {_show(found)}, expected {_expected(first['msg'])}")


def _in_document(path: KeyPath, document: Document) -> int:
    return sum(path[: length + 1] in document.lines for length in range(len(path)))


def _clean(location: Sequence[str | int], document: Document, at: KeyPath) -> KeyPath:
    """Drop the names of union branches that pydantic puts among the keys."""
    path: KeyPath = ()
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if at + path + (part,) in document.lines or not document.lines or (last and not _is_branch(part)):
            path += (part,)
    return path


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and bool(
        re.search(r"[\[\](){}-]|^[A-Z]|^(int|str|float|bool|list|dict)$", part)
    )


def _expected(message: str) -> str:
    message = re.sub(r"^Input should be ", "", message)
    return re.sub(r"^(a )?valid ", "a valid ", message)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """Return the keys allowed at `location` below `model`, or of every model reachable when that is unclear."""
    current: set[type[BaseModel]] = {model}
    for part in location:
        following: set[type[BaseModel]] = set()
        for item in current:
            if isinstance(part, str) and part in item.model_fields:
                following |= _models_in(item.model_fields[part].annotation)
        current = following or current
    return {name for item in current for name in item.model_fields}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    found: set[type[BaseModel]] = set()
    for argument in getattr(annotation, "__args__", ()) or ():
        found |= _models_in(argument)
    return found


class _StrictComposer(Composer):
    """A composer that refuses aliases and deep nesting before anything is built."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            event = self.parser.peek_event()
            raise _Refused(
                event.start_mark.line + 1, f"uses the alias `*{event.anchor}`; write the value out"
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            event = self.parser.peek_event()
            raise _Refused(event.start_mark.line + 1, f"nests deeper than {MAX_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def check_end_doc_dup_key(self, node: Any) -> None:
        """Leave duplicate keys to `_build`, which says the line."""


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        self.line, self.message = line, message


def _read_yaml(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _StrictComposer
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text)
        data = None if node is None else _build(node, (), lines, yaml)
    except _Refused as refused:
        raise InputError(refused.message, file=file, line=refused.line) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or "cannot be read"
        raise InputError(
            f"is not YAML: {str(problem).splitlines()[0]}", file=file, line=mark.line + 1 if mark else None
        ) from None
    except ValueError as error:
        raise InputError(f"is not YAML: {error}", file=file) from None
    return data, lines


def _build(node: Node, path: KeyPath, lines: dict[KeyPath, int], yaml: YAML) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        result: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise _Refused(line, "has a key that is not a plain word")
            key = _scalar(key_node, yaml)
            if isinstance(key, bool | float) or key is None:
                key = key_node.value
            if key in result:
                raise _Refused(line, f"repeats the key `{key}`")
            lines[(*path, key)] = line
            result[key] = _build(value_node, (*path, key), lines, yaml)
        return result
    if isinstance(node, SequenceNode):
        return [_build(item, (*path, index), lines, yaml) for index, item in enumerate(node.value)]
    return _scalar(node, yaml)


_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}


def _scalar(node: Any, yaml: YAML) -> Any:
    tag = str(node.ctag) if getattr(node, "ctag", None) is not None else str(node.tag)
    if tag not in _SCALAR_TAGS:
        raise _Refused(node.start_mark.line + 1, f"uses the tag `{tag}`, which is not accepted")
    if tag.endswith((":str", ":timestamp")):
        return node.value
    if len(node.value) > 400:
        raise _Refused(node.start_mark.line + 1, "has a number of more than 400 characters")
    return yaml.constructor.construct_object(node, deep=True)


def _read_toml(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}", file=file) from None
    _check_depth(data, file)
    return data, {}


def _read_json(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"repeats the key `{repeated}`", file=file)
        return result

    def refuse_constant(name: str) -> Any:
        raise InputError(f"holds `{name}`, which is not a JSON number", file=file)

    try:
        data = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", file=file, line=error.lineno) from None
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=file) from None
    _check_depth(data, file)
    return data, {}


def _check_depth(data: Any, file: str) -> None:
    layer, depth = [data], 0
    while layer:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"nests deeper than {MAX_DEPTH} levels", file=file)
        layer = [
            child
            for item in layer
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
