"""Every launcher by name, and `emit`, which writes what one of them makes: all of it or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from placer.errors import ExportError, InputError, nearest
from placer.launchers.base import Launcher, Options
from placer.launchers.deepspeed import DeepSpeed
from placer.launchers.env import Env
from placer.launchers.intelmpi import IntelMpi
from placer.launchers.jax import Jax
from placer.launchers.kubernetes import Kubernetes
from placer.launchers.megatron import Megatron
from placer.launchers.mpich import Mpich
from placer.launchers.nccl import Nccl
from placer.launchers.numbering import FrameworkName
from placer.launchers.openmpi import OpenMpi
from placer.launchers.ranks import Ranks
from placer.launchers.ray import Ray
from placer.launchers.scripts import EmittedFile, check_file_name
from placer.launchers.sglang import Sglang
from placer.launchers.slurm import Slurm
from placer.launchers.soundness import check_placement
from placer.launchers.torchrun import Torchrun
from placer.launchers.trtllm import Trtllm
from placer.launchers.vllm import Vllm
from placer.placement import Placement, write_text

LAUNCHERS: dict[str, Launcher] = {
    launcher.name: launcher
    for launcher in (
        Ranks(),
        Env(),
        Torchrun(),
        Slurm(),
        OpenMpi(),
        Mpich(),
        IntelMpi(),
        DeepSpeed(),
        Megatron(),
        Vllm(),
        Sglang(),
        Trtllm(),
        Ray(),
        Jax(),
        Kubernetes(),
        Nccl(),
    )
}


@dataclass(frozen=True)
class Listing:
    """A launcher in a list; `cannot` says why it cannot express the placement, None when it can or none was given."""

    name: str
    summary: str
    cannot: str | None


def launcher_named(name: str) -> Launcher:
    """Return a launcher; raise InputError with the nearest name for one that is not known."""
    if name not in LAUNCHERS:
        raise InputError(
            f"found the launcher {name[:60]!r}, expected one of {', '.join(LAUNCHERS)}{nearest(name, LAUNCHERS)}"
        )
    return LAUNCHERS[name]


def list_launchers(
    placement: Placement | None = None, framework: FrameworkName | None = None
) -> list[Listing]:
    """Return every launcher, and for a placement whether it can express it."""
    if placement is not None:
        check_placement(placement)
    return [
        Listing(
            launcher.name,
            launcher.summary,
            None if placement is None else launcher.cannot(placement, framework),
        )
        for launcher in LAUNCHERS.values()
    ]


def emit(
    placement: Placement,
    name: str,
    out_dir: str | Path,
    *,
    force: bool = False,
    options: Options | None = None,
) -> list[Path]:
    """Write the files of launcher `name` into `out_dir` and return their paths.

    The folder is made when missing. A file that is there already is replaced only with `force`. Raises ExportError
    when the launcher cannot express the placement, naming those that can, or when the files cannot be written.
    """
    launcher = launcher_named(name)
    check_placement(placement)
    options = options or Options()
    framework = options.framework
    reason = launcher.cannot(placement, framework)
    if reason is not None:
        able = [
            f"`{other.name}`" for other in LAUNCHERS.values() if other.cannot(placement, framework) is None
        ]
        raise ExportError(f"{name} cannot express this placement: {reason}; {_those_that_can(able)}")
    return write_files(launcher.files(placement, options), out_dir, force=force)


def _those_that_can(able: list[str]) -> str:
    if not able:
        return "no launcher can"
    return f"{', '.join(able[:-1])} and {able[-1]} can" if len(able) > 1 else f"{able[0]} can"


def write_files(files: Mapping[str, EmittedFile], out_dir: str | Path, *, force: bool = False) -> list[Path]:
    """Write files into a folder, all of them or none, and return their paths.

    They are written whole to a temporary folder inside it and then moved into place, so that a full disk or a killed
    run does not leave half of them.
    """
    folder = Path(out_dir)
    paths = {folder / check_file_name(name): file for name, file in files.items()}
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise ExportError(f"{path}: cannot be written: it is a folder")
        if not force and (path.exists() or path.is_symlink()):
            raise ExportError(f"{path}: exists already and is replaced only with --force")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".placer."))
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from None
    done = False
    try:
        for path, file in paths.items():
            write_text(staging / path.name, file.text)
            if file.executable:
                mode = (staging / path.name).stat().st_mode & 0o777
                # Whoever may read a script may run it.
                (staging / path.name).chmod(mode | (mode & 0o444) >> 2)
        for path in paths:
            (staging / path.name).replace(path)
        done = True
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not done and not any(folder.iterdir()):
            folder.rmdir()
    return list(paths)
