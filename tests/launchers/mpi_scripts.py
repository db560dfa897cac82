"""What the scripts of all MPI launchers must do, held against a program that only says what it was given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.by_hand import make, uuid
from tests.launchers.conftest import STUB, Ran

Shell = Callable[..., Ran]

LEFT_OVER = dict.fromkeys(
    [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "PMIX_RANK",
        "PMI_RANK",
        "PALS_RANKID",
        "SLURM_PROCID",
        "MV2_COMM_WORLD_RANK",
        "FLUX_TASK_RANK",
        "JSM_NAMESPACE_RANK",
    ],
    "9",
)


@dataclass(frozen=True)
class Scripts:
    """A launcher's emitted files. `says` is what its program answers to `--version`."""

    name: str
    program: str
    says: str
    hosts_file: str

    @property
    def script(self) -> str:
        return f"{self.name}-run.sh"

    def write(self, folder: Path, placed: Placement, options: Options | None = None) -> Path:
        """Emit into `folder/out` and return the script; `folder/stubs` gets the program."""
        self.stub(folder, self.program, self.says)
        emit(placed, self.name, folder / "out", options=options)
        return folder / "out" / self.script

    def stub(self, folder: Path, program: str, says: str, code: int = 0) -> Path:
        """Make a program of this name that answers to `--version`, and else tells what it was given."""
        path = folder / "stubs" / program
        version = f"if sys.argv[1:] == ['--version']:\n    print({says!r})\n    sys.exit({code})\n"
        first, rest = STUB.format(python=sys.executable).split("\nprint", 1)
        path.write_text(f"{first}\n{version}print{rest}")
        path.chmod(0o755)
        return path


def check_command(
    scripts: Scripts, folder: Path, shell: Shell, placed: Placement, expected: list[str]
) -> None:
    """The script becomes the program with `expected` words, the user's options, and the wrapper with the user's command.

    What another launcher left in the environment is gone, the rest is as it was.
    """
    script = scripts.write(folder, placed, Options(command=("it's", "$HOME")))
    out = folder / "out"
    words = [str(out / word.removeprefix("@")) if word.startswith("@") else word for word in expected]
    options = ["--mpirun", "-x", "A B", "--"]
    ran = shell(script, *options, "--mpirun", "--", "", host="anywhere", **LEFT_OVER, KEPT="1")
    assert ran.code == 0, ran.err
    bind = str(out / "bind.sh")
    assert ran.argv == [scripts.program, *words, "-x", "A B", bind, "--mpirun", "--", ""]
    assert not set(LEFT_OVER) & set(ran.env)
    assert ran.env["KEPT"] == "1"
    assert shell(script, host="anywhere").argv == [scripts.program, *words, bind]
    other = scripts.stub(folder, "other program", scripts.says)
    assert shell(script, "a", host="anywhere", MPIRUN=other).argv == ["other program", *words, bind, "a"]


def check_dry_run(scripts: Scripts, folder: Path, shell: Shell) -> None:
    """It shows the ranks of every host and the command, and starts nothing."""
    placed = make([("node02", 1), ("node01", 0), ("node01", 1), ("node02", 0)])
    script = scripts.write(folder, placed)
    ran = shell(script, "--dry-run", "--mpirun", "-v", "--", "prog ram", host="anywhere")
    assert ran.code == 0, ran.err
    *hosts, command = ran.out.splitlines()
    assert hosts == ["# on node02: ranks 0, 3", "# on node01: ranks 1-2"]
    assert command.startswith(f"{scripts.program} ")
    assert f" -v {folder / 'out/bind.sh'} prog\\ ram" in command
    assert '"argv"' not in ran.out


def check_changed_files(scripts: Scripts, folder: Path, shell: Shell) -> None:
    """A file beside the script that is not the one made with it, or not there, stops it."""
    placed = make([("node02", 1), ("node01", 0)])
    script = scripts.write(folder, placed)
    for name in (scripts.hosts_file, "ranks.tsv", "bind.sh"):
        path = folder / "out" / name
        kept = path.read_text()
        path.write_text(kept + "\n")
        ran = shell(script, "program", host="node01")
        assert (ran.code, ran.out) == (66, "")
        assert f"{name} is not the file made with this script" in ran.err
        path.unlink()
        ran = shell(script, "--dry-run", "program", host="node01")
        assert (ran.code, ran.out) == (66, "")
        assert f"cannot read {path}" in ran.err
        path.write_text(kept)
        path.chmod(0o755)
    assert shell(script, "program", host="node01").code == 0


def check_misuse(scripts: Scripts, folder: Path, shell: Shell) -> None:
    """Nothing to run, options without an end, a program that is missing, breaks or is another: a plain message each."""
    script = scripts.write(folder, make([("node02", 1), ("node01", 0)]))
    usage = f"usage: {scripts.script} [--dry-run] [--mpirun OPTION... --] PROGRAM [ARGUMENT...]"
    for words in ([], ["--dry-run"], ["--mpirun", "-v", "--"]):
        ran = shell(script, *words, host="anywhere")
        assert (ran.code, ran.out) == (64, "")
        assert usage in ran.err
    for words in (["program", ":", "other"], ["--mpirun", ":", "other", "--", "program"]):
        ran = shell(script, *words, host="anywhere")
        assert (ran.code, ran.out) == (64, "")
        assert f"found `:` among the arguments, which {scripts.program} takes for the beginning" in ran.err
    ran = shell(script, "--dryrun", "program", host="anywhere")
    assert (ran.code, ran.out) == (64, "")
    assert "found --dryrun, expected --dry-run" in ran.err
    ran = shell(script, "--mpirun", "-v", "program", host="anywhere")
    assert (ran.code, ran.out) == (64, "")
    assert "found no `--` after `--mpirun`" in ran.err
    ran = shell(script, "program", host="anywhere", MPIRUN="not-there")
    assert (ran.code, ran.out) == (69, "")
    assert "cannot run not-there" in ran.err
    for says, code in (("some MPI 5.0\nand more", 0), ("broken", 3)):
        other = scripts.stub(folder, "other", says, code)
        ran = shell(script, "program", host="anywhere", MPIRUN=other)
        assert (ran.code, ran.out) == (69, "")
        assert f"{says.splitlines()[0]}; MPIRUN names the program" in ran.err


_LABEL = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,6}[a-z0-9])?(\.[a-z0-9]{1,5})?", fullmatch=True)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any map of ranks to the GPUs of up to four hosts, with and without UUIDs."""
    hosts = draw(st.lists(_LABEL, min_size=1, max_size=4, unique=True))
    seats = st.tuples(st.sampled_from(hosts), st.integers(0, 15))
    gpus = draw(st.lists(seats, min_size=1, max_size=24, unique=True))
    return make([(*gpu, uuid(number) if number % 2 else None) for number, gpu in enumerate(gpus)])


def hosts_of(placed: Placement) -> list[str]:
    """Return the host of every rank."""
    return [record.host for record in placed.ranks]


def read_machines(text: str) -> list[str]:
    """Return the host of every rank from a machine file, as its format is described: `host:count`, `#` for comments."""
    hosts: list[str] = []
    for line in text.splitlines():
        host, _, count = line.partition("#")[0].strip().partition(":")
        hosts += [host] * int(count or 1) if host else []
    return hosts
