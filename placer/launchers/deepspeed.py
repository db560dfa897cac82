"""DeepSpeed: one script for each host around `deepspeed.launcher.launch`, which starts the ranks of a host.

The `deepspeed` command sorts the GPUs of a host (`--include` of runner.py), so that their order cannot be had through it.
The launcher it starts on every host keeps the order of `--world_info`: base64 of `{host: [GPU index, ...]}`, hosts in the
order of `--node_rank`. It makes LOCAL_RANK of the rank modulo the ranks of the host, which is right only where all hosts
hold as many. The list has indices alone; the wrapper sets UUIDs where every GPU of a host has one.

Read and run: DeepSpeed 0.19.8 (`launcher/launch.py`).
"""

from __future__ import annotations

import base64
import json

from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import HostRanks, Job
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import Beside, EmittedFile, host_scripts


class DeepSpeed(Launcher):
    """One script per host around DeepSpeed's launcher of a host."""

    name = "deepspeed"
    summary = "one DeepSpeed script per host that keeps the order of GPUs, and the expert permutation"
    visibilities = ("host", "one")

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `deepspeed-HOST.sh` for every host, the wrapper and, where experts move, their permutation."""
        (server,) = job.servers("deepspeed")
        wrapper = wrapper_files(server, options, self.visibility(options), listed=True)
        experts = FRAMEWORKS["deepspeed"].expert_files(job)
        info, master = world_info(server), options.master(server)

        def command(number: int, _: HostRanks) -> list[str | Beside]:
            return [
                *("python3", "-m", "deepspeed.launcher.launch"),
                f"--world_info={info}",
                f"--node_rank={number}",
                f"--master_addr={master}",
                f"--master_port={options.master_port}",
                "--no_python",
                "--no_local_rank",
                Beside("bind.sh"),
            ]

        scripts = host_scripts(
            server,
            self.name,
            command,
            usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
            notes=_notes(job, list(experts)),
            beside=wrapper,
            needs_arguments=not options.command,
        )
        return wrapper | experts | scripts


def world_info(job: Job) -> str:
    """Return what `--world_info` takes: base64 of the GPU indices of every host, both in rank order."""
    hosts = {host.host: [record.gpu for record in host.ranks] for host in job.hosts}
    return base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()


def _notes(job: Job, experts: list[str]) -> list[str]:
    stages = job.strategy.stages
    stage = stages[0]
    notes = [
        "world_info is base64 of the GPU indices of every host in rank order. PROGRAM gets no --local_rank and reads LOCAL_RANK.",
        f"What PROGRAM is to ask DeepSpeed for: {len(stages)} pipeline stages, TP {stage.tp}, DP {stage.dp}.",
    ]
    if len(stages) > 1:
        counts = ", ".join(str(last - first) for first, last in (each.layers for each in stages))
        notes.append(
            f"Layers of the stages: {counts}. No partition_method of PipelineModule names them: set its parts to that."
        )
    if job.experts:
        split = "True" if stage.etp > 1 else "False"
        notes.append(f"MoE layers: ep_size={stage.ep}, enable_expert_tensor_parallelism={split}.")
    if experts:
        notes += [
            f"The checkpoint has to be loaded with its experts in the order of {experts[0]}: new expert p of a layer",
            "is the old expert order[p], in the router (weight and bias) and in the weights.",
        ]
    return notes
