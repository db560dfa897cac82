"""One script for each host: starting them all, and a program whose processes meet through torch.distributed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from placer.placement import Placement, RankRecord
from tests.launchers.real.hosts import Hosts
from tests.launchers.real.tools import FOLDER

#: What the processes of torch need on simulated hosts, and torchrun on the path.
TORCH = {
    "PATH": f"{FOLDER / 'python/bin'}:{os.environ['PATH']}",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
}

#: Groups of ranks by the columns of ranks.tsv that their members have in common.
GROUPS = {
    "tp": ("stage", "dp"),
    "dp": ("stage", "tp"),
    "pp": ("dp", "tp"),
    "ep": ("stage", "etp", "edp"),
    "edp": ("stage", "etp", "ep"),
}

MEET = """
import json, os, socket, sys
from datetime import timedelta
import torch
import torch.distributed as dist

table, groups = sys.argv[1], json.loads(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = dist.get_rank(), dist.get_world_size()
mine = [rank, socket.gethostname(), os.environ["CUDA_VISIBLE_DEVICES"], int(os.environ["LOCAL_RANK"])]
everyone = [None] * size
dist.all_gather_object(everyone, mine)
lines = [line.split("\\t") for line in open(table).read().splitlines()[1:]]
rows = [dict(zip(lines[0], line)) for line in lines[1:]]
for name, columns in groups.items():
    members = {}
    for row in rows:
        members.setdefault(tuple(row[column] for column in columns), []).append(int(row["rank"]))
    for ranks in members.values():
        group = dist.new_group(ranks)
        if rank in ranks:
            # Each member adds a bit of its own, so that the sum names the members.
            total = torch.tensor([2.0**rank], dtype=torch.float64)
            dist.all_reduce(total, group=group)
            sys.stdout.write(f"SUM {name} {rank} {int(total.item())}\\n")
sys.stdout.write(f"GATHERED {rank} {json.dumps(everyone)}\\n")
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
"""


def run_scripts(
    hosts: Hosts,
    scripts: Mapping[str, Path],
    words: Sequence[str | Path],
    env: Mapping[str, str],
    timeout: float = 90,
    until: str | None = None,
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run a script on each host and return how each ended, by host.

    With `until`, hosts that still run 3 s after that one has ended are killed: those whose launcher waits for it.
    """
    started = {host: hosts.start(host, [script, *words], env) for host, script in scripts.items()}
    try:
        if until is not None:
            started[until].wait(timeout)
            time.sleep(3)
            hosts.kill()
        done = {}
        deadline = time.monotonic() + timeout
        for host, process in started.items():
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            done[host] = subprocess.CompletedProcess([str(scripts[host])], process.returncode, out, err)
        return done
    finally:
        if any(process.poll() is None for process in started.values()):
            hosts.kill()
            for process in started.values():
                process.communicate()


def said(done: Mapping[str, subprocess.CompletedProcess[str]]) -> str:
    """All that was said on all hosts."""
    return "\n".join(f"{process.stdout}\n{process.stderr}" for process in done.values())


def swap_lines(path: Path, first: int, second: int) -> None:
    """Exchange two lines of a file, counted from 0, and keep its right to be run."""
    lines = path.read_text().splitlines(keepends=True)
    lines[first], lines[second] = lines[second], lines[first]
    path.write_text("".join(lines))


def meet_words(folder: Path, table: Path) -> list[str]:
    """Write the program whose processes meet, and return the words that start it."""
    program = folder / "meet.py"
    program.write_text(MEET)
    return ["python3", str(program), str(table), json.dumps(GROUPS)]


def check_meeting(text: str, expected: Placement, visibility: str = "host") -> None:
    """Compare what all processes learned of one another, and the members of each group, with the placement."""
    ranks = expected.ranks
    local: dict[str, list[RankRecord]] = defaultdict(list)
    for record in ranks:
        local[record.host].append(record)
    everyone = []
    for record in ranks:
        own = [record] if visibility == "one" else local[record.host]
        number = 0 if visibility == "one" else local[record.host].index(record)
        devices = ",".join(each.uuid or str(each.gpu) for each in own)
        everyone.append([record.rank, record.host, devices, number])
    gathered = {int(rank): json.loads(told) for rank, told in re.findall(r"GATHERED (\d+) (.*)", text)}
    assert gathered == {record.rank: everyone for record in ranks}
    sums = {(name, int(rank)): int(total) for name, rank, total in re.findall(r"SUM (\w+) (\d+) (\d+)", text)}
    for name, columns in GROUPS.items():
        for record in ranks:
            members = [
                other.rank
                for other in ranks
                if all(getattr(other, column) == getattr(record, column) for column in columns)
            ]
            assert sums[name, record.rank] == sum(2**member for member in members), (name, record.rank)
    assert len(sums) == len(GROUPS) * len(ranks)
