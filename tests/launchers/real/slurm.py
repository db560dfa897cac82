"""A Slurm cluster on one machine: one slurmctld and a slurmd for each node, with GPUs that are only named.

All of it runs in namespaces of its own (processes, network, host name, mounts), so that its ports meet nobody's and its
/etc/hosts is seen by nobody else; ending the first process of them ends them all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.launchers.real.tools import missing, program

MACHINE = "slurmhost"
ADDRESS = "10.78.0.1"

_CONF = """\
ClusterName=simulated
SlurmctldHost={machine}({address})
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=1
GresTypes=gpu
"""

# The first process of the namespaces: everything else there ends with it. What it starts, it waits for.
_FIRST = """\
set -eu
mount --make-rprivate /
mount --bind "$1/hosts" /etc/hosts
hostname {machine}
ip link set lo up
# With nothing but the loopback, names and addresses do not resolve.
ip link add eth0 type veth peer name eth1
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip link set eth1 up
munged --force --key-file="$1/munge/key" --socket="$1/munge/socket" --pid-file="$1/munge/pid" \
  --log-file="$1/munge/log" --seed-file="$1/munge/seed" --num-threads=4
export SLURM_CONF="$1/slurm.conf"
slurmctld
for node in $2; do slurmd -N "$node"; done
: >"$1/started"
while :; do sleep 3600; done
"""


class Slurm:
    """A cluster that is up. `gpus` is the number of GPUs of each node, by its name."""

    def __init__(self, folder: Path, gpus: Mapping[str, int], process: subprocess.Popen[bytes]) -> None:
        self.folder, self.gpus, self.process = folder, dict(gpus), process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self.first = children[0]

    def run(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a program where the cluster is, to its end, with `text` on its standard input."""
        clean = {name: value for name, value in os.environ.items() if not _of_a_launcher(name)}
        inside = ["nsenter", "-t", self.first, "-m", "-u", "-n", "-p", "-i"]
        words = [*inside, f"--wd={cwd or self.folder}", "--", *map(str, argv)]
        return subprocess.run(
            words,
            env={**clean, "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})},
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(
        self, words: Sequence[str | Path], cwd: Path | None = None, text: str = "", timeout: float = 60
    ) -> tuple[int, str, str]:
        """Submit a job with the words of an sbatch command, wait for its end, and return its exit code, output and errors.

        `sbatch --wait` looks only every 10 s.
        """
        told = [Path(tempfile.mkstemp(dir=self.folder, prefix=f"{what}.")[1]) for what in ("out", "err")]
        argv = ["sbatch", "--parsable", f"--output={told[0]}", f"--error={told[1]}", *words]
        done = self.run(argv, cwd=cwd, text=text)
        if done.returncode:
            return done.returncode, done.stdout, done.stderr
        end, job = time.monotonic() + timeout, done.stdout.strip()
        while True:
            shown = self.run(["scontrol", "-o", "show", "job", job]).stdout
            state = re.search(r"JobState=(\S+)", shown)
            if state is not None and state[1] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
                break
            if time.monotonic() > end:
                self.run(["scancel", job])
                raise AssertionError(f"job {job} took longer than {timeout} s: {shown}")
            time.sleep(0.15)
        code = re.search(r" ExitCode=(\d+):(\d+)", shown)
        assert code is not None
        return int(code[1]) or int(code[2]), told[0].read_text(), told[1].read_text()

    def _nodes_ready(self) -> bool:
        shown = self.run(["sinfo", "-h", "-N", "-o", "%N %t"]).stdout.split("\n")
        return sorted(shown) == sorted(["", *(f"{node} idle" for node in self.gpus)])

    def wait_until_up(self, seconds: float = 60) -> None:
        """Return when all nodes are idle; fail with the log when they are not in time."""
        end = time.monotonic() + seconds
        while not self._nodes_ready():
            if time.monotonic() > end or self.process.poll() is not None:
                log = self.folder / "slurmctld.log"
                raise AssertionError(log.read_text()[-3000:] if log.exists() else "slurmctld did not start")
            time.sleep(0.2)


def _of_a_launcher(name: str) -> bool:
    return name.startswith(
        ("SLURM", "SBATCH", "SALLOC", "SRUN", "OMPI", "PMI", "RANK", "LOCAL_", "WORLD_", "MASTER_", "CUDA_")
    )


@contextmanager
def simulated_slurm(gpus: Mapping[str, int]) -> Iterator[Slurm]:
    """Yield a Slurm cluster with these nodes, up until the end of the block; skip the test where it cannot be."""
    for name in ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare", "nsenter", "ip"):
        program(name)
    if os.geteuid() != 0:
        missing("the right to make namespaces and device files (root)")
    # Short: a socket's path has room for a hundred letters. In no folder of the tests, which nobody but root may enter.
    folder = Path(tempfile.mkdtemp(prefix="placer-slurm."))
    folder.chmod(0o755)
    process = None
    try:
        _write(folder, gpus)
        process = subprocess.Popen(
            [
                *(
                    "unshare",
                    "--mount",
                    "--uts",
                    "--net",
                    "--ipc",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                ),
                *(
                    "bash",
                    "-c",
                    _FIRST.format(machine=MACHINE, address=ADDRESS),
                    "first",
                    str(folder),
                    " ".join(gpus),
                ),
            ],
            env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            stdin=subprocess.DEVNULL,
            stdout=(folder / "first.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while not (folder / "started").exists():
            if process.poll() is not None or time.monotonic() > end:
                missing(f"a simulated Slurm ({(folder / 'first.log').read_text().strip()[-300:]})")
            time.sleep(0.1)
        cluster = Slurm(folder, gpus, process)
        cluster.wait_until_up()
        yield cluster
    finally:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, gpus: Mapping[str, int]) -> None:
    """Write the files of the cluster: addresses, configuration, GPUs that are device files nobody opens, and a key."""
    for name in ("munge", "state", "spool", "dev"):
        (folder / name).mkdir(mode=0o755)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {MACHINE}\n")
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    for number in range(max(gpus.values())):
        os.mknod(folder / "dev" / f"nvidia{number}", 0o020600, os.makedev(195, number))
    nodes = [
        f"NodeName={node} NodeHostname={MACHINE} NodeAddr={ADDRESS} Port={17001 + place} Sockets=2 CoresPerSocket=8 "
        f"ThreadsPerCore=1 RealMemory=2000 Gres=gpu:{count} State=UNKNOWN"
        for place, (node, count) in enumerate(gpus.items())
    ]
    partition = f"PartitionName=all Nodes={','.join(gpus)} Default=YES MaxTime=INFINITE State=UP"
    (folder / "slurm.conf").write_text(
        "\n".join([_CONF.format(folder=folder, machine=MACHINE, address=ADDRESS), *nodes, partition, ""])
    )
    lines = [
        f"NodeName={node} Name=gpu File={folder}/dev/nvidia[0-{count - 1}]" for node, count in gpus.items()
    ]
    (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
