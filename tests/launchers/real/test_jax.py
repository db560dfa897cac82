"""JAX itself on simulated hosts: every process with forced CPU devices in place of GPUs, joined by `jax.distributed`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make
from tests.launchers.real import jobs
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.tools import python

#: Tells for every device of its own at which place of the mesh it is, and what a sum over TP and over EP gave there.
PROGRAM = """
import os, platform
import jax_mesh
jax_mesh.initialize()
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

def summed(mesh, axis):
    shape = mesh.devices.shape
    numbers = np.arange(mesh.devices.size, dtype=np.int32).reshape(shape)
    sharding = NamedSharding(mesh, P(*mesh.axis_names))
    each = jax.make_array_from_callback(shape, sharding, lambda index: numbers[index])
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=P(*mesh.axis_names),
                    out_specs=P(*mesh.axis_names)))(each)
    return {shard.device: int(np.ravel(shard.data)[0]) for shard in total.addressable_shards}

mesh, experts = jax_mesh.mesh(), jax_mesh.expert_mesh()
tp, ep = summed(mesh, "tp"), summed(experts, "ep")
gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
for place, device in np.ndenumerate(mesh.devices):
    if device.process_index == jax.process_index():
        (at,) = [place for place, other in np.ndenumerate(experts.devices) if other == device]
        print("SEEN", "host=" + platform.node(), "gpu=" + gpus[device.local_hardware_id],
              "place=%d,%d,%d" % place, "experts=%d,%d,%d,%d" % at, "tp=%d" % tp[device], "ep=%d" % ep[device],
              "nic=" + os.environ.get("NCCL_IB_HCA", ""), flush=True)
"""
SEEN = re.compile(r"SEEN host=(\S+) gpu=(\S+) place=(\S+) experts=(\S+) tp=(\d+) ep=(\d+) nic=(\S*)")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with simulated_hosts(jobs.names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def emitted(placement: Placement, folder: Path) -> Path:
    """Write the files and the program, which is the command; return the folder."""
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    options = Options(cluster=jobs.cluster(), command=(str(python("jax")), str(program)))
    emit(placement, "jax", folder, options=options)
    return folder


def devices(count: int) -> dict[str, str]:
    """The environment in which JAX has so many CPU devices."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def start(hosts: Hosts, placement: Placement, folder: Path) -> tuple[str, str, list[int]]:
    """Run every host's script there; return what was said, and how they ended."""
    running = [
        hosts.start(host.host, [folder / f"jax-{host.host}.sh"], devices(len(host.ranks)))
        for host in job_of(placement).hosts
    ]
    try:
        said = [each.communicate(timeout=120) for each in running]
    except subprocess.TimeoutExpired:
        hosts.kill()
        said = [each.communicate() for each in running]
        raise AssertionError("".join(out + err for out, err in said)) from None
    return "".join(out for out, _ in said), "".join(err for _, err in said), [e.returncode for e in running]


def check(text: str, placement: Placement) -> None:
    """Compare the devices of the meshes with the placement, and each group's sum with its ranks."""
    found = {(host, gpu): told for host, gpu, *told in SEEN.findall(text)}
    assert len(SEEN.findall(text)) == len(found) == len(placement.ranks)
    device = {
        record.rank: name
        for host in job_of(placement).hosts
        for record, name in zip(host.ranks, host.devices, strict=True)
    }
    for each in placement.ranks:
        tp = [o.rank for o in placement.ranks if (o.stage, o.dp) == (each.stage, each.dp)]
        ep = [o.rank for o in placement.ranks if (o.stage, o.edp, o.etp) == (each.stage, each.edp, each.etp)]
        place, experts, tp_sum, ep_sum, nic = found[each.host, device[each.rank]]
        assert place == f"{each.stage},{each.dp},{each.tp}", f"rank {each.rank}"
        assert experts == f"{each.stage},{each.edp},{each.ep},{each.etp}", f"rank {each.rank}"
        assert (int(tp_sum), int(ep_sum)) == (sum(tp), sum(ep)), f"rank {each.rank}"
        assert f"mlx5_{each.gpu}" in nic.removeprefix("=").split(",")


