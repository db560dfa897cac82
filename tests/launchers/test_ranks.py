from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import ExportError, InputError
from placer.launchers.base import Options
from placer.launchers.ranks import Ranks, parse_ranks
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.spec.cluster import Cluster
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid

MPI = {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 8}


def cluster_of(
    placement: Placement, cpus: list[str | None], nic: list[str | None], numa: list[int | None] | None = None
) -> Cluster:
    hosts = tuple(dict.fromkeys(record.host for record in placement.ranks))
    return Cluster(
        name="by hand",
        types=(),
        hosts=hosts,
        host_of=np.array([hosts.index(record.host) for record in placement.ranks]),
        index=np.array([record.gpu for record in placement.ranks]),
        type_of=np.zeros(len(cpus), dtype=np.int64),
        networked=np.ones(0, dtype=bool),
        usable=np.ones(len(cpus), dtype=bool),
        memory_taken=np.zeros(len(cpus), dtype=np.int64),
        uuid=(None,) * len(cpus),
        numa=tuple(numa or (None,) * len(cpus)),
        cpus=tuple(cpus),
        nic=tuple(nic),
        levels=(),
    )


def test_table_reads_back(two_by_four, tmp_path):
    """The table has every rank with its GPU, and the digest of the placement."""
    table, script = emit(two_by_four, "ranks", tmp_path)
    digest, rows = parse_ranks(table.read_text())
    assert digest == two_by_four.digest()
    assert [(row.rank, row.host, row.gpu, row.uuid) for row in rows] == [
        (record.rank, record.host, record.gpu, record.uuid) for record in two_by_four.ranks
    ]
    assert [row.local for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert table.read_text().splitlines()[0] == f"# placer 0.1.0 placement {digest}"
    assert script.stat().st_mode & 0o111
    assert not table.stat().st_mode & 0o111


def test_every_rank_is_bound(two_by_four, tmp_path, shell):
    """Each rank gets its GPU and the variables of `env://`, and no more than that."""
    emit(two_by_four, "ranks", tmp_path / "out")
    for record in two_by_four.ranks:
        ran = shell(
            tmp_path / "out/bind.sh", "program", "a b", host=record.host, RANK=record.rank, WORLD_SIZE=8
        )
        assert ran.code == 0, ran.err
        assert ran.argv == ["program", "a b"]
        assert ran.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert ran.env["CUDA_VISIBLE_DEVICES"] == (record.uuid or str(record.gpu))
        assert (ran.env["RANK"], ran.env["WORLD_SIZE"], ran.env["LOCAL_RANK"]) == (str(record.rank), "8", "0")
        assert (ran.env["MASTER_ADDR"], ran.env["MASTER_PORT"]) == ("node02", "29500")
        assert "NCCL_IB_HCA" not in ran.env
        assert "SEEN_CPUS" not in ran.env


def test_cpus_and_nic_of_the_cluster(two_by_four, tmp_path, shell):
    """CPUs and NIC are those the cluster names for the GPU, and none where it names none."""
    cpus = [None if rank == 3 else f"{rank}-{rank},{rank + 10}" for rank in range(8)]
    nic = [None if rank == 4 else f"mlx5_{rank}:1" for rank in range(8)]
    options = Options(cluster=cluster_of(two_by_four, cpus, nic), command=("program", "it's", "$HOME"))
    table, script = emit(two_by_four, "ranks", tmp_path / "out", options=options)
    assert [(row.cpus, row.nic) for row in parse_ranks(table.read_text())[1]] == list(
        zip(cpus, nic, strict=True)
    )
    for record in two_by_four.ranks:
        ran = shell(script, "--more", host=record.host, RANK=record.rank)
        assert ran.code == 0, ran.err
        assert ran.argv == ["program", "it's", "$HOME", "--more"]
        assert ran.env.get("SEEN_CPUS") == cpus[record.rank]
        assert ran.env.get("NCCL_IB_HCA") == (None if nic[record.rank] is None else f"={nic[record.rank]}")


@pytest.mark.parametrize(
    ("cpus", "nic"), [("0-3;reboot", "mlx5_0"), ("0-3\t", "mlx5_0"), ("0", "mlx5\n0"), ("", "a b")]
)
def test_cpus_and_nic_in_no_known_form_are_refused(two_by_four, tmp_path, cpus, nic):
    """Nothing odd from a cluster file comes into a script."""
    options = Options(cluster=cluster_of(two_by_four, [cpus] * 8, [nic] * 8))
    with pytest.raises(ExportError, match="node02/3"):
        emit(two_by_four, "ranks", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_cluster_of_other_gpus_is_refused(two_by_four, uneven, tmp_path):
    """A cluster without a GPU of the placement is the wrong one."""
    options = Options(cluster=cluster_of(uneven, [None] * 4, [None] * 4))
    with pytest.raises(ExportError, match="rank 0 is on GPU node02/3, which the cluster by hand has not"):
        emit(two_by_four, "ranks", tmp_path, options=options)


def test_rank_of_the_innermost_launcher(two_by_four, tmp_path, shell):
    """Of several launchers around it the wrapper believes the innermost."""
    emit(two_by_four, "ranks", tmp_path)
    script = tmp_path / "bind.sh"
    assert shell(script, "program", host="node02", **MPI).env["CUDA_VISIBLE_DEVICES"] == "0"
    # Inside a Slurm batch script SLURM_PROCID is 0 for whatever an MPI launcher starts there.
    assert shell(script, "program", host="node02", SLURM_PROCID=0, **MPI).env["RANK"] == "2"
    # torchrun, started once on each host by MPI.
    assert (
        shell(script, "program", host="node02", RANK=1, **MPI | {"OMPI_COMM_WORLD_SIZE": 2}).env["RANK"]
        == "1"
    )
    # Slurm may know a host by another name than the host does.
    slurm = {"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 8, "SLURMD_NODENAME": "node01"}
    assert shell(script, "program", host="machine", **slurm).env["RANK"] == "5"
    assert shell(script, "program", host="machine", RANK=5, SLURMD_NODENAME="node01").code == 65


def test_ranks_that_were_left_behind(two_by_four, tmp_path, shell):
    """A RANK without WORLD_SIZE, and the SLURM_PROCID of a batch script, are nobody's rank; two that differ are refused."""
    emit(two_by_four, "ranks", tmp_path)
    script = tmp_path / "bind.sh"
    assert shell(script, "program", host="node02", RANK=1, WORLD_SIZE=None, **MPI).env["RANK"] == "2"
    for alone in ({"RANK": 1, "WORLD_SIZE": None}, {"SLURM_PROCID": 0}):
        ran = shell(script, "program", host="node02", **alone)
        assert (ran.code, ran.out) == (64, "")
        assert "no rank: start it with a launcher" in ran.err
    ran = shell(script, "program", host="node02", RANK=1, **MPI)
    assert (ran.code, ran.out) == (64, "")
    assert "found RANK=1 and OMPI_COMM_WORLD_RANK=2: unset the one that was left behind" in ran.err


OMPI, PMI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def of(names, rank, size):
    """Return the variables by which a launcher says that a process is rank `rank` of `size`."""
    return dict(zip(names, (rank, size), strict=True))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # Open MPI and `srun --mpi=pmix` set the number of PMIx beside their own.
        (of(OMPI, 2, 8) | {"PMIX_RANK": 2}, 2),
        (of(SLURM, 2, 8) | {"PMIX_RANK": 2}, 2),
        (of(SLURM, 2, 8) | of(PMI, 2, 8), 2),
        ({"PMIX_RANK": 2}, 2),
        (of(PMI, 2, 8) | {"PALS_RANKID": 2}, 2),
        ({"PALS_RANKID": 2}, 2),
        # torchrun, started by Open MPI once on each host.
        ({"RANK": 2} | of(OMPI, 1, 2) | {"PMIX_RANK": 1}, 2),
        # mpiexec inside the shell of `srun --mpi=pmix --pty`.
        (of(PMI, 2, 8) | of(SLURM, 0, 1) | {"PMIX_RANK": 0}, 2),
        (of(SLURM, 0, 2) | {"PMIX_RANK": 0}, "started 2 processes, but this placement has 8 ranks"),
        (of(PMI, 2, 8) | {"PMIX_RANK": 0}, "found PMI_RANK=2 and PMIX_RANK=0: unset the one that was left"),
        (of(PMI, 2, 8) | of(SLURM, 0, 8), "found PMI_RANK=2 and SLURM_PROCID=0: unset"),
        (of(PMI, 2, 8) | {"PALS_RANKID": 0}, "found PMI_RANK=2 and PALS_RANKID=0: unset"),
    ],
)
def test_launchers_around_one_another(two_by_four, tmp_path, shell, environment, expected):
    """PMIx says no number of processes, so that a launcher which does is asked; two that could both be right are refused."""
    emit(two_by_four, "ranks", tmp_path)
    ran = shell(tmp_path / "bind.sh", "program", host="node02", **environment)
    if isinstance(expected, int):
        assert ran.code == 0, ran.err
        assert ran.env["RANK"] == str(expected)
    else:
        assert (ran.code, ran.out) == (64, "")
        assert expected in ran.err


def test_slurms_name_of_a_host_is_for_ranks_of_slurm(two_by_four, tmp_path, shell):
    """A name that Slurm left behind in the environment of another launcher says nothing about this host."""
    emit(two_by_four, "ranks", tmp_path)
    slurm = of(SLURM, 0, 8) | {"SLURMD_NODENAME": "node02"}
    for environment in (slurm, slurm | {"PMIX_RANK": 0}):
        assert shell(tmp_path / "bind.sh", "program", host="machine", **environment).code == 0
    ran = shell(tmp_path / "bind.sh", "program", host="machine", **slurm, **of(PMI, 0, 8))
    assert (ran.code, ran.out) == (65, "")


@pytest.mark.parametrize("launcher", ["ranks", "torchrun", "env", "openmpi", "nccl"])
def test_folder_of_the_script(dense, tmp_path, shell, launcher):
    """CDPATH does not lead the script elsewhere, and through a link it finds the files beside itself."""
    emit(dense, launcher, tmp_path / "out")
    name = {"ranks": "bind.sh", "openmpi": "openmpi-run.sh", "nccl": "nccl.sh"}.get(
        launcher, f"{launcher}-node01.sh"
    )
    (tmp_path / "link.sh").symlink_to(tmp_path / "out" / name)
    rank = {"RANK": 0} if launcher in ("ranks", "nccl") else {}
    for words in (["bash", f"out/{name}"], ["bash", str(tmp_path / "link.sh")]):
        ran = shell(
            "/usr/bin/env", "-C", str(tmp_path), *words, "--dry-run", "program",
            host="node01", CDPATH=str(tmp_path), **rank, WORLD_SIZE=4 if rank else None,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        assert "program" in ran.out


@pytest.mark.parametrize("tool", ["awk", "sha256sum"])
def test_a_missing_tool_is_said(two_by_four, tmp_path, shell, tool):
    """Without what the table is checked and read by it ends with 69, and says why."""
    emit(two_by_four, "ranks", tmp_path / "out")
    tools = tmp_path / "tools"
    tools.mkdir()
    for each in {"env", "bash", "sha256sum", "awk"} - {tool}:
        (tools / each).symlink_to(str(shutil.which(each)))
    ran = shell(
        tmp_path / "out/bind.sh", "program", host="node02", RANK=0, PATH=f"{tmp_path / 'stubs'}:{tools}"
    )
    assert (ran.code, ran.out) == (69, "")
    assert ran.err == f"bind.sh: cannot check the files beside it: {tool} is not in PATH\n"


def test_a_missing_program_is_said(two_by_four, tmp_path, shell):
    """A program that is not there ends it with 127 and a sentence of the wrapper's."""
    emit(two_by_four, "ranks", tmp_path)
    ran = shell(tmp_path / "bind.sh", "absent", host="node02", RANK=0)
    assert (ran.code, ran.out, ran.err) == (127, "", "bind.sh: found no program absent that may be run\n")


def test_what_looks_like_a_dry_run(two_by_four, tmp_path, shell):
    """`--dryrun` and the like do not start the command they would be an argument of."""
    emit(two_by_four, "ranks", tmp_path, options=Options(command=("program",)))
    for word in ("--dryrun", "--dry", "--dry-run=yes", "--dry_run"):
        ran = shell(tmp_path / "bind.sh", word, host="node02", RANK=0)
        assert (ran.code, ran.out) == (64, "")
        assert f"found {word}, expected --dry-run" in ran.err
    assert shell(tmp_path / "bind.sh", "x", "--dryrun", host="node02", RANK=0).argv == [
        "program",
        "x",
        "--dryrun",
    ]


def test_a_host_that_cannot_bind_says_why(two_by_four, tmp_path, shell):
    """What numactl says comes out, with what it was asked."""
    options = Options(cluster=cluster_of(two_by_four, ["0-3"] * 8, [None] * 8, [1] * 8))
    emit(two_by_four, "ranks", tmp_path / "out", options=options)
    numactl = tmp_path / "stubs/numactl"
    numactl.write_text(
        "#!/usr/bin/env bash\necho 'set_mempolicy: Operation not permitted'\necho usage\nexit 1\n"
    )
    numactl.chmod(0o755)
    ran = shell(tmp_path / "out/bind.sh", "program", host="node02", RANK=0)
    assert (ran.code, ran.out) == (65, "")
    assert (
        "refused: numactl --all --membind=1 --physcpubind=0-3 fails for rank 0 on node02 "
        "(set_mempolicy: Operation not permitted)" in ran.err
    )
    assert "usage" not in ran.err


def test_hosts_that_are_equal_as_numbers(tmp_path, shell):
    """The hosts 1, 01 and 1e0 are three, although awk takes them for one number."""
    placement = make([("1", 0), ("1", 1), ("01", 2), ("1e0", 3)])
    emit(placement, "ranks", tmp_path, options=Options(visibility="host"))
    lists = [
        shell(tmp_path / "bind.sh", "program", host=record.host, RANK=record.rank).env["CUDA_VISIBLE_DEVICES"]
        for record in placement.ranks
    ]
    assert lists == ["0,1", "0,1", "2", "3"]


def test_an_option_is_no_program(two_by_four, tmp_path, shell):
    """`exec -c` and the like would start the program without its environment."""
    emit(two_by_four, "ranks", tmp_path)
    for word in ("-c", "--help", "-a"):
        ran = shell(tmp_path / "bind.sh", word, "program", host="node02", RANK=0)
        assert (ran.code, ran.out) == (64, "")
        assert f"found {word} where the program should be" in ran.err


def test_wrong_host_is_refused(two_by_four, tmp_path, shell):
    """A rank on another host than its own is refused and starts nothing."""
    emit(two_by_four, "ranks", tmp_path)
    ran = shell(tmp_path / "bind.sh", "program", host="node01", RANK=3)
    assert (ran.code, ran.out) == (65, "")
    assert ran.err == (
        "bind.sh: refused: rank 3 belongs on the host node02, but this is node01: "
        "start it there, or give this container the name of its host\n"
    )


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        ("node01.lan", "node01", True),
        ("node01", "node01.lan", True),
        ("node01.lan", "node01.lan", True),
        ("node01.lan", "node01.wan", False),
        ("node011", "node01", False),
        ("*", "node01", False),
        ("", "node01", False),
        ("NODE01", "node01", True),
        ("node01", "Node01.Lan", True),
        ("NODE01.lan", "node01.LAN", True),
    ],
)
def test_names_with_and_without_a_domain(tmp_path, shell, here, there, same):
    """A name with a domain and the same name without one are one host."""
    emit(make([(there, 0)]), "ranks", tmp_path)
    assert (shell(tmp_path / "bind.sh", "program", host=here, RANK=0).code == 0) is same
    emit(make([(there, 0)]), "torchrun", tmp_path, force=True)
    assert (shell(tmp_path / f"torchrun-{there}.sh", "program", host=here).code == 0) is same


