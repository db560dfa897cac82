"""SGLang: one server script for each host and replica, and the expert map the servers start from.

What SGLang means by its degrees: `tp-size` is all GPUs of a stage. With DP attention the attention groups are carved
out of it, `tp-size / dp-size` ranks each with TP fastest, and the experts have `tp-size / ep-size` expert-TP ranks,
fastest too; so a rank here has the number it has in the placement. Host number r holds the r-th run of ranks, which
works out only when hosts hold equal shares and stages and hosts divide one another.

A server has the set of experts once. Where a placement has it in several EDP copies and each holds whole TP groups, no
layer talks between the copies: each is a server of its own, behind a router. So is each TP group of a dense model.
Copy k of one stage and copy k of every other make replica k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placer.errors import ExportError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.sglang import FILE_NAME as EXPERT_FILE
from placer.expert_maps.sglang import Sglang as ExpertLocation
from placer.launchers.base import (
    Beside,
    EmittedFile,
    HostRanks,
    Launcher,
    Options,
    Placed,
    by_host,
    host_scripts,
    in_rank_order,
    layer_count,
    not_blocked,
)
from placer.placement import Placement, RankRecord

# SGLang's own default. Every host of a server listens on it, so that replicas which share a host need several.
HTTP_PORT = 30000


@dataclass(frozen=True)
class Replica:
    """One server: its ranks as SGLang numbers them, stage after stage, and the ports it listens on.

    `port` is for HTTP. From `meeting_port` on, its first host has some ports for the processes to find one another.
    """

    number: int
    ranks: tuple[RankRecord, ...]
    port: int
    meeting_port: int

    @property
    def hosts(self) -> list[HostRanks]:
        """The hosts of the replica, in the order of their first rank, with its ranks there."""
        return by_host(self.ranks)

    @property
    def head(self) -> str:
        """The host of its first rank."""
        return self.ranks[0].host


class Sglang(Launcher):
    """Server scripts and the expert map of SGLang."""

    name = "sglang"
    summary = "one SGLang server script per host and replica, and the expert map for --init-expert-location"

    def cannot(self, placement: Placed) -> str | None:
        """Return why not: SGLang wants like stages, whole experts over a server's GPUs, equal hosts and blocked ranks."""
        return self.cannot_degrees(placement) or _hosts(placement) or _slots(placement)

    def cannot_degrees(self, placement: Placed) -> str | None:
        """Return why its stages and degrees cannot be expressed, wherever the ranks are, or None when they can."""
        return _stages(placement) or _degrees(placement)

    def render(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return the scripts of every host and, for a MoE model, `expert_location.json`.

        A script is `sglang-HOST.sh`, or `sglang-replicaK-HOST.sh` where there is more than one replica. Raises
        ExportError when the ports or the address in `options` cannot serve all replicas.
        """
        files: dict[str, EmittedFile] = {}
        if placement.experts:
            files[EXPERT_FILE] = EmittedFile(expert_location(placement))
        all_replicas = replicas(placement, options.master_port)
        if len(all_replicas) > 1:
            _check_address(all_replicas, options)
            _check_ports(all_replicas, _ports_each(placement))
        scripts: dict[str, EmittedFile] = {}
        for replica in all_replicas:
            scripts |= _scripts(placement, options, replica, len(all_replicas), files)
        return files | scripts


def _scripts(
    placement: Placement, options: Options, replica: Replica, count: int, beside: Mapping[str, EmittedFile]
) -> dict[str, EmittedFile]:
    hosts = len(replica.hosts)
    stages = placement.strategy.stages
    stage = stages[0]
    size = _replica_size(placement)
    meeting = options.endpoint(replica.head, replica.meeting_port)
    common: list[str | Beside] = [
        f"--dist-init-addr={meeting}",
        f"--tp-size={size}",
        f"--pp-size={len(stages)}",
        f"--ep-size={stage.ep}",
    ]
    if size > stage.tp:
        common += [f"--dp-size={size // stage.tp}", "--enable-dp-attention"]
    if placement.experts:
        slots, experts = slots_and_experts(placement)
        common += [
            "--init-expert-location",
            Beside(EXPERT_FILE),
            f"--ep-num-redundant-experts={slots - experts}",
            "--ep-dispatch-algorithm=static",
        ]
    notes: list[str] = []
    if count > 1:
        common.append(f"--port={replica.port}")
        notes = [
            f"Replica {replica.number} of {count}: a server of its own, for a router to send requests to.",
            f"It serves at port {replica.port} of {replica.head}, {HTTP_PORT} + replica, and meets from port "
            f"{replica.meeting_port} on.",
        ]
    environment = {}
    if len(stages) > 1:
        counts = (last - first for first, last in (each.layers for each in stages))
        environment["SGLANG_PP_LAYER_PARTITION"] = ",".join(str(count) for count in counts)

    def command(number: int, _: HostRanks) -> list[str | Beside]:
        server = ["python3", "-m", "sglang.launch_server", f"--nnodes={hosts}", f"--node-rank={number}"]
        return [*server, *common, *options.command]

    return host_scripts(
        placement,
        f"{Sglang.name}-replica{replica.number}" if count > 1 else Sglang.name,
        command,
        usage="[ARGUMENT...]" if options.command else "--model-path MODEL [ARGUMENT...]",
        ranks=replica.ranks,
        notes=notes,
        environment=environment,
        beside=beside,
        needs_arguments=not options.command,
    )


def replicas(placement: Placed, first_port: int) -> list[Replica]:
    """Return the servers of a placement with like stages: one for each EDP copy, or for each dense TP group.

    Replicas that begin on one host meet there at ports of their own, from `first_port` on.
    """
    stage = placement.strategy.stages[0]
    per_stage = stage.tp * stage.dp
    size = _replica_size(placement)
    ranks = in_rank_order(placement)
    apart = _ports_each(placement)
    begun: dict[str, int] = {}
    found: list[Replica] = []
    for number in range(per_stage // size):
        starts = range(number * size, len(ranks), per_stage)
        own = tuple(record for start in starts for record in ranks[start : start + size])
        before = begun.setdefault(own[0].host, 0)
        begun[own[0].host] += 1
        found.append(Replica(number, own, HTTP_PORT + number, first_port + apart * before))
    return found


def _replica_size(placement: Placed) -> int:
    """Return how many ranks of a stage one server has."""
    stage = placement.strategy.stages[0]
    return stage.ep * stage.etp if placement.experts else stage.tp


def _ports_each(placement: Placed) -> int:
    """Return how many ports a server may use from its meeting port on.

    With DP attention SGLang listens on the next 6 and on the 13th; some versions add one for each DP rank after those 6.
    """
    groups = _replica_size(placement) // placement.strategy.stages[0].tp
    return 10 * (groups // 10 + 2)


def _check_address(all_replicas: Sequence[Replica], options: Options) -> None:
    heads = {replica.head for replica in all_replicas}
    if options.master_addr is not None and len(heads) > 1:
        raise ExportError(
            f"the {len(all_replicas)} SGLang servers of this placement begin on {len(heads)} hosts, so that one master "
            "address cannot serve them all: leave it out"
        )


def _check_ports(all_replicas: Sequence[Replica], apart: int) -> None:
    used: dict[tuple[str, int], int] = {}
    for replica in all_replicas:
        last = replica.meeting_port + apart - 1
        if max(last, replica.port) > 65535:
            raise ExportError(
                f"replica {replica.number} would use the ports {replica.meeting_port} to {last} and {replica.port}, "
                "and ports end at 65535"
            )
        used |= {(replica.head, port): replica.number for port in range(replica.meeting_port, last + 1)}
    for replica in all_replicas:
        for host in replica.hosts:
            if (host.host, replica.port) in used:
                raise ExportError(
                    f"replica {replica.number} listens on port {replica.port} of {host.host}, where replica "
                    f"{used[host.host, replica.port]} may use it to meet: state another master port"
                )


def slots_and_experts(placement: Placed) -> tuple[int, int]:
    """Return the slots of a MoE layer and the number of its experts: each has a copy, so the largest tells."""
    rows = next(iter(placement.experts.values()))
    experts = 1 + max(expert for layer in placement.experts.values() for row in layer for expert in row)
    return sum(len(row) for row in rows), experts


def expert_location(placement: Placement) -> str:
    """Return the expert map: a row for every layer of the model, and no other key, which SGLang would not take.

    Layers without experts need a row as well; they get the experts in order, then copies from the first on.
    """
    _, experts = slots_and_experts(placement)
    layers = {layer: np.array(rows, dtype=np.int64) for layer, rows in placement.experts.items()}
    expert_map = ExpertMap(layers, experts, layer_count(placement))
    return ExpertLocation().render(expert_map)[EXPERT_FILE].decode()


def _stages(placement: Placed) -> str | None:
    stages = placement.strategy.stages
    shapes = {(stage.tp, stage.dp, stage.ep, stage.etp) for stage in stages}
    if len(shapes) > 1:
        return f"the stages of {placement.strategy.name} differ, and SGLang gives all stages the same degrees"
    for number, stage in enumerate(stages):
        if stage.layers[0] == stage.layers[1]:
            return f"stage {number} holds no layers, and SGLang gives every stage some"
    return None


def _degrees(placement: Placed) -> str | None:
    stage = placement.strategy.stages[0]
    if not placement.experts:
        if stage.ep * stage.etp > 1:
            return f"ep is {stage.ep} and etp {stage.etp}, but the placement has no expert in any slot"
        return None
    if stage.etp != 1:
        return f"etp is {stage.etp}, and an SGLang expert map is for whole experts, etp 1"
    if stage.ep % stage.tp:
        return (
            f"edp is {stage.tp * stage.dp // stage.ep} and a TP group of {stage.tp} ranks spans "
            f"{stage.tp // stage.ep} copies of the set of experts, and an SGLang server has one copy"
        )
    return None


def _hosts(placement: Placed) -> str | None:
    all_replicas = replicas(placement, first_port=0)
    for replica in all_replicas:
        reason = not_blocked(replica.ranks) or _unequal(replica.hosts, len(placement.strategy.stages))
        if reason is not None:
            return reason if len(all_replicas) == 1 else f"in replica {replica.number}, {reason}"
    return None


def _unequal(hosts: Sequence[HostRanks], stages: int) -> str | None:
    for host in hosts:
        if len(host.ranks) != len(hosts[0].ranks):
            return (
                f"host {host.host} holds {len(host.ranks)} ranks and host {hosts[0].host} {len(hosts[0].ranks)}, "
                "and SGLang gives every host as many"
            )
    if len(hosts) % stages and stages % len(hosts):
        return f"{len(hosts)} hosts and {stages} stages do not divide one another, as SGLang needs"
    return None


def _slots(placement: Placed) -> str | None:
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
