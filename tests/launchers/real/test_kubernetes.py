"""The JobSet held against the schemas of Kubernetes, and its pods' own commands run on simulated hosts as pods would."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.real import jobs
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.tools import python

SCHEMA = Path(__file__).parent / "jobset.schema.json"

#: Reads documents as JSON and says for each what is wrong with it, a line each: a JobSet by its schema and every job in it
#: as a job of its own, all others by their kind.
VALIDATE = """
import json, sys
import jsonschema, kubernetes_validate
schema = json.load(open(sys.argv[1]))
for document in json.load(sys.stdin):
    kinds, wrong = [document], []
    if document["kind"] == "JobSet":
        wrong += [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
        kinds = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
                 for job in document["spec"].get("replicatedJobs", [])]
    for kind in kinds:
        try:
            kubernetes_validate.validate(kind, "1.37", strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(error.message)
    print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with simulated_hosts(jobs.names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def emitted(placement: Placement, folder: Path, visibility: str = "host") -> list[dict[str, Any]]:
    """Write the JobSet, with a program that tells what it sees, and return its documents as Kubernetes reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    show = jobs.show_program(folder)
    # A pod has a host name of its own, so the program tells the address of the node.
    show.write_text(show.read_text().replace("$(hostname)", "$(hostname -I | cut -d ' ' -f 1)"))
    options = Options(
        cluster=jobs.cluster(),
        image="registry.example/serve:1.2",
        command=(str(show),),
        visibility=visibility,
    )
    (path,) = emit(placement, "kubernetes", folder, options=options)
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return list(yaml.load_all(path.read_text()))


def wrongs(documents: list[dict[str, Any]]) -> list[list[str]]:
    """Return what the schemas say against each document."""
    ran = subprocess.run(
        [python("kubernetes_validate", "jsonschema"), "-c", VALIDATE, SCHEMA],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def mounted(documents: list[dict[str, Any]], pod: dict[str, Any], folder: Path) -> Path:
    """Lay out a pod's volume as the kubelet does, with links into a dated folder; return it."""
    maps = {each["metadata"]["name"]: each["data"] for each in documents if each["kind"] == "ConfigMap"}
    inside = folder / "..2025"
    inside.mkdir(parents=True)
    (folder / "..data").symlink_to("..2025")
    volume = next(each for each in pod["volumes"] if each["name"] == "placer")["projected"]
    for source in volume["sources"]:
        for item in source["configMap"]["items"]:
            (inside / item["path"]).write_text(maps[source["configMap"]["name"]][item["key"]])
            (inside / item["path"]).chmod(volume["defaultMode"])
            (folder / item["path"]).symlink_to(f"..data/{item['path']}")
    return folder


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [job["template"]["spec"]["template"]["spec"] for job in documents[-1]["spec"]["replicatedJobs"]]


def run_pods(hosts: Hosts, documents: list[dict[str, Any]], folder: Path) -> dict[str, tuple[int, str, str]]:
    """Run every pod's command on the node its selector names; return by node how it ended and what it said."""
    running = {}
    for number, pod in enumerate(pods(documents)):
        node = pod["nodeSelector"]["kubernetes.io/hostname"]
        (container,) = pod["containers"]
        (mount,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == "placer")
        at = mounted(documents, pod, folder / f"pod{number}")
        words = [word.replace(mount, str(at)) for word in container["command"]]
        (variable,) = container["env"]
        assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        in_pod = ["bash", "-c", 'hostname "$0"; exec "$@"', f"pod-{number}", *words]
        running[node] = hosts.start(node, in_pod, {variable["name"]: node})
    ended = {}
    for node, each in running.items():
        out, err = each.communicate(timeout=90)
        ended[node] = (each.returncode, out, err)
    return ended


def named(text: str, hosts: Hosts) -> str:
    """Return what was told with the nodes in place of their addresses."""
    for host in hosts.names:
        text = text.replace(f" host={hosts.address(host)} ", f" host={host} ")
    return text


def test_documents_hold_against_the_schemas(tmp_path):
    """64 ranks on 8 hosts: ConfigMap, JobSet and each job in it are what Kubernetes takes."""
    documents = emitted(jobs.placement("interleaved", 41), tmp_path / "out")
    assert wrongs(documents) == [[] for _ in documents]
    assert [each["kind"] for each in documents] == ["ConfigMap", "JobSet"]


@pytest.mark.parametrize(
    ("path", "key", "wrong"),
    [
        (("spec",), "replicatedJobs", "replicatedjobs"),
        (("spec", "replicatedJobs", 0), "replicas", "replica"),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"),
            "nodeSelector",
            "nodeselector",
        ),
        (("spec", "replicatedJobs", 0, "template", "spec"), "backoffLimit", "backOffLimit"),
    ],
)
def test_schemas_tell_a_misspelt_field(tmp_path, path, key, wrong):
    """The same documents with a field misspelt do not hold."""
    documents = emitted(jobs.placement("blocked", 42, hosts=1), tmp_path / "out")
    at = jobset = copy.deepcopy(documents[-1])
    for step in path:
        at = at[step]
    at[wrong] = at.pop(key)
    (found,) = wrongs([jobset])
    assert any(wrong in message for message in found)


@pytest.mark.parametrize(
    ("kind", "visibility"), [("blocked", "one"), ("interleaved", "host"), ("uneven", "host")]
)
def test_pods_start_their_ranks(hosts, tmp_path, kind, visibility):
    """The commands of the pods start 64 ranks (60 where uneven) as the placement says."""
    placement = jobs.placement(kind, 43)
    ended = run_pods(hosts, emitted(placement, tmp_path / "out", visibility), tmp_path)
    assert {code for code, _, _ in ended.values()} == {0}, ended
    told = named("".join(out for _, out, _ in ended.values()), hosts)
    jobs.check_seen(jobs.seen(told), placement, visibility)


def test_wrong_map_starts_nothing(hosts, tmp_path):
    """Two lines of the table swapped in the ConfigMap: every pod ends with 66 before it starts a rank."""
    documents = emitted(jobs.placement("interleaved", 44), tmp_path / "out")
    lines = documents[0]["data"]["ranks.tsv"].splitlines()
    lines[5], lines[9] = lines[9], lines[5]
    documents[0]["data"]["ranks.tsv"] = "\n".join([*lines, ""])
    for code, out, err in run_pods(hosts, documents, tmp_path).values():
        assert (code, out) == (66, "")
        assert "ranks.tsv is not the file made with this script" in err


def test_pods_on_the_nodes_of_others_start_nothing(hosts, tmp_path):
    """Two pods with exchanged node selectors end with 65, and so does one that is not told its node, with 64."""
    documents = emitted(jobs.placement("interleaved", 45), tmp_path / "out")
    first, second = pods(documents)[:2]
    first["nodeSelector"], second["nodeSelector"] = second["nodeSelector"], first["nodeSelector"]
    ended = run_pods(hosts, documents, tmp_path)
    nodes = [pod["nodeSelector"]["kubernetes.io/hostname"] for pod in (first, second)]
    for here, belongs in (nodes, nodes[::-1]):
        code, out, err = ended[here]
        assert (code, out) == (65, "")
        assert f"refused: made for the host {belongs}, but this is {here}" in err
    at = mounted(documents, first, tmp_path / "bare")
    script = first["containers"][0]["command"][1].rpartition("/")[2]
    ran = hosts.run(nodes[1], ["bash", at / script])
    assert (ran.returncode, ran.stdout) == (64, "")
    assert "NODE_NAME is not set" in ran.stderr
