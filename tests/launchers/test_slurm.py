"""What `--to slurm` writes, and what the script asks of Slurm; programs that only tell what they were given stand for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.importers.rank_maps import parse_slurm
from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.registry import emit
from placer.launchers.slurm import Slurm
from placer.spec.names import expand_hosts
from placer.strategy import Shape
from tests.launchers.by_hand import make
from tests.launchers.conftest import STUB, Ran

#: What Slurm 22.05 prints, without the lines that are of no use here. `{}` is the GRES of the job.
JOB = """\
JobId=7 JobName=slurm-job.sh
   NodeList=node[01-02]
   NumNodes=2 NumCPUs=32 NumTasks=8 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   JOB_GRES={}
     Nodes=node01 CPU_IDs=0-15 Mem=2000 GRES=gpu:8(IDX:0-7)
     Nodes=node02 CPU_IDs=0-15 Mem=2000 GRES=gpu:4(IDX:0-3)
   Command=/nowhere/slurm-job.sh a b
"""
#: Prints `$JOB` and `$NODE_n`, whatever it is asked of them.
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  *hostnames*) printf 'node01\\nnode02\\n' ;;
  *"show node"*) printf 'NodeName=node01 Gres=%s\\nNodeName=node02 Gres=%s\\n' "$GRES_1" "$GRES_2" ;;
  *) printf '%s' "$JOB" ;;
esac
"""
ALLOCATION = {
    "SLURM_JOB_ID": 7,
    "SLURM_JOB_NODELIST": "node[01-02]",
    "GRES_1": "gpu:h100:8(S:0-1),nic:2",
    "GRES_2": "gpu:4",
    "JOB": JOB.format("gpu:12"),
}


