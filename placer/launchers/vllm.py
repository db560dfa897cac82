"""vLLM with its multiprocessing executor: one `vllm serve` script for each host and replica.

vLLM numbers DP outside PP outside TP (`parallel_state.initialize_model_parallel`); an engine is one DP rank, PP x TP workers.
With `--nnodes` host r holds the r-th run of ranks: several whole engines, or an equal part of one. From `--node-rank` it takes
its first DP rank (`EngineArgs.create_engine_config`), and a worker takes the GPU at its place in CUDA_VISIBLE_DEVICES
(`ParallelConfig.get_local_gpu_index`), which the script sets in rank order; `--device-ids` would count from there and is not
given. The first host serves HTTP, the others are headless.

Experts are whole over all DP x TP ranks of a stage with `--enable-expert-parallel`, and split over them without; vLLM puts
experts 0 to k - 1 on the first rank and so on, and reads no other map, so that another order is a reordered checkpoint.

Run with the parsers and the functions named here of vLLM 0.33.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import HostRanks, Job
from placer.launchers.ranks import RankRow
from placer.launchers.scripts import Beside, EmittedFile, host_scripts
from placer.launchers.servers import (
    Replica,
    check_words,
    expert_notes,
    layers_of_stages,
    replicas,
    stage_ranks,
)

# vLLM's own default.
HTTP_PORT = 8000

#: A server meets at its meeting port, and its engines at the next.
PORTS_EACH = 2

_RANKS = (
    "--nnodes -n --node-rank -r --device-ids --headless --distributed-executor-backend --tensor-parallel-size -tp "
    "--pipeline-parallel-size -pp --prefill-context-parallel-size -pcp --data-parallel-size -dp --data-parallel-rank -dpn "
    "--data-parallel-start-rank -dpr --data-parallel-size-local -dpl --data-parallel-backend -dpb "
    "--data-parallel-hybrid-lb -dph --data-parallel-external-lb -dpe --data-parallel-multi-port-external-lb -dpm"
)
_EXPERTS = (
    "--enable-expert-parallel -ep --no-enable-expert-parallel --disable-expert-parallel --expert-placement-strategy "
    "--enable-eplb --eplb-config --enable-elastic-ep"
)

#: Arguments that would move ranks or experts away from where the placement has them.
REFUSED: Mapping[str, Sequence[str]] = {
    "the placement says which rank is on which GPU": _RANKS.split(),
    "the placement says where each expert is": _EXPERTS.split(),
    "what a file of arguments says is not looked at: state its arguments here": ["--config"],
}


class Vllm(Launcher):
    """Server scripts of vLLM."""

    name = "vllm"
    summary = "one `vllm serve` script per host and replica (multiprocessing), and the expert permutation"
    visibilities = ("host",)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return the scripts of every host and, where experts move, their permutation.

        A script is `vllm-HOST.sh`, or `vllm-replicaK-HOST.sh` where there is more than one replica. Raises ExportError
        when the ports, the address or the command in `options` cannot be.
        """
        self.visibility(options)
        check_words(options, REFUSED)
        files = FRAMEWORKS["vllm"].expert_files(job)
        scripts: dict[str, EmittedFile] = {}
        for replica in replicas(job, "vllm", options, http_port=HTTP_PORT, ports_each=PORTS_EACH):
            scripts |= _scripts(job, options, replica, files)
        return files | scripts


def degrees(job: Job) -> list[str]:
    """Return the arguments that give vLLM the degrees of one server, but for DP."""
    stage = job.strategy.stages[0]
    words = [f"--tensor-parallel-size={stage.tp}", f"--pipeline-parallel-size={len(job.strategy.stages)}"]
    if job.experts and stage.ep > 1:
        words += ["--enable-expert-parallel", "--expert-placement-strategy=linear"]
    return words


def engines(job: Job) -> int:
    """Return how many engines a server has: one for each of its DP ranks."""
    return max(1, stage_ranks(job) // job.strategy.stages[0].tp)


def layer_partition(job: Job) -> dict[str, str]:
    """Return the environment that gives vLLM the layers of each stage; of one stage, none."""
    if len(job.strategy.stages) == 1:
        return {}
    return {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, layers_of_stages(job)))}


def _scripts(
    job: Job, options: Options, replica: Replica, beside: Mapping[str, EmittedFile]
) -> dict[str, EmittedFile]:
    numa = replica.numa(options)

    def command(number: int, host: HostRanks) -> list[str | Beside]:
        words = ["vllm", "serve", "--distributed-executor-backend=mp", *degrees(job)]
        words += _nodes(job, options, replica, number)
        # Words that take several values stand before others, or they would take the model as well.
        words += _numa(numa.get(host.host, []))
        words += [f"--port={replica.port}"] if number == 0 else ["--headless"]
        return [*words, *options.command]

    return host_scripts(
        job,
        replica.name(Vllm.name),
        command,
        usage="[ARGUMENT...]" if options.command else "MODEL [ARGUMENT...]",
        ranks=replica.job.ranks,
        notes=[*replica.notes, *expert_notes(beside)],
        environment=layer_partition(job),
        beside=beside,
        needs_arguments=not options.command,
        refused=REFUSED,
    )


def _nodes(job: Job, options: Options, replica: Replica, number: int) -> list[str]:
    hosts, count = len(replica.hosts), engines(job)
    words = [f"--data-parallel-size={count}"] if count > 1 else []
    if hosts == 1:
        return words
    if count > 1:
        words += [
            f"--data-parallel-size-local={max(1, count // hosts)}",
            f"--data-parallel-rpc-port={replica.meeting_port + 1}",
        ]
    return [
        *words,
        f"--nnodes={hosts}",
        f"--node-rank={number}",
        f"--master-addr={options.master_addr or replica.head}",
        f"--master-port={replica.meeting_port}",
    ]


def _numa(rows: Sequence[RankRow]) -> list[str]:
    """vLLM takes entry i for the i-th of CUDA_VISIBLE_DEVICES (`numa_utils._get_numactl_worker_args`)."""
    if not rows:
        return []
    words = ["--numa-bind-nodes", *(str(row.numa) for row in rows)]
    cpus = [row.cpus for row in rows if row.cpus is not None]
    if len(cpus) == len(rows):
        words += ["--numa-bind-cpus", *cpus]
    return [*words, "--numa-bind"]
