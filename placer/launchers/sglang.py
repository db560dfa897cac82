"""SGLang: one server script for each host and replica, and the expert map the servers start from.

What SGLang means by its degrees: `tp-size` is all GPUs of a stage. With DP attention the attention groups are carved
out of it, `tp-size / dp-size` ranks each with TP fastest, and the experts have `tp-size / ep-size` expert-TP ranks,
fastest too; so a rank here has the number it has in the placement. Host number r holds the r-th run of ranks, which
works out only when hosts hold equal shares and stages and hosts divide one another.

Read in and run with the parsers of SGLang 0.5.23. It says `--attn-dp-size N` for what older versions know as `--dp-size N
--enable-dp-attention`, and takes both; the older words are emitted, as all versions take them. How copies of an expert are
chosen among is left to it: with a map and an all-to-all backend it takes the nearest (`static`), and without a backend it
ends when told to, since all ranks must then choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS, slots_and_experts
from placer.launchers.job import HostRanks, Job
from placer.launchers.ranks import RankRow
from placer.launchers.scripts import Beside, EmittedFile, host_scripts
from placer.launchers.servers import (
    EVERY_ADDRESS,
    Replica,
    check_words,
    layers_of_stages,
    replicas,
    stage_ranks,
)

EXPERT_FILE = "expert_location.json"

# SGLang's own default. Every host of a server listens on it, so that replicas which share a host need several.
HTTP_PORT = 30000

#: Arguments that would move ranks or experts away from where the placement has them.
REFUSED = {
    "the placement says which rank is on which GPU": (
        "--nnodes",
        "--node-rank",
        "--tp",
        "--tp-size",
        "--tensor-parallel-size",
        "--pp-size",
        "--pp",
        "--pipeline-parallel-size",
        "--ep",
        "--ep-size",
        "--expert-parallel-size",
        "--dp",
        "--dp-size",
        "--data-parallel-size",
        "--attn-dp-size",
        "--attention-data-parallel-size",
        "--attn-cp-size",
        "--attention-context-parallel-size",
        "--moe-dp-size",
        "--moe-data-parallel-size",
        "--base-gpu-id",
        "--gpu-id-step",
    ),
    "the placement says where each expert is": (
        "--init-expert-location",
        "--ep-num-redundant-experts",
        "--enable-eplb",
    ),
    "what a file of arguments says is not looked at: state its arguments here": ("--config",),
}


class Sglang(Launcher):
    """Server scripts and the expert map of SGLang."""

    name = "sglang"
    summary = "one SGLang server script per host and replica, and the expert map for --init-expert-location"

    visibilities = ("host",)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return the scripts of every host and, for a MoE model, `expert_location.json`.

        A script is `sglang-HOST.sh`, or `sglang-replicaK-HOST.sh` where there is more than one replica. Raises
        ExportError when the ports, the address or the command in `options` cannot be.
        """
        self.visibility(options)
        check_words(options, REFUSED)
        files = FRAMEWORKS["sglang"].expert_files(job)
        scripts: dict[str, EmittedFile] = {}
        for replica in replicas(job, "sglang", options, http_port=HTTP_PORT, ports_each=_ports_each(job)):
            scripts |= _scripts(job, options, replica, files)
        return files | scripts


def _scripts(
    job: Job, options: Options, replica: Replica, beside: Mapping[str, EmittedFile]
) -> dict[str, EmittedFile]:
    hosts, numa = len(replica.hosts), replica.numa(options)
    common = [*_degrees(job), *_experts(job), f"--host={EVERY_ADDRESS}"]
    notes: list[str] = []
    if replica.count > 1:
        common.append(f"--port={replica.port}")
        notes = [
            f"Replica {replica.number} of {replica.count}: a server of its own, with ranks from 0, for a router to send "
            "requests to.",
            f"It serves at port {replica.port} of {replica.head}, {HTTP_PORT} + replica, and meets from port "
            f"{replica.meeting_port} on.",
        ]
    environment = {}
    if len(job.strategy.stages) > 1:
        environment["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, layers_of_stages(job)))

    def command(number: int, host: HostRanks) -> list[str | Beside]:
        return [
            *("python3", "-m", "sglang.launch_server", f"--nnodes={hosts}", f"--node-rank={number}"),
            f"--dist-init-addr={options.endpoint(replica.head, replica.meeting_port)}",
            *common,
            *_numa(numa.get(host.host, [])),
            *options.command,
        ]

    return host_scripts(
        job,
        replica.name(Sglang.name),
        command,
        usage="[ARGUMENT...]" if options.command else "--model-path MODEL [ARGUMENT...]",
        ranks=replica.job.ranks,
        notes=notes,
        environment=environment,
        beside=beside,
        needs_arguments=not options.command,
        refused=REFUSED,
    )


def _degrees(job: Job) -> list[str | Beside]:
    stage, size = job.strategy.stages[0], stage_ranks(job)
    words: list[str | Beside] = [
        f"--tp-size={size}",
        f"--pp-size={len(job.strategy.stages)}",
        f"--ep-size={stage.ep}",
    ]
    if size > stage.tp:
        words += [f"--dp-size={size // stage.tp}", "--enable-dp-attention"]
        dense_layers = len(job.experts) < sum(layers_of_stages(job))
        if stage.tp == 1 and dense_layers:
            # Without it the dense layers are split over all ranks, in parts too small for blocks of FP8.
            words.append("--moe-dense-tp-size=1")
    return words


def _experts(job: Job) -> list[str | Beside]:
    if not job.experts:
        return []
    slots, experts = slots_and_experts(job)
    return [
        *("--init-expert-location", Beside(EXPERT_FILE)),
        f"--ep-num-redundant-experts={slots - experts}",
    ]


def _numa(rows: Sequence[RankRow]) -> list[str]:
    """SGLang takes entry i for the i-th of CUDA_VISIBLE_DEVICES (`numa_utils.get_numa_node_if_available`)."""
    return ["--numa-node", *(str(row.numa) for row in rows)] if rows else []


def _ports_each(job: Job) -> int:
    """Return how many ports a server may use from its meeting port on.

    With DP attention SGLang listens on the next 6 and on the 13th; its Rust server adds one for each DP rank after those 6.
    """
    groups = stage_ranks(job) // job.strategy.stages[0].tp
    return 10 * (groups // 10 + 2)
