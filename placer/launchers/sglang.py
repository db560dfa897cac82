"""SGLang: one server script for each host, and the expert map it starts from.

What SGLang means by its degrees: `tp-size` is all GPUs of a stage. With DP attention the attention groups are carved
out of it, `tp-size / dp-size` ranks each with TP fastest, and the experts have `tp-size / ep-size` expert-TP ranks,
fastest too; so a rank here has the number it has in the placement. Host number r holds the r-th run of ranks, which
works out only when hosts hold equal shares and stages and hosts divide one another.
"""

from __future__ import annotations

import json

from placer.launchers.base import (
    Beside,
    EmittedFile,
    HostRanks,
    Launcher,
    Options,
    host_scripts,
    layer_count,
    not_blocked,
    ranks_by_host,
)
from placer.placement import Placement

EXPERT_FILE = "expert_location.json"


class Sglang(Launcher):
    """Server scripts and the expert map of SGLang."""

    name = "sglang"
    summary = "one SGLang server script per host and the expert map for --init-expert-location"

    def cannot(self, placement: Placement) -> str | None:
        """Return why not: SGLang wants like stages, equal hosts, blocked ranks, and experts over all GPUs of a stage."""
        return not_blocked(placement) or _unequal(placement) or _degrees(placement) or _slots(placement)

    def render(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return `sglang-HOST.sh` for every host and, for a MoE model, `expert_location.json`."""
        hosts = len(ranks_by_host(placement))
        stages = placement.strategy.stages
        stage = stages[0]
        files: dict[str, EmittedFile] = {}
        common: list[str | Beside] = [
            f"--dist-init-addr={options.endpoint(placement)}",
            f"--tp-size={stage.tp * stage.dp}",
            f"--pp-size={len(stages)}",
            f"--ep-size={stage.ep}",
        ]
        if stage.dp > 1:
            common += [f"--dp-size={stage.dp}", "--enable-dp-attention"]
        if placement.experts:
            files[EXPERT_FILE] = EmittedFile(expert_location(placement))
            slots, experts = slots_and_experts(placement)
            common += [
                "--init-expert-location",
                Beside(EXPERT_FILE),
                f"--ep-num-redundant-experts={slots - experts}",
                "--ep-dispatch-algorithm=static",
            ]
        environment = {}
        if len(stages) > 1:
            counts = (last - first for first, last in (each.layers for each in stages))
            environment["SGLANG_PP_LAYER_PARTITION"] = ",".join(str(count) for count in counts)

        def command(number: int, _: HostRanks) -> list[str | Beside]:
            server = ["python3", "-m", "sglang.launch_server", f"--nnodes={hosts}", f"--node-rank={number}"]
            return [*server, *common, *options.command]

        scripts = host_scripts(
            placement,
            self.name,
            command,
            usage="[ARGUMENT...]" if options.command else "--model-path MODEL [ARGUMENT...]",
            environment=environment,
            beside=files,
            needs_arguments=not options.command,
        )
        return files | scripts


def slots_and_experts(placement: Placement) -> tuple[int, int]:
    """Return the slots of a MoE layer and the number of its experts: each has a copy, so the largest tells."""
    rows = next(iter(placement.experts.values()))
    experts = 1 + max(expert for layer in placement.experts.values() for row in layer for expert in row)
    return sum(len(row) for row in rows), experts


def expert_location(placement: Placement) -> str:
    """Return the expert map: a row for every layer of the model, and no other key, which SGLang would not take.

    Layers without experts need a row as well; they get the experts in order, then copies from the first on.
    """
    slots, experts = slots_and_experts(placement)
    no_experts = [slot % experts for slot in range(slots)]
    rows = [
        [expert for row in placement.experts[layer] for expert in row]
        if layer in placement.experts
        else no_experts
        for layer in range(layer_count(placement))
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{{"physical_to_logical_map": [\n{lines}\n]}}\n'


def _unequal(placement: Placement) -> str | None:
    stages = placement.strategy.stages
    shapes = {(stage.tp, stage.dp, stage.ep, stage.etp) for stage in stages}
    if len(shapes) > 1:
        return f"the stages of {placement.strategy.name} differ, and SGLang gives all stages the same degrees"
    for number, stage in enumerate(stages):
        if stage.layers[0] == stage.layers[1]:
            return f"stage {number} holds no layers, and SGLang gives every stage some"
    hosts = ranks_by_host(placement)
    for host in hosts:
        if len(host.ranks) != len(hosts[0].ranks):
            return (
                f"host {host.host} holds {len(host.ranks)} ranks and host {hosts[0].host} {len(hosts[0].ranks)}, "
                "and SGLang gives every host as many"
            )
    if len(hosts) % len(stages) and len(stages) % len(hosts):
        return f"{len(hosts)} hosts and {len(stages)} stages do not divide one another, as SGLang needs"
    return None


def _degrees(placement: Placement) -> str | None:
    stage = placement.strategy.stages[0]
    ranks = stage.tp * stage.dp
    if not placement.experts:
        if stage.dp > 1:
            return (
                f"dp is {stage.dp} for a dense model, which SGLang serves as {stage.dp} servers of their own"
            )
        return None
    if stage.etp != 1:
        return f"etp is {stage.etp}, and an SGLang expert map is for whole experts, etp 1"
    if stage.ep != ranks:
        return f"edp is {ranks // stage.ep}, and SGLang has one copy of the set of experts, over all {ranks} GPUs"
    return None


def _slots(placement: Placement) -> str | None:
    if not placement.experts:
        return None
    slots, experts = slots_and_experts(placement)
    everyone = set(range(experts))
    for layer, rows in sorted(placement.experts.items()):
        placed = [expert for row in rows for expert in row]
        if len(placed) != slots:
            return f"layer {layer} has {len(placed)} slots and another {slots}, and SGLang has as many in every layer"
        missing = everyone.difference(placed)
        if missing:
            return f"layer {layer} has no copy of expert {min(missing)}, and SGLang needs one of each"
    return None
