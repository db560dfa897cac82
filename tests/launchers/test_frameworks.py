from __future__ import annotations

import json

import pytest

from placer.launchers.frameworks import FRAMEWORKS, expert_map, slots_and_experts
from placer.launchers.job import job_of
from placer.launchers.numbering import FRAMEWORK_NAMES, HOST_RULES
from placer.launchers.registry import LAUNCHERS
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make

IN_ORDER = {1: [[0, 1], [2, 3]]}


def placed(*shapes: Shape, experts=None, groups: int | None = 1) -> Placement:
    """A placement of two layers for each stage."""
    stages = [((2 * number, 2 * number + 2), shape) for number, shape in enumerate(shapes)]
    gpus = [("node01", gpu) for gpu in range(sum(shape.ranks for shape in shapes))]
    return make(gpus, stages, experts).model_copy(update={"router_groups": groups})


def rows(ep: int, slots: int = 1) -> dict[int, list[list[int]]]:
    return {1: [[rank * slots + slot for slot in range(slots)] for rank in range(ep)]}


def test_every_framework_has_a_numbering():
    """The frameworks are those whose numbers are known."""
    assert set(FRAMEWORKS) == set(FRAMEWORK_NAMES)
    for name, framework in FRAMEWORKS.items():
        assert framework.name == name
        assert framework.title


#: Shape, and by framework whether a MoE layer can be split so.
MOE = [
    (Shape(tp=2, dp=2, ep=4), {"megatron", "deepspeed", "vllm", "sglang"}),
    (Shape(tp=1, dp=4, ep=4), {"megatron", "deepspeed", "vllm", "sglang", "trtllm"}),
    (Shape(tp=4, dp=1, ep=4), {"megatron", "deepspeed", "vllm", "sglang", "trtllm"}),
    # Each expert split, as attention is.
    (Shape(tp=2, dp=2, ep=2, etp=2), {"megatron", "deepspeed"}),
    # Each expert split otherwise.
    (Shape(tp=1, dp=4, ep=2, etp=2), {"megatron"}),
    # Experts split over all ranks, none spread: vLLM without EP.
    (Shape(tp=2, dp=2, ep=1, etp=4), {"megatron", "vllm"}),
    # A TP group over two copies of the set of experts.
    (Shape(tp=4, dp=1, ep=2), {"megatron", "deepspeed"}),
]


@pytest.mark.parametrize(("shape", "able"), MOE)
def test_degrees_of_experts(shape, able):
    """Which frameworks can split experts so; the others say in one sentence why not."""
    placement = placed(shape, experts=rows(shape.ep))
    reasons = {name: framework.cannot_degrees(placement) for name, framework in FRAMEWORKS.items()}
    assert {name for name, reason in reasons.items() if reason is None} == able, reasons
    for name, reason in reasons.items():
        if reason is not None:
            assert not reason.endswith(".")
            assert FRAMEWORKS[name].title in reason


def test_stages_that_differ_and_stages_without_layers():
    """All stages have the same degrees, and some layers, but that Megatron's may have none."""
    differ = placed(Shape(tp=2), Shape(dp=2))
    empty = make([("node01", 0), ("node01", 1)], [((0, 2), Shape()), ((2, 2), Shape())])
    for name, framework in FRAMEWORKS.items():
        assert "the stages of by hand differ" in str(framework.cannot_degrees(differ))
        reason = framework.cannot_degrees(empty)
        assert reason is None if name == "megatron" else "stage 1 holds no layers" in str(reason)


def test_expert_degrees_without_experts():
    """Degrees for experts that are nowhere are told."""
    for framework in FRAMEWORKS.values():
        reason = framework.cannot_degrees(placed(Shape(dp=4, ep=4)))
        assert reason == "ep is 4 and etp 1, but the placement has no expert in any slot"


