"""Slurm host files and Open MPI rank files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers.rank_maps import (
    RankMap,
    looks_like_machines,
    looks_like_openmpi,
    parse_machines,
    parse_openmpi,
    parse_slurm,
    read_rank_map,
)
from tests.importers.refusals import answer_or_refusal

hosts = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[0-9]{1,2})?(\.lan)?", fullmatch=True)


def ranks(found: RankMap) -> list[tuple[int, str]]:
    return [(row.rank, row.host) for row in found.rows]


def test_slurm_lines_commas_and_repetitions() -> None:
    """The r-th host of the file is of rank r, whichever way it is written, and knows its line."""
    found = parse_slurm("# two hosts\nnode02*2\n\nnode01, node03 # the rest\nnode02\n", "hosts")
    assert ranks(found) == [(0, "node02"), (1, "node02"), (2, "node01"), (3, "node03"), (4, "node02")]
    assert [row.line for row in found.rows] == [2, 2, 4, 4, 5]
    assert (found.kind, found.faults, found.notes) == ("slurm", (), ())


@given(st.lists(hosts, min_size=1, max_size=20))
def test_a_host_file_of_one_host_a_line_reads_back(names: list[str]) -> None:
    """One line for each rank gives that host to each rank."""
    found = parse_slurm("\n".join(names), "hosts")
    assert ranks(found) == list(enumerate(names))


@given(st.lists(hosts, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_rank_file_reads_back_in_any_order(names: list[str], random: object) -> None:
    """Lines of a rank file may stand in any order."""
    lines = [f"rank {rank}={host} slot={rank}" for rank, host in enumerate(names)]
    random.shuffle(lines)  # type: ignore[attr-defined]
    found = parse_openmpi("\n".join(lines), "ranks")
    assert ranks(found) == list(enumerate(names))
    assert found.faults == ()


def test_openmpi_forms_of_a_line() -> None:
    """Sockets, lists, blanks, a login name, comments and a missing slot are all read."""
    text = """\
    # a comment
    rank 0=node1 slot=0
    rank 1 = me@node0 slot = 1:0-3   // socket 1
    RANK 2=10.0.0.7 slot=10-12
    rank 3=node1 slot=0,1,4
    rank 4=node1 slot=0:0;1:2
    rank 5=node1 slot=p3
    rank 6=node1
    """
    found = parse_openmpi(text, "ranks")
    assert ranks(found) == [
        (0, "node1"), (1, "node0"), (2, "10.0.0.7"), (3, "node1"), (4, "node1"), (5, "node1"), (6, "node1"),
    ]  # fmt: skip
    assert [row.slot for row in found.rows] == ["0", "1:0-3", "10-12", "0,1,4", "0:0;1:2", "p3", None]
    assert all(row.gpu is None for row in found.rows)
    assert found.notes == ("rank 6 (line 8) has no `slot=`, which Open MPI 4 does not accept",)


def test_shared_slots_are_noted_once() -> None:
    """Two ranks on the same CPUs of a host are a note, not on different hosts."""
    apart = parse_openmpi("rank 0=a slot=0\nrank 1=b slot=0", "f")
    together = parse_openmpi("rank 0=a slot=0-3\nrank 1=a slot=0-3\nrank 2=a slot=0-3", "f")
    assert apart.notes == ()
    assert len(together.notes) == 1
    assert "ranks 0 and 1 share the CPUs `slot=0-3` of a" in together.notes[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rank 0=a slot=0\nrank 0=b slot=1", "names rank 0 twice, on the lines 1, 2"),
        ("rank 0=a slot=0\nrank 2=b slot=1", "does not name rank 1, but rank 2"),
        ("rank 7=a slot=0", "does not name rank 0, but rank 7"),
    ],
)
def test_a_map_with_holes_says_so(text: str, fault: str) -> None:
    """Missing and repeated ranks are faults of the map, which is still read."""
    assert parse_openmpi(text, "f").faults == (fault,)


@pytest.mark.parametrize(
    ("read", "text", "line", "says"),
    [
        (parse_slurm, "", None, "names no host"),
        (parse_slurm, "# nothing\n\n", None, "names no host"),
        (parse_slurm, "node01\n$(touch x)\n", 2, "expected a host name"),
        (parse_slurm, "`id`", 1, "expected a host name"),
        (parse_slurm, "n" * 300, 1, "expected a host name"),
        (parse_slurm, "a,,b", 1, "expected a host such as"),
        (parse_slurm, "a b", 1, "expected a host name"),
        (parse_slurm, "a*999999999", 1, "repeats a host 999999999 times"),
        (parse_slurm, "a*" + "9" * 5000, 1, "repeats a host"),
        (parse_slurm, "a*1000000\nb*1000000", 2, "more than 1,048,576 tasks"),
        (parse_slurm, "a*0", 1, "repeats a host 0 times"),
        (parse_slurm, "a*x", 1, "expected a host such as"),
        (parse_slurm, "node[01-04]", 1, "whether Slurm unfolds brackets"),
        (parse_slurm, "a\x1b[31m", 1, "found"),
        (parse_openmpi, "", None, "names no rank"),
        (parse_openmpi, "rank 0=+n1 slot=0", 1, "the relative host '+n1'"),
        (parse_openmpi, "rank 0=$(touch) slot=0", 1, "expected a host name"),
        (parse_openmpi, "rank 0=a slot=$(touch)", 1, "found the slots"),
        (parse_openmpi, "rank 0=a\nrank 1 b", 2, "expected `rank 0=node01 slot=0-3`"),
        (parse_openmpi, "rank 0=a slot=0 extra", 1, "expected `rank 0=node01 slot=0-3`"),
        (parse_openmpi, "rank 99999999999=a slot=0", 1, "expected one below"),
    ],
)
def test_what_a_launcher_does_not_read_is_refused(
    read: Callable[[str, str], RankMap], text: str, line: int | None, says: str
) -> None:
    """A refusal names the file and the line, and stays short and printable."""
    with pytest.raises(InputError) as caught:
        read(text, "map.txt")
    assert says in str(caught.value)
    assert (caught.value.file, caught.value.line) == ("map.txt", line)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@given(st.text(alphabet="rank 0=ab\n*,#+[]:-@slot.9$(", max_size=60))
@settings(max_examples=300)
def test_any_text_is_an_answer_or_a_refusal(text: str) -> None:
    """No text makes either reader fail in any other way than with a sentence."""
    for read in (parse_slurm, parse_openmpi):
        with answer_or_refusal():
            found = read(text, "f")
            assert len(found.rows) > 0


def test_content_tells_the_two_apart(tmp_path: Path) -> None:
    """A file whose first line begins with `rank N` is Open MPI's, any other Slurm's, unless told."""
    path = tmp_path / "map"
    path.write_text("# x\nrank 0=a slot=0\n")
    assert read_rank_map(path).kind == "openmpi"
    path.write_text("rank7\nrank0\n")
    assert read_rank_map(path).kind == "slurm"
    assert not looks_like_openmpi("rank7\n")
    with pytest.raises(InputError):
        read_rank_map(path, "openmpi")


@given(st.lists(st.tuples(hosts, st.integers(1, 5)), min_size=1, max_size=12))
def test_a_machine_file_reads_back(runs: list[tuple[str, int]]) -> None:
    """`host:count` is of the next ranks, hosts come again, a host alone is one rank."""
    text = "# head\n" + "\n".join(f"{host}:{count}" for host, count in runs) + "\nlast\n"
    found = parse_machines(text, "machines")
    assert [row.host for row in found.rows] == [host for host, count in runs for _ in range(count)] + ["last"]
    assert [row.rank for row in found.rows] == list(range(len(found.rows)))
    assert looks_like_machines(text)
    assert not looks_like_machines("node1*3\nnode2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node1:0", "names 0 ranks"),
        ("node1:99999999999999", "expected 1 to"),
        ("node1:1048576\nnode2", "names 1 ranks"),
        ("node1:2 ifhn=x", "expected `node01:4`"),
        ("$(x):2", "expected a host name"),
        ("# nothing", "names no host"),
    ],
)
def test_what_no_machine_file_says_is_refused(text: str, says: str) -> None:
    """With the line."""
    with pytest.raises(InputError) as caught:
        parse_machines(text, "machines")
    assert says in str(caught.value)
