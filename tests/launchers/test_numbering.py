"""The numbers of ranks against the frameworks' own code, or their formulas written out by hand."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from placer.launchers.job import Job, job_of
from placer.launchers.numbering import HOST_RULES, hosts_admitted, server_size, servers
from placer.placement import RankRecord
from placer.strategy import Shape
from tests.launchers.by_hand import make
from tests.launchers.real.tools import python

#: tp, dp, ep, etp and pp: dense, EP inside and across TP groups, expert TP of its own and that of attention, EDP.
DEGREES = [
    (1, 1, 1, 1, 1),
    (4, 2, 1, 1, 1),
    (2, 4, 8, 1, 1),
    (2, 4, 4, 1, 2),
    (4, 4, 2, 4, 2),
    (2, 8, 4, 2, 3),
    (1, 8, 2, 2, 2),
    (8, 2, 4, 1, 2),
    (4, 4, 2, 8, 1),
    (3, 6, 2, 3, 2),
]
Groups = set[tuple[int, ...]]


def placed(tp: int, dp: int, ep: int, etp: int, pp: int) -> Job:
    """Return a job of those degrees, two layers in each stage, on hosts of 8 GPUs."""
    shape = Shape(tp=tp, dp=dp, ep=ep, etp=etp)
    stages = [((2 * stage, 2 * stage + 2), shape) for stage in range(pp)]
    gpus = [(f"node{rank // 8:02d}", rank % 8) for rank in range(shape.ranks * pp)]
    experts = {}
    if shape.ep_group > 1:
        rows = [[2 * rank, 2 * rank + 1] for rank in range(ep)]
        experts = dict.fromkeys(range(2 * pp), rows)
    return job_of(make(gpus, stages, experts))


def groups(ranks: Sequence[RankRecord], key: Callable[[RankRecord], object]) -> Groups:
    """Return the groups of ranks that agree in `key`."""
    found = defaultdict(list)
    for record in ranks:
        found[key(record)].append(record.rank)
    return {tuple(group) for group in found.values()}


def as_groups(lists: Sequence[Sequence[int]]) -> Groups:
    return {tuple(group) for group in lists}


def by_coordinates(ranks: Sequence[RankRecord]) -> dict[str, Groups]:
    """Return the groups that the coordinates of a placement make, by name."""
    return {
        "tp": groups(ranks, lambda r: (r.stage, r.dp)),
        "dp": groups(ranks, lambda r: (r.stage, r.tp)),
        "pp": groups(ranks, lambda r: (r.dp, r.tp)),
        "etp": groups(ranks, lambda r: (r.stage, r.ep, r.edp)),
        "ep": groups(ranks, lambda r: (r.stage, r.etp, r.edp)),
        "edp": groups(ranks, lambda r: (r.stage, r.etp, r.ep)),
        "expert pp": groups(ranks, lambda r: (r.etp, r.ep, r.edp)),
        "set of experts": groups(ranks, lambda r: (r.stage, r.edp)),
    }


MEGATRON = """
import json, sys
from megatron.core.parallel_state import RankGenerator
answer = []
for tp, dp, ep, etp, pp in json.loads(sys.argv[1]):
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=order)
    edp = tp * dp // (ep * etp)
    expert = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
    answer.append({
        "tp": dense.get_ranks("tp"), "dp": dense.get_ranks("dp"), "pp": dense.get_ranks("pp"),
        "etp": expert.get_ranks("tp"), "ep": expert.get_ranks("ep"), "edp": expert.get_ranks("dp"),
        "expert pp": expert.get_ranks("pp"), "set of experts": expert.get_ranks("tp-ep"),
    })
print(json.dumps(answer))
"""

DEEPSPEED = """
import json, sys
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import groups

class Unit:
    # Stands for the model parallel unit and for torch.distributed: they are asked for sizes, and for new groups.
    def __init__(self, tp, dp, pp): self.tp, self.dp, self.pp = tp, dp, pp
    def get_tensor_model_parallel_world_size(self): return self.tp
    def get_pipeline_model_parallel_world_size(self): return self.pp
    def get_data_parallel_world_size(self): return self.dp
    def get_model_parallel_world_size(self): return self.tp