def test_short_name_that_could_be_two_hosts_is_refused(tmp_path, shell):
    """Where hosts differ in their domains alone, names must be equal."""
    placement = make([("node01.a", 0), ("Node01.b", 0)])
    emit(placement, "ranks", tmp_path)
    emit(placement, "torchrun", tmp_path, force=True)
    for script, rank in (("bind.sh", 1), ("torchrun-Node01.b.sh", 1)):
        codes = [
            shell(tmp_path / script, "program", host=host, RANK=rank).code
            for host in ("node01.b", "node01", "node01.a")
        ]
        assert codes == [0, 65, 65]


def test_dry_run_prints_and_runs_nothing(two_by_four, tmp_path, shell):
    """A dry run shows the environment and the command, and tells of a wrong host too."""
    emit(two_by_four, "ranks", tmp_path)
    ran = shell(tmp_path / "bind.sh", "--dry-run", "program", "--dry-run", "a b", host="node01", RANK=4)
    assert ran.code == 0
    assert "# rank 4 of 8 (from RANK) on node01: stage 0 dp 1 tp 0" in ran.out
    assert f"CUDA_VISIBLE_DEVICES={uuid(2)}" in ran.out
    assert "program --dry-run a\\ b" in ran.out
    wrong = shell(tmp_path / "bind.sh", "--dry-run", "program", host="node02", RANK=4)
    assert wrong.code == 65
    assert "refused" in wrong.err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "no rank"),
        ({"RANK": "8"}, "ranks 0 to 7"),
        ({"RANK": "x[$(echo 1 >&2)]"}, "expected a whole number"),
        ({"RANK": "01"}, "expected a whole number"),
        ({"RANK": "-1"}, "expected a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "started 4 processes, but this placement has 8 ranks"),
    ],
)
def test_rank_that_does_not_fit_is_refused(two_by_four, tmp_path, shell, environment, message):
    """A missing, hostile or foreign rank, or another number of processes, is refused."""
    emit(two_by_four, "ranks", tmp_path)
    ran = shell(tmp_path / "bind.sh", "program", host="node02", **environment)
    assert (ran.code, ran.out) == (64, "")
    assert message in ran.err


