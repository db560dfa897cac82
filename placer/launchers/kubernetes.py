"""Kubernetes: a JobSet with one pod for each host, which starts the ranks there by the script of the `env` launcher.

Each host is a replicated job of its own, held on its node by `nodeSelector`; the table, the wrapper and the scripts come to
the pods in ConfigMaps. A pod has a host name of its own, so the scripts look at NODE_NAME, which the pod has from
`spec.nodeName`. The device plugin numbers the GPUs it gives to a pod anew, in the order of the node: a pod asks for all of
its node, so that their numbers are what they were; UUIDs are in any case. Ranks meet at the name JobSet gives the first pod,
`JOBSET-JOB-0-0.JOBSET`.

Read: JobSet v1alpha2 (`api/jobset/v1alpha2/jobset_types.go` at 0336a8f, `pkg/webhooks/jobset_webhook.go` at 0107852: the name of
a pod with its suffix is a label of 63 signs at most), Kubernetes (`ValidateConfigMap`: 1 MiB of data; etcd takes requests of
1.5 MiB). Checked against the schemas of Kubernetes 1.37; no cluster has run it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from placer.errors import ExportError
from placer.launchers.base import Launcher, Options, Visibility
from placer.launchers.env import env_scripts
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import HostRanks, Job, cuda_uuid
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import EmittedFile
from placer.spec.cluster import Cluster

FILE_NAME = "jobset.yaml"
FOLDER = "/placer"
HOST_VARIABLE = "NODE_NAME"
GPU = "nvidia.com/gpu"

CONFIG_MAP_BYTES = 2**20
#: Half of what etcd takes: the record of who set which field can take as much again.
JOBSET_BYTES = 3 * 2**18
NAME_SIGNS = 63
#: What JobSet and Kubernetes put behind the names of the set and of the job in the name of a pod.
POD_SUFFIX = "-0-0-abcde"

_NODE = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")


class Kubernetes(Launcher):
    """A JobSet of one pod for each host."""

    name = "kubernetes"
    summary = "JobSet with one pod per host, all GPUs of each node, and the scripts in ConfigMaps; needs --image, --command, --cluster"
    visibilities = ("host", "one")
    containers = True

    def refuses(self, job: Job) -> str | None:
        """Return why not: hosts that no node can be named after."""
        nodes: dict[str, str] = {}
        for host in job.hosts:
            node = _node(host.host)
            if len(node) > NAME_SIGNS or not _NODE.fullmatch(node):
                return (
                    f"host {host.host} cannot be the name of a Kubernetes node, which has letters, digits, `-` and `.`, "
                    f"and as a label {NAME_SIGNS} signs at most"
                )
            if nodes.setdefault(node, host.host) != host.host:
                return f"hosts {nodes[node]} and {host.host} would both be the Kubernetes node {node}"
        return super().refuses(job)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `jobset.yaml`; raise ExportError without image, command or cluster, and where an object is too large."""
        visibility, image = self.visibility(options), options.image
        if image is None:
            raise ExportError("kubernetes needs the image of its containers: state `--image`")
        if not options.command:
            raise ExportError("kubernetes needs the program its containers run: state `--command`")
        if options.cluster is None:
            raise ExportError(
                "a pod asks for all GPUs of its node, and the placement does not say how many there are: state `--cluster`"
            )
        cluster = replace(options.cluster, hosts=tuple(_node(host) for host in options.cluster.hosts))
        options = replace(options, cluster=cluster)
        job = replace(
            job,
            ranks=tuple(record.model_copy(update={"host": _node(record.host)}) for record in job.ranks),
        )
        gpus = {host.host: _gpus(host, cluster) for host in job.hosts}
        name = _set_name(job, options, visibility)
        jobs = {host.host: _job_name(name, number, host.host) for number, host in enumerate(job.hosts)}
        if options.master_addr is None:
            options = replace(options, master_addr=f"{name}-{jobs[job.hosts[0].host]}-0-0.{name}")
        wrapper = wrapper_files(job, options, visibility, host_variable=HOST_VARIABLE)
        scripts = env_scripts(job, options, wrapper, host_variable=HOST_VARIABLE)
        experts = FRAMEWORKS[job.framework].expert_files(job) if job.framework is not None else {}
        shared = wrapper | experts
        maps = _config_maps(shared | scripts, name)
        held_by = {file: each for each, held in maps.items() for file in held}
        replicated = [
            _replicated_job(
                jobs[host.host],
                _pod(
                    host.host,
                    image,
                    gpus[host.host],
                    script,
                    {file: held_by[file] for file in (*shared, script)},
                ),
            )
            for host, script in zip(job.hosts, scripts, strict=True)
        ]
        documents = [_config_map(each, held, job) for each, held in maps.items()]
        return {FILE_NAME: EmittedFile(_dump([*documents, _jobset(name, replicated, job)], job))}


def _node(host: str) -> str:
    """Return the node of a host: the kubelet names it by the host's name in lower case."""
    return host.lower()


