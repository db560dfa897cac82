"""Every launcher by name, and `emit`, which writes what one of them makes: all of it or nothing."""

from __future__ import annotations

import os
import re
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
from placer.launchers.vllm_ray import VllmRay
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
        VllmRay(),
        Sglang(),
        Trtllm(),
        Ray(),
        Jax(),
        Kubernetes(),
        Nccl(),
    )
}


#: What every emitted script says in a line of its head.
_HEAD = re.compile(rb"^(?:# )?placer [A-Za-z0-9.+!_-]{1,64} placement ([0-9a-f]{64})$", re.MULTILINE)
_STARTED = (".sh", ".py")
_HEAD_BYTES = 2000


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
    return write_files(launcher.files(placement, options), out_dir, force=force, digest=placement.digest())


def _those_that_can(able: list[str]) -> str:
    if not able:
        return "no launcher can"
    return f"{', '.join(able[:-1])} and {able[-1]} can" if len(able) > 1 else f"{able[0]} can"


def write_files(
    files: Mapping[str, EmittedFile],
    out_dir: str | Path,
    *,
    force: bool = False,
    digest: str | None = None,
) -> list[Path]:
    """Write files into a folder, all of them or none, and return their paths.

    They are written whole to a temporary folder inside it and then moved into place, so that a full disk or a killed
    run does not leave half of them. A folder with files of another placement than that of `digest` is refused, since one
    of its scripts could be started among the new ones; nothing is ever removed.
    """
    if not str(out_dir):
        raise InputError("is empty, expected a folder", key="-o")
    folder = Path(out_dir)
    paths = {folder / check_file_name(name): file for name, file in files.items()}
    try:
        _check_folder(folder, paths, digest, force=force)
        made = not folder.exists()
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from None
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


def _check_folder(
    folder: Path, paths: Mapping[Path, EmittedFile], digest: str | None, *, force: bool
) -> None:
    """Raise ExportError for what is not to be replaced, and for scripts of another placement that would stay."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ExportError(f"{folder}: cannot be written: it is a file, expected a folder")
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise ExportError(f"{path}: cannot be written: it is a folder")
        if not force and (path.exists() or path.is_symlink()):
            raise ExportError(f"{path}: exists already and is replaced only with --force")
    stays = sorted(_of_others(folder, digest) - set(paths)) if digest is not None and folder.exists() else []
    if stays:
        count = f" and {len(stays) - 1} more" if len(stays) > 1 else ""
        raise ExportError(
            f"{stays[0]}{count}: of another placement, and could be started among the new files; remove what is of that "
            "placement, or state another folder"
        )


def _of_others(folder: Path, digest: str) -> set[Path]:
    """Return the scripts in a folder that were emitted from a placement of another digest."""
    found: set[Path] = set()
    for path in folder.iterdir():
        if path.suffix in _STARTED and path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            with path.open("rb") as stream:
                head = _HEAD.search(stream.read(_HEAD_BYTES))
            if head is not None and head.group(1).decode() != digest:
                found.add(path)
    return found
