from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from placer.launchers import job
from placer.launchers.base import Options
from placer.launchers.env import env_scripts
from placer.launchers.ranks import wrapper_files
from placer.launchers.registry import LAUNCHERS, emit, write_files
from tests.launchers.by_hand import make

SHOW = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $CUDA_VISIBLE_DEVICES $MASTER_ADDR $MASTER_PORT"; echo "err $RANK" >&2'


def start(shell_folder: Path, script: Path, *command: str, host: str) -> subprocess.Popen[str]:
    """Start a script on a pretended host and leave it running."""
    return subprocess.Popen(
        [script, *command],
        env={"PATH": f"{shell_folder}:{os.environ['PATH']}", "PRETENDED_HOST": host},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(folder: Path, count: int) -> None:
    """Wait until each of `count` ranks has left its file."""
    deadline = time.monotonic() + 20
    while len(list(folder.glob("up-*"))) < count:
        assert time.monotonic() < deadline, "the ranks did not come up"
        time.sleep(0.02)


def alive(folder: Path) -> list[int]:
    """The processes that the ranks named in their files and that still run."""
    found = []
    for path in folder.glob("up-*"):
        for number in path.read_text().split():
            try:
                state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append(int(number))
    return found


def hostname(tmp_path: Path) -> Path:
    """A folder with a program that tells the pretended host name."""
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / "hostname").write_text('#!/usr/bin/env bash\necho "$PRETENDED_HOST"\n')
    (folder / "hostname").chmod(0o755)
    return folder


def gone(folder: Path) -> None:
    """Assert that no process of a rank is left, allowing for the time a kill takes."""
    deadline = time.monotonic() + 5
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(folder) == []


def test_every_rank_is_started_where_placed(interleaved, tmp_path, shell):
    """Each host starts its own ranks, with the variables of `env://`, and their lines come out behind their numbers."""
    paths = emit(interleaved, "env", tmp_path / "out")
    assert [path.name for path in paths] == ["ranks.tsv", "bind.sh", "env-node01.sh", "env-node02.sh"]
    out, err = [], []
    for host in ("node01", "node02"):
        ran = shell(tmp_path / f"out/env-{host}.sh", "bash", "-c", SHOW, host=host)
        assert ran.code == 0, ran.err
        out += ran.out.splitlines()
        err += ran.err.splitlines()
    assert sorted(out) == [
        f"[{record.rank}] {record.rank} 8 {record.gpu} 0,1,2,3 node01 29500" for record in interleaved.ranks
    ]
    assert sorted(err) == [f"[{rank}] err {rank}" for rank in range(8)]


def test_one_gpu_for_each_process(interleaved, tmp_path, shell):
    """With `--visibility one` every process sees its GPU alone."""
    emit(
        interleaved,
        "env",
        tmp_path / "out",
        options=Options(visibility="one", master_addr="10.0.0.7", master_port=1234),
    )
    ran = shell(tmp_path / "out/env-node02.sh", "bash", "-c", SHOW, host="node02")
    assert sorted(ran.out.splitlines()) == [
        f"[{record.rank}] {record.rank} 8 0 {record.gpu} 10.0.0.7 1234"
        for record in interleaved.ranks
        if record.host == "node02"
    ]


def test_command_and_arguments(uneven, tmp_path, shell):
    """The command of the options comes first, then the arguments of the script, word by word."""
    emit(uneven, "env", tmp_path / "out", options=Options(command=("printf",)))
    ran = shell(tmp_path / "out/env-node02.sh", "<%s>", "a  b", "", "$HOME", host="node02")
    assert sorted(ran.out.splitlines()) == [f"[{rank}] <a  b><><$HOME>" for rank in (1, 2, 3)]


def test_last_line_without_an_end_comes_out(uneven, tmp_path, shell):
    """The last words of a rank come out though no line end follows."""
    emit(uneven, "env", tmp_path / "out")
    ran = shell(tmp_path / "out/env-node01.sh", "printf", "a\\nb", host="node01")
    assert ran.out == "[0] a\n[0] b\n"


