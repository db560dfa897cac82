"""What Slurm shows of jobs and steps, read back into hosts, GPUs and tasks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers.scontrol import (
    SlurmNodes,
    lay_out,
    looks_like_scontrol,
    parse_scontrol,
    parse_task_layout,
)
from tests.importers.refusals import answer_or_refusal

#: As Slurm 22.05.8 printed them for a job on nodes of 8, 8 and 4 GPUs.
JOB = """\
JobId=2 JobName=job2.sh
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Partition=all AllocNode:Sid=slurmhost:0
   ReqNodeList=node[0-1,8] ExcNodeList=(null)
   NodeList=node[0-1,8]
   BatchHost=node0
   NumNodes=3 NumCPUs=48 NumTasks=3 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=48,mem=6000M,node=3,billing=48
   JOB_GRES=gpu:20
     Nodes=node[0-1] CPU_IDs=0-15 Mem=2000 GRES=gpu:8(IDX:0-7)
     Nodes=node8 CPU_IDs=0-15 Mem=2000 GRES=gpu:4(IDX:0-3)
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/tmp/job2.sh NodeList=evil
   WorkDir=/tmp
   Power=

"""
STEP = """\
StepId=2.1 UserId=0 StartTime=2026-11-21T15:02:02 TimeLimit=UNLIMITED
   State=RUNNING Partition=all NodeList=node[0-1,8]
   Nodes=3 CPUs=48 Tasks=6 Name=sleep Network=(null)
   TRES=cpu=48,mem=6000M,node=3
   ResvPorts=(null)
   CPUFreqReq=Default Dist={}
   SrunHost:Pid=slurmhost:374
   TresPerStep=cpu:24,gres:gpu:20

"""
BATCH = """\
StepId=2.batch UserId=0 StartTime=2026-11-21T15:01:26 TimeLimit=UNLIMITED
   State=RUNNING Partition=all NodeList=node0
   Nodes=1 CPUs=0 Tasks=1 Name=batch Network=(null)

