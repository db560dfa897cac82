"""The benchmark of expert placement: its score is right and trusts nobody, and its tables add up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import experts as bench
from placer.cost.expert_score import fan_out
from tests.shared_data import SHARED, needs_shared

SLOTS, GPUS, EXPERTS, TOP_K = 80, 16, 64, 6
PRICES, CAPS = (0.1, 1.0), (0.1, 0.3)


@pytest.fixture(scope="module")
def data() -> bench.Data:
    return bench.generated_data(2, EXPERTS, sample_layers=1, prompts=8)


@pytest.fixture(scope="module")
def tables(data: bench.Data) -> dict[str, list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as smaller:
        for name, value in (("SINGLE", (SLOTS, GPUS)), ("PRICES", PRICES), ("CAPS", CAPS), ("STARTS", 2)):
            smaller.setattr(bench, name, value)
        found = list(bench.tables(data, bench.Layers(1, 1, 1), [(SLOTS, GPUS)], times=False))
    return {told["title"].split(".")[0]: told["rows"] for told in (table.as_json() for table in found)}


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in rows}


# The score.


def test_gpu_loads_by_hand() -> None:
    loads = np.array([[[6.0, 3.0, 1.0]]])
    layout = np.array([[0, 1, 0, 2]])
    assert bench.gpu_loads(loads, layout, 4, 2).tolist() == [[[6.0, 4.0]]]
    assert bench.imbalance(loads, layout, 4, 2).tolist() == [[1.2]]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 6]))
def test_no_load_is_lost(seed: int, gpus: int) -> None:
    generator = np.random.default_rng(seed)
    loads = generator.random((2, 3, 5))
    layout = np.stack([generator.permutation([*range(5), *generator.integers(0, 5, 7)]) for _ in range(3)])
    on_gpu = bench.gpu_loads(loads, layout, 12, gpus)
    assert on_gpu.shape == (2, 3, gpus)
    assert np.allclose(on_gpu.sum(axis=2), loads.sum(axis=2))
    assert (bench.imbalance(loads, layout, 12, gpus) >= 1 - 1e-12).all()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda layout: layout[:, :-1], "shape"),
        (lambda layout: layout[:1], "shape"),
        (lambda layout: layout.reshape(-1), "shape"),
        (lambda layout: layout.astype(np.float64), "float64"),
        (lambda layout: np.where(layout == 3, 2, layout), "expert 3 of layer 0 has no slot"),
        (lambda layout: layout + 1, "experts 1 to 4"),
        (lambda layout: layout - 1, "experts -1 to 2"),
    ],
)
def test_a_cheating_map_is_an_error(spoil: Callable[[Any], Any], word: str) -> None:
    layout = np.tile([0, 1, 2, 3, 0, 1], (2, 1))
    loads = np.ones((1, 2, 4))
    assert bench.imbalance(loads, layout, 6, 2).tolist() == [[1.0, 1.0]]
    with pytest.raises(bench.CheatError, match=f"thief: .*{word}"):
        bench.imbalance(loads, spoil(layout), 6, 2, "thief")


def test_slots_that_do_not_divide_by_gpus_are_an_error() -> None:
    with pytest.raises(bench.CheatError, match="4 GPUs"):
        bench.imbalance(np.ones((1, 1, 4)), np.array([[0, 1, 2, 3, 0, 1]]), 6, 4)


def test_a_bound_above_the_score_is_an_error() -> None:
    layout = np.zeros((2, 1), dtype=np.int64)
    honest = bench.Placed("ours", layout, 0.0, np.array([1.0, 1.2]))
    assert bench.gaps_of(honest, np.array([1.0, 1.8])) == pytest.approx((0.6 / 2.8, 1 / 3))
    assert bench.gaps_of(bench.Placed("theirs", layout, 0.0), np.ones(2)) is None
    with pytest.raises(bench.CheatError, match="layer 1"):
        bench.gaps_of(honest, np.array([1.0, 1.1]))


@pytest.mark.parametrize(("slots", "gpus"), [(64, 8), (72, 8), (96, 16)])
def test_reach_agrees_with_the_cost_model(data: bench.Data, slots: int, gpus: int) -> None:
    assert data.sample is not None
    layout = np.random.default_rng(slots).permutation(np.arange(slots) % 64)[None]
    hosted = np.zeros((gpus, 64), dtype=np.int64)
    np.add.at(hosted, (np.repeat(np.arange(gpus), slots // gpus), layout[0]), 1)
    expected = fan_out(data.sample, 0, hosted, np.arange(gpus)).mean()
    assert bench.gpus_reached(data.sample, layout, slots, gpus)[0] == pytest.approx(expected, rel=1e-6)


def test_moves_are_counted_by_gpu_and_by_slot() -> None:
    before, after = np.array([[0, 1, 2, 3]]), np.array([[1, 0, 2, 0]])
    assert bench.slots_changed(before, after) == 0.75
    assert bench.copies_moved(before, after, 4, 2) == 0.25
    assert bench.copies_moved(before, before, 4, 2) == 0.0


# The data.


def test_generated_data_says_so_and_differs_by_workload(data: bench.Data) -> None:
    assert data.generated
    assert all("GENERATED" in name for name in (*data.names, data.origin))
    assert data.loads.shape == (8, 2, EXPERTS)
    assert np.allclose(data.loads.sum(axis=2), 1.0)
    assert len(np.unique(data.loads[:, 0, 0])) == 8


def test_halves_share_no_prompt_and_lose_none(data: bench.Data) -> None:
    assert data.sample is not None
    one, other = bench.halves(data.sample, 0)
    assert not set(one.prompt.tolist()) & set(other.prompt.tolist())
    assert one.tokens + other.tokens == data.sample.tokens
    assert not np.array_equal(one.prompt, bench.halves(data.sample, 1)[0].prompt)


def test_evenly_takes_the_ends() -> None:
    assert bench.evenly(58, 3).tolist() == [0, 28, 57]
    assert bench.evenly(5, 0).tolist() == bench.evenly(5, 9).tolist() == [0, 1, 2, 3, 4]


def test_splits_are_of_all_workloads() -> None:
    for split in bench.SPLITS:
        assert len(set(split)) == 4
        assert set(split) < set(range(len(bench.WORKLOADS)))
    assert bench.WORKLOADS[bench.BEFORE] == "decode_in1000out1000"
    assert bench.WORKLOADS[bench.AFTER] == "decode_in2000out100"


@needs_shared
def test_measured_data_is_read_whole() -> None:
    read = bench.read_data(SHARED / "routing")
    assert read.loads.shape == (8, 58, 256)
    assert np.allclose(read.loads.sum(axis=2), 1.0)
    assert read.sample is not None
    assert (read.sample.tokens, len(read.sample.layers), read.sample.experts) == (25073, 26, 64)
    # Experts in order on 32 GPUs: the published balance of the two workloads.
    layout = np.tile(np.arange(256), (58, 1))
    balance = (1 / bench.imbalance(read.loads, layout, 256, 32)).mean(axis=1)
    assert balance[[3, 1]] == pytest.approx([0.434, 0.384], abs=6e-4)


# The tables.


@pytest.mark.parametrize("split", ["1a", "1b"])
def test_balance_adds_up(tables: dict[str, list[dict[str, Any]]], split: str) -> None:
    rows = by_name(tables[split])
    assert len(rows) == 7
    ours = rows["placer"]
    for row in rows.values():
        assert 1 <= row["unseen"] <= row["worst file"] <= row["worst layer"]
        for kind in ("planned", "unseen"):
            assert row[f"x ours, {kind}"] == pytest.approx((row[kind] - 1) / (ours[kind] - 1))
        assert (row["gap"] is None) == (row is not ours)
        assert row["planned"] >= ours["planned"]
    assert 0 <= ours["gap"] < 0.1


def test_single_workloads_add_up(tables: dict[str, list[dict[str, Any]]]) -> None:
    assert len(tables["2"]) == 8
    for row in tables["2"]:
        assert row["bound"] <= row["placer"] <= row["greedy"] <= row["greedy worst layer"]
        assert row["greedy x ours"] == pytest.approx((row["greedy"] - 1) / (row["placer"] - 1))
        # One layer: the worst gap is that of the means.
        assert row["placer worst gap"] == pytest.approx(1 - row["bound"] / row["placer"])


@pytest.mark.parametrize(("table", "settings", "swaps"), [("3", 2, 2), ("4", 1, 0)])
def test_fan_out_adds_up(
    tables: dict[str, list[dict[str, Any]]], table: str, settings: int, swaps: int
) -> None:
    rows = tables[table]
    assert len({row["slots/GPUs"] for row in rows}) == settings
    assert sum("swaps" in row["contender"] for row in rows) == settings * swaps
    assert sum("price" in row["contender"] for row in rows) == settings * len(PRICES)
    for row in rows:
        for half in ("planned", "held out"):
            assert 1 <= row[f"reached, {half}"] <= TOP_K
            assert 0 < row[f"balance, {half}"] <= 1
    first = by_name([row for row in rows if row["slots/GPUs"].endswith("/8")])
    dear = first[f"placer, price {PRICES[-1]:g}"]
    assert dear["reached, planned"] < first["greedy"]["reached, planned"]


def test_moves_keep_to_their_caps(tables: dict[str, list[dict[str, Any]]]) -> None:
    rows = by_name(tables["5"])
    stale = rows["no new plan"]
    assert stale["slots that change"] == stale["copies that move"] == 0
    for row in rows.values():
        assert 1 <= row["max / mean"] <= min(row["worst layer"], stale["max / mean"])
        assert row["copies that move"] <= row["slots that change"]
    for cap in CAPS:
        assert rows[f"placer, at most {cap:.0%}"]["copies that move"] <= cap


def test_a_folder_without_data_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["experts", "--data", str(tmp_path)])
    assert bench.main() == 2
    assert "prefill_in1024.json" in capsys.readouterr().err


def test_json_holds_what_is_printed(
    data: bench.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_table(*_: object) -> list[bench.Table]:
        return [
            bench.Table(
                "1. Title", (("who", "group"), ("load", "load")), [("us", 1.25), ("us", None)], ("Why.",)
            )
        ]

    monkeypatch.setattr(bench, "tables", one_table)
    monkeypatch.setattr(bench, "warm_up", lambda _: None)
    monkeypatch.setattr(bench, "generated_data", lambda: data)
    monkeypatch.setattr(bench, "DEFAULT_DATA", tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", ["experts", "--json", str(tmp_path / "told.json")])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "GENERATED" in printed
    assert "1.2500" in printed
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["generated"] is True
    assert told["tables"][0]["rows"] == [{"who": "us", "load": 1.25}, {"who": "us", "load": None}]


def test_a_cheat_ends_the_run(
    data: bench.Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "greedy_global", lambda loads, slots, gpus: np.zeros((len(loads), slots), int))
    monkeypatch.setattr(bench, "warm_up", lambda _: None)
    monkeypatch.setattr(bench, "read_data", lambda _: data)
    monkeypatch.setattr(sys, "argv", ["experts", "--data", "anywhere", "--layers", "1"])
    assert bench.main() == 1
    assert "greedy, mean of workloads: expert 1 of layer 0 has no slot" in capsys.readouterr().err
