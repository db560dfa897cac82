"""Every string of a cluster file and of a placement file, replaced by what would do harm in a script, a path or a terminal."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from placer import cli
from placer.errors import InputError
from placer.launchers.registry import LAUNCHERS
from placer.placement import dump_json, load_placement
from placer.spec.cluster import load_cluster
from placer.spec.reading import Document
from tests.conftest import Solved

HOSTILE = {
    "command": "$(touch x)",
    "statement": "a;b",
    "backquotes": "`touch x`",
    "path": "../x",
    "line": "node01\ntouch x",
    "length": "a" * 300,
    "escape": "a\x1b[31m",
    "quote": "a'b",
    "variable": "${HOME}",
    "nothing-printable": "a\u202eb",
}
#: Text for people, shown and kept, and in no emitted file. A sentence may hold these.
PROSE = ("source", "notes", "note")
FINE_IN_PROSE = ("statement", "backquotes", "path", "length", "quote")
#: Numbers with units, which are read and not kept: the length of the text does no harm there.
CLUSTER: dict[str, Any] = {
    "kind": "cluster",
    "name": "hostile",
    "source": "made up",
    "gpu_types": {
        "own": {
            "like": "h100-80g",
            "memory": "80 GiB",
            "memory_bandwidth": "3 TB/s",
            "peak": {"bf16": "900 TFLOP/s"},
            "constants": {"tp_all_reduce": {"latency_us": 1.0, "source": "made up"}},
        }
    },
    "hosts": [
        {
            "hosts": "node01",
            "gpu_type": "own",
            "gpus": 2,
            "uuids": ["GPU-1", "GPU-2"],
            "memory_taken": "1 GiB",
            "numa": [0, 1],
            "cpus": ["0-3", "4-7"],
            "nics": ["mlx5_0", "mlx5_1"],
        },
        {
            "hosts": "node[02-03]",
            "gpu_type": "h100-80g",
            "gpus": 1,
            "uuids": {"node02": ["GPU-3"], "node03": ["GPU-4"]},
        },
    ],
    "levels": [
        {
            "name": "rack",
            "bandwidth": "50 GB/s",
            "latency": "3 us",
            "domains": [
                {"name": "left", "hosts": "node[01-02]", "uplink": "1 GB/s"},
                {"name": "r", "gpus": {"node03": [0]}},
            ],
        },
        {"name": "all", "bandwidth": "20 GB/s", "latency": "9 us", "uplink": "90 GB/s"},
    ],
}

Path_ = tuple[str | int, ...]


def strings(data: Any, at: Path_ = ()) -> Iterator[tuple[Path_, bool]]:
    """Yield the place of every string: of a value, and, with True, of a key that is a name and not a field."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*at, key), True
            yield from strings(value, (*at, key))
    elif isinstance(data, list):
        for number, value in enumerate(data[:3]):
            yield from strings(value, (*at, number))
    elif isinstance(data, str):
        yield at, False


def replaced(data: Any, at: Path_, key: bool, text: str) -> Any:
    """Return the data with the string at a place replaced."""
    changed = copy.deepcopy(data)
    inner = changed
    for part in at[:-1]:
        inner = inner[part]
    if key:
        inner[text] = inner.pop(at[-1])
    else:
        inner[at[-1]] = text
    return changed


def harmless(at: Path_, key: bool, kind: str) -> bool:
    """Whether this place is text for people, in which that is a sentence like any other."""
    return not key and any(part in PROSE for part in at) and kind in FINE_IN_PROSE


def check_message(message: str) -> None:
    """One printable line that does not hold the whole of a long text."""
    assert message.isprintable()
    assert "a" * 100 not in message


def test_the_cluster_is_sound_as_it_is() -> None:
    """What is spoilt below is spoilt by the one string alone."""
    assert load_cluster(Document(CLUSTER, "cluster.yaml", "0" * 64)).gpus == 4


@pytest.mark.parametrize(("at", "key"), list(strings(CLUSTER)), ids=lambda value: str(value))
def test_hostile_string_in_a_cluster(at: Path_, key: bool) -> None:
    """Every string of a cluster file is refused with its place."""
    for kind, text in HOSTILE.items():
        data = replaced(CLUSTER, at, key, text)
        if harmless(at, key, kind):
            load_cluster(Document(data, "cluster.yaml", "0" * 64))
            continue
        with pytest.raises(InputError) as caught:
            load_cluster(Document(data, "cluster.yaml", "0" * 64))
        check_message(str(caught.value))
        if len(at) > 1:
            assert str(at[0]) in str(caught.value), (kind, str(caught.value))


@pytest.fixture(scope="module")
def placement_data(quickstart_solved: Solved) -> dict[str, Any]:
    """A placement of the solver, as its file has it, with a UUID and all kinds of text."""
    data: dict[str, Any] = json.loads(dump_json(quickstart_solved.placement.model_dump(mode="json")))
    data["ranks"][0] |= {"uuid": "GPU-1", "cpus": "0-3", "nic": "mlx5_0"}
    data["certificate"]["parts"][0]["note"] = "told"
    return data


def test_hostile_string_in_a_placement(placement_data: dict[str, Any], tmp_path: Path) -> None:
    """Every string of a placement file is refused with its place."""
    file = tmp_path / "placement.json"
    places = [
        (at, key)
        for at, key in strings(placement_data)
        if at[:1] != ("experts",) or key  # numbers alone
    ]
    assert len(places) > 80
    for at, key in places:
        for kind, text in HOSTILE.items():
            data = replaced(placement_data, at, key, text)
            file.write_text(json.dumps(data))
            if harmless(at, key, kind):
                load_placement(file)
                continue
            with pytest.raises(InputError) as caught:
                load_placement(file)
            check_message(str(caught.value))
            assert str(file) in str(caught.value)
            if len(at) > 1:
                assert str(at[0]) in str(caught.value), (kind, str(caught.value))


@pytest.mark.parametrize("kind", HOSTILE)
def test_emit_writes_and_runs_nothing(
    kind: str,
    placement_data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command refuses such a host with exit code 2, for every launcher, and leaves the folder as it was."""
    monkeypatch.chdir(tmp_path)
    data = replaced(placement_data, ("ranks", 1, "host"), False, HOSTILE[kind])
    Path("placement.json").write_text(json.dumps(data))
    for name in LAUNCHERS:
        assert cli.main(["emit", "placement.json", "--to", name, "-o", "out"]) == 2
        assert "ranks[1].host" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["placement.json"]
