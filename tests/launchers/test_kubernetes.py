from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from placer.errors import ExportError, InputError
from placer.launchers import kubernetes
from placer.launchers.base import Options
from placer.launchers.ranks import parse_ranks
from placer.launchers.registry import LAUNCHERS, emit
from placer.placement import Placement
from placer.spec.cluster import Cluster
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid
from tests.launchers.real.jobs import cluster

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def named(hosts: list[str], gpus: int = 2) -> Cluster:
    """Return a cluster of these hosts."""
    return replace(cluster(len(hosts), gpus), hosts=tuple(hosts))


def options(of: Cluster, **changes: object) -> Options:
    """Return options with all that Kubernetes needs."""
    return replace(
        Options(cluster=of, image="registry.example/serve:1", command=("program", "it's")), **changes
    )


def documents(placement: Placement, folder: Path, of: Options) -> list[dict]:
    """Emit and read back as YAML 1.1, which is what Kubernetes reads."""
    (path,) = emit(placement, "kubernetes", folder, options=of)
    assert path.name == "jobset.yaml"
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return list(yaml.load_all(path.read_text()))


def pods(jobset: dict) -> list[dict]:
    return [job["template"]["spec"]["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]]


def test_one_pod_for_each_host_with_all_its_gpus(tmp_path):
    """Each host has a job on its node that asks for every GPU there and runs the script of that host."""
    placement = make([("node1", 1), ("node0", 0), ("node1", 0), ("node0", 1)])
    config, jobset = documents(placement, tmp_path, options(cluster(2, 4)))
    assert (config["kind"], jobset["kind"]) == ("ConfigMap", "JobSet")
    assert jobset["metadata"]["annotations"]["placer/placement"] == placement.digest()
    for host, pod in zip(("node1", "node0"), pods(jobset), strict=True):
        (container,) = pod["containers"]
        assert pod["nodeSelector"] == {"kubernetes.io/hostname": host}
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
        assert container["command"] == ["bash", f"/placer/env-{host}.sh"]
        assert container["env"][0]["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        (source,) = pod["volumes"][0]["projected"]["sources"]
        assert source["configMap"]["name"] == config["metadata"]["name"]
        assert [item["key"] for item in source["configMap"]["items"]] == [
            "ranks.tsv",
            "bind.sh",
            f"env-{host}.sh",
        ]


def test_files_are_those_of_the_wrapper_and_ranks_meet_at_the_first_pod(tmp_path):
    """The table reads back from the ConfigMap byte for byte, and the master is the name of the first pod."""
    placement = make([("node1", 1), ("node0", 0), ("node1", 0), ("node0", 1)])
    config, jobset = documents(placement, tmp_path, options(cluster(2, 2)))
    digest, rows = parse_ranks(config["data"]["ranks.tsv"])
    assert digest == placement.digest()
    assert [(row.host, row.gpu) for row in rows] == [(each.host, each.gpu) for each in placement.ranks]
    name, first = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    for file in ("bind.sh", "env-node0.sh", "env-node1.sh"):
        assert f"{name}-{first}-0-0.{name}" in config["data"][file]
    stated = documents(placement, tmp_path / "stated", options(cluster(2, 2), master_addr="10.0.0.1"))
    assert "MASTER_ADDR:-10.0.0.1}" in stated[0]["data"]["bind.sh"]


@pytest.mark.parametrize(
    "hosts",
    [
        ["gpu.rack-1.example", "gpu-rack-1.example"],
        ["no", "0x1f"],
        ["1", "1-1"],
        ["a" * 63, "a" * 62],
        ["Node01", "node02"],
    ],
)
def test_names_of_objects_are_labels_of_their_own(tmp_path, hosts):
    """Hosts with dots, capitals, long names and names that YAML takes for values: valid, unlike names, the right node."""
    placement = make([(host, gpu) for host in hosts for gpu in (1, 0)])
    *configs, jobset = documents(placement, tmp_path, options(named(hosts)))
    name = jobset["metadata"]["name"]
    jobs = [job["name"] for job in jobset["spec"]["replicatedJobs"]]
    assert len(set(jobs)) == len(hosts)
    for text in (*jobs, *(config["metadata"]["name"] for config in configs)):
        assert LABEL.fullmatch(text), text
    for job in jobs:
        assert LABEL.fullmatch(f"{name}-{job}-0-0-abcde")
    assert [pod["nodeSelector"]["kubernetes.io/hostname"] for pod in pods(jobset)] == [
        host.lower() for host in hosts
    ]


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (["gpu_1"], "host gpu_1 cannot be the name of a Kubernetes node"),
        (["a" * 40 + "." + "b" * 40], "as a label 63 signs at most"),
        (["Node1", "node1"], "hosts Node1 and node1 differ in upper and lower case alone"),
    ],
)
def test_hosts_that_no_node_is_named_after_are_refused(tmp_path, hosts, message):
    """Underscores, too long a name, and two hosts that are one node."""
    placement = make([(host, gpu) for host in hosts for gpu in range(2)])
    with pytest.raises((ExportError, InputError), match=message):
        emit(placement, "kubernetes", tmp_path, options=options(named(hosts)))
    assert LAUNCHERS["kubernetes"].cannot(placement) is not None


def test_parts_of_gpus_are_refused(tmp_path):
    """A MIG device has a resource name of its own."""
    placement = make([("node0", 0, "MIG-0"), ("node0", 1, "MIG-1")], [((0, 4), Shape(tp=1, dp=2))])
    with pytest.raises(ExportError, match="kubernetes cannot start a rank on the MIG device MIG-0 of node0"):
        emit(placement, "kubernetes", tmp_path, options=options(cluster(1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "state `--image`"),
        ({"command": ()}, "state `--command`"),
        ({"cluster": None}, "state `--cluster`"),
    ],
)
def test_what_it_needs_is_asked_for(tmp_path, change, message):
    """Without image, command or cluster there is one sentence and no file."""
    with pytest.raises(ExportError, match=message):
        emit(make([("node0", 0)]), "kubernetes", tmp_path, options=options(cluster(1, 1), **change))
    assert not list(tmp_path.iterdir())


def test_gpus_set_aside_need_uuids(tmp_path):
    """Where a node does not give out all GPUs a pod numbers the others anew: only UUIDs say which they are."""
    of = cluster(1, 4)
    of = replace(of, usable=np.array([True, False, True, True]))
    with pytest.raises(ExportError, match="a pod on node0 has not all GPUs of the node"):
        emit(make([("node0", 0), ("node0", 2)]), "kubernetes", tmp_path, options=options(of))
    placement = make([("node0", 0, uuid(0)), ("node0", 2, uuid(2))])
    jobset = documents(placement, tmp_path, options(of))[-1]
    assert pods(jobset)[0]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 3}


