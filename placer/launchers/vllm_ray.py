"""vLLM with its Ray executor: one script per host that starts its Ray node, and a program that starts the servers.

vLLM's Ray executor makes an actor for each of its ranks, rank i in the bundle that VLLM_RAY_BUNDLE_INDICES names i-th
(`ray_utils.get_bundles_for_indices`), in the placement group of the actor it is started in. Bundles ask for a host by the label
of its node, so that ranks lie on hosts in any way. Inside a host an engine's workers take its GPUs by ascending index, whichever
bundles they are in (`RayExecutorV2._init_executor` sorts them), so that a placement must have them so. Which of a node's GPUs a
bundle has is Ray's choice; the program looks it up first, since engines that share a host must not take one another's.

One engine is one DP rank. Several of one server are started as vLLM's external load balancing wants it: each in an actor of its
own, with an HTTP port of its own.

Read in vLLM 0.33.0 and run with Ray 2.60: nodes, placement group, bundles and vLLM's own `get_bundles_for_indices` with the
sorting of its executor; vLLM itself does not start without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import Job, short_names_clash
from placer.launchers.ranks import dump_ranks, rank_rows
from placer.launchers.ray import LABEL, Ray
from placer.launchers.scripts import EmittedFile, render_template
from placer.launchers.servers import check_words, expert_notes
from placer.launchers.vllm import HTTP_PORT, REFUSED, degrees, engines, layer_partition

PROGRAM, TABLE = "vllm_ray.py", "ranks.tsv"
#: Refused where there are several engines.
ONE_PORT: Mapping[str, Sequence[str]] = {
    f"each engine has a port of its own, from {HTTP_PORT} on": ("--port",)
}


class VllmRay(Ray):
    """Node scripts, and a program of actors that start vLLM's engines."""

    name = "vllm-ray"
    summary = "one script per host that starts its Ray node, and vllm_ray.py, which starts vLLM on the GPUs of each rank"
    visibilities = ("host",)
    program = PROGRAM

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `vllm-ray-HOST.sh` for every host, `vllm_ray.py`, `ranks.tsv` and, where experts move, their permutation.

        Raises ExportError for a command with arguments against the placement.
        """
        self.visibility(options)
        workers = job.shapes[0].tp * len(job.shapes)
        refused = {**REFUSED, **(ONE_PORT if len(job.ranks) > workers else {})}
        check_words(options, refused)
        _check_ports(len(job.ranks) // workers, len(job.servers("vllm")), options.master_port)
        numbered = _numbered(job)
        table = EmittedFile(dump_ranks(numbered, rank_rows(numbered, options)))
        experts = FRAMEWORKS["vllm"].expert_files(job)
        beside = {TABLE: table, **experts}
        program = render_template(
            "vllm_ray.py.j2",
            name=PROGRAM,
            version=job.version,
            digest=job.digest,
            scripts=f"{self.name}-HOST.sh",
            prefix=self.name,
            usage="[ARGUMENT...]" if options.command else "MODEL [ARGUMENT...]",
            notes=expert_notes(experts),
            table_file=TABLE,
            beside={file: emitted.sha256 for file, emitted in beside.items()},
            exact=short_names_clash(job.hosts),
            label=LABEL,
            workers=workers,
            engines=engines(job),
            http_port=HTTP_PORT,
            rpc_port=options.master_port,
            command=options.command,
            words=["--distributed-executor-backend=ray", *degrees(job)],
            environment=layer_partition(job),
            refused=refused,
        )
        return beside | {PROGRAM: EmittedFile(program, executable=True)} | self._nodes(numbered, options)


def _numbered(job: Job) -> Job:
    """Return the job with vLLM's numbers, of one server after the other."""
    records = chain.from_iterable(server.ranks for server in job.servers("vllm"))
    ranks = tuple(record.model_copy(update={"rank": number}) for number, record in enumerate(records))
    return replace(job, ranks=ranks, framework="vllm")


def _check_ports(all_engines: int, servers: int, first: int) -> None:
    """Raise ExportError where the ports at which engines meet, from `first` on, end too high or are those of HTTP."""
    last, last_http = first + servers - 1, HTTP_PORT + all_engines - 1
    if max(last, last_http) > 65535:
        raise ExportError(
            f"vllm-ray would use the ports {first} to {last} and {HTTP_PORT} to {last_http}, and ports end at 65535"
        )
    if first <= last_http and last >= HTTP_PORT:
        raise ExportError(
            f"vllm-ray serves at the ports {HTTP_PORT} to {last_http}, and its servers would meet at {first} to {last}: "
            "state another master port"
        )
