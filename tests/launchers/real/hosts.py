"""Several hosts on one machine: each a network namespace with an address and a host name of its own.

They reach one another over a bridge and nothing else. All see the same files and processes. Names and devices carry the
process number, so that two runs of the tests do not meet.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.launchers.real.tools import missing, program

AGENT = """#!/usr/bin/env bash
# Stands for ssh: AGENT [OPTION...] HOST COMMAND...
while [[ ${{1:-}} == -* ]]; do
  case $1 in -o | -p | -l | -i | -F | -E) shift 2 ;; *) shift ;; esac
done
host=$1
shift
case $host in
{cases}
  *) echo "no route to $host" >&2; exit 255 ;;
esac
# As sshd does, with none of the environment of whoever asks.
exec env -i HOME="$HOME" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
  ip netns exec "$space" unshare --uts -- bash -c 'hostname "$0"; exec bash -c "$1"' "$host" "$*"
"""


class Hosts:
    """Hosts that are up. `agent` takes the place of ssh for launchers that start processes on the others."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names = tuple(names)
        self.mark = f"{os.getpid() % 100_000}"
        self.spaces = {name: f"placer{self.mark}h{number}" for number, name in enumerate(names)}
        self.agent = folder / "agent"
        cases = "\n".join(f"  {name}) space={space} ;;" for name, space in self.spaces.items())
        self.agent.write_text(AGENT.format(cases=cases))
        self.agent.chmod(0o755)

    def address(self, host: str) -> str:
        """The address of a host."""
        return f"10.77.{self.names.index(host) // 200}.{10 + self.names.index(host) % 200}"

    def command(self, host: str, argv: Sequence[str | Path]) -> list[str]:
        """Return the words that run `argv` on a host."""
        inside = ["bash", "-c", 'hostname "$0"; exec "$@"', host, *map(str, argv)]
        return ["ip", "netns", "exec", self.spaces[host], "unshare", "--uts", "--", *inside]

    def start(
        self,
        host: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program on a host, in a session of its own; what it says goes to pipes."""
        return subprocess.Popen(
            self.command(host, argv),
            env={**_clean(), **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end; kill what it started when that takes longer than `timeout` seconds."""
        started = self.start(host, argv, env, cwd)
        try:
            out, err = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = started.communicate()
            raise AssertionError(
                f"{shlex.join(map(str, argv))} took longer than {timeout} s:\n{out}\n{err}"
            ) from None
        return subprocess.CompletedProcess(list(map(str, argv)), started.returncode, out, err)

    def kill(self) -> None:
        """Kill every process of every host."""
        for space in self.spaces.values():
            found = subprocess.run(
                ["ip", "netns", "pids", space], capture_output=True, text=True, check=False
            )
            for number in found.stdout.split():
                subprocess.run(["kill", "-9", number], capture_output=True, check=False)


def _clean() -> dict[str, str]:
    """The environment without what a launcher around the tests may have left there."""
    marks = (
        "SLURM",
        "OMPI",
        "PMI",
        "PMIX",
        "PRTE",
        "HYDRA",
        "MPI_",
        "I_MPI",
        "RANK",
        "LOCAL_",
        "WORLD_",
        "MASTER_",
        "CUDA_",
        "NCCL_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(marks)}


@contextmanager
def simulated_hosts(names: Sequence[str], folder: Path) -> Iterator[Hosts]:
    """Yield hosts of these names, up until the end of the block; skip the test where namespaces cannot be made."""
    program("ip")
    if os.geteuid() != 0:
        missing("the right to make network namespaces (root)")
    hosts = Hosts(names, folder)
    bridge = f"plbr{hosts.mark}"
    try:
        done = _ip("link", "add", bridge, "type", "bridge", check=False)
        if done.returncode:
            missing(f"a network bridge ({done.stderr.strip()})")
        _ip("link", "set", bridge, "up")
        known = "".join(f"{hosts.address(name)} {name}\n" for name in names)
        for number, (name, space) in enumerate(hosts.spaces.items()):
            outside = _outside(hosts, number)
            _ip("netns", "add", space)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{hosts.address(name)}/16", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            files = Path("/etc/netns") / space
            files.mkdir(parents=True, exist_ok=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        yield hosts
    finally:
        hosts.kill()
        for number, space in enumerate(hosts.spaces.values()):
            # By itself: a connection that was cut off keeps a namespace, and what is in it, for minutes.
            _ip("link", "del", _outside(hosts, number), check=False)
            _ip("netns", "del", space, check=False)
            (Path("/etc/netns") / space / "hosts").unlink(missing_ok=True)
            if (Path("/etc/netns") / space).is_dir():
                (Path("/etc/netns") / space).rmdir()
        _ip("link", "del", bridge, check=False)


def _outside(hosts: Hosts, number: int) -> str:
    """The end of a host's cable that is plugged into the bridge."""
    return f"plv{hosts.mark}h{number}"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
