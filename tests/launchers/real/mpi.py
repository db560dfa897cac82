"""What the tests of the MPI launchers share: emitting for simulated hosts, running there, and spoiling what was emitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.by_hand import make
from tests.launchers.real.hosts import Hosts
from tests.launchers.real.jobs import check_seen, cluster, placement, seen, show_program

#: Ranks 1 and 2 on `node0`, ranks 0 and 3 on `node1`.
SMALL = make([("node1", 1), ("node0", 0), ("node0", 1), ("node1", 0)])


@dataclass(frozen=True)
class Mpi:
    """One MPI launcher of one version. `words` are options it is given, where AGENT stands for the hosts' ssh."""

    name: str
    program: Path
    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def emit(self, hosts: Hosts, folder: Path, placed: Placement, options: Options | None = None) -> Emitted:
        """Write the files for a placement, and the program that tells where it is beside them."""
        paths = emit(placed, self.name, folder, options=options or Options(cluster=cluster()))
        return Emitted(self, hosts, folder, show_program(folder), {path.name: path for path in paths})


@dataclass(frozen=True)
class Emitted:
    """What was emitted for a launcher."""

    mpi: Mpi
    hosts: Hosts
    folder: Path
    show: Path
    files: Mapping[str, Path]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the script."""
        own = {
            name: value.replace("AGENT", str(self.hosts.agent))
            for name, value in self.mpi.environment.items()
        }
        return {"MPIRUN": str(self.mpi.program), **own}

    def run(
        self,
        *first: str,
        host: str = "node0",
        env: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run the emitted script on a host, from another folder, with more options for the launcher."""
        given = [word.replace("AGENT", str(self.hosts.agent)) for word in (*self.mpi.words, *options)]
        marked = ["--mpirun", *given, "--"] if given else []
        command = [self.files[f"{self.mpi.name}-run.sh"], *first, *marked, self.show]
        return self.hosts.run(host, command, {**self.environment, **(env or {})}, cwd=Path("/"))

    def command(self) -> list[str]:
        """Return what the script is about to run, as it shows it."""
        shown = self.run("--dry-run")
        assert shown.returncode == 0, shown.stderr
        return shlex.split(shown.stdout.splitlines()[-1])


def check_kind(mpi: Mpi, hosts: Hosts, folder: Path, kind: str) -> None:
    """Run a placement on 8 hosts of 8 GPUs, each host with an order of GPUs of its own, and compare rank by rank."""
    placed = placement(kind, seed=1)
    ran = mpi.emit(hosts, folder, placed).run()
    assert ran.returncode == 0, ran.stderr
    check_seen(seen(ran.stdout), placed)


def check_spoilt(mpi: Mpi, hosts: Hosts, folder: Path, name: str) -> None:
    """Exchange two lines in a file of `SMALL`: the script stops, and so do the ranks where it is gone round."""
    emitted = mpi.emit(hosts, folder, SMALL)
    command = emitted.command()
    swap_lines(emitted.files[name])
    ran = emitted.run()
    assert (ran.returncode, ran.stdout) == (66, "")
    assert f"{name} is not the file made with this script" in ran.stderr
    unchecked = hosts.run("node0", command, emitted.environment, cwd=Path("/"))
    assert unchecked.returncode != 0
    if name == "ranks.tsv":
        assert "it was changed" in unchecked.stderr
        assert "SEEN" not in unchecked.stdout
        return
    refused = {int(rank) for rank in re.findall(r"bind.sh: refused: rank (\d) belongs", unchecked.stderr)}
    assert refused, unchecked.stderr
    assert not refused & set(seen(unchecked.stdout))
    # Those that did start, before the launcher ended the others, were where they belong.
    for rank, told in seen(unchecked.stdout).items():
        assert told.host == SMALL.ranks[rank].host


def check_exchanged(mpi: Mpi, hosts: Hosts, folder: Path, name: str) -> None:
    """Put a file of another placement beside the script: it stops."""
    other = make([("node0", 1), ("node1", 0), ("node1", 1), ("node0", 0)])
    emitted = mpi.emit(hosts, folder / "one", SMALL)
    mpi.emit(hosts, folder / "other", other).files[name].replace(emitted.files[name])
    ran = emitted.run()
    assert (ran.returncode, ran.stdout) == (66, "")
    assert f"{name} is not the file made with this script" in ran.stderr


def check_left_over(mpi: Mpi, hosts: Hosts, folder: Path) -> None:
    """Run with variables of another launcher left over, from a host without ranks and from one of the placement's.

    They are not believed.
    """
    left = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
    emitted = mpi.emit(hosts, folder, SMALL)
    for host in ("node7", "node0"):
        ran = emitted.run(host=host, env=left)
        assert ran.returncode == 0, ran.stderr
        check_seen(seen(ran.stdout), SMALL)


def check_unbound(mpi: Mpi, hosts: Hosts, folder: Path, settings: Mapping[str, str]) -> None:
    """Run ranks whose CPUs are not known: they keep all, whatever settings of a user ask the launcher for."""
    ran = mpi.emit(hosts, folder, SMALL, Options()).run(env=settings)
    assert ran.returncode == 0, ran.stderr
    told = seen(ran.stdout)
    assert [told[rank].host for rank in range(4)] == [record.host for record in SMALL.ranks]
    command = ["taskset", "-cp", str(os.getpid())]
    all_cpus = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert {one.cpus for one in told.values()} == {all_cpus}


def check_clash(mpi: Mpi, hosts: Hosts, folder: Path) -> None:
    """Run on two hosts whose names differ in the domain alone, from one of them."""
    placed = make([("twin.east", 0), ("twin.west", 0), ("twin.west", 1), ("twin.east", 1)])
    ran = mpi.emit(hosts, folder, placed, Options()).run(host="twin.east")
    assert ran.returncode == 0, ran.stderr
    told = seen(ran.stdout)
    assert [told[rank].host for rank in range(4)] == [record.host for record in placed.ranks]


def check_wrong_program(mpi: Mpi, hosts: Hosts, folder: Path, title: str) -> None:
    """Run with a launcher of another family, as happens where several are installed: it is told from the right one."""
    ran = mpi.emit(hosts, folder, SMALL).run()
    assert (ran.returncode, ran.stdout) == (69, "")
    assert f"{mpi.program} is not {title}, it says: " in ran.stderr
    assert "MPIRUN names the program" in ran.stderr


def swap_lines(path: Path) -> None:
    """Exchange two lines: the first two after the head that differ in more than their numbers."""
    lines = path.read_text().splitlines(keepends=True)
    first = 2 if path.name == "ranks.tsv" else 1
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    path.write_text("".join(lines))
