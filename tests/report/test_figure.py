"""The picture of a placement: well formed, one cell for each rank, and nothing from a file is markup in it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from placer import cli
from placer.placement import Placement, save_placement
from placer.report.figure import MAX_HOSTS, placement_svg
from placer.strategy import Shape
from tests.conftest import Solved
from tests.launchers.by_hand import make, make_data

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> ElementTree.Element:
    """Return the parsed picture, everything in it inside its frame."""
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter(f"{SVG}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        assert 0 <= x <= x + float(box.attrib["width"]) <= width
        assert 0 <= y <= y + float(box.attrib["height"]) <= height
    return root


def cells(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Return the rectangles of the ranks by id."""
    found = [box for box in root.iter(f"{SVG}rect") if box.get("id")]
    assert len({box.attrib["id"] for box in found}) == len(found)
    assert len({(box.get("x"), box.get("y")) for box in found}) == len(found)
    return {box.attrib["id"]: box for box in found}


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def two_stages() -> Placement:
    return make(
        [("node02", 1), ("node02", 0), ("node01", 4), ("node01", 6)],
        [((0, 3), Shape(tp=2)), ((3, 5), Shape(tp=2))],
    )


def test_there_is_one_cell_for_each_rank_coloured_by_stage() -> None:
    root = drawn(placement_svg(two_stages()))
    found = cells(root)
    assert set(found) == {f"rank-{number}" for number in range(4)}
    fills = [found[f"rank-{number}"].attrib["fill"] for number in range(4)]
    assert fills[0] == fills[1] != fills[2] == fills[3]
    assert {"stage 0", "stage 1", "node01", "node02"} <= set(words(root))
    # GPU 0 stands left of GPU 1, though it holds the higher rank.
    assert float(found["rank-1"].attrib["x"]) < float(found["rank-0"].attrib["x"])


def test_without_a_cluster_the_indices_between_ranks_have_none() -> None:
    text = words(drawn(placement_svg(two_stages())))
    assert [word for word in text if word.startswith("GPU")] == [
        "GPU 0", "GPU 1", "GPU 0", "GPU 1", "GPU 2", "GPU 3", "GPU 4", "GPU 5", "GPU 6",
    ]  # fmt: skip
    # Five cells and the legend.
    assert text.count("no rank") == 6


def test_one_stage_is_coloured_by_ep_rank() -> None:
    gpus = [("a", number) for number in range(4)]
    found = cells(drawn(placement_svg(make(gpus, [((0, 1), Shape(dp=4, ep=2))], {0: [[0], [1]]}))))
    fills = [found[f"rank-{number}"].attrib["fill"] for number in range(4)]
    assert fills[0] == fills[2] != fills[1] == fills[3]


def test_a_cluster_shows_free_and_taken_gpus(quickstart_solved: Solved) -> None:
    placement, cluster = quickstart_solved.placement, quickstart_solved.problem.cluster
    root = drawn(placement_svg(placement, cluster))
    text = words(root)
    assert len([word for word in text if word.startswith("GPU ")]) == cluster.gpus == 16
    assert len(cells(root)) == 12
    # Two of each, and the legend.
    assert text.count("free") == text.count("taken") == 3
    assert any("modelled" in word and "gap" in word for word in text)


def test_pipelines_with_experts_name_every_coordinate(small_solved: Solved) -> None:
    text = words(drawn(placement_svg(small_solved.placement)))
    for record in small_solved.placement.ranks:
        assert f"dp {record.dp}  tp {record.tp}" in text or f"stage {record.stage}  dp {record.dp}" in text


@pytest.mark.parametrize("hosts", [1, 5, 17, MAX_HOSTS, MAX_HOSTS + 1])
def test_many_hosts_wrap_and_the_rest_is_told(hosts: int) -> None:
    gpus = [(f"node{number}", gpu) for number in range(hosts) for gpu in range(2)]
    root = drawn(placement_svg(make(gpus, [((0, 4), Shape(dp=len(gpus)))])))
    assert len(cells(root)) == 2 * min(hosts, MAX_HOSTS)
    assert any(word == f"the first {MAX_HOSTS} of {hosts} hosts" for word in words(root)) == (
        hosts > MAX_HOSTS
    )


def test_a_large_host_wraps_its_cells() -> None:
    gpus = [("tray", number) for number in range(72)]
    found = cells(drawn(placement_svg(make(gpus, [((0, 4), Shape(tp=72))]))))
    assert len(found) == 72
    assert len({box.attrib["y"] for box in found.values()}) == 9


def test_two_ranks_on_one_gpu_are_both_drawn() -> None:
    assert len(cells(drawn(placement_svg(make([("a", 0), ("a", 0)]))))) == 2


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "a&b", "\"'><svg>", "]]>", "\x1b[2J\x00", "x" * 5000]
)
def test_hostile_words_stay_words(hostile: str) -> None:
    placement = make([("a", 0), ("a", 1)])
    changed = placement.model_copy(
        update={
            "model": hostile,
            "cluster": hostile,
            "strategy": placement.strategy.model_copy(update={"name": hostile}),
            "ranks": [record.model_copy(update={"host": hostile}) for record in placement.ranks],
        }
    )
    root = drawn(placement_svg(changed))
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "style", "rect", "text")
    }
    assert len(cells(root)) == 2
    shown = "".join(words(root))
    assert hostile[:20] in shown or "\\x1b[2J\\x00" in shown
    assert all(len(word) < 200 for word in words(root))


def test_show_draws_a_placement_and_replaces_only_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placement, picture = tmp_path / "placement.json", tmp_path / "p.svg"
    save_placement(two_stages(), placement)
    command = ["show", str(placement), "--svg", str(picture)]
    assert cli.main(command) == cli.main(command) == 0
    assert picture.read_text() == placement_svg(two_stages())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "p.svg" in captured.err
    picture.write_text("notes")
    assert cli.main(command) == 2
    assert picture.read_text() == "notes"
    assert "is no picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (make_data([("a", 0)]), "p.png", "expected `.svg`"),
        ({"kind": "cluster"}, "p.svg", "is not a placement file"),
    ],
)
def test_show_refuses_what_it_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, Any], name: str, said: str
) -> None:
    if "ranks" in data:
        save_placement(Placement.model_validate(data), tmp_path / "x.json")
    else:
        (tmp_path / "x.json").write_text('{"kind": "cluster"}')
    assert cli.main(["show", str(tmp_path / "x.json"), "--svg", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / name).exists()