def test_files_too_many_for_one_map_are_split(tmp_path, monkeypatch):
    """With room for two scripts in a ConfigMap a pod sees the shared files of one and its own of another."""
    placement = make([(f"node{number}", gpu) for number in range(4) for gpu in range(2)])
    whole = documents(placement, tmp_path, options(cluster(4, 2)))
    sizes = {file: len(file) + len(text) for file, text in whole[0]["data"].items()}
    shared = sizes["ranks.tsv"] + sizes["bind.sh"]
    monkeypatch.setattr(kubernetes, "CONFIG_MAP_BYTES", shared + sizes["env-node0.sh"])
    *configs, jobset = documents(placement, tmp_path / "split", options(cluster(4, 2)))
    assert len(configs) > 1
    held = {config["metadata"]["name"]: set(config["data"]) for config in configs}
    assert sorted(file for files in held.values() for file in files) == sorted(sizes)
    for pod in pods(jobset):
        seen = set()
        for source in pod["volumes"][0]["projected"]["sources"]:
            keys = {item["key"] for item in source["configMap"]["items"]}
            assert keys <= held[source["configMap"]["name"]]
            seen |= keys
        script = pod["containers"][0]["command"][1].removeprefix("/placer/")
        assert seen == {"ranks.tsv", "bind.sh", script}
    monkeypatch.setattr(kubernetes, "CONFIG_MAP_BYTES", sizes["bind.sh"] - 1)
    with pytest.raises(ExportError, match=r"bind.sh has [0-9,]+ bytes with its name, and a ConfigMap holds"):
        emit(placement, "kubernetes", tmp_path / "none", options=options(cluster(4, 2)))


def test_a_set_too_large_to_store_is_refused(tmp_path, monkeypatch):
    """A JobSet of more bytes than Kubernetes is sure to store is not written."""
    placement = make([(f"node{number}", gpu) for number in range(4) for gpu in range(2)])
    monkeypatch.setattr(kubernetes, "JOBSET_BYTES", 4_000)
    with pytest.raises(
        ExportError, match=r"a JobSet of 4 hosts has 4,[0-9]+ bytes, and 4,000 are stored safely"
    ):
        emit(placement, "kubernetes", tmp_path, options=options(cluster(4, 2)))


def test_another_command_has_another_name(tmp_path):
    """A set never gets the immutable ConfigMap of another placement, command or image."""
    placement, other = make([("node0", 0)]), make([("node1", 0)])
    names = {
        documents(each, tmp_path / str(number), with_options)[-1]["metadata"]["name"]
        for number, (each, with_options) in enumerate(
            [
                (placement, options(cluster(2, 1))),
                (other, options(cluster(2, 1))),
                (placement, options(cluster(2, 1), command=("other",))),
                (placement, options(cluster(2, 1), image="other")),
                (placement, options(cluster(2, 1), visibility="one")),
            ]
        )
    }
    assert len(names) == 5


def test_expert_map_of_the_framework_is_in_the_pods(tmp_path):
    """With `--framework sglang` every pod has the expert map beside its script."""
    placement = make(
        [("node1", 1), ("node1", 0), ("node0", 0), ("node0", 1)],
        [((0, 3), Shape(tp=2, dp=2, ep=4))],
        {1: [[5, 0], [1, 0], [2, 3], [4, 3]], 2: [[0, 1], [2, 3], [4, 5], [5, 4]]},
    )
    paths = emit(placement, "kubernetes", tmp_path, options=options(cluster(2, 2), framework="sglang"))
    yaml = YAML(typ="safe", pure=True)
    config, jobset = yaml.load_all((tmp_path / "jobset.yaml").read_text())
    beside = next(path for path in paths if path.name == "expert_location.json")
    assert config["data"]["expert_location.json"] == beside.read_text()
    for pod in pods(jobset):
        items = pod["volumes"][0]["projected"]["sources"][0]["configMap"]["items"]
        assert "expert_location.json" in [item["path"] for item in items]