def test_nothing_to_run_is_refused(two_by_four, tmp_path, shell):
    """Without a program the wrapper says how it is used."""
    emit(two_by_four, "ranks", tmp_path)
    assert shell(tmp_path / "bind.sh", host="node02", RANK=0).code == 64


def test_table_of_another_placement_is_refused(two_by_four, interleaved, tmp_path, shell):
    """The digests of the table and the wrapper must be the same."""
    emit(two_by_four, "ranks", tmp_path / "a")
    emit(interleaved, "ranks", tmp_path / "b")
    (tmp_path / "b/ranks.tsv").replace(tmp_path / "a/ranks.tsv")
    ran = shell(tmp_path / "a/bind.sh", "program", host="node02", RANK=0)
    assert ran.code == 66
    assert "belongs to another placement" in ran.err
    assert two_by_four.digest() in ran.err


def test_changed_table_is_refused(two_by_four, tmp_path, shell):
    """Lines exchanged, changed, lost or added, and a lost table, all stop the wrapper."""
    table, script = emit(two_by_four, "ranks", tmp_path)
    lines = table.read_text().splitlines(keepends=True)
    swapped = [*lines[:2], lines[3], lines[2], *lines[4:]]
    hosts = [line.replace("node01", "node03") for line in lines]
    for text in ("".join(swapped), "".join(hosts), "".join(lines[:-1]), "".join(lines) + "\n"):
        table.write_text(text)
        ran = shell(script, "program", host="node02", RANK=0, WORLD_SIZE=8)
        assert (ran.code, ran.out) == (66, "")
        assert "it was changed" in ran.err
    table.unlink()
    assert shell(script, "program", host="node02", RANK=0, WORLD_SIZE=8).code == 66


