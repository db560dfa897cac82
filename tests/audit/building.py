"""Small plan files for the tests of the audit, the model and the cluster inline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ruamel.yaml

from placer.audit.plans import PlanAudit, Verdict, audit_plan
from placer.audit.solving import Solver

#: Eight layers of 16 experts, of which a token takes 2; 32 GPUs of 80 GB on four hosts.
PLAN: dict[str, Any] = {
    "kind": "plan",
    "name": "small",
    "source": "small.txt",
    "model": {
        "kind": "model",
        "name": "small-moe",
        "hidden": 1024,
        "vocabulary": 32000,
        "groups": [
            {
                "layers": "0-7",
                "attention": {"kind": "gqa", "heads": 16, "kv_heads": 16, "head_dim": 64},
                "moe": {"experts": 16, "top_k": 2, "width": 2048, "matrices": 2},
            }
        ],
    },
    "cluster": {
        "kind": "cluster",
        "name": "small-cluster",
        "gpu_types": {
            "card": {
                "memory": "80 GB",
                "memory_bandwidth": "2 TB/s",
                "peak": {"bf16": "100 TFLOP/s"},
            }
        },
        "hosts": [{"hosts": "node[1-4]", "gpu_type": "card", "gpus": 8}],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "300 GB/s", "latency": "3 us"},
            {"name": "cluster", "bandwidth": "200 Gb/s", "latency": "10 us"},
        ],
    },
    "workload": {"batch": 64, "length": 1024},
    "strategy": {"name": "EP8_TP2", "gpus": 16, "ep": 8, "tp": 2, "pp": 1, "etp": 2},
    "claims": [],
}


def plan_data(*claims: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the small plan with these claims, and with whole keys changed; None takes a key out."""
    data = copy.deepcopy(PLAN) | {"claims": list(claims)} | changes
    return {key: value for key, value in data.items() if value is not None}


def write_plan(folder: Path, *claims: dict[str, Any], **changes: Any) -> Path:
    """Write the small plan as YAML, and return where."""
    path = folder / "plan.yaml"
    with path.open("w") as stream:
        ruamel.yaml.YAML(typ="safe", pure=True).dump(plan_data(*claims, **changes), stream)
    return path


def audited(folder: Path, *claims: dict[str, Any], solver: Solver | None = None, **changes: Any) -> PlanAudit:
    """Return the audit of the small plan."""
    return audit_plan(write_plan(folder, *claims, **changes), solver)


def verdict(
    folder: Path, solver: Solver | None = None, changes: dict[str, Any] | None = None, **claim: Any
) -> Verdict:
    """Return the verdict on one claim of the small plan."""
    return audited(folder, claim, solver=solver, **(changes or {})).verdicts[0]
