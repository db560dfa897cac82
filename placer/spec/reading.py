"""Files a person wrote -> plain data that still knows the line of every key.

YAML 1.2, TOML and JSON come in through here. Everything is hostile until read: size, nesting, aliases,
duplicate keys and the encoding are checked before anything is built from the text.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import ReusedAnchorWarning, YAMLError
from ruamel.yaml.events import AliasEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

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

    def located(self) -> Document:
        """Return the same with lines where they were not kept: JSON is YAML enough to be read again for them."""
        if self.lines or Path(self.file).suffix.lower() != ".json":
            return self
        return Document(self.data, self.file, self.digest, _lines_of_json(self.file, self.digest))

    def error(self, path: KeyPath, message: str) -> InputError:
        """Return the error to raise for what stands at `path`."""
        return InputError(message, file=self.file, key=format_key(path) or None, line=self.line(path))


def format_key(path: KeyPath) -> str:
    """Return `hosts[2].gpus` for `("hosts", 2, "gpus")`."""
    text = ""
    for part in path:
        word = f"[{part}]" if isinstance(part, int) else _printable(part)
        text += word if isinstance(part, int) or not text else f".{word}"
    return text


def _printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates escaped, and cut after 80 characters."""
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_document(path: str | Path, limit: int = MAX_FILE_BYTES) -> Document:
    """Read a YAML, TOML or JSON file, chosen by its ending.

    Raises InputError when the file cannot be read, is not UTF-8, is larger than `limit` bytes, nests deeper than 40
    levels, repeats a key, uses an alias, or does not parse.
    """
    path = Path(path)
    text = read_text(path, limit)
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


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the bytes of a file of at most `limit` bytes; raise InputError otherwise."""
    path = Path(path)
    try:
        if not path.exists():
            raise InputError("no such file", file=str(path))
        if not path.is_file():
            raise InputError("is not a file", file=str(path))
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read: {said}", file=str(path)) from None
    if len(raw) > limit:
        raise InputError(f"is larger than {limit / 2**20:g} MiB, the most that is read", file=str(path))
    return raw


def read_text(path: str | Path, limit: int = MAX_FILE_BYTES) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes; raise InputError otherwise."""
    raw = read_bytes(path, limit)
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
        raise _first_error(error, model, document, data, at) from None


def _first_error(
    error: ValidationError, model: type[BaseModel], document: Document, data: Any, at: KeyPath
) -> InputError:
    details = error.errors(include_url=False)
    root = _at(document.data, at) if data is None else data
    paths = [_clean(item["loc"], root, item["type"] == "missing") for item in details]
    # The deepest error is the one in the branch of a union that the user meant.
    deepest = max(_depth(path, root) for path in paths)
    chosen = next(number for number, path in enumerate(paths) if _depth(path, root) == deepest)
    first, path, kind = details[chosen], at + paths[chosen], details[chosen]["type"]
    found = first.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        name = str(path[-1])
        hint = nearest(name, known) or (f"; known keys: {', '.join(sorted(known))}" if known else "")
        return document.error(path, f"unknown key `{_printable(name)}`{hint}")
    if kind == "missing":
        return document.error(path[:-1], f"the key `{path[-1]}` is missing")
    if kind == "union_tag_not_found":
        return document.error(path, f"the key `{_unquote(first, 'discriminator')}` is missing")
    if kind == "union_tag_invalid":
        tag, names = str(first["ctx"]["tag"]), _quoted(first, "expected_tags")
        path += (_unquote(first, "discriminator"),)
        expected = f"one of {', '.join(f'`{name}`' for name in names)}"
        return document.error(path, f"found {_show(tag)}, expected {expected}{nearest(tag, names)}")
    # Several errors in one place are the branches of a union: what any of them takes would have done.
    here = [item for item, other in zip(details, paths, strict=True) if at + other == path]
    said = next((item for item in here if item["type"] in ("value_error", "assertion_error")), None)
    if said is not None:
        message = str(said.get("ctx", {}).get("error", said["msg"]))
        # A rule over a whole mapping names the key it is about; the place is that key.
        about = re.match(r"`(\w+)` ", message)
        value = _at(root, path[len(at) :])
        if about and isinstance(value, Mapping) and about.group(1) in value:
            path += (about.group(1),)
        others = [_expected(item, model) for item in here if item is not said]
        return document.error(path, " or ".join(dict.fromkeys([message, *others])))
    expected = " or ".join(dict.fromkeys(_expected(item, model) for item in here))
    hint = ""
    if kind in ("literal_error", "enum"):
        hint = nearest(str(found), _quoted(first, "expected"))
    if not path and found is None:
        return document.error(path, f"is empty, expected {expected}")
    return document.error(path, f"found {_show(found)}, expected {expected}{hint}")


def _quoted(error: Any, key: str) -> list[str]:
    """Return the names that pydantic put in quotes in one entry of an error's context."""
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get(key, "")))


def _unquote(error: Any, key: str) -> str:
    return str(error.get("ctx", {}).get(key, "")).strip("'")


def _at(data: Any, path: Sequence[str | int]) -> Any:
    """Return what stands at `path`, or None where nothing does."""
    for part in path:
        if not _holds(data, part):
            return None
        data = data[part]
    return data


def _holds(data: Any, part: str | int) -> bool:
    if isinstance(data, Mapping):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)


def _depth(path: KeyPath, data: Any) -> int:
    """Return how many keys of `path` a person wrote."""
    for depth, part in enumerate(path):
        if not _holds(data, part):
            return depth
        data = data[part]
    return len(path)


