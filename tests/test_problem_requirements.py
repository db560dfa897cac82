"""Requirements as read: each mistake is one sentence with file, key path, line, what was found and what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.errors import InputError
from placer.placement import save_placement
from placer.problem import Problem, load_problem
from placer.spec.requirements import split_seat
from tests.conftest import PROBLEM, Solved

Files = Callable[..., Path]

LAST = "  exclude: {small02: [3]}\n"

#: No sentence may hold a word of the library that checks the types.
JARGON = re.compile(
    r"Input should|function-|constrained|validat|pydantic|dict\b|\bNone\b|instance of|unable to parse|Traceback",
    re.I,
)


@pytest.fixture
def stated(small_files: Files) -> Callable[[str], Path]:
    """Write the small problem with one more requirement, a line of YAML, and return its path."""

    def write(line: str, *changes: tuple[str, str]) -> Path:
        return small_files((LAST, f"{LAST}  {line}\n"), *changes)

    return write


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_problem(path)
    error = caught.value
    assert not JARGON.search(error.message), error.message
    assert str(error).isprintable(), str(error)
    assert not error.message.endswith(".")
    assert len(error.message) < 400
    return error


# The line to add, the key path under `requirements`, the message.
ERRORS = [
    # memory by type
    pytest.param("max_memory: {h100-80gb: 70 GiB}", ".max_memory.h100-80gb",
        "names the GPU type `h100-80gb`, which no host has, did you mean `h100-80g`?", id="type-near"),
    pytest.param("max_memory: {b200-180g: 70 GiB}", ".max_memory.b200-180g",
        "names the GPU type `b200-180g`, which no host has", id="type-not-used"),
    pytest.param("max_memory: {h100-80g: 70}", ".max_memory.h100-80g",
        "found the bare number 70, expected a size with its unit, such as `80 GiB`", id="memory-bare"),
    pytest.param("max_memory: {h100-80g: -1 GiB}", ".max_memory.h100-80g",
        "found '-1 GiB', expected a size that is finite and not negative", id="memory-negative"),
    pytest.param("max_memory: 70 GiB", ".max_memory",
        "found '70 GiB', expected a mapping of names to values", id="memory-of-no-type"),
    # GPUs
    pytest.param("pin_gpus: {big03: [0]}", ".pin_gpus.big03",
        "names the host `big03`, which the cluster has not, did you mean `big02`?", id="pin-gpus-host"),
    pytest.param("pin_gpus: {big01: [6]}", ".pin_gpus.big01",
        "names GPU 6 of `big01`, which the cluster has not", id="pin-gpus-index"),
    pytest.param("pin_gpus: {small01: [1]}", ".pin_gpus.small01",
        "names GPU 1 of `small01`, which the cluster has not", id="pin-gpus-hole"),
    pytest.param("pin_gpus: {big01: [-1]}", ".pin_gpus.big01",
        "names GPU -1 of `big01`, which the cluster has not", id="pin-gpus-negative"),
    pytest.param(f"pin_gpus: {{big01: [{'9' * 300}]}}", ".pin_gpus.big01",
        "names a GPU of more than 9 digits of `big01`, which the cluster has not", id="pin-gpus-huge"),
    pytest.param("pin_gpus: {big01: [0.5]}", ".pin_gpus.big01[0]",
        "found 0.5, expected a whole number", id="pin-gpus-half"),
    pytest.param('pin_gpus: {big01: ["0"]}', ".pin_gpus.big01[0]",
        "found '0', expected a whole number", id="pin-gpus-text"),
    pytest.param("pin_gpus: {big01: 0}", ".pin_gpus.big01", "found 0, expected a list", id="pin-gpus-no-list"),
    pytest.param("pin_gpus: {'big01; rm': [0]}", ".pin_gpus.big01; rm",
        "found 'big01; rm', expected a host name of letters, digits, `-` and `.` (RFC 1123)", id="pin-gpus-no-host"),
    # ranks
    pytest.param("pin_ranks: {0: big3}", ".pin_ranks[0]",
        "names the host `big3`, which the cluster has not, did you mean `big02`?", id="pin-ranks-host"),
    pytest.param('pin_ranks: {"0": big3}', ".pin_ranks.0",
        "names the host `big3`, which the cluster has not, did you mean `big02`?", id="pin-ranks-host-quoted"),
    pytest.param("pin_ranks: {0: small01/1}", ".pin_ranks[0]",
        "names GPU 1 of `small01`, which the cluster has not", id="pin-ranks-gpu"),
    pytest.param("pin_ranks: {0: big01/}", ".pin_ranks[0]",
        "found 'big01/', expected a host such as `node01` or a GPU such as `node01/3`", id="pin-ranks-slash"),
    pytest.param("pin_ranks: {0: big01/01}", ".pin_ranks[0]",
        "found 'big01/01', expected a host such as `node01` or a GPU such as `node01/3`", id="pin-ranks-leading-zero"),
    pytest.param("pin_ranks: {0: big01/-1}", ".pin_ranks[0]",
        "found 'big01/-1', expected a host such as `node01` or a GPU such as `node01/3`", id="pin-ranks-negative-gpu"),
    pytest.param("pin_ranks: {0: big01/0/1}", ".pin_ranks[0]",
        "found 'big01/0/1', expected a host such as `node01` or a GPU such as `node01/3`", id="pin-ranks-two-slashes"),
    pytest.param("pin_ranks: {0: big01/٣}", ".pin_ranks[0]",
        "found 'big01/٣', expected a host such as `node01` or a GPU such as `node01/3`", id="pin-ranks-other-digits"),
    pytest.param("pin_ranks: {0: 3}", ".pin_ranks[0]", "found 3, expected text", id="pin-ranks-number"),
    pytest.param("pin_ranks: {0: [big01]}", ".pin_ranks[0]", "found ['big01'], expected text", id="pin-ranks-list"),
    pytest.param("pin_ranks: {0: }", ".pin_ranks[0]", "found nothing, expected text", id="pin-ranks-nothing"),
    pytest.param("pin_ranks: {-1: big01}", ".pin_ranks[-1]",
        "found the key '-1', expected a whole number from 0 to 999,999,999", id="rank-negative"),
    pytest.param('pin_ranks: {"01": big01}', ".pin_ranks.01",
        "found the key '01', expected a whole number from 0 to 999,999,999", id="rank-leading-zero"),
    pytest.param("pin_ranks: {1.0: big01}", ".pin_ranks.1.0",
        "found the key '1.0', expected a whole number from 0 to 999,999,999", id="rank-a-float"),
    pytest.param("pin_ranks: {1e400: big01}", ".pin_ranks.1e400",
        "found the key '1e400', expected a whole number from 0 to 999,999,999", id="rank-infinite"),
    pytest.param("pin_ranks: {.nan: big01}", ".pin_ranks..nan",
        "found the key '.nan', expected a whole number from 0 to 999,999,999", id="rank-nan"),
    pytest.param("pin_ranks: {true: big01}", ".pin_ranks.true",
        "found the key 'true', expected a whole number from 0 to 999,999,999", id="rank-true"),
    pytest.param("pin_ranks: {1000000000: big01}", ".pin_ranks[1000000000]",
        "found the key '1000000000', expected a whole number from 0 to 999,999,999", id="rank-too-large"),
    pytest.param('pin_ranks: {1: big01, "1": big02}', ".pin_ranks",
        "names 1 twice, as a number and as text", id="rank-twice"),
    pytest.param("pin_ranks: [big01]", ".pin_ranks",
        "found ['big01'], expected a mapping of names to values", id="pin-ranks-no-mapping"),
    pytest.param("exclude_ranks: {0: [big01, bigg02]}", ".exclude_ranks[0]",
        "names the host `bigg02`, which the cluster has not, did you mean `big02`?", id="exclude-ranks-host"),
    pytest.param("exclude_ranks: {0: [big01, big02/9]}", ".exclude_ranks[0]",
        "names GPU 9 of `big02`, which the cluster has not", id="exclude-ranks-gpu"),
    pytest.param("exclude_ranks: {0: big01}", ".exclude_ranks[0]",
        "found 'big01', expected a list", id="exclude-ranks-no-list"),
    pytest.param("exclude_ranks: {0: [big01, big02/x]}", ".exclude_ranks[0][1]",
        "found 'big02/x', expected a host such as `node01` or a GPU such as `node01/3`", id="exclude-ranks-seat"),
    # layers
    pytest.param("pin_layers: {7: 0}", ".pin_layers[7]",
        "names layer 7, but small-moe has the layers 0 to 6", id="layer-beyond"),
    pytest.param("pin_layers: {0: -1}", ".pin_layers[0]",
        "found -1, expected a number of at least 0", id="stage-negative"),
    pytest.param("pin_layers: {0: '1'}", ".pin_layers[0]", "found '1', expected a whole number", id="stage-text"),
    pytest.param("pin_layers: {0: 1e400}", ".pin_layers[0]", "found inf, expected a finite number", id="stage-infinite"),
    pytest.param(f"pin_layers: {{0: {'9' * 300}}}", ".pin_layers[0]",
        "found a number of more than 40 digits, expected a number of at most 999999999", id="stage-huge"),
    pytest.param("exclude_layers: {9: [0]}", ".exclude_layers[9]",
        "names layer 9, but small-moe has the layers 0 to 6", id="exclude-layer-beyond"),
    pytest.param("exclude_layers: {0: 1}", ".exclude_layers[0]", "found 1, expected a list", id="exclude-layers-no-list"),
    pytest.param("exclude_layers: {0: [true]}", ".exclude_layers[0][0]",
        "found true, expected a whole number", id="exclude-layers-true"),
    # experts
    pytest.param("pin_experts: [{experts: [8], ep: [0]}]", ".pin_experts[0]",
        "names expert 8, but small-moe has the experts 0 to 7", id="expert-beyond"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: 1-3}]", ".pin_experts[0]",
        "names layer 1, which is no MoE layer of small-moe", id="experts-of-a-dense-layer"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: 99}]", ".pin_experts[0]",
        "names layer 99, which is no MoE layer of small-moe", id="experts-of-no-layer"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: 3..4}]", ".pin_experts[0].layers",
        "found '3..4', expected layer numbers such as `0-2`, `3,7,11` or `0-46:2`", id="layers-nonsense"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: -3}]", ".pin_experts[0].layers",
        "found '-3', expected layer numbers such as", id="layers-negative"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: 0-999999999}]", ".pin_experts[0].layers",
        "found '0-999999999', expected layer numbers such as", id="layers-vast"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layers: [3]}]", ".pin_experts[0].layers",
        "found [3], expected text", id="layers-a-list"),
    pytest.param("pin_experts: [{experts: [2, 1, 2], ep: [0]}]", ".pin_experts[0].experts",
        "found 2 twice, expected each number once", id="expert-twice"),
    pytest.param("pin_experts: [{experts: [0], ep: [3, 3]}]", ".pin_experts[0].ep",
        "found 3 twice, expected each number once", id="ep-twice"),
    pytest.param("pin_experts: [{experts: [], ep: [0]}]", ".pin_experts[0].experts",
        "found an empty list, expected at least 1 of them", id="no-experts"),
    pytest.param("pin_experts: [{experts: [0]}]", ".pin_experts[0]", "the key `ep` is missing", id="no-ep"),
    pytest.param("pin_experts: [{experts: [0], ep: [0], layer: 3}]", ".pin_experts[0].layer",
        "unknown key `layer`, did you mean `layers`?", id="key-of-a-pin"),
    pytest.param("pin_experts: {experts: [0], ep: [0]}", ".pin_experts", "expected a list", id="pins-no-list"),
    pytest.param(f"pin_experts: [{{experts: [{'9' * 300}], ep: [0]}}]", ".pin_experts[0].experts[0]",
        "found a number of more than 40 digits, expected a number of at most 999999999", id="expert-huge"),
    pytest.param("exclude_experts: [{experts: [0], ep: [-1]}]", ".exclude_experts[0].ep[0]",
        "found -1, expected a number of at least 0", id="ep-negative"),
    pytest.param("exclude_experts: [{experts: [0], ep: [0]}, {experts: [9], ep: [0]}]", ".exclude_experts[1]",
        "names expert 9, but small-moe has the experts 0 to 7", id="exclude-expert-beyond"),
    # levels, numbers, words
    pytest.param("replicas_across: rak", ".replicas_across",
        "names the level `rak`; the cluster has nvlink, rack, cluster, did you mean `rack`?", id="level"),
    pytest.param("max_slots: 0", ".max_slots", "found 0, expected a number of at least 1", id="slots-zero"),
    pytest.param("max_slots: 2.5", ".max_slots", "found 2.5, expected a whole number", id="slots-half"),
    pytest.param("max_imbalance: 0.9", ".max_imbalance",
        "found 0.9, expected a number of at least 1", id="imbalance-below-1"),
    pytest.param("max_imbalance: .nan", ".max_imbalance",
        "found nan, expected a number of at least 1", id="imbalance-nan"),
    pytest.param("max_imbalance: 1e400", ".max_imbalance",
        "found inf, expected a number of at most 1000000", id="imbalance-infinite"),
    pytest.param("max_imbalance: true", ".max_imbalance", "found true, expected a number such as `1.2`", id="imbalance-true"),
    pytest.param("max_imbalance: '1.2'", ".max_imbalance",
        "found '1.2', expected a number such as `1.2`", id="imbalance-text"),
    pytest.param("divide_evenly: [layers, vocab]", ".divide_evenly[1]",
        "found 'vocab', expected `layers`, `vocabulary` or `batch`", id="divide-word"),
    pytest.param("divide_evenly: [batch, layers, batch]", ".divide_evenly",
        "`divide_evenly` names one thing twice", id="divide-twice"),
    pytest.param("divide_evenly: batch", ".divide_evenly", "found 'batch', expected a list", id="divide-no-list"),
    pytest.param("launcher: torchrnu", ".launcher",
        "`kubernetes` or `nccl`, did you mean `torchrun`?", id="launcher"),
    # time and throughput
    pytest.param("max_ttft: 200", ".max_ttft",
        "found the bare number 200, expected a time with its unit, such as `3 us`", id="ttft-bare"),
    pytest.param("max_tpot: -3 ms", ".max_tpot",
        "found '-3 ms', expected a time that is finite and not negative", id="tpot-negative"),
    pytest.param("max_tpot: 1e400 s", ".max_tpot",
        "found '1e400 s', expected a time that is finite and not negative", id="tpot-infinite"),
    pytest.param("min_throughput: {decoed: 20 ktokens/s}", ".min_throughput.decoed",
        "names the scenario `decoed`, which the workload has not, did you mean `decode`?", id="throughput-scenario"),
    pytest.param("min_throughput: {decode: 20000}", ".min_throughput.decode",
        "found the bare number 20000, expected a throughput with its unit, such as `20000 tokens/s`", id="rate-bare"),
    pytest.param("min_throughput: {decode: 20 kTokens/s}", ".min_throughput.decode",
        "with the unknown unit `kTokens/s`, did you mean `ktokens/s`?", id="rate-unit"),
    pytest.param("min_throughput: {decode: 0 tokens/s}", ".min_throughput",
        "found a throughput of 0 for `decode`, expected one above 0", id="rate-zero"),
    pytest.param("min_throughput: {decode: 1e308 Mtokens/s}", ".min_throughput.decode",
        "expected a throughput that is finite and not negative", id="rate-infinite"),
    # moves
    pytest.param("max_moves: {since: gone.json, ranks: 2}", ".max_moves.since",
        "names `gone.json`, but there is no file", id="since-missing"),
    pytest.param("max_moves: {since: problem.yaml, ranks: 2}", ".max_moves.since",
        "names `problem.yaml`, which is no placement: it lists no `ranks`", id="since-the-problem"),
    pytest.param("max_moves: {since: ., ranks: 2}", ".max_moves.since", "is not a file", id="since-a-folder"),
    pytest.param('max_moves: {since: "", ranks: 2}', ".max_moves.since",
        "found '', expected text of at least 1 characters", id="since-empty"),
    pytest.param("max_moves: {ranks: 2}", ".max_moves", "the key `since` is missing", id="no-since"),
    pytest.param("max_moves: {since: loads.csv}", ".max_moves", "the key `ranks` is missing", id="no-ranks"),
    pytest.param("max_moves: {since: x, ranks: -1}", ".max_moves.ranks",
        "found -1, expected a number of at least 0", id="moves-negative"),
    pytest.param("max_moves: 3", ".max_moves", "found 3, expected a mapping with keys such as ranks, since", id="moves-bare"),
    # unknown kinds
    pytest.param("pin_rank: {0: big01}", ".pin_rank", "unknown key `pin_rank`, did you mean `pin_ranks`?", id="kind"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "key", "message"), ERRORS)
def test_a_mistake_is_told_with_its_place(
    line: str, key: str, message: str, stated: Callable[[str], Path]
) -> None:
    """File, key path, the line it stands on, and the sentence."""
    path = stated(line)
    error = refused(path)
    assert message in error.message
    assert (error.file, error.key) == (str(path), f"requirements{key}")
    assert error.line == next(
        number for number, text in enumerate(path.read_text().splitlines(), start=1) if text == f"  {line}"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hosts: 1, bandwidth: 450 GB/s, no_network: [1]", "unknown key `no_network`"),
        (
            "reserved: [1], no_network: [9]",
            "`no_network` names GPU 9, but these hosts have the GPUs [0, 1, 2, 3, 4, 5]",
        ),
        ("reserved: [1], no_network: [-1]", "`no_network` names GPU -1, but these hosts"),
        ("reserved: [1], no_network: 1", "found 1, expected a list"),
        ("reserved: [1], no_network: [true]", "found true, expected a whole number"),
    ],
)
def test_gpus_without_a_network_are_of_their_hosts(line: str, message: str, small_files: Files) -> None:
    """The hosts of a cluster file say which of their GPUs have none."""
    old = "hosts: 1, bandwidth: 450 GB/s" if line.startswith("hosts") else "reserved: [1]"
    path = small_files((old, line))
    error = refused(path)
    assert message in error.message
    assert Path(error.file or "").name == "cluster.yaml"


def test_experts_of_a_dense_model_cannot_be_pinned(stated: Callable[..., Path]) -> None:
    """There are none, and the sentence says so."""
    dense = (
        ("moe: {experts: 8, top_k: 2, width: 2048}", "mlp: {width: 2048}"),
        ("EP4_TP2_DP4_PP2", "TP2"),
        ("  redundant_experts: 4\n", ""),
    )
    error = refused(stated("pin_experts: [{experts: [0], ep: [0]}]", *dense))
    assert error.message == "names expert 0, but small-moe has no experts"


# The same requirements in the three languages

EVERYTHING = """\
max_memory: {h100-80g: 70 GiB}
  pin_gpus: {big01: [0, 2]}
  pin_ranks: {0: big01/0, 12: big02}
  exclude_ranks: {3: [small01, big01/2], 0: []}
  pin_layers: {0: 0, 6: 1}
  exclude_layers: {3: [1, 1]}
  pin_experts: [{experts: [0, 7], ep: [1], layers: "2,4"}]
  exclude_experts: [{experts: [3], ep: [0, 2], layers: 6}, {experts: [4], ep: [3]}]
  replicas_across: nvlink
  max_slots: 4
  max_imbalance: 1.5
  divide_evenly: [layers, batch]
  max_ttft: 200 ms
  max_tpot: 20 ms
  min_throughput: {decode: 2 ktokens/s, prefill: 60 tokens/min}
  launcher: torchrun"""

EVERYTHING_TOML = """
[requirements]
redundant_experts = 4
tp_within = "nvlink"
exclude = {small02 = [3]}
max_memory = {h100-80g = "70 GiB"}
pin_gpus = {big01 = [0, 2]}
pin_ranks = {0 = "big01/0", 12 = "big02"}
exclude_ranks = {"3" = ["small01", "big01/2"], 0 = []}
pin_layers = {0 = 0, 6 = 1}
exclude_layers = {3 = [1, 1]}
pin_experts = [{experts = [0, 7], ep = [1], layers = "2,4"}]
exclude_experts = [{experts = [3], ep = [0, 2], layers = 6}, {experts = [4], ep = [3]}]
replicas_across = "nvlink"
max_slots = 4
max_imbalance = 1.5
divide_evenly = ["layers", "batch"]
max_ttft = "200 ms"
max_tpot = "20 ms"
min_throughput = {decode = "2 ktokens/s", prefill = "60 tokens/min"}
launcher = "torchrun"
"""

PROBLEM_TOML = """\
kind = "problem"
name = "small"
cluster = "cluster.yaml"
model = "model.yaml"
strategy = "EP4_TP2_DP4_PP2"
[[workload.scenarios]]
name = "prefill"
phase = "prefill"
batch = 16
length = 512
[[workload.scenarios]]
name = "decode"
phase = "decode"
batch = 64
length = 512
"""


def as_json(path: Path) -> Path:
    """Write a problem file as JSON beside it."""
    from placer.spec.reading import read_document

    target = path.with_suffix(".json")
    target.write_text(json.dumps(read_document(path).data))
    return target


def test_numbers_are_keys_in_every_language(stated: Callable[[str], Path]) -> None:
    """YAML has whole numbers as keys, JSON and TOML have text: the same requirements, as numbers."""
    path = stated(EVERYTHING)
    in_toml = path.with_suffix(".toml")
    in_toml.write_text(PROBLEM_TOML + EVERYTHING_TOML)
    problems = [load_problem(item) for item in (path, as_json(path), in_toml)]
    first = problems[0].requirements
    assert [problem.requirements == first for problem in problems] == [True] * 3
    assert first.pin_ranks == {0: "big01/0", 12: "big02"}
    assert first.exclude_layers == {3: [1, 1]}
    assert first.exclude_experts[0].layer_numbers == [6]
    assert first.exclude_experts[1].layer_numbers is None
    assert first.pin_experts[0].layer_numbers == [2, 4]
    assert first.min_throughput == {"decode": 2000.0, "prefill": 1.0}
    assert problems[2].scenarios[1].tokens / problems[2].step_limits[1] == pytest.approx(64 / 20e-3)


@pytest.mark.parametrize(
    ("kind", "value", "key", "message"),
    [
        ("pin_ranks", {"0": "big3"}, "pin_ranks.0", "names the host `big3`, which the cluster has not"),
        ("pin_ranks", {"01": "big01"}, "pin_ranks.01", "found the key '01', expected a whole number"),
        ("pin_ranks", {"-0": "big01"}, "pin_ranks.-0", "found the key '-0', expected a whole number"),
        ("pin_ranks", {"": "big01"}, "pin_ranks.", "found the key '', expected a whole number"),
        ("pin_ranks", {"9" * 500: "big01"}, f"pin_ranks.{'9' * 77}...", "found the key '9999"),
        ("pin_ranks", {"1\x1b[31m": "big01"}, "pin_ranks.1\\x1b[31m", "found the key '1\\x1b[31m'"),
        ("pin_layers", {"7": 0}, "pin_layers.7", "names layer 7, but small-moe has the layers 0 to 6"),
        ("exclude_layers", {"0": [10**400]}, "exclude_layers.0[0]", "found a number of more than 40 digits"),
        ("exclude_ranks", {"2": ["big01", "nope"]}, "exclude_ranks.2", "names the host `nope`"),
        ("pin_gpus", {"big01": [10**4000]}, "pin_gpus.big01", "names a GPU of more than 9 digits of `big01`"),
        ("max_imbalance", 10**400, "max_imbalance", "found a number of more than 9 digits, expected a number such as `1.2`"),
        ("max_moves", {"since": "a\x00b", "ranks": 0}, "max_moves.since", "found 'a\\x00b', expected a path"),
        ("max_moves", {"since": "a" * 5000, "ranks": 0}, "max_moves.since", "expected text of at most 4096 characters"),
    ],
)  # fmt: skip
def test_a_mistake_in_json_has_its_key(
    kind: str, value: Any, key: str, message: str, small_files: Files
) -> None:
    """JSON keeps no lines; the key path is as it stands in the file."""
    path = as_json(small_files())
    data = json.loads(path.read_text())
    data["requirements"][kind] = value
    path.write_text(json.dumps(data))
    error = refused(path)
    assert message in error.message
    assert (error.file, error.key) == (str(path), f"requirements.{key}")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_number_is_refused(word: str, small_files: Files) -> None:
    """Before anything is compared with it."""
    path = as_json(small_files())
    path.write_text(path.read_text().replace('"redundant_experts": 4', f'"max_imbalance": {word}'))
    assert refused(path).message == f"holds `{word}`, which is not a JSON number"


def test_a_key_that_stands_twice_is_refused(stated: Callable[[str], Path]) -> None:
    """The same number twice, also in another form of it."""
    assert "repeats the key `1`" in refused(stated("pin_ranks: {1: big01, 1: big02}")).message
    assert "repeats the key `1`" in refused(stated("pin_ranks: {1: big01, 0x1: big02}")).message


def test_long_lists_and_repeats_that_do_no_harm_are_read(small_files: Files) -> None:
    """Naming a GPU or a stage over and over says no more than once."""
    path = as_json(small_files())
    data = json.loads(path.read_text())
    data["requirements"] |= {
        "pin_gpus": {"big01": [0] * 100_000},
        "exclude_ranks": {str(rank): ["big01/0"] for rank in range(5_000)},
        "exclude_layers": {"0": [5] * 100_000},
        "exclude_experts": [{"experts": [0], "ep": list(range(100_000))}],
    }
    path.write_text(json.dumps(data))
    problem = load_problem(path)
    assert problem.pinned.sum() == 1
    assert len(problem.requirements.exclude_ranks) == 5_000


# Levels, limits and masks that follow


def test_seats_are_hosts_and_gpus() -> None:
    """A seat is a host, or a host and an index."""
    assert split_seat("node01") == ("node01", None)
    assert split_seat("gpu-3.example.org/12") == ("gpu-3.example.org", 12)
    for text in (
        "",
        "/",
        "/3",
        "a/",
        "a/b",
        "a/3 ",
        "a /3",
        "a/00",
        "a/12345",
        "a/3/",
        "a\n",
        "a/3\n",
        "x" * 300,
    ):
        with pytest.raises(ValueError, match="expected a host"):
            split_seat(text)


def test_limits_that_meet_on_one_step(stated: Callable[[str], Path]) -> None:
    """Every limit of a scenario with its key path; the shortest is the one that a search has to keep."""
    path = stated(
        "max_tpot: 20 ms\n  max_step: {decode: 30 ms, prefill: 1 s}\n  min_throughput: {decode: 6400 tokens/s}"
    )
    problem = load_problem(path)
    prefill, decode = problem.scenarios
    assert dict(problem.limits_of(prefill)) == {"max_step.prefill": 1.0}
    assert dict(problem.limits_of(decode)) == pytest.approx(
        {"max_step.decode": 0.03, "max_tpot": 0.02, "min_throughput.decode": 64 / 6400}
    )
    assert problem.step_limits == pytest.approx((1.0, 0.01))


def test_memory_by_type_only_ever_lowers_the_limit(stated: Callable[[str], Path]) -> None:
    """GPUs of the type have the smaller limit, others theirs."""
    problem = load_problem(stated("max_memory: {h100-80g: 1 GiB, spare: 64 GiB}"))
    big = problem.cluster.number["big01", 0]
    spare = problem.cluster.number["small01", 0]
    assert problem.memory_limit[big] == 2**30
    assert problem.memory_limit[spare] == int(64 * 2**30 * 0.9)


def test_pins_become_masks(stated: Callable[[str], Path]) -> None:
    """GPUs that must be used, and GPUs that a rank may be on."""
    problem = load_problem(
        stated(
            "pin_gpus: {big02: [0]}\n  pin_ranks: {3: small01}\n  exclude_ranks: {3: [small01/0], 5: [big01]}"
        )
    )

    def names(mask: Any) -> list[str]:
        return [problem.cluster.label(gpu) for gpu in np.flatnonzero(mask).tolist()]

    assert names(problem.pinned) == ["big02/0"]
    assert names(problem.rank_masks[3]) == ["small01/2", "small01/4", "small01/6", "small01/7"]
    assert problem.rank_masks[5].sum() == problem.cluster.gpus - 6
    assert sorted(problem.rank_masks) == [3, 5]


def test_islands_are_where_all_reach_one_another(small_files: Files) -> None:
    """Those with a network together, and the host of one without by itself; excluded GPUs are in neither."""
    problem = load_problem(small_files(("uuids: [GPU-b0", "no_network: [3, 4]\n    uuids: [GPU-b0")))
    everyone, lonely = problem.islands
    labels = [problem.cluster.label(gpu) for gpu in np.flatnonzero(lonely).tolist()]
    assert labels == ["small02/1", "small02/2", "small02/4", "small02/5"]
    assert not everyone[problem.cluster.number["small02", 4]]
    assert everyone.sum() == problem.allowed.sum() - 1
    assert len(load_problem(small_files()).islands) == 1


# An earlier placement


@pytest.fixture
def since(small_files: Files, small_solved: Solved) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Write the problem with `max_moves` and the earlier placement changed; return the problem's path."""

    def write(change: Callable[[dict[str, Any]], None]) -> Path:
        path = small_files((LAST, f"{LAST}  max_moves: {{since: old.json, ranks: 2}}\n"))
        save_placement(small_solved.placement, path.parent / "old.json")
        data = json.loads((path.parent / "old.json").read_text())
        change(data)
        (path.parent / "old.json").write_text(json.dumps(data))
        return path

    return write