def _set_name(job: Job, options: Options, visibility: Visibility) -> str:
    """Return a name that another placement, image or command does not share, so that pods never get the files of another."""
    files = wrapper_files(job, options, visibility, host_variable=HOST_VARIABLE)
    told = json.dumps([job.digest, options.image, *(emitted.sha256 for emitted in files.values())])
    return f"placer-{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def _job_name(set_name: str, number: int, host: str) -> str:
    """Return the name of a host's job: its number, which makes it the only one, and what fits of the host's name."""
    room = NAME_SIGNS - len(set_name) - 1 - len(POD_SUFFIX)
    return f"h{number}-{host.replace('.', '-')}"[:room].rstrip("-")


def _gpus(host: HostRanks, cluster: Cluster) -> int:
    """Return how many GPUs a pod is to ask for, which are all that its node gives out.

    Raises ExportError where the pod would number them otherwise than the node does, and not all have UUIDs.
    """
    own = cluster.host_of == cluster.host_number[host.host]
    usable = int(cluster.usable[own].sum())
    whole = usable == int(own.sum()) and sorted(cluster.index[own].tolist()) == list(range(usable))
    if not whole and not all(cuda_uuid(record.uuid) for record in host.ranks):
        raise ExportError(
            f"a pod on {host.host} has not all GPUs of the node and numbers those it has anew: "
            "state the UUIDs of that host's GPUs in the cluster"
        )
    return usable


def _config_maps(files: Mapping[str, EmittedFile], name: str) -> dict[str, dict[str, EmittedFile]]:
    """Return the files by ConfigMap, in order, each with as many as it holds; raise ExportError for one too large."""
    maps: list[dict[str, EmittedFile]] = []
    room = 0
    for file, emitted in files.items():
        size = len(file) + len(emitted.text.encode())
        if size > CONFIG_MAP_BYTES:
            raise ExportError(
                f"{file} has {size:,} bytes with its name, and a ConfigMap holds {CONFIG_MAP_BYTES:,}"
            )
        if size > room:
            maps.append({})
            room = CONFIG_MAP_BYTES
        maps[-1][file] = emitted
        room -= size
    return {f"{name}-{number}": held for number, held in enumerate(maps)}


def _metadata(name: str, job: Job) -> dict[str, Any]:
    annotations = {"placer/placement": _text(job.digest), "placer/version": _text(job.version)}
    return {"name": name, "annotations": annotations}


def _text(value: str) -> str:
    """Return a value in quotes: Kubernetes reads YAML 1.1, where the host `no` is false and `0x1` a number."""
    quoted: str = DoubleQuotedScalarString(value)
    return quoted


def _config_map(name: str, files: Mapping[str, EmittedFile], job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, job),
        "immutable": True,
        "data": {file: LiteralScalarString(emitted.text) for file, emitted in files.items()},
    }


def _jobset(name: str, replicated: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Return the JobSet; raise ExportError where Kubernetes would not store it."""
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(name, job),
        "spec": {"network": {"enableDNSHostnames": True}, "replicatedJobs": replicated},
    }
    size = len(json.dumps(jobset))
    if size > JOBSET_BYTES:
        raise ExportError(
            f"a JobSet of {len(replicated)} hosts has {size:,} bytes, and {JOBSET_BYTES:,} are stored safely"
        )
    return jobset


def _replicated_job(name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Return the job of a host, which is one pod and is not tried again."""
    job = {
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {"name": name, "replicas": 1, "template": {"spec": job}}


def _pod(host: str, image: str, gpus: int, script: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the pod of a host, which runs `script`: `files` are those it sees, each with the ConfigMap it is in."""
    sources = [
        {
            "configMap": {
                "name": each,
                "items": [{"key": file, "path": file} for file, held_by in files.items() if held_by == each],
            }
        }
        for each in dict.fromkeys(files.values())
    ]
    container = {
        "name": "ranks",
        "image": _text(image),
        "command": ["bash", f"{FOLDER}/{script}"],
        "env": [{"name": HOST_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "resources": {"limits": {GPU: gpus}},
        "volumeMounts": [
            {"name": "placer", "mountPath": FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "restartPolicy": "Never",
        "nodeSelector": {"kubernetes.io/hostname": _text(host)},
        "tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [
            # r-xr-xr-x, as the scripts start one another; in decimals, which every reader of YAML takes alike.
            {"name": "placer", "projected": {"defaultMode": 0o555, "sources": sources}},
            # NCCL passes data between the processes of a host through it; the 64 MiB of a container are too few.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _dump(documents: list[dict[str, Any]], job: Job) -> str:
    first = CommentedMap(documents[0])
    first.yaml_set_start_comment(
        f"placer {job.version} placement {job.digest}\n"
        "Start it with `kubectl create -f`; its pods name themselves by their nodes and refuse all but their own.\n"
        "InfiniBand needs more of the pods than is said here: host network, devices or memory locks, as the cluster has them."
    )
    yaml = YAML()
    yaml.width = 2**30
    stream = io.StringIO()
    yaml.dump_all([first, *documents[1:]], stream)
    return stream.getvalue()
