"""Scripts from templates, and the names of the files they go to.

Whatever is put into a script passes the `quote` filter, even where a pattern has checked it before: a script runs on
every host of the cluster.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2

from placer.errors import ExportError
from placer.launchers.job import HostRanks, Job, by_host, short_names_clash
from placer.placement import RankRecord
from placer.spec.names import check_host

# A name has to leave room for what a temporary file adds to it; file systems allow 255 bytes.
MAX_FILE_NAME = 230

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLAIN = re.compile(r"[A-Za-z0-9 ._+!:,/=\[\]()-]*")


@dataclass(frozen=True)
class EmittedFile:
    """The text of one file, and whether it is to be run."""

    text: str
    executable: bool = False

    @property
    def sha256(self) -> str:
        """SHA-256 of the file as it will be written."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def check_file_name(name: str) -> str:
    """Return `name` when it is one plain part of a path; raise ExportError otherwise."""
    if len(name) > MAX_FILE_NAME or not _FILE_NAME.fullmatch(name):
        raise ExportError(
            f"cannot write a file named {name[:60]!r}: expected {MAX_FILE_NAME} letters, digits and `._-` at most"
        )
    return name


def host_file(prefix: str, host: str, suffix: str) -> str:
    """Return the name of a host's file, such as `torchrun-node01.sh`; raise ExportError for no host name."""
    try:
        check_host(host)
    except ValueError as error:
        raise ExportError(f"cannot name a file after a host: {error}") from None
    return check_file_name(f"{prefix}-{host}{suffix}")


@dataclass(frozen=True)
class Beside:
    """A word of a command that is the path of a file emitted beside the script."""

    name: str


def host_scripts(
    job: Job,
    name: str,
    command: Callable[[int, HostRanks], Sequence[str | Beside]],
    *,
    usage: str,
    ranks: Sequence[RankRecord] | None = None,
    notes: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    beside: Mapping[str, EmittedFile] | None = None,
    needs_arguments: bool = False,
    after: Sequence[str] = (),
    refused: Mapping[str, Sequence[str]] | None = None,
    whole_names: bool = False,
    cleared: Sequence[str] = (),
) -> dict[str, EmittedFile]:
    """Return `NAME-HOST.sh` for every host of `ranks`, all of the job unless told, in the order of their first.

    Each checks its host, shows the command that host's GPUs in rank order, and becomes what `command` returns for the
    host's number and ranks, with the arguments given to the script. `beside` are emitted files the command reads: the
    script refuses to run when one is missing or not the one made with it. `notes` are lines under the usage. `after` are
    words behind the arguments given to the script. `refused` are arguments it does not take, by the reason; also cut short,
    unless the parser takes `whole_names` alone. `cleared` are environment variables the command is not to have.
    """
    hosts = job.hosts if ranks is None else by_host(ranks)
    exact = short_names_clash(job.hosts)
    sums = {check_file_name(file): emitted.sha256 for file, emitted in (beside or {}).items()}
    scripts: dict[str, EmittedFile] = {}
    for number, host in enumerate(hosts):
        file = host_file(name, host.host, ".sh")
        text = render_template(
            "host.sh.j2",
            name=file,
            title=f"{name} on {host.host}, host {number} of {len(hosts)}: ranks {host.runs}",
            usage=usage,
            notes=notes,
            version=job.version,
            digest=job.digest,
            host=host.host,
            exact=exact,
            ranks=host.runs,
            environment={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": ",".join(host.devices),
                **(environment or {}),
            },
            command=[
                {"beside": isinstance(word, Beside), "word": _word(word)} for word in command(number, host)
            ],
            beside=sums,
            needs_arguments=needs_arguments,
            after=after,
            refused=refused or {},
            whole_names=whole_names,
            cleared=cleared,
        )
        scripts[file] = EmittedFile(text, executable=True)
    return scripts


def _word(word: str | Beside) -> str:
    return check_file_name(word.name) if isinstance(word, Beside) else word


def quote(value: object) -> str:
    """Return a value as one word of a shell script; raise ExportError for what cannot be printed on one line."""
    text = str(value)
    if not text.isprintable():
        raise ExportError(
            f"cannot put {text[:60]!r} into a script: it holds a line break or another control sign"
        )
    return shlex.quote(text)


def plain(value: object) -> str:
    """Return a value that stands in a comment or as a variable name, unquoted; raise ExportError for anything odd."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise ExportError(f"cannot put {text[:60]!r} into a script: it holds signs that are not plain")
    return text


def render_template(template: str, /, **values: object) -> str:
    """Return a template of `templates/` filled in."""
    return _templates().get_template(template).render(values)


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    # The output is shell and not HTML: `quote` is the escaping, and a value left out is an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # `{#` is the length of an array in the shell.
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["quote"] = quote
    environment.filters["plain"] = plain
    return environment