def test_an_earlier_placement_is_an_input(since: Callable[..., Path], small_solved: Solved) -> None:
    """GPU numbers by rank, whatever the order of the lines, with a digest; GPUs that are gone are -1."""

    def change(data: dict[str, Any]) -> None:
        data["ranks"][4]["host"] = "gone"
        data["ranks"][5]["gpu"] = 999
        data["ranks"].reverse()

    before: Problem = load_problem(since(lambda data: None))
    after: Problem = load_problem(since(change))
    assert before.since is not None
    assert after.since is not None
    expected = [before.cluster.number[record.host, record.gpu] for record in small_solved.placement.ranks]
    assert before.since.tolist() == expected
    assert after.since.tolist() == [*expected[:4], -1, -1, *expected[6:]]
    assert before.digests["placement before"] != after.digests["placement before"]
    assert load_problem(small_solved.path).since is None


BROKEN_PLACEMENTS: list[Any] = [
    pytest.param(lambda data: data.pop("ranks"), None, "which is no placement: it lists no `ranks`", id="no-ranks"),
    pytest.param(lambda data: data.update(ranks=[]), None, "it lists no `ranks`", id="empty"),
    pytest.param(lambda data: data.update(ranks={"0": 1}), None, "it lists no `ranks`", id="no-list"),
    pytest.param(lambda data: data["ranks"].insert(2, None), "ranks[2]",
        "is no rank of a placement, expected a mapping with `rank`, `host` and `gpu`", id="null"),
    pytest.param(lambda data: data["ranks"].insert(2, {}), "ranks[2]", "the key `rank` is missing", id="no-keys"),
    pytest.param(lambda data: data["ranks"][3].pop("gpu"), "ranks[3]", "the key `gpu` is missing", id="no-gpu"),
    pytest.param(lambda data: data["ranks"][3].update(gpu=-1), "ranks[3].gpu",
        "found -1, expected a number of at least 0", id="gpu-negative"),
    pytest.param(lambda data: data["ranks"][3].update(gpu=True), "ranks[3].gpu",
        "found true, expected a whole number", id="gpu-true"),
    pytest.param(lambda data: data["ranks"][3].update(gpu="0"), "ranks[3].gpu",
        "found '0', expected a whole number", id="gpu-text"),
    pytest.param(lambda data: data["ranks"][3].update(rank=10**300), "ranks[3].rank",
        "found a number of more than 40 digits, expected a number of at most 999999999", id="rank-huge"),
    pytest.param(lambda data: data["ranks"][3].update(rank=1.5), "ranks[3].rank",
        "found 1.5, expected a whole number", id="rank-half"),
    pytest.param(lambda data: data["ranks"][3].update(host="a b\x1b[0m"), "ranks[3].host",
        "found 'a b\\x1b[0m', expected a host name", id="host"),
    pytest.param(lambda data: data["ranks"][3].update(rank=2), "ranks[3]", "states rank 2 a second time", id="twice"),
    pytest.param(lambda data: data["ranks"][3].update(rank=16), "ranks[3]",
        "states rank 16, but there are 16 ranks, numbered from 0", id="beyond"),
    pytest.param(lambda data: data["ranks"].pop(3), "ranks[14]",
        "states rank 15, but there are 15 ranks, numbered from 0", id="missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "key", "message"), BROKEN_PLACEMENTS)
def test_what_is_no_placement_is_no_earlier_one(
    change: Callable[[dict[str, Any]], None], key: str | None, message: str, since: Callable[..., Path]
) -> None:
    """Told with its place in that file, or in the problem where the file as a whole is none."""
    path = since(change)
    error = refused(path)
    assert message in error.message
    if key is None:
        assert (error.file, error.key) == (str(path), "requirements.max_moves.since")
        assert error.line == len(PROBLEM.splitlines()) + 1
    else:
        assert (error.file, error.key) == (str(path.parent / "old.json"), key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1, 2]", "it lists no `ranks`"),
        (b"null", "it lists no `ranks`"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"ranks": [' + b"[" * 60 + b"]" * 60 + b"]}", "nests deeper than 40 levels"),
        (b'{"ranks": [{"rank": 0, "host": "big01", "gpu": 1e400}]}', "found inf, expected a whole number"),
        (b'{"ranks": [{"rank": NaN}]}', "holds `NaN`, which is not a JSON number"),
        (b'{"ranks": [], "ranks": [{}]}', "repeats the key `ranks`"),
        (b'{"ranks": [' + b"9" * 5000 + b"]}", "holds a number of more than 4300 digits"),
    ],
)
def test_bytes_that_are_no_placement(content: bytes, message: str, since: Callable[..., Path]) -> None:
    """Whatever `since` names, the answer is a sentence."""
    path = since(lambda data: None)
    (path.parent / "old.json").write_bytes(content)
    assert message in refused(path).message


def test_a_file_of_another_ending_is_refused(stated: Callable[[str], Path]) -> None:
    """A rank table is no placement."""
    error = refused(stated("max_moves: {since: loads.csv, ranks: 1}"))
    assert error.message == "found the ending `.csv`, expected `.yaml`, `.toml` or `.json`"


@pytest.mark.slow
def test_a_million_ranks_are_read(since: Callable[..., Path]) -> None:
    """A large earlier placement is read in full, and a fault at its end is found."""

    def change(data: dict[str, Any]) -> None:
        data["ranks"] = [{"rank": rank, "host": "big01", "gpu": rank % 9} for rank in range(10**6)]

    problem = load_problem(path := since(change))
    assert problem.since is not None
    assert problem.since.shape == (10**6,)
    assert problem.since[:9].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    text = (path.parent / "old.json").read_text()
    (path.parent / "old.json").write_text(text.replace('"rank": 999999,', '"rank": 999998,'))
    assert refused(path).message == "states rank 999998 a second time"


def test_more_ranks_than_a_file_may_name_are_refused(small_files: Files) -> None:
    """A mask over all GPUs is kept for each named rank, so their number has an end."""
    path = as_json(small_files())
    data = json.loads(path.read_text())
    data["requirements"]["pin_ranks"] = {str(rank): "big01" for rank in range(5_001)}
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="at most 5000 of them"):
        load_problem(path)