def test_without_taskset_the_rank_runs_and_says_so(two_by_four, tmp_path, shell):
    """A missing tool for binding is told, and the rank runs."""
    options = Options(cluster=cluster_of(two_by_four, ["0"] * 8, [None] * 8))
    emit(two_by_four, "ranks", tmp_path / "out", options=options)
    (tmp_path / "stubs/taskset").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("env", "bash", "dirname", "sha256sum", "awk", "uname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    path = f"{tmp_path / 'stubs'}:{tools}"
    ran = shell(tmp_path / "out/bind.sh", "program", host="node02", RANK=0, PATH=path)
    assert ran.code == 0
    assert "taskset is missing, so rank 0 is not bound to the CPUs 0" in ran.err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("# placer", "# player"),
        lambda text: text.replace("\tgpu\t", "\tdevice\t"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "8\tnode01\n",
        lambda text: text.replace("\tnode01\t", "\tnode 01\t"),
        lambda text: text.replace("\n7\t", "\nseven\t"),
        lambda text: "",
    ],
)
def test_spoilt_table_is_not_read(two_by_four, spoil):
    """The reader takes nothing but what is written."""
    text = Ranks().files(two_by_four, Options())["ranks.tsv"].text
    with pytest.raises(InputError):
        parse_ranks(spoil(text))