def test_first_failure_ends_all(uneven, tmp_path):
    """When a rank fails, the others get TERM, and the script ends as that rank did, leaving nothing behind."""
    emit(uneven, "env", tmp_path / "out")
    stub = hostname(tmp_path)
    program = (
        f"sleep 300 & echo $$ $! >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; "
        f"if [[ $RANK == 2 ]]; then until [[ -e {tmp_path}/up-1 && -e {tmp_path}/up-3 ]]; do sleep 0.02; done; exit 7; fi; wait"
    )
    begun = time.monotonic()
    process = start(stub, tmp_path / "out/env-node02.sh", "bash", "-c", program, host="node02")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (7, "")
    assert err == "env-node02.sh: rank 2 ended with 7, so the others on node02 are ended\n"
    assert time.monotonic() - begun < 9
    gone(tmp_path)


def test_rank_that_does_not_listen_is_killed(uneven, tmp_path):
    """A rank that ignores TERM gets KILL after the time of grace."""
    emit(uneven, "env", tmp_path / "out")
    script = tmp_path / "out/env-node02.sh"
    script.write_text(script.read_text().replace("readonly grace=10\n", "readonly grace=1\n"))
    program = (
        f"trap '' TERM; echo $$ >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; "
        f"if [[ $RANK == 1 ]]; then until [[ -e {tmp_path}/up-2 && -e {tmp_path}/up-3 ]]; do sleep 0.02; done; exit 3; fi; "
        "while true; do sleep 0.1; done"
    )
    process = start(hostname(tmp_path), script, "bash", "-c", program, host="node02")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "rank 1 ended with 3" in err
    gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(uneven, tmp_path, number):
    """Ranks get the very signal, may end in their own time, and what they say last comes out."""
    emit(uneven, "env", tmp_path / "out")
    name = number.name.removeprefix("SIG")
    program = (
        f"trap 'echo got {name}; exit 0' {name}; "
        f"echo $$ >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; while true; do sleep 0.05; done"
    )
    process = start(hostname(tmp_path), tmp_path / "out/env-node02.sh", "bash", "-c", program, host="node02")
    wait_for(tmp_path, 3)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert sorted(out.splitlines()) == [f"[{rank}] got {name}" for rank in (1, 2, 3)]
    gone(tmp_path)


def impatient(folder: Path) -> Path:
    """Return the script of node02, with a second of grace."""
    script = folder / "out/env-node02.sh"
    text = script.read_text()
    assert "readonly grace=10\n" in text
    script.write_text(text.replace("readonly grace=10\n", "readonly grace=1\n"))
    return script


def test_rank_that_ignores_what_it_is_told_is_killed(uneven, tmp_path):
    """A script that is told to end gives ranks that ignore it the time of grace, and no more."""
    emit(uneven, "env", tmp_path / "out")
    program = (
        f"trap '' TERM; echo $$ >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; "
        "while true; do sleep 0.1; done"
    )
    process = start(hostname(tmp_path), impatient(tmp_path), "bash", "-c", program, host="node02")
    wait_for(tmp_path, 3)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_for_the_ranks_alone(uneven, tmp_path, number):
    """USR1 and USR2, which ask for a checkpoint and the like, reach the ranks and end nothing; nor does PIPE."""
    emit(uneven, "env", tmp_path / "out")
    name = number.name.removeprefix("SIG")
    program = (
        f"trap 'echo got {name}; exit 0' {name}; "
        f"echo $$ >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; while true; do sleep 0.05; done"
    )
    process = start(hostname(tmp_path), tmp_path / "out/env-node02.sh", "bash", "-c", program, host="node02")
    wait_for(tmp_path, 3)
    os.kill(process.pid, signal.SIGPIPE)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [f"[{rank}] got {name}" for rank in (1, 2, 3)]
    gone(tmp_path)