@pytest.fixture
def slurm(tmp_path: Path, shell: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run the script inside a pretended allocation of two hosts, of 8 and 4 GPUs."""
    (tmp_path / "stubs/srun").write_text(STUB.format(python=sys.executable))
    (tmp_path / "stubs/scontrol").write_text(SCONTROL)
    for name in ("srun", "scontrol"):
        (tmp_path / "stubs" / name).chmod(0o755)

    def run(*words: str, **environment: object) -> Ran:
        return shell(tmp_path / "out/slurm-job.sh", *words, host="node01", **{**ALLOCATION, **environment})

    return run


def test_the_files_and_what_is_asked_of_sbatch(two_by_four, tmp_path):
    """A script, the hosts of the ranks one on each line, a rank table, a wrapper; hosts folded in the script's head."""
    paths = emit(two_by_four, "slurm", tmp_path)
    assert [path.name for path in paths] == ["slurm-job.sh", "slurm-hosts", "ranks.tsv", "bind.sh"]
    asked = [line for line in paths[0].read_text().split("\n") if line.startswith("#SBATCH")]
    assert asked == [
        "#SBATCH --nodes=2",
        "#SBATCH --nodelist=node[01-02]",
        "#SBATCH --ntasks=8",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
    ]
    hosts = paths[1].read_text()
    assert hosts.split("\n") == [
        f"# placer 0.1.0 placement {two_by_four.digest()}",
        *["node02"] * 4,
        *["node01"] * 4,
        "",
    ]
    assert [row.host for row in parse_slurm(hosts, "slurm-hosts").rows] == [
        record.host for record in two_by_four.ranks
    ]


def test_what_sbatch_reads_stands_before_the_first_command(two_by_four, tmp_path):
    """Slurm stops reading at the first line that is no comment."""
    lines = emit(two_by_four, "slurm", tmp_path)[0].read_text().split("\n")
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_hosts_of_many_names_fold_and_unfold(tmp_path):
    """The list in the head names every host once, of whatever form its name is."""
    hosts = ["r2n1", "r1n2", "r1n1", "login", "a01", "a10", "b-3"]
    text = emit(make([(host, 0) for host in hosts]), "slurm", tmp_path)[0].read_text()
    folded = next(line for line in text.split("\n") if "--nodelist=" in line and line.startswith("#SBATCH"))
    assert sorted(expand_hosts(folded.partition("=")[2])) == sorted(hosts)


def test_numbers_of_a_framework_order_the_host_file(tmp_path):
    """Line r is of the rank that the framework calls r: vLLM counts DP outside the stages."""
    gpus = [(f"node0{1 + rank // 4}", rank % 4) for rank in range(8)]
    placement = make(gpus, [((0, 2), Shape(tp=2, dp=2, ep=4)), ((2, 4), Shape(tp=2, dp=2, ep=4))],
                     {layer: [[0], [1], [2], [3]] for layer in range(4)})  # fmt: skip
    emit(placement, "slurm", tmp_path, options=Options(framework="vllm"))
    rows = parse_slurm((tmp_path / "slurm-hosts").read_text(), "slurm-hosts").rows
    assert [row.host for row in rows] == [record.host for record in job_of(placement, "vllm").ranks]
    assert [row.host for row in rows] == ["node01", "node01", "node02", "node02"] * 2


def test_the_step_asks_for_all_gpus_of_its_hosts(two_by_four, tmp_path, slurm):
    """Ranks, hosts and layout of the placement, and the GPUs of both hosts in one sum; arguments go to the program."""
    emit(two_by_four, "slurm", tmp_path / "out", options=Options(command=("program", "it's")))
    ran = slurm("a b", "")
    assert ran.code == 0, ran.err
    assert ran.argv == [
        *("srun", "--nodes=2", "--ntasks=8", "--distribution=arbitrary", "--cpu-bind=none", "--gpus=12"),
        *("--export=ALL", "--kill-on-bad-exit=1", f"{tmp_path}/out/bind.sh", "a b", ""),
    ]
    assert ran.env["SLURM_HOSTFILE"] == f"{tmp_path}/out/slurm-hosts"


def test_what_was_said_to_sbatch_does_not_reshape_the_step(two_by_four, tmp_path, slurm):
    """Variables that srun reads, and rank numbers left by another launcher, are gone; others stay."""
    emit(two_by_four, "slurm", tmp_path / "out")
    names = ["SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK"]
    names += [
        "SLURM_PROCID",
        "PMIX_RANK",
        "PMI_RANK",
        "SLURM_GPU_BIND",
        "SLURM_EXACT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_RANK",
    ]
    wishes = dict.fromkeys(names, 3)
    ran = slurm("program", SLURM_MPI_TYPE="pmix", **wishes)
    assert ran.code == 0, ran.err
    assert not wishes.keys() & ran.env.keys()
    assert ran.env["SLURM_MPI_TYPE"] == "pmix"


@pytest.mark.parametrize(
    ("gres", "nodes"),
    [("gpu:h100:8,gpu:a100:4", ("gpu:h100:8", "gpu:a100:4")), ("nic:3,gpu:9", ("gpu:8,nic:9", "gpu"))],
)
def test_gpus_with_types_and_beside_others_are_counted(two_by_four, tmp_path, slurm, gres, nodes):
    """Only GPUs count, of all types; one without a number is one."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm("program", JOB=JOB.format(gres), GRES_1=nodes[0], GRES_2=nodes[1])
    assert ran.code == 0, ran.err
    assert f"--gpus={12 if 'h100' in gres else 9}" in ran.argv


def test_where_slurm_counts_no_gpus_none_are_asked_for(two_by_four, tmp_path, slurm):
    """A cluster without `gres/gpu` shows all devices to everyone."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm("program", JOB=JOB.format("(null)"), GRES_1="(null)", GRES_2="(null)")
    assert ran.code == 0, ran.err
    assert not any(word.startswith("--gpus") for word in ran.argv)


def test_a_part_of_the_gpus_is_refused(two_by_four, tmp_path, slurm):
    """Where the job lacks a GPU of a host, the others have other numbers."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm("program", JOB=JOB.format("gpu:8"))
    assert (ran.code, ran.out) == (65, "")
    assert "refused: this allocation has 8 of the 12 GPUs of its hosts" in ran.err


def test_a_host_that_is_not_allocated_is_refused(tmp_path, slurm):
    """The first such host is named."""
    emit(make([("node01", 0), ("node03", 1)]), "slurm", tmp_path / "out")
    ran = slurm("program")
    assert (ran.code, ran.out) == (65, "")
    assert ran.err == (
        "slurm-job.sh: refused: the host node03 is not in this allocation, which has node[01-02]\n"
    )


@pytest.mark.parametrize("file", ["slurm-hosts", "ranks.tsv", "bind.sh"])
@pytest.mark.parametrize("words", [("program",), ("--dry-run", "program")])
def test_a_changed_or_missing_file_is_refused(two_by_four, tmp_path, slurm, file, words):
    """Each file beside the script is the one made with it, for a dry run as well."""
    emit(two_by_four, "slurm", tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_text(path.read_text().replace("node02", "node01", 1) + "\n")
    ran = slurm(*words)
    assert (ran.code, ran.out) == (66, "")
    assert f"{file} is not the file made with this script" in ran.err
    path.unlink()
    ran = slurm(*words)
    assert (ran.code, f"cannot read {path}" in ran.err) == (66, file != "slurm-hosts")


def test_nothing_to_run_and_no_allocation(two_by_four, tmp_path, slurm):
    """Both are told with the usage."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm()
    assert (ran.code, "usage: sbatch slurm-job.sh PROGRAM" in ran.err) == (64, True)
    ran = slurm("program", SLURM_JOB_ID="")
    assert (ran.code, "not inside an allocation of Slurm" in ran.err) == (64, True)
    ran = slurm("program", ":", "other")
    assert (ran.code, "found `:` among the arguments, which srun takes" in ran.err) == (64, True)


def test_ranks_meet_where_it_was_stated(two_by_four, tmp_path, slurm):
    """A MASTER_ADDR or MASTER_PORT that another job left behind is told and not taken."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm("program", MASTER_ADDR="stale", MASTER_PORT=1)
    assert ran.code == 0, ran.err
    assert (ran.env["MASTER_ADDR"], ran.env["MASTER_PORT"]) == ("node02", "29500")
    assert ran.err.splitlines() == [
        "slurm-job.sh: the ranks meet at MASTER_ADDR=node02, and not at the stale of the environment",
        "slurm-job.sh: the ranks meet at MASTER_PORT=29500, and not at the 1 of the environment",
    ]


def test_a_dry_run_starts_nothing(two_by_four, tmp_path, slurm):
    """It prints the command it would become."""
    emit(two_by_four, "slurm", tmp_path / "out")
    ran = slurm("--dry-run", "program", "a b")
    assert ran.code == 0, ran.err
    with pytest.raises(json.JSONDecodeError):
        json.loads(ran.out)
    assert "# 8 ranks on node[01-02]\n" in ran.out
    assert ran.out.rstrip().endswith("bind.sh program a\\ b")
    outside = slurm("--dry-run", "program", SLURM_JOB_ID="")
    assert (outside.code, "no allocation here" in outside.out) == (0, True)


def test_any_map_can_be_expressed(interleaved, uneven, moe, pipeline):
    """Slurm takes ranks on any host in any number."""
    assert [Slurm().cannot(placement) for placement in (interleaved, uneven, moe, pipeline)] == [None] * 4
