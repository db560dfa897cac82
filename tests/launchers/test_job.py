from __future__ import annotations

import pytest

from placer.launchers.job import (
    HostRanks,
    by_host,
    cuda_uuid,
    job_of,
    layer_count,
    mig_in_a_group,
    not_blocked,
    short_names_clash,
    unequal,
)
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid


def test_ranks_in_the_order_of_their_numbers(moe):
    """A file may list ranks in any order; a job has them by number, and what it needs of the file."""
    job = job_of(moe.model_copy(update={"ranks": moe.ranks[::-1]}))
    assert [record.rank for record in job.ranks] == [0, 1, 2, 3]
    assert [host.host for host in job.hosts] == ["node02", "node01"]
    assert (job.digest, job.version, job.framework) == (
        moe.model_copy(update={"ranks": moe.ranks[::-1]}).digest(),
        moe.placer,
        None,
    )
    assert job.shapes == (Shape(tp=2, dp=2, ep=4),)


def test_decisions_alone_have_no_digest(moe):
    """A launcher can be asked about decisions that are no placement yet."""

    class Decisions:
        strategy, ranks, experts, router_groups = moe.strategy, moe.ranks, moe.experts, None

    job = job_of(Decisions())
    assert (job.digest, job.version) == ("", "")
    assert job.ranks == job_of(moe).ranks


def test_servers_have_ranks_from_zero():
    """Each server is a job of its own; its records keep their coordinates and GPUs."""
    placement = make([("node01", gpu) for gpu in range(4)], [((0, 2), Shape(tp=2, dp=2))])
    first, second = job_of(placement).servers("sglang")
    assert [(r.rank, r.gpu, r.dp, r.tp) for r in first.ranks] == [(0, 0, 0, 0), (1, 1, 0, 1)]
    assert [(r.rank, r.gpu, r.dp, r.tp) for r in second.ranks] == [(0, 2, 1, 0), (1, 3, 1, 1)]
    assert second.framework == "sglang"
    assert second.digest == placement.digest()
    # Numbered all at once, one server after the other.
    job = job_of(placement, "sglang")
    assert [(r.rank, r.gpu) for r in job.ranks] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert job.framework == "sglang"


def test_runs_of_a_host(interleaved, two_by_four):
    """The numbers of a host for a person."""
    assert [host.runs for host in job_of(interleaved).hosts] == ["0-1, 4-5", "2-3, 6-7"]
    assert [host.runs for host in job_of(two_by_four).hosts] == ["0-3", "4-7"]
    assert [host.runs for host in by_host([interleaved.ranks[0], interleaved.ranks[4]])] == ["0, 4"]


@pytest.mark.parametrize(
    ("uuids", "devices"),
    [
        ((uuid(3), uuid(1)), (uuid(3), uuid(1))),
        ((uuid(3), None), ("3", "1")),
        ((uuid(3), "0x12"), ("3", "1")),
        (("MIG-a", uuid(1)), ("MIG-a", uuid(1))),
        ((None, None), ("3", "1")),
    ],
)
def test_devices_are_of_one_kind(uuids, devices):
    """CUDA hides every device behind one it does not know, so UUIDs are used where all are known to it."""
    (host,) = job_of(make([("node01", 3, uuids[0]), ("node01", 1, uuids[1])])).hosts
    assert host.devices == devices


@pytest.mark.parametrize(
    ("text", "known"),
    [(uuid(1), True), ("MIG-x", True), ("GPU-", False), ("7", False), (None, False), ("gpu-1", False)],
)
def test_uuids_cuda_takes(text, known):
    """CUDA takes UUIDs of GPUs and of MIG devices."""
    assert cuda_uuid(text) is known


def test_blocked_and_equal(interleaved, uneven, two_by_four):
    """The first host that breaks a rule is named with its ranks."""
    assert not_blocked(two_by_four.ranks) is None
    assert not_blocked(uneven.ranks) is None
    assert not_blocked(interleaved.ranks) == (
        "host node01 holds the ranks 0-1, 4-5, and each host must hold one unbroken run of ranks"
    )
    assert unequal(by_host(interleaved.ranks)) is None
    assert unequal(by_host(uneven.ranks)) == (
        "host node02 holds 3 ranks and host node01 1, and each host must hold as many"
    )


def test_short_names_that_clash():
    """Two hosts of one short name are told apart by their domains."""

    def hosts(*names: str) -> list[HostRanks]:
        return job_of(make([(name, 0) for name in names])).hosts

    assert short_names_clash(hosts("a.x", "a.y"))
    assert short_names_clash(hosts("a", "a.y"))
    assert not short_names_clash(hosts("a.x", "b.x"))


def test_mig_devices():
    """A MIG device is against a group within a layer, and not against data parallel or pipeline ranks."""
    gpus = [("node01", 0, "MIG-0"), ("node01", 1, uuid(1))]
    assert mig_in_a_group(make(gpus, [((0, 2), Shape(dp=2))])) is None
    assert mig_in_a_group(make(gpus, [((0, 1), Shape()), ((1, 2), Shape())])) is None
    assert mig_in_a_group(make(gpus, [((0, 2), Shape(tp=2))])) == (
        "rank 0 is on the MIG device MIG-0 of node01, which cannot talk to the others of its TP group of 2 ranks"
    )
    assert mig_in_a_group(make([("node01", 0), ("node01", 1)])) is None


def test_layers(pipeline, moe):
    """The layers of a model end where its last stage does."""
    assert (layer_count(pipeline), layer_count(moe)) == (5, 3)