labels = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,6}[a-z0-9])?(\.[a-z0-9]{1,5})?", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_placement_reads_back(data):
    """Any map of ranks to GPUs, with and without UUIDs, comes back from the table as it was."""
    hosts = data.draw(st.lists(labels, min_size=1, max_size=4, unique=True))
    gpus = data.draw(
        st.lists(st.tuples(st.sampled_from(hosts), st.integers(0, 15)), min_size=1, max_size=24, unique=True)
    )
    known = data.draw(st.lists(st.booleans(), min_size=len(gpus), max_size=len(gpus)))
    placement = make([(*gpu, uuid(number) if known[number] else None) for number, gpu in enumerate(gpus)])
    digest, rows = parse_ranks(Ranks().files(placement, Options())["ranks.tsv"].text)
    assert digest == placement.digest()
    names = ("rank", "host", "gpu", "uuid", "stage", "dp", "tp", "ep", "etp", "edp")
    assert [[getattr(row, name) for name in names] for row in rows] == [
        [getattr(record, name) for name in names] for record in placement.ranks
    ]


def test_all_gpus_of_the_host_in_rank_order(tmp_path, shell):
    """With `--visibility host` LOCAL_RANK is the place in the list: UUIDs where every GPU of the host has one."""
    placement = make(
        [
            ("node01", 5, uuid(5)),
            ("node02", 3, uuid(3)),
            ("node01", 0, uuid(0)),
            ("node02", 2),
            ("node01", 1, uuid(1)),
        ]
    )
    emit(placement, "ranks", tmp_path / "out", options=Options(visibility="host"))
    listed = {"node01": f"{uuid(5)},{uuid(0)},{uuid(1)}", "node02": "3,2"}
    for record, local in zip(placement.ranks, (0, 0, 1, 1, 2), strict=True):
        ran = shell(tmp_path / "out/bind.sh", "program", host=record.host, RANK=record.rank)
        assert ran.code == 0, ran.err
        assert ran.env["CUDA_VISIBLE_DEVICES"] == listed[record.host]
        assert ran.env["LOCAL_RANK"] == str(local)
        assert ran.env["LOCAL_WORLD_SIZE"] == str(listed[record.host].count(",") + 1)
        # A launcher of another kind, that numbers the ranks of a host itself, is not asked.
        ran = shell(tmp_path / "out/bind.sh", "program", host=record.host, PMI_RANK=record.rank, LOCAL_RANK=9)
        assert ran.env["LOCAL_RANK"] == str(local)
    ran = shell(tmp_path / "out/bind.sh", "program", host="node01", RANK=2, LOCAL_RANK=0)
    assert ran.code == 65
    assert "rank 2 is number 1 on the host node01, but was started as number 0 there" in ran.err