def test_ends_all_when_nobody_reads_what_it_says(uneven, tmp_path):
    """The connection that a script was started over may be gone when a rank fails: the others are ended all the same."""
    emit(uneven, "env", tmp_path / "out")
    program = (
        f"echo $$ >{tmp_path}/half-$RANK; mv {tmp_path}/half-$RANK {tmp_path}/up-$RANK; "
        f"until [[ -e {tmp_path}/hung-up ]]; do sleep 0.02; done; [[ $RANK != 1 ]] || exit 3; exec sleep 300"
    )
    process = start(hostname(tmp_path), tmp_path / "out/env-node02.sh", "bash", "-c", program, host="node02")
    wait_for(tmp_path, 3)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    (tmp_path / "hung-up").touch()
    assert process.wait(timeout=30) == 3
    gone(tmp_path)


@pytest.mark.parametrize("ignored", ["", "trap '' TERM; "])
def test_what_ranks_leave_running_is_ended(uneven, tmp_path, ignored):
    """Ranks that end well and leave processes behind: these get TERM, then KILL, and the script ends well."""
    emit(uneven, "env", tmp_path / "out")
    program = f"{ignored}sleep 300 & echo $! >{tmp_path}/up-$RANK; exit 0"
    process = start(hostname(tmp_path), impatient(tmp_path), "bash", "-c", program, host="node02")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(list(tmp_path.glob("up-*"))) == 3
    gone(tmp_path)


def test_ranks_meet_where_it_was_stated(uneven, tmp_path, shell):
    """A MASTER_ADDR or MASTER_PORT that another job left behind is told and not taken."""
    emit(uneven, "env", tmp_path / "out", options=Options(master_addr="10.0.0.1"))
    script = tmp_path / "out/env-node01.sh"
    words = ("bash", "-c", 'echo "$MASTER_ADDR $MASTER_PORT"')
    ran = shell(script, *words, host="node01", MASTER_ADDR="stale", MASTER_PORT="abc")
    assert (ran.code, ran.out) == (0, "[0] 10.0.0.1 29500\n")
    assert ran.err.splitlines() == [
        "env-node01.sh: the ranks meet at MASTER_ADDR=10.0.0.1, and not at the stale of the environment",
        "env-node01.sh: the ranks meet at MASTER_PORT=29500, and not at the abc of the environment",
    ]
    ran = shell(script, *words, host="node01", MASTER_ADDR="10.0.0.1", MASTER_PORT=29500)
    assert (ran.out, ran.err) == ("[0] 10.0.0.1 29500\n", "")


