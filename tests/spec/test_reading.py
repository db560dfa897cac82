"""Files that want to do harm, and the place that every error names."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from placer.errors import InputError
from placer.spec.base import Stated
from placer.spec.reading import MAX_FILE_BYTES, Document, format_key, read_document, read_text, validate


def read(folder: Path, name: str, content: str | bytes) -> Document:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_document(path)


def refused(folder: Path, name: str, content: str | bytes) -> InputError:
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            read(folder, name, content)
    assert time.perf_counter() - start < 5
    assert caught.value.file == str(folder / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return caught.value


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "says", "line"),
    [
        ("a.yaml", BOMB, "uses the alias `*a`", 2),
        ("a.yaml", "a: &a\n  b: *a\n", "uses the alias `*a`", 2),
        ("a.yaml", "[" * 100_000, "deeper than 40", 1),
        ("a.yaml", "{a: " * 100_000, "deeper than 40", 1),
        ("a.yaml", "\n".join(" " * depth + "a:" for depth in range(1000)), "deeper than 40", 41),
        ("a.yaml", "- " * 50_000 + "x", "deeper than 40", 1),
        ("a.yaml", "? " * 50_000, "deeper than 40", 1),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", "repeats the key `a`", 3),
        ("a.yaml", "x:\n  - a: 1\n    a: 2\n", "repeats the key `a`", 3),
        ("a.yaml", "a: 1\nb: x\0y\n", "control character 0x00", 2),
        ("a.yaml", "a: x\x07y\n", "control character 0x07", 1),
        ("a.yaml", "a: 1\nb: !!python/object:os.system x\n", "uses the tag", 2),
        ("a.yaml", "b: !!python/object/apply:os.system [x]\n", "uses the tag", 1),
        ("a.yaml", "b: !foo {x: 1}\n", "uses the tag `!foo`", 1),
        ("a.yaml", "b: !!set {x}\n", "uses the tag", 1),
        ("a.yaml", "a: !!int abc\n", "found `abc` under the tag", 1),
        ("a.yaml", "a: 1\n<<: {b: 2}\n", "uses the tag", 2),
        ("a.yaml", "a: " + "9" * 5000, "more than 400 characters", 1),
        ("a.yaml", "? [a, b]\n: 1\n", "not a plain word", 1),
        ("a.yaml", "a: 1\n---\nb: 2\n", "second document", 2),
        ("a.yaml", "a: [1\n", "is not YAML", 2),
        ("a.yaml", "a:\n\t- b\n", "is not YAML", 2),
        ("a.yaml", b"a: \xe9\n", "not UTF-8 text: byte 3 is 0xe9", None),
        ("a.yaml", '"\\e[31mx": 1\n"\\e[31mx": 2\n', r"repeats the key `\x1b[31mx`", 2),
        ("a.json", "[" * 100_000, "deeper than 40", None),
        ("a.json", "[" * 41 + "]" * 41, "deeper than 40", None),
        ("a.json", '{"a": {"b": 1, "b": 2}}', "repeats the key `b`", None),
        (
            "a.json",
            "{" + ",".join(f'"k{n}":1' for n in range(100_000)) + ',"k99999":2}',
            "repeats the key `k99999`",
            None,
        ),
        ("a.json", '{"a": NaN}', "`NaN`", None),
        ("a.json", '{"a": -Infinity}', "`-Infinity`", None),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "4300 digits", None),
        ("a.json", '{\n"a": }', "is not JSON", 2),
        ("a.toml", "a = " + "[" * 100_000, "deeper than 40", None),
        ("a.toml", "a" + ".a" * 100_000 + " = 1", "deeper than 40", 1),
        ("a.toml", "x = 1\ny = {" + "a." * 50_000 + "b = 1}", "deeper than 40", 2),
        ("a.toml", "[" + ".".join("a" * 41) + "]", "deeper than 40", None),
        ("a.toml", "a = 1\na = 2\n", "is not TOML", 2),
        ("a.txt", "a: 1\n", "found the ending `.txt`", None),
    ],
)
def test_hostile_files_are_refused(
    tmp_path: Path, name: str, content: str | bytes, says: str, line: int | None
) -> None:
    error = refused(tmp_path, name, content)
    assert says in error.message
    if line is not None:
        assert error.line == line


def test_forty_levels_are_read_and_forty_one_are_not(tmp_path: Path) -> None:
    assert read(tmp_path, "a.json", "[" * 40 + "]" * 40).data
    assert read(tmp_path, "a.yaml", "[" * 40 + "1" + "]" * 40).data
    assert read(tmp_path, "a.yaml", "\n".join(" " * depth + "a:" for depth in range(40)) + " 1").data
    refused(tmp_path, "b.yaml", "[" * 41 + "]" * 41)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as stream:
        stream.truncate(100 * 2**20)
    start = time.perf_counter()
    with pytest.raises(InputError, match="larger than 4 MiB"):
        read_document(path)
    assert time.perf_counter() - start < 0.5


def test_the_limit_is_exact(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert len(read_text(tmp_path / "a", 100)) == 100
    with pytest.raises(InputError, match="larger than"):
        read_text(tmp_path / "a", 99)
    assert MAX_FILE_BYTES == 4 * 2**20


def test_what_is_not_a_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    start = time.perf_counter()
    for name, says in [
        ("fifo.yaml", "is not a file"),
        ("folder.yaml", "is not a file"),
        ("zero.yaml", "is not a file"),
        ("loop.yaml", "no such file|cannot be read"),
        ("missing.yaml", "no such file"),
        ("x" * 5000 + ".yaml", "cannot be read"),
        ("a\0b.yaml", "no such file"),
    ]:
        with pytest.raises(InputError, match=says):
            read_document(tmp_path / name)
    assert time.perf_counter() - start < 1


def test_words_that_other_yaml_readers_take_for_truths_stay_words(tmp_path: Path) -> None:
    document = read(
        tmp_path, "a.yaml", "a: no\nb: on\nc: 1:30\nd: 2024-01-01\ne: true\nf: 0x10\ng: ~\nno: yes\n"
    )
    assert document.data == {
        "a": "no", "b": "on", "c": "1:30", "d": "2024-01-01", "e": True, "f": 16, "g": None, "no": "yes",
    }  # fmt: skip


def test_an_anchor_without_an_alias_does_no_harm(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, "a.yaml", "a: &x 1\nb: &x 2\n").data == {"a": 1, "b": 2}


def test_three_formats_give_the_same_data(tmp_path: Path) -> None:
    wanted = {"a": {"b": [1, "x"]}, "c": 1.5}
    assert read(tmp_path, "a.yaml", "a:\n  b: [1, x]\nc: 1.5\n").data == wanted
    assert read(tmp_path, "a.json", "\ufeff" + json.dumps(wanted)).data == wanted
    assert read(tmp_path, "a.toml", 'c = 1.5\n[a]\nb = [1, "x"]\n').data == wanted


def test_lines_are_those_of_the_keys(tmp_path: Path) -> None:
    document = read(tmp_path, "a.yaml", "# remark\na:\n  b:\n    - 1\n    - c: 2\n")
    assert document.line(("a", "b", 1, "c")) == 5
    assert document.line(("a", "b", 0)) == 4
    assert document.line(("a", "b", 7, "z")) == 3
    assert document.line(("z",)) == 2


def test_keys_are_printed_so_that_a_terminal_is_safe() -> None:
    assert format_key(("hosts", 2, "gpus")) == "hosts[2].gpus"
    assert format_key(("a\x1b[31m", "b\ud800")) == r"a\x1b[31m.b\ud800"
    assert len(format_key(("x" * 1000,))) == 80


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet="ab:-[]{}&*!?|>#'\"%@`,\n\t 01.<", max_size=60).map(str.encode),
    )
)
@pytest.mark.parametrize("name", ["a.yaml", "a.json", "a.toml"])
def test_any_bytes_are_data_or_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        document = read_document(path)
    except InputError as error:
        said = str(error)
    else:
        said = document.digest
    assert said.strip()
    assert "\n" not in said


class Leaf(Stated):
    kind: Literal["leaf"] = "leaf"
    size: int = 1
    width: int


class Twig(Stated):
    kind: Literal["twig"] = "twig"
    leaves: tuple[Leaf, ...] = ()


class Tree(Stated):
    parts: list[Annotated[Leaf | Twig, Field(discriminator="kind")]] = Field(default_factory=list)
    one: Leaf | list[Leaf] | None = None


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        (
            {"parts": [{"kind": "lef"}]},
            "parts[0].kind",
            "found 'lef', expected one of `leaf`, `twig`, did you mean `leaf`?",
        ),
        ({"parts": [{"size": 1}]}, "parts[0]", "the key `kind` is missing"),
        ({"parts": [{"kind": "leaf"}]}, "parts[0]", "the key `width` is missing"),
        ({"parts": [{"kind": "leaf", "width": "x"}]}, "parts[0].width", "found 'x', expected a whole number"),
        (
            {"parts": [{"kind": "twig", "leaves": [{"width": 1, "sise": 2}]}]},
            "parts[0].leaves[0].sise",
            "did you mean `size`?",
        ),
        ({"parts": [3]}, "parts[0]", "found 3, expected a mapping"),
        ({"one": 3}, "one", "found 3, expected a mapping with keys such as kind, size, width or a list"),
        ({"one": {"width": None}}, "one.width", "found nothing, expected a whole number"),
        (
            {"one": [{"width": 1}, {"width": []}]},
            "one[1].width",
            "found an empty list, expected a whole number",
        ),
        ({"partz": []}, "partz", "unknown key `partz`, did you mean `parts`?"),
        ([], None, "found an empty list, expected a mapping"),
    ],
)
def test_errors_name_the_key_that_was_written(
    tmp_path: Path, data: object, key: str | None, says: str, suffix: str
) -> None:
    document = read(tmp_path, f"a{suffix}", json.dumps(data, indent=1))
    with pytest.raises(InputError) as caught:
        validate(Tree, document)
    assert caught.value.key == key
    assert says in caught.value.message
    assert (caught.value.line is not None) == (suffix == ".yaml")


def test_errors_below_a_key_of_a_larger_document(tmp_path: Path) -> None:
    document = read(tmp_path, "a.yaml", "x: 1\ntree:\n  one:\n    width: y\n")
    with pytest.raises(InputError) as caught:
        validate(Tree, document, document.data["tree"], ("tree",))
    assert (caught.value.key, caught.value.line) == ("tree.one.width", 4)
