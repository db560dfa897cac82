"""Inputs that look harmless and are refused at once, because what would follow from them is wrong or endless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from placer.errors import InputError
from placer.problem import Problem, load_problem
from placer.solver.answer import solve
from placer.solver.clock import Clock
from placer.verify import check_placement

INSTANCES = Path(__file__).parents[1] / "instances"


def quickstart(folder: Path, change: dict[str, Any], cluster: dict[str, Any] | None = None) -> Path:
    """Write the quickstart with its cluster inline and some keys changed; return the file."""
    yaml = YAML(typ="safe")
    data = yaml.load(INSTANCES / "quickstart.yaml")
    data["cluster"] = {**yaml.load(INSTANCES / "clusters" / "two-h100-hosts.yaml"), **(cluster or {})}
    data["model"] = str(INSTANCES.parent / "models" / "mixtral-8x7b.yaml")
    data.update(change)
    path = folder / "problem.yaml"
    with path.open("w", encoding="utf-8") as stream:
        yaml.dump(data, stream)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_problem(path)
    return str(caught.value)


def test_named_domains_that_leave_gpus_without_a_link_are_refused(tmp_path: Path) -> None:
    """The last level must hold every GPU, however its domains are stated: a missing link is no free link."""
    levels = [
        {
            "name": "nvlink",
            "bandwidth": "450 GB/s",
            "latency": "3 us",
            "domains": [{"name": "a", "hosts": "gpu01"}],
        }
    ]
    assert "leaves 9 domains with no link between them" in refusal(
        quickstart(tmp_path, {}, {"levels": levels})
    )


@pytest.mark.parametrize("cpus", ["9-3", "1-", "-2", "1,,2", "999999", "0-70000"])
def test_cpu_lists_that_no_tool_reads_are_refused(cpus: str, tmp_path: Path) -> None:
    """A CPU list ends up in a launch script, so it is read here, where there is a line to point at."""
    hosts = [{"hosts": "gpu01", "gpu_type": "h100-80g", "gpus": 1, "cpus": [cpus]}]
    levels = [{"name": "cluster", "bandwidth": "50 GB/s", "latency": "3 us"}]
    assert "CPU" in refusal(quickstart(tmp_path, {}, {"hosts": hosts, "levels": levels}))


def test_more_copies_than_gpus_can_hold_are_refused_at_once(tmp_path: Path) -> None:
    """A thousand million copies must not be dealt out before anyone notices."""
    told = refusal(quickstart(tmp_path, {"requirements": {"redundant_experts": 1_000_000_000}}))
    assert "hold at most 120 more of 8 experts" in told


@pytest.mark.parametrize("batch", [True, "4"])
def test_a_whole_number_is_neither_a_truth_value_nor_text(batch: Any, tmp_path: Path) -> None:
    """`true` is not 1."""
    scenario = {"name": "a", "phase": "decode", "batch": batch, "length": 10}
    assert "expected a whole number" in refusal(quickstart(tmp_path, {"workload": {"scenarios": [scenario]}}))


def test_a_renamed_problem_file_still_verifies(tmp_path: Path) -> None:
    """Without a name of its own a problem takes that of its file, and a copy of the file is the same problem."""
    path = quickstart(tmp_path, {"name": None})
    problem = load_problem(path)
    _, placement = solve(problem, workers=1)
    assert placement is not None
    renamed = path.rename(tmp_path / "renamed.yaml")
    assert check_placement(placement, load_problem(renamed)) == []


def test_ctrl_c_before_anything_was_built_still_gives_a_placement(tmp_path: Path) -> None:
    """After Ctrl-C one plan is built by the quickest ways, verified, and said to be cut short or without proof."""
    problem: Problem = load_problem(quickstart(tmp_path, {}))
    clock = Clock(60)
    clock.interrupted = True
    result, placement = solve(problem, workers=1, clock=clock)
    assert placement is not None
    assert check_placement(placement, problem) == []
    assert result.cut_short
    assert (result.bound or 0.0) <= (result.objective or 0.0)
