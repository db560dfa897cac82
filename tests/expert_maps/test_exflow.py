from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placer.errors import ExportError, InputError
from placer.expert_maps.registry import render_expert_map
from tests.expert_maps.building import read_bytes, small_map

GOOD = b"Expert,Node\n0,0\n1,1\n2,0\n3,1\n4,1\n5,1\n6,0\n7,0\n"


def test_experts_are_numbered_through_all_layers(tmp_path: Path) -> None:
    expected = small_map([[0, 2], [1, 3]], [[2, 3], [0, 1]])
    assert read_bytes(tmp_path, "solution.csv", GOOD, experts=4) == expected
    lines = GOOD.splitlines()
    turned = b"\n".join([lines[0], *reversed(lines[1:])])
    assert read_bytes(tmp_path, "solution.csv", turned, experts=4, ep=2) == expected


@pytest.mark.parametrize(
    ("content", "known", "message"),
    [
        (GOOD, {"experts": None}, "ExFlow's file does not say how many experts a layer has; give --experts"),
        (GOOD, {"experts": 3}, "holds 8 experts, expected 3 for every layer"),
        (GOOD, {"ep": 1}, "found node 1, expected 0 to 0"),
        (GOOD + b"8,900000000\n9,0\n10,0\n11,0\n", {}, "found node 900000000, expected 0 to 65535"),
        (GOOD.replace(b"3,1", b"2,1"), {}, "has no line, or several, for expert 3"),
        (GOOD.replace(b"3,1", b"3,-1"), {}, ".csv:5: found '3,-1', expected an expert and a node"),
        (GOOD.replace(b"3,1", b"3,true"), {}, "found '3,true'"),
        (GOOD.replace(b"3,1", b"3,nan"), {}, "found '3,nan'"),
        (GOOD.replace(b"3,1", b"3,1,1"), {}, "found '3,1,1'"),
        (GOOD.replace(b"3,1", "³,1".encode()), {}, "found '³,1'"),
        (b"Expert,Node\n", {}, "holds 0 experts"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, known: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, "solution.csv", content, **({"experts": 4} | known))
    assert message in str(caught.value)


def test_it_is_not_written() -> None:
    with pytest.raises(ExportError, match="ExFlow's CSV is read and not written; `sglang`, "):
        render_expert_map(small_map([[0, 1], [2, 3]]), "exflow")
