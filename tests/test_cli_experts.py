"""`placer experts`: each option, the files it reads and writes, and what it says of what it cannot use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer import cli
from placer.expert_maps.registry import read_expert_map
from placer.solver.experts import floor
from tests.shared_data import ROOT

MIXTRAL = str(ROOT / "models" / "mixtral-8x7b.yaml")
LOADS = np.array([[0] * 8, [90, 40, 30, 20, 10, 5, 3, 2], [5, 5, 5, 5, 5, 5, 5, 65]])
MODEL = ["--model", MIXTRAL, "--gpu-type", "h100-80g", "--tokens-per-gpu", "512"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work among a few small files of loads, on 100 columns without colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "PLACER_TRACEBACK", "TERM"):
        monkeypatch.delenv(name, raising=False)
    np.save("a.npy", LOADS)
    np.savetxt("b.csv", LOADS[:, ::-1], fmt="%d", delimiter=",")
    Path("c.json").write_text(json.dumps({"logical_count": np.roll(LOADS, 3, axis=1).tolist()}))
    np.save("wide.npy", np.ones((3, 16)))
    rng = np.random.default_rng(2)
    chosen = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(40)]).astype(np.int16)
    np.savez("t.npz", topk=chosen, layers=np.array([1, 2]), experts=8)
    np.savez("late.npz", topk=chosen[:, :1], layers=np.array([2]), experts=8)
    np.savez("early.npz", topk=chosen[:, :1], layers=np.array([0]), experts=8)
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 3
    Path("running.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    Path("single.json").write_text(json.dumps({"physical_to_logical_map": [list(range(8))] * 3}))
    return tmp_path


class Outcome:
    """What one command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in out + err

    @property
    def data(self) -> Any:
        """What it printed as JSON."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


@pytest.fixture
def placer(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `placer experts` in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = cli.main(["experts", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def slots(rows: Sequence[Sequence[int]]) -> list[int]:
    return [len(row) for row in rows]


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [expert for row in rows for expert in row]


# what is placed


@pytest.mark.parametrize("loads", ["a.npy", "b.csv", "c.json", "t.npz"])
def test_each_kind_of_file_is_placed(placer: Any, loads: str) -> None:
    found = placer(loads, "--gpus", 4, "--json").data
    assert set(found["experts"]) == {"1", "2"}
    for rows in found["experts"].values():
        assert slots(rows) == [2, 2, 2, 2]
        assert sorted(flat(rows)) == list(range(8))
    assert 0 < found["bound"] <= found["objective"] + 1e-12


def test_the_report_names_scenarios_balance_and_proof(placer: Any) -> None:
    done = placer("a.npy", "b.csv", "--gpus", 4, "--slots", 12, "--hosts", 2)
    assert (done.code, done.err) == (0, "")
    assert "2 MoE layers, 8 experts, 12 slots a layer; 4 EP ranks, 2 hosts" in done.out
    assert "weighted mean" in done.out
    assert "objective " in done.out
    assert "bound " in done.out
    assert "proven within 0.1 %" in " ".join(done.out.split())
    assert max(map(len, done.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--slots", 12], [3, 3, 3, 3]),
        (["--slots", 10, "--uneven"], [3, 3, 2, 2]),
        (["--slots-per-gpu", "3x2,2x2"], [3, 3, 2, 2]),
        (["--slots", 10, "--format", "omni"], [3, 3, 2, 2]),
        (["--experts", 8], [2, 2, 2, 2]),
    ],
)
def test_slots_as_asked(placer: Any, words: list[Any], expected: list[int]) -> None:
    assert slots(placer("a.npy", "--gpus", 4, *words, "--json").data["experts"]["1"]) == expected


def test_weights_and_worst_change_what_is_best(placer: Any) -> None:
    def by_scenario(*words: object) -> dict[str, float]:
        score = placer("a.npy", "c.json", "--gpus", 4, "--slots", 12, *words, "--json").data["score"]
        return {item["name"]: float(item["imbalance"]) for item in score["scenarios"]}

    first, second = by_scenario("--weights", "1,0.001"), by_scenario("--weights", "0.001,1")
    assert first["a"] <= second["a"]
    assert second["c"] <= first["c"]
    assert first != second
    assert max(by_scenario("--worst", 1).values()) <= max(first.values())


def test_speeds_are_heeded_and_said(placer: Any) -> None:
    done = placer("a.npy", "--gpus", 4, "--slots", 12, "--speeds", "1x3,0.5")
    assert done.code == 0
    assert "time: load / relative speed" in done.out


def test_copies_apart_by_host(placer: Any) -> None:
    words = ["a.npy", "--gpus", 4, "--slots", 12, "--hosts", 2, "--replicas-across", "host", "--json"]
    for rows in placer(*words).data["experts"].values():
        for host in (rows[:2], rows[2:]):
            held = flat(host)
            assert len(held) == len(set(held))


def test_a_permutation_keeps_groups_on_blocks(placer: Any, place: Path) -> None:
    words = ["--format", "permutation", "--groups", 4, "-o", "p.json"]
    assert placer("a.npy", "--gpus", 4, *words).code == 0
    for rows in read_expert_map("p.json", ep=4, format="permutation", dense_layers=[0]).layers.values():
        for row in rows.tolist():
            assert row[0] // 2 == row[1] // 2
    found = placer("a.npy", "--gpus", 4, "--contiguous", "--groups", 2, "--json").data["experts"]
    for rows in found.values():
        assert [{expert // 4 for expert in flat(half)} for half in (rows[:2], rows[2:])] in (
            [{0}, {1}],
            [{1}, {0}],
        )


def test_balance_trades_for_reach(placer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "LADDER", (0.2, 0.8))
    monkeypatch.setattr(floor, "KICKS", 1)
    done = placer("t.npz", "a.npy", "--gpus", 4, "--slots", 12, "--balance", 0.6)
    assert done.code == 0
    words = ["a.npy", "b.csv", "--sample", "t.npz", "--gpus", 4, "--slots", 12, "--balance", 0.6, "--json"]
    found = placer(*words).data
    assert found["score"]["balance"] >= 0.6
    curve = [(point["balance"], point["reach"]) for point in found["reach_curve"]]
    assert curve == sorted(curve, reverse=True)
    assert len(curve) >= 1


def test_a_budget_is_shared_out(placer: Any) -> None:
    found = placer("a.npy", "--gpus", 4, "--budget", 20, "--json").data
    used = sum(sum(slots(rows)) for rows in found["experts"].values())
    assert 16 <= used <= 20
    assert "slots per GPU by layer" in found["notes"][-1]


def test_modelled_time_with_a_model_card(placer: Any) -> None:
    found = placer("a.npy", "--gpus", 4, "--slots", 12, *MODEL, "--json").data
    assert found["unit"] == "s"
    assert 0 < found["bound"] <= found["objective"] < 1
    decode = placer("a.npy", "--gpus", 4, "--slots", 12, *MODEL, "--phases", "decode")
    assert decode.code == 0
    assert "a layer, modelled" in decode.out
    config = ["--model", "config.json", *MODEL[2:]]
    whole = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "torch_dtype": "bfloat16",
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(whole))
    again = placer("a.npy", "--gpus", 4, "--slots", 12, *config, "--json").data
    assert again["objective"] == pytest.approx(found["objective"])


# files written


@pytest.mark.parametrize(
    ("name", "words", "format"),
    [
        ("m.json", [], "sglang"),
        ("m.yaml", [], "tensorrt-llm"),
        ("m.yml", [], "tensorrt-llm"),
        ("m.npy", [], "omni"),
        ("m.npz", [], "vllm-arrays"),
        ("m.json", ["--format", "vllm-ascend"], "vllm-ascend"),
        ("m.json", ["--format", "vllm-physical"], "vllm-physical"),
    ],
)
def test_the_ending_or_the_format_says_what_is_written(
    placer: Any, name: str, words: list[str], format: str
) -> None:
    done = placer("a.npy", "--gpus", 4, "--slots", 12, "-o", name, *words, "--json")
    assert (done.code, done.err) == (0, f"written to `{name}` as {format}\n")
    experts = json.loads(done.out)["experts"]
    read = read_expert_map(name, ep=4, experts=8, format=format, dense_layers=[0], model_layers=3)
    for layer in (1, 2):
        assert [sorted(row) for row in read.layers[layer].tolist()] == [
            sorted(row) for row in experts[str(layer)]
        ]


def test_a_file_that_is_there_is_replaced_only_when_told(placer: Any) -> None:
    Path("m.json").write_text("mine")
    words = ["a.npy", "--gpus", 4, "-o", "m.json"]
    refused = placer(*words)
    assert (refused.code, refused.out) == (2, "")
    assert "m.json: exists already and is replaced only with --force" in refused.err
    assert Path("m.json").read_text() == "mine"
    assert placer(*words, "--force").code == 0
    assert Path("m.json").read_text() != "mine"


def test_what_a_format_cannot_express_leaves_no_file(placer: Any, place: Path) -> None:
    done = placer("a.npy", "--gpus", 4, "--slots", 10, "--uneven", "-o", "m.json")
    assert done.code == 2
    assert "sglang cannot express this expert map" in done.err
    assert "`omni`" in done.err
    assert not (place / "m.json").exists()


def test_the_same_command_writes_the_same_bytes_with_any_workers(placer: Any) -> None:
    for number, workers in enumerate((2, 2, 1, 3)):
        words = ["--slots", 12, "--workers", workers, "-o", f"m{number}.json"]
        assert placer("a.npy", "b.csv", "--gpus", 4, *words).code == 0
    assert len({Path(f"m{number}.json").read_bytes() for number in range(4)}) == 1


# a map that is there


def test_simulation_of_the_map_just_written_gives_the_balance_that_was_printed(placer: Any) -> None:
    words = ["a.npy", "b.csv", "--gpus", 4, "--hosts", 2]
    found = json.loads(placer(*words, "--slots", 12, "-o", "m.json", "--json").out)
    score = placer(*words, "--simulate", "m.json", "--json").data
    assert score["balance"] == found["score"]["balance"]
    assert score["scenarios"] == found["score"]["scenarios"]
    shown = placer(*words, "--simulate", "m.json")
    assert shown.out.startswith("m.json: 2 MoE layers, 8 experts, 12 slots a layer; 4 EP ranks, 2 hosts")


@pytest.mark.parametrize("name", ["m.json", "m.npy"])
def test_nothing_moves_from_the_map_just_written(placer: Any, name: str) -> None:
    words = ["a.npy", "b.csv", "--gpus", 4]
    found = json.loads(placer(*words, "--slots", 12, "-o", name, "--json").out)
    again = placer(*words, "--from", name, "--json").data
    assert again["moves"]["moved"] == 0
    assert again["objective"] == pytest.approx(found["objective"])
    for layer, rows in found["experts"].items():
        assert [sorted(row) for row in again["experts"][layer]] == [sorted(row) for row in rows]


def test_moves_at_a_price_and_under_a_cap(placer: Any) -> None:
    words = ["a.npy", "--gpus", 4, "--hosts", 2, "--from", "running.json"]
    stay = placer(*words, "--json").data
    capped = placer(*words, "--move-cap", 8, "--json").data
    priced = placer(*words, "--move-price", 0, "--inside-weight", 0.1, "--json").data
    assert stay["moves"]["moved"] == 0 < capped["moves"]["moved"] <= 8
    assert stay["objective"] > capped["objective"] >= priced["objective"]
    for found in (stay, capped, priced):
        assert found["moves"]["moved"] == found["moves"]["inside_hosts"] + found["moves"]["between_hosts"]
    shown = placer(*words, "--move-cap", 8)
    assert "what moves would buy" in shown.out
    assert "moved: " in shown.out


def test_steps_say_what_a_move_may_cost(placer: Any) -> None:
    words = ["a.npy", "--gpus", 4, "--hosts", 2, "--from", "running.json", *MODEL, "--json"]
    few, many = (placer(*words, "--steps", steps).data for steps in (1, 10**9))
    assert few["moves"]["moved"] < many["moves"]["moved"]
    assert few["objective"] > many["objective"]


def test_a_lost_gpu_and_a_lost_host(placer: Any) -> None:
    words = ["a.npy", "--gpus", 4, "--hosts", "n[1-2]", "--from", "running.json", "--json"]
    one = placer(*words, "--lost", "n1:1").data
    assert slots(one["experts"]["1"]) == [3, 3, 3]
    # Ranks 0, 2 and 3 hold 0-2, 6, 7, 0 and 1-3: experts 4 and 5 are missing from both layers.
    assert one["moves"]["moved"] == 2 * 2
    host = placer(*words, "--lost", "n1", "--slots", 8).data
    assert slots(host["experts"]["1"]) == [4, 4]
    for rows in host["experts"].values():
        assert set(flat(rows)) == set(range(8))


def test_a_format_named_for_the_map_before(placer: Any) -> None:
    words = ["a.npy", "--gpus", 4, "--from", "running.json"]
    assert placer(*words, "--from-format", "sglang", "--json").data["moves"]["moved"] == 0
    wrong = placer(*words, "--from-format", "omni")
    assert wrong.code == 2
    assert "running.json" in wrong.err


# what cannot be used

FROM = ["--from", "running.json"]
HOSTS = ["--hosts", "node[1-2]"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.npy"], ["none.npy: no such file"]),
        (["a.npy", "wide.npy"], ["wide.npy", "3 layers x 16 experts", "expected loads of one model"]),
        (["--experts", 9], ["a.npy", "found 8 experts, expected 9"]),
        (["--gpus", 0], ["`--gpus`", "found 0, expected 1 to 4096"]),
        (["--gpus", 5000], ["`--gpus`", "found 5000, expected 1 to 4096"]),
        (["--hosts", 5], ["`--hosts`", "found 5 hosts, expected 1 to 4"]),
        (["--hosts", 3], ["`--hosts`", "4 GPUs do not divide over 3 hosts"]),
        (["--hosts", "a[1"], ["`--hosts`", "a[1"]),
        (["--hosts", "a,a"], ["`--hosts`", "twice"]),
        (["--slots", 7], ["`--slots`", "7 slots cannot hold 8 experts, expected at least 8"]),
        (["--slots", 0], ["`--slots`", "found 0, expected 1 to 8192"]),
        (["--slots", 10], ["`--slots`", "10 slots do not divide over 4 GPUs, expected 8 or 12", "--uneven"]),
        (["--slots", 36], ["a domain of 9 slots would hold two copies of one of 8 experts"]),
        (["--slots-per-gpu", "3x3"], ["`--slots-per-gpu`", "gives 3 numbers, expected 4"]),
        (["--slots-per-gpu", "three"], ["`--slots-per-gpu`", "found 'three'", "`9x16,8x16`"]),
        (["--slots-per-gpu", "2.5x4"], ["`--slots-per-gpu`", "expected whole numbers"]),
        (["--slots-per-gpu", "0x4"], ["`--slots-per-gpu`", "found 0, expected numbers above 0"]),
        (["--slots-per-gpu", "1x4"], ["4 slots cannot hold 8 experts"]),
        (["--speeds", "1x3"], ["`--speeds`", "gives 3 numbers, expected 4"]),
        (["--weights", "1,2"], ["`--weights`", "expected 1 numbers, one for each scenario: a"]),
        (["--worst", 1.5], ["`--worst`", "found 1.5, expected 0 to 1"]),
        (["--worst", "nan"], ["`--worst`", "found nan, expected 0 to 1"]),
        (["--contiguous", "--groups", 3], ["`--groups`", "found 3, expected a number that divides 8 experts"]),
        (["--groups", 0], ["`--groups`", "found 0"]),
        (["--contiguous", "--slots", 12], ["12 slots for 8 experts, expected one slot for each"]),
        (["--replicas-across", "rack"], ["`--replicas-across`", "found 'rack', expected gpu or host"]),
        (["--balance", 0.8], ["`--balance`", "needs tokens", "--sample"]),
        (["--balance", 2, "--sample", "t.npz"], ["`--balance`", "found 2, expected 0 to 1"]),
        (["--balance", 0.8, "--sample", "a.npy"], ["a.npy: found the shape (3, 8)", "top_k"]),
        (["--balance", 0.8, "--sample", "early.npz"], ["early.npz: samples layer 0, which has no expert loads"]),
        (["t.npz", "late.npz", "--balance", 0.8], ["late.npz", "layer 1", "expected loads of one model"]),
        (["--lost", "host00"], ["`--lost`", "needs --from"]),
        ([*FROM, *HOSTS, "--lost", "nodes1"], ["`--lost`", "names `nodes1`", "did you mean `node1`"]),
        ([*FROM, *HOSTS, "--lost", "node1:2"], ["`--lost`", "found `node1:2`, expected a GPU from 0 to 1"]),
        ([*FROM, *HOSTS, "--lost", "node["], ["`--lost`", "node["]),
        ([*FROM, *HOSTS, "--lost", "node[1-2]"], ["`--lost`", "every GPU is lost"]),
        ([*FROM, *HOSTS, "--lost", "node1"], ["hold 6, fewer than 8 experts", "--slots 8 or more, 4 on each"]),
        (["--move-price", 0.1], ["`--move-price`", "needs --from"]),
        (["--move-cap", 3], ["`--move-cap`", "needs --from"]),
        ([*MODEL, "--steps", 3], ["`--steps`", "needs --from"]),
        (["--from", "none.json"], ["none.json: no such file"]),
        (["--from", "c.json"], ["c.json", "holds expert loads"]),
        ([*FROM, "--gpus", 5], ["running.json", "12", "5"]),
        ([*FROM, "--from-format", "sglan"], ["'sglan'", "did you mean `sglang`"]),
        (["--budget", 15], ["a budget of 15 slots is less than the 16"]),
        (["--gpu-type", "h100-80g"], ["`--gpu-type`", "needs --model"]),
        (["--phases", "decode"], ["`--phases`", "needs --model"]),
        (["--tokens-per-gpu", "5"], ["`--tokens-per-gpu`", "needs --model"]),
        ([*FROM, "--steps", "5"], ["`--steps`", "needs --model"]),
        (MODEL[:4], ["`--tokens-per-gpu`", "is missing"]),
        (MODEL[:2] + MODEL[4:], ["`--gpu-type`", "is missing"]),
        ([*MODEL, "--speeds", "1x4"], ["`--speeds`", "cannot stand beside --model"]),
        ([*MODEL, "--balance", 0.5], ["`--balance`", "cannot stand beside --model"]),
        ([*MODEL, *FROM, "--move-price", 1], ["`--move-price`", "cannot stand beside --model"]),
        ([*MODEL, "--phases", "decode,prefill"], ["`--phases`", "expected prefill or decode", "1 scenarios"]),
        ([*MODEL, "--phases", "train"], ["`--phases`", "found 'train'"]),
        ([*MODEL[:4], "--tokens-per-gpu", "1,2"], ["`--tokens-per-gpu`", "gives 2 numbers, expected 1"]),
        ([*MODEL[:2], "--gpu-type", "h101", *MODEL[4:]], ["h101"]),
        (["--model", "none.yaml", *MODEL[2:]], ["none.yaml: no such file"]),
        (["--model", ROOT / "models/deepseek-v3.yaml", *MODEL[2:]], ["deepseek-v3.yaml", "256 experts", "8"]),
        (["--model", ROOT / "models/llama-3.1-70b.yaml", *MODEL[2:]], ["llama-3.1-70b, which has no experts"]),
        ([*MODEL, "--nic-bandwidth", "fast"], ["fast"]),
        (["--simulate", "none.json"], ["none.json: no such file"]),
        (["--simulate", "running.json", "--format", "omnis"], ["'omnis'", "did you mean `omni`"]),
        (["--format", "list"], ["expected one of sglang, tensorrt-llm"]),
        (["-o", "m.txt"], ["m.txt"]),
        (["-o", "m.json", "--format", "omni"], ["m.json", ".npy"]),
        (["-o", "none/m.json"], ["none"]),
        (["--time-limit", 0], ["--time-limit"]),
        (["--workers", 0], ["--workers"]),
        (["--seed", -1], ["--seed"]),
    ],
    ids=lambda item: " ".join(map(str, item))[-50:] if isinstance(item, list) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line(placer: Any, words: list[Any], expected: list[str]) -> None:
    files = [] if words and str(words[0]).endswith((".npy", ".npz")) else ["a.npy"]
    gpus = [] if "--gpus" in words else ["--gpus", 4]
    done = placer(*files, *words, *gpus)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1 or done.err.splitlines()[1].startswith("hint: ")
    assert "fault in placer" not in done.err
    for part in expected:
        assert part in done.err


def test_gpus_must_be_said(placer: Any) -> None:
    done = placer("a.npy")
    assert done.code == 2
    assert "--gpus" in done.err