"""


def hosts_of(nodes: SlurmNodes, layout: str | None) -> list[str]:
    """Return the host of every task."""
    return [row.host for row in lay_out(nodes, None if layout is None else parse_task_layout(layout)).rows]


def test_a_job_with_its_gpus() -> None:
    """Hosts in Slurm's order, and the numbers of the GPUs on each; the user's own words in it say nothing."""
    found = parse_scontrol(JOB, "job")
    assert looks_like_scontrol(JOB)
    assert (found.kind, found.name, found.hosts) == ("job", "2", ("node0", "node1", "node8"))
    assert found.gpus == {"node0": tuple(range(8)), "node1": tuple(range(8)), "node8": (0, 1, 2, 3)}
    assert (found.tasks, found.distribution) == (None, None)


def test_gpus_of_some_numbers_and_types() -> None:
    """Types are put together, other resources left out, and a host without GPUs has none."""
    text = JOB.replace("gpu:8(IDX:0-7)", "gpu:h100:3(IDX:0,2-3),nic:1(IDX:5),gpu:a100:1(IDX:6)")
    text = text.replace("GRES=gpu:4(IDX:0-3)", "GRES=")
    assert parse_scontrol(text, "job").gpus == {"node0": (0, 2, 3, 6), "node1": (0, 2, 3, 6)}


@pytest.mark.parametrize(
    ("word", "expected"),
    [("Cyclic", "cyclic"), ("Block", "block"), ("BCyclic", "block"), ("CBlock", "cyclic"), ("Plane", "plane"),
     ("arbitrary task distribution", "arbitrary"), ("Unknown", None)],
)  # fmt: skip
def test_a_step_among_the_batch_step(word: str, expected: str | None) -> None:
    """`scontrol show step JOB` tells of the batch step too, which starts no ranks."""
    found = parse_scontrol(BATCH + STEP.format(word), "step")
    assert (found.kind, found.name, found.tasks, found.distribution) == ("step", "2.1", 6, expected)
    assert found.hosts == ("node0", "node1", "node8")


@pytest.mark.parametrize(
    ("word", "layout", "expected"),
    [
        ("Block", "2(x3)", "001188"),
        ("Cyclic", "2(x3)", "018018"),
        ("Cyclic", "3,1,2", "018080"),
        ("Block", "block:1,4,1", "011118"),
        ("Unknown", "cyclic:1,4,1", "018111"),
    ],
)
def test_tasks_are_laid_out(word: str, layout: str, expected: str) -> None:
    """One host after another, or in turn with full hosts passed over."""
    nodes = parse_scontrol(STEP.format(word), "step")
    assert hosts_of(nodes, layout) == [f"node{sign}" for sign in expected]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from(["block", "cyclic"]))
def test_every_host_gets_its_tasks(counts: list[int], distribution: str) -> None:
    """Whatever the order, a host has as many tasks as were stated; in turn, no host is two ahead of one with room."""
    hosts = tuple(f"n{number}" for number in range(len(counts)))
    nodes = SlurmNodes("job", "file", "1", hosts)
    order = hosts_of(nodes, f"{distribution}:{','.join(map(str, counts))}")
    assert Counter(order) == dict(zip(hosts, counts, strict=True))
    if distribution == "block":
        assert order == sorted(order, key=hosts.index)
        return
    seen: Counter[str] = Counter()
    for host in order:
        assert all(seen[other] >= min(seen[host], room) for other, room in zip(hosts, counts, strict=True))
        seen[host] += 1


def test_a_step_on_one_host_needs_no_layout() -> None:
    """All its tasks are there."""
    text = STEP.format("Unknown").replace("node[0-1,8]", "node1").replace("Nodes=3", "Nodes=1")
    assert hosts_of(parse_scontrol(text, "step"), None) == ["node1"] * 6


@pytest.mark.parametrize(
    ("word", "layout", "says"),
    [
        ("arbitrary task distribution", "2(x3)", "give the file of SLURM_HOSTFILE"),
        ("Plane", None, "distribution `plane`"),
        ("Cyclic", None, "does not say how many tasks each host has"),
        ("Cyclic", "block:2(x3)", "states block, but step 2.1 has the distribution `cyclic`"),
        ("Unknown", "2(x3)", "expected `block:` or `cyclic:` before it"),
        ("Block", "2(x2)", "states the tasks of 2 hosts, but step 2.1 has 3"),
        ("Block", "2(x4)", "states the tasks of 4 hosts"),
        ("Block", "2,2,3", "states 7 tasks, but step 2.1 has 6"),
    ],
)
def test_what_is_left_open_is_refused(word: str, layout: str | None, says: str) -> None:
    """Nothing is guessed of which task is where."""
    nodes = parse_scontrol(STEP.format(word), "step")
    with pytest.raises(InputError) as caught:
        hosts_of(nodes, layout)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "8,", "0", "8(x0)", "plane:8", "8x3", "8(x3", "-1", "9" * 30, "1000000(x9999)", "8;8", "a:8"]
)
def test_a_layout_in_no_known_form_is_refused(text: str) -> None:
    """The option is named, with an example or the limit."""
    with pytest.raises(InputError, match="--tasks"):
        parse_task_layout(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no answer"),
        ("node1\nnode2\n", "is no answer"),
        ("slurm_load_jobs error: Invalid job id specified\n", "is no answer"),
        (f"x\n{JOB}", "is no answer"),
        (JOB + JOB.replace("JobId=2", "JobId=3"), "tells of 2 jobs or steps"),
        (BATCH, "tells of 0 jobs or steps"),
        (JOB.replace(" NodeList=node[0-1,8]", " NodeList=(null)"), "names no hosts"),
        (JOB.replace("\n", " "), "names no hosts"),
        (JOB.replace("Nodes=node8", "Nodes=node9"), "names GPUs of node9, which the job has not"),
        (JOB.replace("IDX:0-3", "IDX:0-3-5"), "expected numbers of GPUs"),
        (JOB.replace("   NodeList=node[0-1,8]", "   NodeList=node[0-99999999]"), "NodeList"),
        (JOB.replace("   NodeList=node[0-1,8]", "   NodeList=$(reboot)"), "expected a host"),
        (STEP.format("Block").replace("Tasks=6", "Tasks=0"), "expected a number of tasks"),
        (STEP.format("Block").replace("StepId=2.1", "StepId=$(x)"), "expected the number of a step"),
    ],
)
def test_what_is_no_answer_of_scontrol_is_refused(text: str, says: str) -> None:
    """Each with a sentence that says what was found."""
    with pytest.raises(InputError) as caught:
        parse_scontrol(text, "file")
    assert says in str(caught.value)


@given(st.data())
def test_spoilt_answers_are_read_or_refused(data: st.DataObject) -> None:
    """Whatever is cut out of an answer or put into it, the reader answers or says what is wrong."""
    text = data.draw(st.sampled_from([JOB, STEP.format("Block"), BATCH + STEP.format("Cyclic")]))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    put = data.draw(st.text(max_size=6))
    with answer_or_refusal():
        parse_scontrol(text[:start] + put + text[end:], "file")


def test_free_text_states_no_gpus() -> None:
    """A command line inside a record states no GPUs, and a host's are stated once."""
    text = JOB.replace(
        "   Power=\n", "   SubmitLine=srun Nodes=node0 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:6-7)\n   Power=\n"
    )
    assert text != JOB
    assert parse_scontrol(text, "job.txt") == parse_scontrol(JOB, "job.txt")
    twice = JOB.replace(
        "     Nodes=node8", "     Nodes=node0 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:6-7)\n     Nodes=node8"
    )
    with pytest.raises(InputError, match="names the GPUs of node0 twice"):
        parse_scontrol(twice, "job.txt")
