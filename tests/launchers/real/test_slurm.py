"""`--to slurm` under a real Slurm: 64 ranks on 8 nodes land where the placement has them, and nothing else is started."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.errors import InputError
from placer.importers.rank_maps import parse_slurm
from placer.importers.scontrol import lay_out, parse_scontrol, parse_task_layout
from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.spec.names import fold_hosts
from tests.launchers.by_hand import make
from tests.launchers.real import jobs
from tests.launchers.real.slurm import Slurm, simulated_slurm

#: As `jobs.placement` has them, and one with fewer GPUs.
NODES = {**dict.fromkeys(jobs.names(8), 8), "node8": 4}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A cluster of 8 nodes of 8 GPUs and one of 4."""
    with simulated_slurm(NODES) as cluster:
        yield cluster


def emitted(placement: Placement, folder: Path, visibility: str = "one") -> Path:
    """Write the files of a placement whose ranks tell where they are, and return the folder."""
    folder.mkdir(exist_ok=True)
    options = Options(
        command=(str(jobs.show_program(folder)),),
        cluster=jobs.cluster(),
        visibility=visibility,  # type: ignore[arg-type]
    )
    emit(placement, "slurm", folder / "out", options=options)
    return folder / "out"


@pytest.mark.parametrize(
    ("kind", "visibility"), [("blocked", "host"), ("interleaved", "one"), ("uneven", "one")]
)
def test_every_rank_is_where_it_is_placed(kind: str, visibility: str, slurm: Slurm, tmp_path: Path) -> None:
    """Hosts in any order, ranks on any of them, GPUs in any order: through sbatch, from a folder elsewhere."""
    placement = jobs.placement(kind, seed=1)
    out = emitted(placement, tmp_path, visibility)
    code, told, errors = slurm.submit([out / "slurm-job.sh"], cwd=Path("/"))
    assert code == 0, errors
    jobs.check_seen(jobs.seen(told), placement, visibility)


def test_inside_an_allocation_and_with_options_that_would_reshape_the_step(
    slurm: Slurm, tmp_path: Path
) -> None:
    """The script runs under salloc, on some of its hosts, and what else the job asked for leaves the ranks alone."""
    placement = jobs.placement("interleaved", seed=2, hosts=3)
    out = emitted(placement, tmp_path)
    wishes = ["--exclusive", "--nodelist=node[0-3]", "--nodes=4", "--ntasks-per-node=2", "--cpus-per-task=2"]
    wishes += ["--gpus-per-node=4", "--threads-per-core=1", "--gpu-bind=single:1"]
    done = slurm.run(["salloc", *wishes, "bash", out / "slurm-job.sh"], env={"RANK": "3", "WORLD_SIZE": "4"})
    assert done.returncode == 0, done.stderr
    jobs.check_seen(jobs.seen(done.stdout), placement)


