"""From files to the question that is asked, and from the answer to a map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.errors import InputError
from placer.expert_maps.registry import render_expert_map
from placer.experts import Placed, Question, Wishes, answer, file_of, read_map, read_question, simulate
from placer.solver.experts import floor

#: A dense layer, then two with experts.
LOADS = np.array([[0] * 8, [90, 40, 30, 20, 10, 5, 3, 2], [5, 5, 5, 5, 5, 5, 5, 65]])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", LOADS)
    np.savetxt("b.csv", LOADS[:, ::-1], fmt="%d", delimiter=",")
    named = {"1": LOADS[1].tolist(), "2": LOADS[2].tolist()}
    Path("c.json").write_text(json.dumps({"counts": {"x": named, "y": named}}))
    rng = np.random.default_rng(2)
    chosen = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(40)])
    np.savez("t.npz", topk=chosen.astype(np.int16), layers=np.array([1, 2]), experts=8)
    return tmp_path


def ask(*loads: str, **wishes: Any) -> Question:
    return read_question(Wishes(loads=loads or ("a.npy",), **({"gpus": 4, "workers": 1} | wishes)))


def placed(*loads: str, **wishes: Any) -> Placed:
    return answer(ask(*loads, **wishes))


def write(found: Placed, name: str = "map.json", format: str = "sglang") -> str:
    Path(name).write_bytes(file_of(render_expert_map(found.map, format), Path(name)))
    return name


# the question


def test_each_part_of_a_file_is_a_scenario_and_dense_layers_are_left_out() -> None:
    assert [routing.name for routing in ask("c.json").routings] == ["c:x", "c:y"]
    found = ask("a.npy", "b.csv", "a.npy", "b.csv")
    problem = found.problem
    assert problem.layers == (1, 2)
    assert problem.loads.shape == (4, 2, 8)
    assert problem.loads.sum(axis=2) == pytest.approx(1.0)
    assert problem.loads[0, 0] == pytest.approx(LOADS[1] / 200)
    assert problem.weights == pytest.approx(0.25)


def test_files_of_one_name_are_told_apart_by_their_paths(place: Path) -> None:
    for folder in ("x", "y"):
        (place / folder).mkdir()
        np.save(f"{folder}/a.npy", LOADS)
    assert [routing.name for routing in ask("x/a.npy", "y/a.npy", "b.csv").routings] == [
        "x/a.npy", "y/a.npy", "b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wishes", "room"),
    [
        ({}, [2, 2, 2, 2]),
        ({"slots": 12}, [3, 3, 3, 3]),
        ({"slots": 10, "uneven": True}, [3, 3, 2, 2]),
        ({"room": "3x2, 4,1"}, [3, 3, 4, 1]),
        ({"room": "2*4"}, [2, 2, 2, 2]),
        ({"gpus": 3, "simulating": True}, [3, 3, 3]),
        ({"gpus": 3, "budget": 60}, [3, 3, 3]),
    ],
)
def test_slots_of_each_gpu(wishes: dict[str, Any], room: list[int]) -> None:
    assert ask(**wishes).problem.room.tolist() == room


def test_hosts_have_equal_shares_of_consecutive_ranks() -> None:
    assert ask(hosts="2").names == ("host00", "host00", "host01", "host01")
    found = ask(hosts="n[7-8]", apart="host")
    assert found.names == ("n7", "n7", "n8", "n8")
    assert found.problem.host_of.tolist() == found.problem.apart_of.tolist() == [0, 0, 1, 1]
    assert ask(hosts="2").problem.apart_of.tolist() == [0, 1, 2, 3]


def test_weights_and_speeds_are_relative() -> None:
    found = ask("a.npy", "b.csv", weights="1,3", speeds="1x3,.5", worst=0.5)
    assert found.problem.weights.tolist() == [0.25, 0.75]
    assert found.speeds.tolist() == [1, 1, 1, 0.5]
    assert found.problem.forms[0].by_row == pytest.approx([3.5, 3.5, 3.5, 7.0])
    assert found.problem.worst == 0.5


def test_lost_gpus_leave_the_rest_with_their_hosts_speeds_and_slots() -> None:
    running = write(placed(slots=16))
    found = ask(before=running, hosts="2", lost=("host00:1",), speeds="1,2,3,4")
    assert (found.ranks, found.names) == ((0, 2, 3), ("host00", "host01", "host01"))
    assert found.speeds.tolist() == [1, 3, 4]
    assert found.problem.room.tolist() == [4, 4, 4]
    assert ask(before=running, hosts="2", lost=("host00", "host00:1")).ranks == (2, 3)
    assert ask(before=running, hosts="n[1-4]", lost=("n[1,3]",)).names == ("n2", "n4")


def test_samples_are_joined_only_where_they_are_wanted() -> None:
    np.savez(
        "u.npz", topk=np.zeros((5, 2, 2), np.int16) + np.array([0, 1], np.int16), layers=[1, 2], experts=8
    )
    assert ask("t.npz", "u.npz").problem.sample is None
    sample = ask("t.npz", "u.npz", balance=0.8).problem.sample
    assert sample is not None
    assert (sample.tokens, sample.layers) == (45, (1, 2))
    assert sample.prompt[:40].max() < sample.prompt[40:].min()
    alone = ask(sample="t.npz", balance=0.8).problem.sample
    assert alone is not None
    assert alone.tokens == 40


def test_a_sample_that_numbers_layers_from_nought_is_of_the_moe_layers() -> None:
    np.save("s.npy", np.load("t.npz")["topk"])
    sample = ask(sample="s.npy", balance=0.8).problem.sample
    assert sample is not None
    assert sample.layers == (1, 2)


@pytest.mark.parametrize(
    ("wishes", "key", "words"),
    [
        ({"loads": ()}, "LOADS", "at least one file"),
        ({"gpus": None}, "--gpus", "is missing"),
        ({"gpus": 0}, "--gpus", "found 0, expected 1 to 4096"),
        ({"gpus": 4097}, "--gpus", "found 4097, expected 1 to 4096"),
    ],
)
def test_what_only_the_api_can_leave_out(wishes: dict[str, Any], key: str, words: str) -> None:
    asked: dict[str, Any] = {"loads": ("a.npy",), "gpus": 4} | wishes
    with pytest.raises(InputError, match=words) as caught:
        read_question(Wishes(**asked))
    assert caught.value.key == key


# the answer


def test_the_map_keeps_the_layers_numbers_of_the_model() -> None:
    found = placed(slots=12)
    assert sorted(found.map.layers) == [1, 2]
    assert (found.map.experts, found.map.model_layers, found.map.ep) == (8, 3, 4)
    assert found.objective == pytest.approx(float(np.mean(found.score.scenarios[0].imbalance)))
    assert found.bound <= found.objective + 1e-12
    assert found.gap == pytest.approx((found.objective - found.bound) / found.objective)
    # Expert 7 of the last layer has 0.65 of the load: one copy on each GPU at most.
    assert found.map.copies(2)[7] >= 3


def test_unequal_slots_are_in_the_map() -> None:
    found = placed(room="4,4,2,2")
    assert [(row >= 0).sum() for row in found.map.layers[1]] == [4, 4, 2, 2]
    assert [len(row) for row in found.as_json()["experts"]["1"]] == [4, 4, 2, 2]


def test_slow_gpus_get_less() -> None:
    found = placed(slots=12, speeds="1,1,1,0.25")
    rows, copies = found.map.layers[1], found.map.copies(1)
    load = (LOADS[1][rows] / copies[rows]).sum(axis=1)
    assert load[3] < load[:3].min()
    assert found.score.by_speed


def test_a_budget_is_told_by_layer() -> None:
    found = placed(budget=20)
    widths = [rows.shape[1] for rows in found.map.layers.values()]
    assert sum(widths) * 4 <= 20
    assert any("slots per GPU by layer: " in note for note in found.notes)


def test_balance_asked_for_is_kept_and_reported_without_the_price_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floor, "LADDER", (0.2, 0.8))
    monkeypatch.setattr(floor, "KICKS", 1)
    found = placed("t.npz", "a.npy", slots=12, balance=0.6)
    assert found.score.balance >= 0.6
    assert found.objective == pytest.approx(float(found.score.imbalance))
    assert len(found.reach) >= 1


def test_json_is_plain() -> None:
    whole = json.loads(json.dumps(placed(slots=12).as_json()))
    assert set(whole) == {
        "unit", "objective", "bound", "gap", "layers_within_0.1_percent", "cut_short", "layers", "moves", "moves_curve",
        "reach_curve", "notes", "ranks", "score", "experts",
    }  # fmt: skip
    assert whole["moves"] is None
    assert whole["moves_curve"] == []


def test_a_map_scores_what_was_said_of_it() -> None:
    found = placed("a.npy", "b.csv", slots=12)
    score = simulate(ask("a.npy", "b.csv", simulating=True), write(found), None)
    assert score.balance == pytest.approx(found.score.balance, rel=1e-12)


def test_moves_to_a_map_are_counted_in_its_simulation() -> None:
    one, two = write(placed(slots=12), "one.json"), write(placed("b.csv", slots=12), "two.json")
    moves = simulate(ask(simulating=True, before=one), two, "sglang").moves
    assert moves is not None
    assert moves.moved.sum() > 0
    none = simulate(ask(simulating=True, before=one), one, None).moves
    assert none is not None
    assert none.moved.sum() == 0


def test_a_map_with_dense_layers_in_it_is_read_without_them() -> None:
    rows = [[0, 1, 2, 3, 4, 5, 6, 7]] * 3
    Path("physical.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    found = read_map("physical.json", None, 4, LOADS[None].astype(float))
    assert sorted(found.layers) == [1, 2]


def test_the_file_at_a_path_is_told_by_its_ending() -> None:
    files = {"map.json": b"j", "map.npz": b"n"}
    assert file_of(files, Path("x.JSON")) == b"j"
    assert file_of({"m.yaml": b"y"}, Path("x.yml")) == b"y"
    with pytest.raises(InputError, match=r"found the ending `.txt`, expected .json, .npz") as caught:
        file_of(files, Path("x.txt"))
    assert caught.value.key == "-o"
