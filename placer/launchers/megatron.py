"""Megatron-LM: torchrun on every host, the arguments that make Megatron's groups those of the placement, and the experts.

A rank has the number it has in the placement: Megatron's default order `tp-cp-ep-dp-pp` is the placement's own, for the
grid of attention and for that of the experts. `--use-tp-pp-dp-mapping` would number ranks otherwise, so the scripts
refuse it, and other ways to say how layers lie on stages. Its parser takes no name cut short (`allow_abbrev=False`). The degrees come behind the user's own arguments, where the last of
two wins.

Argument names and their conflicts as in Megatron-LM core 0.16 (`megatron/training/arguments.py`, `transformer_config.py`);
the layout is held against `PipelineParallelLayerLayout` of Megatron-Core 0.16.1. Its development branch of 2026 states
expert TP by `--expert-tensor-parallel-num-weight-shards` instead, which was not tried.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS, slots_and_experts
from placer.launchers.job import Job, layer_count
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import EmittedFile
from placer.launchers.servers import check_words
from placer.launchers.torchrun import torchrun_scripts

ARGUMENT_FILE = "megatron-arguments.txt"

#: Arguments that would number ranks, or lay out layers, otherwise than the placement does, by the reason against them.
REFUSED = {
    "the placement numbers ranks in the default order tp-cp-ep-dp-pp: leave it out": (
        "--use-tp-pp-dp-mapping",
    ),
    "the placement says which stage holds which layers: leave it out": (
        "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers",
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split",
    ),
}


class Megatron(Launcher):
    """torchrun scripts with Megatron's arguments."""

    name = "megatron"
    summary = (
        "one torchrun script per host with Megatron's degrees and pipeline layout, and the expert permutation"
    )
    visibilities = ("host", "one")

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `megatron-HOST.sh` for every host, the wrapper, the arguments and, where experts move, their permutation.

        Raises ExportError for a command that has arguments against the placement.
        """
        check_words(options, REFUSED, whole_names=True)
        # The numbers are the placement's own, and Megatron's at once.
        (server,) = job.servers("megatron")
        wrapper = wrapper_files(server, options, self.visibility(options), listed=True)
        experts = FRAMEWORKS["megatron"].expert_files(job)
        arguments = megatron_arguments(job)
        scripts = torchrun_scripts(
            server,
            options,
            self.name,
            beside=wrapper,
            notes=_notes(job, list(experts)),
            after=arguments,
            refused=REFUSED,
            whole_names=True,
        )
        return wrapper | {ARGUMENT_FILE: EmittedFile("\n".join([*arguments, ""]))} | experts | scripts


def megatron_arguments(job: Job) -> list[str]:
    """Return the arguments that give Megatron the degrees, layers and experts of a job, each one word."""
    stage = job.strategy.stages[0]
    words = [
        f"--tensor-model-parallel-size={stage.tp}",
        f"--pipeline-model-parallel-size={len(job.strategy.stages)}",
        "--context-parallel-size=1",
        f"--num-layers={layer_count(job)}",
    ]
    if len(job.strategy.stages) > 1:
        words.append(f"--pipeline-model-parallel-layout={pipeline_layout(job)}")
    if job.experts:
        words += [
            f"--expert-model-parallel-size={stage.ep}",
            f"--expert-tensor-parallel-size={stage.etp}",
            f"--num-experts={slots_and_experts(job)[1]}",
        ]
        if len(job.experts) < layer_count(job):
            pattern = ",".join(str(int(layer in job.experts)) for layer in range(layer_count(job)))
            words.append(f"--moe-layer-freq=[{pattern}]")
    return words


def pipeline_layout(job: Job) -> str:
    """Return the layers of every stage as Megatron writes them, such as `Ett|ttt|L`.

    Layers are written out one by one, without `*n`: a shell that reads the word unquoted finds nothing to expand.
    """
    stages = ["t" * (last - first) for first, last in (stage.layers for stage in job.strategy.stages)]
    stages[0] = f"E{stages[0]}"
    stages[-1] += "L"
    return "|".join(stages)


def _notes(job: Job, experts: list[str]) -> list[str]:
    counts = ", ".join(str(last - first) for first, last in (stage.layers for stage in job.strategy.stages))
    notes = [
        f"What {ARGUMENT_FILE} holds goes behind the arguments. Of two that differ Megatron takes the last.",
        f"Layers of the stages: {counts}. Layers for multi-token prediction are not placed: give them a place yourself,",
        "by an m before the L of the layout.",
    ]
    if experts:
        notes += [
            f"The checkpoint has to be loaded with its experts in the order of {experts[0]}: new expert p of a layer",
            "is the old expert order[p], in the router (weight and bias) and in the weights.",
        ]
    return notes