def test_the_files_are_found_from_wherever_the_script_is_submitted(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm runs a copy: by its path, with arguments, from a pipe in its folder, and by a script around it."""
    placement = jobs.placement("blocked", seed=7, hosts=2)
    out = emitted(placement, tmp_path / "a folder")
    script = out / "slurm-job.sh"
    around = tmp_path / "around.sh"
    around.write_text(f"#!/bin/bash\nbash '{script}' x/slurm-job.sh\n")
    head = ["--nodes=2", "--exclusive", "--nodelist=node[0-1]"]
    for words, cwd, text in (
        ([script, "a b", "/x/slurm-job.sh"], tmp_path, ""),
        ([*head, around], tmp_path, ""),
        ([], out, script.read_text()),
    ):
        code, told, errors = slurm.submit(words, cwd=cwd, text=text)
        assert code == 0, errors
        jobs.check_seen(jobs.seen(told), placement)


def test_slurm_unfolds_what_was_folded(slurm: Slurm) -> None:
    """The list in the script's head, of hosts with zeros before their numbers and with two numbers, is theirs."""
    hosts = ["r2n1", "r1n2", "r1n1", "login", "a01", "a1", "a10", "b-3", "a9", *jobs.names(8)]
    unfolded = slurm.run(["scontrol", "show", "hostnames", fold_hosts(hosts)]).stdout
    assert sorted(unfolded.split()) == sorted(hosts)


def test_hosts_of_unlike_numbers_of_gpus_give_all_of_them(slurm: Slurm, tmp_path: Path) -> None:
    """A step sees every GPU of its hosts, 8 of one and 4 of another: what Slurm gave is read before the wrapper."""
    placement = make([("node8", 3), ("node2", 7), ("node8", 0), ("node2", 0)])
    emit(placement, "slurm", tmp_path / "out")
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/bash\necho print GIVEN $SLURM_PROCID $CUDA_VISIBLE_DEVICES\n")
    prolog.chmod(0o755)
    words = [f"--export=ALL,SLURM_TASK_PROLOG={prolog}", tmp_path / "out/slurm-job.sh", "true"]
    code, told, errors = slurm.submit(words)
    assert code == 0, errors
    given = dict(re.findall(r"GIVEN (\d+) (\S+)", told))
    assert given == {str(rank): "0,1,2,3" if rank % 2 == 0 else "0,1,2,3,4,5,6,7" for rank in range(4)}


def test_a_dry_run_says_what_it_would_do_and_starts_nothing(slurm: Slurm, tmp_path: Path) -> None:
    """Inside an allocation with the number of GPUs, outside one without."""
    out = emitted(jobs.placement("uneven", seed=3, hosts=3), tmp_path)
    inside = [
        "salloc",
        "--exclusive",
        "--nodelist=node[0-2]",
        "bash",
        out / "slurm-job.sh",
        "--dry-run",
        "a b",
    ]
    done = slurm.run(inside)
    assert (done.returncode, jobs.seen(done.stdout)) == (0, {})
    assert "# 20 ranks on node[0-2]\n" in done.stdout
    assert f"SLURM_HOSTFILE={out}/slurm-hosts\n" in done.stdout
    assert "srun --nodes=3 --ntasks=20 --distribution=arbitrary --cpu-bind=none --gpus=24" in done.stdout
    assert "bind.sh a\\ b" in done.stdout
    done = slurm.run(["bash", out / "slurm-job.sh", "--dry-run"])
    assert (done.returncode, "--gpus" in done.stdout) == (0, False)
    done = slurm.run(["bash", out / "slurm-job.sh"])
    assert done.returncode == 64
    assert "slurm-job.sh: not inside an allocation of Slurm" in done.stderr


def test_an_allocation_of_other_hosts_or_of_some_gpus_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """Neither would start the placement, so nothing is started."""
    out = emitted(jobs.placement("blocked", seed=4, hosts=2), tmp_path)
    done = slurm.run(["salloc", "--exclusive", "--nodelist=node[1-2]", "bash", out / "slurm-job.sh"])
    assert done.returncode == 65
    assert "refused: the host node0 is not in this allocation, which has node[1-2]" in done.stderr
    done = slurm.run(["salloc", "--gres=gpu:4", "--nodelist=node[0-1]", "bash", out / "slurm-job.sh"])
    assert done.returncode == 65
    assert "refused: this allocation has 8 of the 16 GPUs of its hosts" in done.stderr
    assert jobs.seen(done.stdout) == {}


def swapped(path: Path, first: int, second: int) -> None:
    """Exchange two lines of a file."""
    lines = path.read_text().split("\n")
    lines[first], lines[second] = lines[second], lines[first]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("file", ["slurm-hosts", "ranks.tsv"])
def test_a_file_with_two_lines_exchanged_starts_nothing(file: str, slurm: Slurm, tmp_path: Path) -> None:
    """The batch script holds what is beside it against the sums it was made with."""
    placement = jobs.placement("interleaved", seed=5, hosts=2)
    out = emitted(placement, tmp_path)
    other = next(record.rank for record in placement.ranks if record.host != placement.ranks[0].host)
    offset = 1 if file == "slurm-hosts" else 2
    swapped(out / file, offset, offset + other)
    code, told, errors = slurm.submit([out / "slurm-job.sh"])
    assert code == 66
    assert f"slurm-job.sh: {out}/{file} is not the file made with this script" in errors
    assert jobs.seen(told) == {}


def test_ranks_on_hosts_of_others_are_refused_by_the_wrapper(slurm: Slurm, tmp_path: Path) -> None:
    """With a wrong host file given to srun itself, no rank that it misplaces starts its program."""
    placement = jobs.placement("interleaved", seed=6, hosts=2)
    out = emitted(placement, tmp_path)
    other = next(record.rank for record in placement.ranks if record.host != placement.ranks[0].host)
    swapped(out / "slurm-hosts", 1, 1 + other)
    step = ["srun", "-n16", "--distribution=arbitrary", "--kill-on-bad-exit=1", out / "bind.sh"]
    done = slurm.run(
        ["salloc", "--exclusive", "--nodelist=node[0-1]", *step],
        env={"SLURM_HOSTFILE": str(out / "slurm-hosts")},
    )
    assert done.returncode != 0
    assert re.search(
        rf"bind.sh: refused: rank (0|{other}) belongs on the host node\d, but this is node\d", done.stderr
    )
    assert not {0, other} & set(jobs.seen(done.stdout))
    # And the table, whose lines the wrapper checks itself.
    swapped(out / "slurm-hosts", 1, 1 + other)
    swapped(out / "ranks.tsv", 2, 2 + other)
    done = slurm.run(
        ["salloc", "--exclusive", "--nodelist=node[0-1]", *step],
        env={"SLURM_HOSTFILE": str(out / "slurm-hosts")},
    )
    assert done.returncode != 0
    assert "ranks.tsv is not the file made with this script" in done.stderr
    assert jobs.seen(done.stdout) == {}


#: Four steps of seven tasks that tell where they are while Slurm is asked what it says of them.
STEPS = """#!/bin/bash
#SBATCH --exclusive --nodelist=node[0-1,8] --mem=0
cd -- {folder}
scontrol show job -d "$SLURM_JOB_ID" >job
for distribution in block cyclic:block block:cyclic arbitrary; do
  [[ $distribution != arbitrary ]] || export SLURM_HOSTFILE=$PWD/hosts
  srun --ntasks=7 --distribution="$distribution" --overlap --output=tasks.%s bash -c \
    'echo "$SLURM_PROCID $SLURMD_NODENAME $SLURM_STEP_TASKS_PER_NODE"; sleep 2' &
done
for try in 1 2 3 4 5 6 7 8; do
  sleep 0.2
  [[ $(cat tasks.* 2>/dev/null | wc -l) == 28 ]] && break
done
scontrol show step "$SLURM_JOB_ID" >steps
for number in 0 1 2 3; do scontrol show step "$SLURM_JOB_ID.$number" >"step.$number"; done
wait
"""


def test_what_slurm_shows_of_running_steps_is_read_back(slurm: Slurm, tmp_path: Path) -> None:
    """From `scontrol show job -d` the GPUs of every host, from `show step` and the tasks of each host where each task is."""
    (tmp_path / "hosts").write_text("node8\nnode0\nnode0\nnode1\nnode8\nnode0\nnode0\n")
    script = tmp_path / "steps.sh"
    script.write_text(STEPS.format(folder=shlex.quote(str(tmp_path))))
    code, _, errors = slurm.submit([script])
    assert code == 0, errors
    job = parse_scontrol((tmp_path / "job").read_text(), "job")
    assert job.hosts == ("node0", "node1", "node8")
    assert job.gpus == {host: tuple(range(NODES[host])) for host in job.hosts}
    with pytest.raises(InputError, match="tells of 4 jobs or steps"):
        parse_scontrol((tmp_path / "steps").read_text(), "steps")
    seen = set()
    for file in tmp_path.glob("step.*"):
        step = parse_scontrol(file.read_text(), file.name)
        told = [line.split() for line in (tmp_path / f"tasks.{file.suffix[1:]}").read_text().splitlines()]
        seen.add(step.distribution)
        if step.distribution == "arbitrary":
            with pytest.raises(InputError, match="SLURM_HOSTFILE"):
                lay_out(step, None)
            found = parse_slurm((tmp_path / "hosts").read_text(), "hosts")
        else:
            found = lay_out(step, parse_task_layout(told[0][2]))
        assert [row.host for row in found.rows] == [host for _, host, _ in sorted(told)]
    assert seen == {"block", "cyclic", "arbitrary"}