def test_numa_node_of_the_cluster(two_by_four, tmp_path, shell):
    """numactl binds memory to the node and the process to the CPUs, or to those of the node where none are named."""
    numa = [0, 1, None, 1, 0, 0, 1, 1]
    cpus = ["0-3", None, "4", None, "0", "1", "2", "3"]
    options = Options(cluster=cluster_of(two_by_four, cpus, [None] * 8, numa))
    table, script = emit(two_by_four, "ranks", tmp_path / "out", options=options)
    assert [row.numa for row in parse_ranks(table.read_text())[1]] == numa
    (tmp_path / "stubs/numactl").write_text(
        '#!/usr/bin/env bash\nexport SEEN_NUMA="$2 $3"\n[[ $1 == --all ]] || exit 1\nshift 3\nexec "$@"\n'
    )
    (tmp_path / "stubs/numactl").chmod(0o755)
    expected = {0: "--membind=0 --physcpubind=0-3", 1: "--membind=1 --cpunodebind=1", 2: None}
    for rank, words in expected.items():
        ran = shell(script, "program", host="node02", RANK=rank)
        assert ran.code == 0, ran.err
        assert ran.env.get("SEEN_NUMA") == words
        assert ran.env.get("SEEN_CPUS") == ("4" if rank == 2 else None)


def test_table_names_the_framework(two_by_four, tmp_path, shell):
    """Ranks that a framework numbers say so in the table and the wrapper; an unknown one is not read."""
    table, script = emit(two_by_four, "ranks", tmp_path / "out", options=Options(framework="megatron"))
    text = table.read_text()
    assert text.splitlines()[0].endswith(" ranks of megatron")
    assert len(parse_ranks(text)[1]) == 8
    assert "megatron gives them" in script.read_text()
    assert shell(script, "program", host="node02", RANK=0).code == 0
    with pytest.raises(InputError):
        parse_ranks(text.replace("ranks of megatron", "ranks of nobody"))


def test_framework_numbers_the_ranks(tmp_path, shell):
    """vLLM has DP outside of PP: with TP 1 the second stage of the first DP rank is its rank 1."""
    stages = [((0, 2), Shape(dp=2, ep=2)), ((2, 4), Shape(dp=2, ep=2))]
    experts = {layer: [[0, 1], [2, 3]] for layer in range(4)}
    placement = make([("node01", gpu) for gpu in range(4)], stages, experts)
    table, script = emit(placement, "ranks", tmp_path / "out", options=Options(framework="vllm"))
    rows = parse_ranks(table.read_text())[1]
    assert [(row.gpu, row.stage, row.dp) for row in rows] == [(0, 0, 0), (2, 1, 0), (1, 0, 1), (3, 1, 1)]
    assert shell(script, "program", host="node01", RANK=1).env["CUDA_VISIBLE_DEVICES"] == "2"