def _clean(location: Sequence[str | int], data: Any, missing: bool) -> KeyPath:
    """Drop what pydantic puts among the keys and nobody wrote: union branches, tags and `[key]`.

    A missing key is the one thing that ends a location, does not stand in `data`, and is kept.
    """
    path: KeyPath = ()
    for part in location:
        if _holds(data, part):
            path += (part,)
            data = data[part]
    return (*path, location[-1]) if missing else path


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "`true` or `false`",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "mapping": "a mapping of names to values",
    "none": "nothing",
    "finite": "a finite number",
}


def _expected(item: Any, model: type[BaseModel]) -> str:
    """Return in words what one pydantic error asks for."""
    kind, limits = str(item["type"]), item.get("ctx", {})
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        known = _known_keys(model, item["loc"])
        return f"a mapping with keys such as {', '.join(sorted(known))}" if known else "a mapping"
    if kind in ("literal_error", "enum"):
        return str(limits.get("expected", "")).replace("'", "`")
    sizes = {
        "greater_than_equal": ("a number of at least {ge}",),
        "greater_than": ("a number above {gt}",),
        "less_than_equal": ("a number of at most {le}",),
        "less_than": ("a number below {lt}",),
        "too_short": ("at least {min_length} of them",),
        "too_long": ("at most {max_length} of them",),
        "string_too_short": ("text of at least {min_length} characters",),
        "string_too_long": ("text of at most {max_length} characters",),
    }
    if kind in sizes:
        return sizes[kind][0].format(**limits)
    return _EXPECTED.get(kind.split("_")[0], re.sub(r"^Input should be (a )?(valid )?", "", str(item["msg"])))


def _show(value: object) -> str:
    """Return a value as a person would have written it, 60 characters at most."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, dict | list) and not value:
        return "an empty mapping" if isinstance(value, dict) else "an empty list"
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

    #: Not `depth`: newer versions of the base class count under that name themselves.
    nesting = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            event = self.parser.peek_event()
            raise _Refused(
                event.start_mark.line + 1, f"uses the alias `*{event.anchor}`; write the value out"
            )
        self.nesting += 1
        if self.nesting > MAX_DEPTH and not self.parser.check_event(ScalarEvent):
            event = self.parser.peek_event()
            raise _Refused(event.start_mark.line + 1, f"nests deeper than {MAX_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.nesting -= 1

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
        with warnings.catch_warnings():
            # An anchor that nothing refers to is harmless, and so is a second one of its name.
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            node = yaml.compose(text)
        data = None if node is None else _build(node, (), lines, yaml)
    except _Refused as refused:
        raise InputError(refused.message, file=file, line=refused.line) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        raise InputError(
            f"holds the control character 0x{ord(text[error.position]):02x}, which YAML does not allow",
            file=file,
            line=line,
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or "cannot be read"
        if problem == "but found another document":
            problem = "holds a second document, expected one"
        raise InputError(
            f"is not YAML: {str(problem).splitlines()[0]}", file=file, line=mark.line + 1 if mark else None
        ) from None
    except ValueError as error:
        raise InputError(f"is not YAML: {error}", file=file) from None
    return data, lines


def _build(node: Node, path: KeyPath, lines: dict[KeyPath, int], yaml: YAML) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if not isinstance(node, ScalarNode) and str(node.ctag) not in _COLLECTION_TAGS:
        raise _Refused(node.start_mark.line + 1, f"uses the tag `{node.ctag}`, which is not accepted")
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
                raise _Refused(line, f"repeats the key `{_printable(str(key))}`")
            lines[(*path, key)] = line
            result[key] = _build(value_node, (*path, key), lines, yaml)
        return result
    if isinstance(node, SequenceNode):
        return [_build(item, (*path, index), lines, yaml) for index, item in enumerate(node.value)]
    return _scalar(node, yaml)


_COLLECTION_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}


def _scalar(node: Any, yaml: YAML) -> Any:
    tag = str(node.ctag) if getattr(node, "ctag", None) is not None else str(node.tag)
    if tag not in _SCALAR_TAGS:
        raise _Refused(node.start_mark.line + 1, f"uses the tag `{tag}`, which is not accepted")
    if tag.endswith((":str", ":timestamp")):
        return node.value
    if len(node.value) > 400:
        raise _Refused(node.start_mark.line + 1, "has a number of more than 400 characters")
    try:
        return yaml.constructor.construct_object(node, deep=True)
    except (ValueError, KeyError):
        raise _Refused(
            node.start_mark.line + 1, f"found `{_printable(node.value)}` under the tag `{tag}`"
        ) from None


@lru_cache(maxsize=4)
def _lines_of_json(file: str, digest: str) -> dict[KeyPath, int]:
    """Return the line of every key of a JSON file that still is what it was; nothing where YAML does not take it."""
    try:
        text = read_text(file)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return {}
        return _read_yaml(text, file)[1]
    except (InputError, RecursionError):
        return {}


_LONG_TOML_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAX_DEPTH}}}""")


def _read_toml(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    if (long := _LONG_TOML_KEY.search(text)) is not None:
        # The standard reader takes time and memory by the square of a dotted key's length.
        start = text.count("\n", 0, long.start()) + 1
        raise InputError(f"nests deeper than {MAX_DEPTH} levels", file=file, line=start)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        message = str(error)[: place.start()] if place else str(error)
        line = int(place.group(1)) if place else None
        raise InputError(f"is not TOML: {message}", file=file, line=line) from None
    _check_depth(data, file)
    return data, {}


def _read_json(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InputError(f"repeats the key `{_printable(repeated)}`", file=file)
        return result

    def refuse_constant(name: str) -> Any:
        raise InputError(f"holds `{name}`, which is not a JSON number", file=file)

    try:
        data = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", file=file, line=error.lineno) from None
    except ValueError:
        raise InputError("holds a number of more than 4300 digits", file=file) from None
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