def test_started_by_a_launcher(uneven, tmp_path, shell):
    """A launcher that starts the scripts, one on each host or as many as there are ranks, numbers no ranks."""
    emit(uneven, "env", tmp_path / "out")
    around = {"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 4, "PMI_RANK": 0, "PMI_SIZE": 4, "PMIX_RANK": 0}
    ran = shell(tmp_path / "out/env-node02.sh", "bash", "-c", "echo $RANK", host="node02", **around)
    assert ran.code == 0, ran.err
    assert sorted(ran.out.splitlines()) == ["[1] 1", "[2] 2", "[3] 3"]


def test_what_looks_like_a_dry_run_starts_nothing(uneven, tmp_path, shell):
    """`--dryrun` would be an argument of the command."""
    emit(uneven, "env", tmp_path / "out", options=Options(command=("touch", str(tmp_path / "started"))))
    ran = shell(tmp_path / "out/env-node01.sh", "--dryrun", host="node01")
    assert (ran.code, ran.out) == (64, "")
    assert "found --dryrun, expected --dry-run" in ran.err
    assert not (tmp_path / "started").exists()


def test_ranks_are_sorted_by_host_once(monkeypatch):
    """Many hosts are no more work for each of them."""
    asked = []
    monkeypatch.setattr(job, "by_host", lambda ranks, found=job.by_host: asked.append(1) or found(ranks))
    counts = []
    for hosts in (2, 20):
        asked.clear()
        LAUNCHERS["env"].files(make([(f"node{host}", 0) for host in range(hosts)]), Options())
        counts.append(len(asked))
    assert counts[0] == counts[1]


def test_many_ranks_that_end_at_once(tmp_path, shell):
    """No end is missed, however many come together."""
    emit(make([("node01", gpu) for gpu in range(32)]), "env", tmp_path / "out")
    script = tmp_path / "out/env-node01.sh"
    assert shell(script, "true", host="node01").code == 0
    assert shell(script, "bash", "-c", "exit 9", host="node01").code == 9
    assert shell(script, "bash", "-c", "kill -KILL $$", host="node01").code == 137


def test_changed_files_are_refused(interleaved, tmp_path, shell):
    """Exchanged ranks, a swapped table, another wrapper and another host all stop before anything starts."""
    emit(interleaved, "env", tmp_path / "out")
    script = tmp_path / "out/env-node01.sh"
    text = script.read_text()
    assert "readonly ranks=(0 1 4 5)" in text
    script.write_text(text.replace("ranks=(0 1 4 5)", "ranks=(0 1 2 3)"))
    ran = shell(script, "program", host="node01")
    assert (ran.code, ran.out) == (66, "")
    assert "the ranks 0 1 2 3 of this script are not those of node01" in ran.err
    script.write_text(text)
    other = shell(script, "program", host="node02")
    assert (other.code, other.out) == (65, "")
    assert "refused: made for the host node01, but this is node02" in other.err
    table = tmp_path / "out/ranks.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    ran = shell(script, "program", host="node01")
    assert (ran.code, ran.out) == (66, "")
    assert "ranks.tsv is not the file made with this script" in ran.err


def test_dry_run_starts_nothing(interleaved, tmp_path, shell):
    """A dry run shows what each rank would be started with, and tells of a wrong host too."""
    emit(interleaved, "env", tmp_path / "out")
    ran = shell(
        tmp_path / "out/env-node02.sh", "--dry-run", "touch", str(tmp_path / "started"), host="node02"
    )
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "# on node02: ranks 2-3, 6-7 of 8, meeting at node01 port 29500"
    assert re.findall(r"RANK=(\d) WORLD_SIZE=8 LOCAL_RANK=(\d)", ran.out) == [
        ("2", "0"),
        ("3", "1"),
        ("6", "2"),
        ("7", "3"),
    ]
    assert not (tmp_path / "started").exists()
    assert shell(tmp_path / "out/env-node02.sh", "--dry-run", "touch", host="node01").code == 65
    assert shell(tmp_path / "out/env-node02.sh", host="node02").code == 64


def test_host_named_by_a_variable(interleaved, tmp_path, shell):
    """Where a process has a host name of its own, a variable names the host for the script and the wrapper."""
    launcher = LAUNCHERS["env"]
    placed, options = launcher.job(interleaved), Options()
    wrapper = wrapper_files(placed, options, "host", host_variable="NODE_NAME")
    write_files(wrapper | env_scripts(placed, options, wrapper, host_variable="NODE_NAME"), tmp_path / "out")
    script = tmp_path / "out/env-node02.sh"
    ran = shell(script, "bash", "-c", SHOW, host="pod-7", NODE_NAME="node02")
    assert ran.code == 0, ran.err
    assert sorted(line.split()[0] for line in ran.out.splitlines()) == ["[2]", "[3]", "[6]", "[7]"]
    assert shell(script, "true", host="node02", NODE_NAME="node01").code == 65
    unnamed = shell(script, "true", host="node02")
    assert unnamed.code == 64
    assert "NODE_NAME is not set, expected the name of the host" in unnamed.err
