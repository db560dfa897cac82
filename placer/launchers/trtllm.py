"""TensorRT-LLM under Open MPI: for each server one script around mpirun, the options file, the wrapper and its table.

TensorRT-LLM numbers stages outside TP (`mapping.Mapping`: rank = tp + TP * pp, moe_ep_rank = tp_rank % moe_ep_size) and takes
rank // gpus_per_node for the node, rank % gpus_per_node for the GPU, so that each host holds one run of as many ranks, and
every process sees its host's GPUs in rank order. `tensor_parallel_size` is all ranks of a stage; with attention DP attention
is whole on each. Every rank is started as `trtllm-llmapi-launch trtllm-serve ...`; rank 0 serves HTTP beside its share.

What moves ranks or experts is in the options file, which stands over arguments or under them, depending on the version: such
arguments are refused. The expert map is inside it, since its path would be taken from where the server is started.

Read in the main branch of August 2026: `llmapi/llm_args.py` (TorchLlmArgs, MoeConfig, MoeLoadBalancerConfig), `mapping.py`,
`commands/serve.py`, `llmapi/trtllm-llmapi-launch`, `fused_moe_wide_ep.py`. It does not run without a GPU; that the words and
the map reach every rank was run with Open MPI 4 and 5 and a stub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from placer.expert_maps.tensorrt_llm import FILE_NAME as MAP_FILE
from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import Job, short_names_clash
from placer.launchers.mpi import host_of_each_rank
from placer.launchers.ranks import file_head, wrapper_files
from placer.launchers.scripts import EmittedFile, check_file_name, render_template
from placer.launchers.servers import (
    EVERY_ADDRESS,
    Replica,
    check_words,
    expert_notes,
    layers_of_stages,
    replicas,
    stage_ranks,
)

# TensorRT-LLM's own default.
HTTP_PORT = 8000

#: Arguments that would move ranks or experts away from where the placement has them.
REFUSED: Mapping[str, Sequence[str]] = {
    "the placement says which rank is on which GPU": (
        *("--tp_size", "--tensor_parallel_size", "--pp_size", "--pipeline_parallel_size"),
        *("--cp_size", "--context_parallel_size", "--gpus_per_node"),
    ),
    "the placement says where each expert is": (
        *("--ep_size", "--moe_expert_parallel_size", "--cluster_size", "--moe_cluster_parallel_size"),
    ),
    "the options file is the one made with it, and would not be read": (
        "--extra_llm_api_options",
        "--config",
    ),
}


class Trtllm(Launcher):
    """mpirun scripts and option files of TensorRT-LLM."""

    name = "trtllm"
    summary = "one mpirun script per TensorRT-LLM server with its options file, and the expert map in it"
    visibilities = ("host",)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return for each server `trtllm-run.sh`, its hosts, its options, `ranks.tsv` and `bind.sh`.

        Of several servers the names carry the number: `trtllm-replicaK-run.sh`, `ranks-K.tsv`, `bind-K.sh`. Raises
        ExportError when the ports, the address or the command in `options` cannot be.
        """
        self.visibility(options)
        check_words(options, REFUSED, whole_names=True)
        experts = FRAMEWORKS["trtllm"].expert_files(job)
        map_file = experts.pop(MAP_FILE, None)
        files = dict(experts)
        for replica in replicas(job, "trtllm", options, http_port=HTTP_PORT, ports_each=1):
            files |= _server(job, options, replica, map_file, experts)
        return files


def _server(
    job: Job,
    options: Options,
    replica: Replica,
    map_file: EmittedFile | None,
    experts: Mapping[str, EmittedFile],
) -> dict[str, EmittedFile]:
    name = replica.name(Trtllm.name)
    suffix = f"-{replica.number}" if replica.count > 1 else ""
    # The words of the command stand in the script, before what TensorRT-LLM is told besides.
    own = replace(options, command=(), master_port=replica.meeting_port)
    wrapper = wrapper_files(replica.job, own, "host", suffix=suffix)
    hosts_file, config_file = check_file_name(f"{name}-hosts.txt"), check_file_name(f"{name}.yaml")
    head = file_head(replica.job)
    made = wrapper | {
        hosts_file: EmittedFile("\n".join([head, *host_of_each_rank(replica.job), ""])),
        config_file: EmittedFile(options_text(job, len(replica.hosts[0].ranks), head, map_file)),
    }
    script = check_file_name(f"{name}-run.sh")
    text = render_template(
        "trtllm-run.sh.j2",
        name=script,
        version=job.version,
        digest=job.digest,
        framework="trtllm",
        usage="[ARGUMENT...]" if options.command else "MODEL [ARGUMENT...]",
        needs_arguments=not options.command,
        ranks=len(replica.job.ranks),
        runs={host.host: host.runs for host in replica.hosts},
        exact=short_names_clash(job.hosts),
        hosts_file=hosts_file,
        wrapper=f"bind{suffix}.sh",
        beside={file: emitted.sha256 for file, emitted in (made | dict(experts)).items()},
        notes=[*replica.notes, *expert_notes(experts)],
        refused=REFUSED,
        model=options.command,
        address=EVERY_ADDRESS,
        port=str(replica.port),
        config=config_file,
    )
    return made | {script: EmittedFile(text, executable=True)}


def options_text(job: Job, gpus_per_node: int, head: str, map_file: EmittedFile | None) -> str:
    """Return the YAML that TensorRT-LLM's LLM arguments are read from: degrees, layers and the expert map."""
    stage, size = job.strategy.stages[0], stage_ranks(job)
    lines = [
        head,
        f"tensor_parallel_size: {size}",
        f"pipeline_parallel_size: {len(job.strategy.stages)}",
        f"gpus_per_node: {gpus_per_node}",
    ]
    if len(job.strategy.stages) > 1:
        lines.append(f"pp_partition: {layers_of_stages(job)}")
    if job.experts:
        lines += [f"moe_expert_parallel_size: {stage.ep}", f"moe_tensor_parallel_size: {stage.etp}"]
        if size > stage.tp:
            lines.append("enable_attention_dp: true")
    if map_file is not None:
        lines += ["moe_config:", "  backend: WIDEEP", "  load_balancer:"]
        lines += [f"    {line}" for line in map_file.text.splitlines()]
    return "\n".join([*lines, ""])