def drawn(kind: str, seed: int, size: int = 4) -> Placement:
    """Return a placement of `size` hosts of `size` GPUs drawn by `seed`, as two stages with experts."""
    flat = jobs.placement(kind, seed, hosts=size, gpus=size)
    gpus = [(record.host, record.gpu, record.uuid) for record in flat.ranks]
    half = len(gpus) // 2
    shape = Shape(tp=2, dp=half // 2, ep=half if half % 4 else half // 2)
    return make(gpus, [((0, 2), shape), ((2, 4), shape)])


@pytest.mark.parametrize(("kind", "size"), [("interleaved", 8), ("uneven", 4)])
def test_meshes_of_several_processes(hosts, tmp_path, kind, size):
    """A process on each host: every device is at the place of its rank, and sums run over the ranks of a group."""
    placement = drawn(kind, 21, size)
    out, err, codes = start(hosts, placement, emitted(placement, tmp_path / "out"))
    assert set(codes) == {0}, err
    check(out, placement)


def test_mesh_of_64_devices_in_one_process(tmp_path):
    """64 forced devices in one process lie in the mesh as the placement numbers their ranks."""
    order = jobs.placement("blocked", 22, hosts=1, gpus=64).ranks
    shape = Shape(tp=4, dp=8, ep=16, etp=2)
    gpus = [("localhost", record.gpu) for record in order]
    placement = make(gpus, [((0, 2), shape), ((2, 4), shape)])
    interpreter = python("jax")
    emit(placement, "jax", tmp_path)
    (tmp_path / "program.py").write_text(
        "import platform\nplatform.node = lambda: 'localhost'\nimport jax_mesh\njax_mesh.initialize()\n"
        "print([int(d.id) for d in jax_mesh.mesh().devices.flat])\n"
        "print(dict(jax_mesh.mesh(('pp', 'data', 'model')).shape), dict(jax_mesh.expert_mesh(stage=1).shape))\n"
        "print([int(d.id) for d in jax_mesh.expert_mesh(stage=1).devices[0, :, 1]])\n"
    )
    listed = ",".join(str(record.gpu) for record in order)
    ran = subprocess.run(
        [interpreter, tmp_path / "program.py"],
        env={**devices(64), "CUDA_VISIBLE_DEVICES": listed, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    flat, shapes, experts = ran.stdout.splitlines()
    assert flat == str(list(range(64)))
    assert shapes == "{'pp': 2, 'data': 8, 'model': 4} {'edp': 1, 'ep': 16, 'etp': 2}"
    assert experts == str([33 + 2 * ep for ep in range(16)])


def test_wrong_map_starts_nothing(hosts, tmp_path):
    """Two lines swapped in the table, the module changed, scripts of two hosts exchanged: no program starts."""
    placement = drawn("interleaved", 23)
    for case, (file, message) in enumerate(
        [
            ("ranks.tsv", "ranks.tsv is not the file made with this script"),
            ("jax_mesh.py", "jax_mesh.py is not the file made with this script"),
        ]
    ):
        folder = emitted(placement, tmp_path / str(case))
        lines = (folder / file).read_text().splitlines()
        lines[5], lines[9] = lines[9], lines[5]
        (folder / file).write_text("\n".join([*lines, ""]))
        out, err, codes = start(hosts, placement, folder)
        assert (set(codes), out) == ({66}, "")
        assert err.count(message) == 4
    folder = emitted(placement, tmp_path / "exchanged")
    first, second = folder / "jax-node0.sh", folder / "jax-node1.sh"
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    for host, made_for in (("node0", "node1"), ("node1", "node0")):
        ran = hosts.run(host, [folder / f"jax-{host}.sh"])
        assert (ran.returncode, ran.stdout) == (65, "")
        assert f"refused: made for the host {made_for}, but this is {host}" in ran.stderr


def test_gpus_in_another_order_are_refused(hosts, tmp_path):
    """A host's list of GPUs with two exchanged stops the process, whether by the script or in the program."""
    placement = drawn("interleaved", 24)
    folder = emitted(placement, tmp_path / "out")
    own = next(host for host in job_of(placement).hosts if host.host == "node1")
    exchanged = ",".join([own.devices[1], own.devices[0], *own.devices[2:]])
    script = folder / "jax-node1.sh"
    script.write_text(script.read_text().replace(",".join(own.devices), exchanged))
    ran = hosts.run("node1", [script])
    assert (ran.returncode, ran.stdout) == (65, "")
    assert f"refused: CUDA_VISIBLE_DEVICES is `{exchanged}`" in ran.stderr
    straight = {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": exchanged}
    ran = hosts.run("node1", [python("jax"), folder / "program.py"], {**devices(4), **straight})
    assert ran.returncode != 0
    assert "SEEN" not in ran.stdout
    assert f"refused: CUDA_VISIBLE_DEVICES is `{exchanged}`" in ran.stderr


def test_processes_of_two_placements_do_not_start(hosts, tmp_path):
    """One host with the files of another placement, of as many hosts and ranks: every process ends with a word on it."""
    placement = drawn("blocked", 25)
    gpus = [(record.host, record.gpu, record.uuid) for record in placement.ranks]
    gpus[0], gpus[1] = gpus[1], gpus[0]
    shape = Shape(tp=4, dp=2)
    other = make(gpus, [((0, 2), shape), ((2, 4), shape)])
    ours, theirs = emitted(placement, tmp_path / "ours"), emitted(other, tmp_path / "theirs")
    first, *rest = job_of(placement).hosts
    running = [hosts.start(first.host, [theirs / f"jax-{first.host}.sh"], devices(4))]
    running += [hosts.start(each.host, [ours / f"jax-{each.host}.sh"], devices(4)) for each in rest]
    said = [each.communicate(timeout=120) for each in running]
    assert "SEEN" not in "".join(out for out, _ in said)
    assert all(each.returncode for each in running)
    assert "the processes do not all run the placement" in "".join(err for _, err in said)