class World:
    def __init__(self, size): self.size, self.made = size, []
    def is_initialized(self): return True
    def get_world_size(self, group=None): return self.size
    def get_rank(self, group=None): return 0
    def new_group(self, ranks): self.made.append(list(ranks))

groups.log_dist = lambda *_, **__: None
answer = []
for tp, dp, ep, etp, pp in json.loads(sys.argv[1]):
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    groups.mpu, groups.dist = Unit(tp, dp, pp), World(tp * dp * pp)
    for cache in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        cache.clear()
    # As deepspeed.moe.layer.MoE chooses.
    if etp == tp and tp > 1:
        groups._create_expert_data_and_model_parallel(ep, mpu=groups.mpu)
    else:
        groups._create_expert_and_data_parallel(ep)
    answer.append({
        "tp": topology.get_axis_comm_lists("model"), "dp": topology.get_axis_comm_lists("data"),
        "pp": topology.get_axis_comm_lists("pipe"), "made": groups.dist.made,
    })
print(json.dumps(answer))
"""


def asked(script: str, degrees: Sequence[tuple[int, ...]], *modules: str) -> list[dict[str, list[list[int]]]]:
    """Return what a framework's own code answers, for each of the degrees."""
    done = subprocess.run(
        [python(*modules), "-c", script, json.dumps(degrees)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_megatron():
    """Every group of Megatron-Core's RankGenerator, of attention and of experts, is one of the placement's coordinates."""
    for degrees, found in zip(DEGREES, asked(MEGATRON, DEGREES, "megatron.core"), strict=True):
        (server,) = placed(*degrees).servers("megatron")
        own = by_coordinates(server.ranks)
        assert {name: as_groups(lists) for name, lists in found.items()} == own, degrees


def test_deepspeed():
    """So is every group of DeepSpeed's topology and of its MoE layers, with experts split as attention is, or whole."""
    can = [(tp, dp, ep, etp, pp) for tp, dp, ep, etp, pp in DEGREES if etp in (1, tp)]
    assert len(can) > 6
    for degrees, found in zip(can, asked(DEEPSPEED, can, "deepspeed"), strict=True):
        (server,) = placed(*degrees).servers("deepspeed")
        own = by_coordinates(server.ranks)
        assert all(as_groups(found[name]) == own[name] for name in ("tp", "dp", "pp")), degrees
        assert as_groups(found["made"]) == own["ep"] | own["edp"], degrees


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "pp"), [(1, 4, 4, 1), (2, 4, 8, 2), (4, 2, 8, 3), (2, 8, 4, 2), (4, 1, 4, 2)]
)
def test_vllm(tp, dp, ep, pp):
    """vLLM lays a server out as DP x PP x TP: `all_ranks = arange(world).reshape(-1, dp, pp, pcp, tp)`, EP over DP x TP."""
    found = placed(tp, dp, ep, 1, pp).servers("vllm")
    assert len(found) == tp * dp // ep
    for server in found:
        engines = ep // tp
        all_ranks = np.arange(len(server.ranks)).reshape(-1, engines, pp, 1, tp)
        in_ep = all_ranks.transpose(0, 2, 1, 3, 4).reshape(-1, engines * tp)
        expected = {
            "tp": all_ranks.reshape(-1, tp),
            "pp": all_ranks.transpose(0, 1, 4, 3, 2).reshape(-1, pp),
            "dp": all_ranks.transpose(0, 4, 2, 3, 1).reshape(-1, engines),
            "set of experts": in_ep,
        }
        own = by_coordinates(server.ranks)
        assert {name: own[name] for name in expected} == {
            name: as_groups(lists.tolist()) for name, lists in expected.items()
        }
        # EP rank: the place in that group. TP rank: the fastest. Both are coordinates of the placement.
        assert all([server.ranks[r].ep for r in group] == list(range(ep)) for group in in_ep.tolist())
        assert all(record.tp == record.rank % tp for record in server.ranks)
        assert all(record.stage == record.rank // tp % pp for record in server.ranks)


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "etp", "pp"),
    [(1, 8, 8, 1, 2), (8, 1, 8, 1, 1), (8, 2, 8, 1, 2), (1, 8, 4, 2, 2), (8, 1, 2, 4, 1)],
)
def test_tensorrt_llm(tp, dp, ep, etp, pp):
    """TensorRT-LLM's Mapping: `tp_rank = rank % tp_size`, `moe_ep_rank = tp_rank % moe_ep_size`, stages outermost."""
    found = placed(tp, dp, ep, etp, pp).servers("trtllm")
    assert len(found) == tp * dp // (ep * etp)
    tp_size = ep * etp
    for server in found:
        assert len(server.ranks) == tp_size * pp
        for record in server.ranks:
            tp_rank = record.rank % tp_size
            assert record.stage == record.rank // tp_size
            assert (record.ep, record.etp) == (tp_rank % ep, tp_rank // ep)


@pytest.mark.parametrize(("tp", "dp", "ep", "pp"), [(1, 4, 4, 1), (2, 4, 8, 2), (2, 8, 4, 2), (4, 2, 1, 2)])
def test_sglang(tp, dp, ep, pp):
    """SGLang's ranks of a server are TP inside attention DP inside stages, and EP ranks in the same order."""
    found = placed(tp, dp, ep, 1, pp).servers("sglang")
    size = max(tp, ep) if ep > 1 else tp
    assert len(found) == tp * dp // size
    for number, server in enumerate(found):
        for record in server.ranks:
            local = record.rank % size
            assert record.stage == record.rank // size
            assert record.tp == local % tp
            if ep > 1:
                assert (record.ep, record.edp) == (local, number)


def test_every_rank_is_in_one_server():
    """However a framework splits a placement, no rank is lost or doubled."""
    for framework, degrees in product((None, "megatron", "vllm", "sglang", "trtllm", "deepspeed"), DEGREES):
        tp, dp, ep, etp, pp = degrees
        shapes = [Shape(tp=tp, dp=dp, ep=ep, etp=etp)] * pp
        for moe in (True, False):
            found = servers(framework, shapes, moe=moe)
            assert sorted(np.concatenate(found).tolist()) == list(range(tp * dp * pp))
            assert len({len(own) for own in found}) == 1
            if framework in ("vllm", "sglang", "trtllm"):
                assert len(found[0]) == pp * server_size(shapes[0], moe=moe)
            else:
                assert len(found) == 1


def test_stages_of_unlike_degrees_are_one_server():
    """No framework here takes them, so that they keep the placement's order."""
    (found,) = servers("vllm", [Shape(tp=2), Shape(tp=4)], moe=False)
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("framework", "shapes", "hosts", "moe", "admitted"),
    [
        ("sglang", [Shape(tp=8)] * 4, 2, False, True),
        ("sglang", [Shape(tp=8)] * 2, 4, False, True),
        ("sglang", [Shape(tp=8)] * 2, 3, False, False),
        ("vllm", [Shape(tp=2, dp=4, ep=8)], 2, True, True),
        ("vllm", [Shape(tp=2, dp=4, ep=8)], 8, True, True),
        ("vllm", [Shape(tp=2, dp=6, ep=12)], 4, True, False),
        ("megatron", [Shape(tp=2, dp=6)], 5, False, True),
        (None, [Shape(tp=2, dp=6)], 5, False, True),
    ],
)
def test_hosts_of_a_server(framework, shapes, hosts, moe, admitted):
    """SGLang's stages, and vLLM's engines, divide the hosts or are divided by them."""
    assert hosts_admitted(framework, shapes, hosts, moe=moe) is admitted


def test_rules_of_the_frameworks():
    """A launcher with servers of a framework asks for its order; those that bind any process ask for nothing."""
    assert HOST_RULES["torchrun"].blocked
    assert not HOST_RULES["torchrun"].equal
    assert HOST_RULES["megatron"].blocked
    assert HOST_RULES["deepspeed"].blocked
    assert HOST_RULES["deepspeed"].equal
    for name in ("ranks", "env", "slurm", "openmpi", "mpich", "intelmpi"):
        rule = HOST_RULES[name]
        assert not any((rule.blocked, rule.equal, rule.ascending, rule.framework)), name