def test_contiguous_experts():
    """One copy of each, in order as they are, or in an order that a reordered checkpoint can have."""
    shape = Shape(dp=2, ep=2)
    for name in ("megatron", "deepspeed", "vllm"):
        framework = FRAMEWORKS[name]
        in_order = placed(shape, experts=IN_ORDER, groups=None)
        assert framework.cannot(in_order) is None
        assert framework.expert_files(job_of(in_order)) == {}
        moved = {1: [[3, 1], [0, 2]]}
        assert framework.cannot(placed(shape, experts=moved)) is None
        (file,) = framework.expert_files(job_of(placed(shape, experts=moved))).values()
        assert json.loads(file.text)["order"] == [[3, 1, 0, 2]]
        unknown = framework.cannot(placed(shape, experts=moved, groups=None))
        assert "does not say how many groups the router has" in str(unknown)
        torn = framework.cannot(placed(shape, experts=moved, groups=2))
        assert "group" in str(torn)
        twice = framework.cannot(placed(shape, experts={1: [[0, 1], [2, 0]]}))
        assert (
            twice
            == f"{framework.title} places experts contiguously, and 4 slots hold 3 experts, some of them twice"
        )


def test_mapped_experts():
    """SGLang and TensorRT-LLM take copies, as many slots in every layer, and one of each expert at least."""
    shape = Shape(dp=2, ep=2)
    for name in ("sglang", "trtllm"):
        framework = FRAMEWORKS[name]
        copies = placed(shape, experts={1: [[0, 1], [2, 0]]})
        assert framework.cannot(copies) is None
        assert len(framework.expert_files(job_of(copies))) == 1
        assert framework.expert_files(job_of(placed(Shape(dp=2)))) == {}
        unequal = framework.cannot(placed(shape, experts={0: [[0], [1]], 1: [[0, 1], [1, 0]]}))
        assert "layer 1 has 4 slots and another 2" in str(unequal)
        missing = framework.cannot(placed(shape, experts={0: [[0], [2]]}))
        assert "layer 0 has no copy of expert 1" in str(missing)


def test_slots_experts_and_map(moe):
    """The largest number of an expert tells how many there are."""
    assert slots_and_experts(moe) == (8, 6)
    found = expert_map(moe)
    assert found.experts == 6
    assert {layer: held.tolist() for layer, held in found.layers.items()} == moe.experts


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_mig_device_for_a_lone_rank(name: str) -> None:
    """A rank that talks to no other may be on a MIG device, a server's where it is its only one, as the rule says."""
    seats = [("node01", 0, "MIG-1"), ("node02", 0, "GPU-2")]
    servers = make(seats, [((0, 4), Shape(tp=1, dp=2))])
    pipeline = make(seats, [((0, 2), Shape()), ((2, 4), Shape())])
    rule = HOST_RULES[name]
    many = rule.framework in ("vllm", "sglang", "trtllm")
    expected = {
        "rank": (True, True),
        "server": (many, False),
        "none": (False, False),
    }[rule.mig]
    reasons = [LAUNCHERS[name].cannot(placement) for placement in (servers, pipeline)]
    assert tuple(reason is None for reason in reasons) == expected, reasons
    assert all(reason is None or "MIG-1" in reason for reason in reasons)


def test_gpus_ascend_in_an_engine_and_not_over_all_of_a_server() -> None:
    """vLLM's Ray executor orders the GPUs of one engine: DP ranks of TP 1 may lie in any order, the two of TP 2 may not."""
    experts = {layer: [[0], [1]] for layer in range(4)}
    seats = [("node01", 3), ("node01", 1)]
    apart = make(seats, [((0, 4), Shape(tp=1, dp=2, ep=2))], experts)
    assert LAUNCHERS["vllm-ray"].cannot(apart) is None
    together = make(seats, [((0, 4), Shape(tp=2, dp=1, ep=2))], experts)
    assert "ranks 0, 1 of host node01 are on its GPUs 3, 1" in str(LAUNCHERS["vllm-ray"].cannot(together))
