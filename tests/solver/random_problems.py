"""Random small problems for the oracle: every kind of trouble a real cluster has, in a handful of GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from placer.problem import Problem, load_problem


def random_problem(seed: int, folder: Path) -> Problem:
    """Return problem number `seed`: a few GPUs, layers and experts, a strategy that is fixed, partly fixed or open."""
    rng = np.random.default_rng([seed, 99])
    model = _model(rng)
    data = {
        "kind": "problem",
        "name": f"random {seed}",
        "cluster": _cluster(rng),
        "model": model,
        "workload": {"scenarios": _scenarios(rng)},
        "strategy": _strategy(rng, moe=any("moe" in group for group in model["groups"])),
        "requirements": _requirements(rng),
    }
    path = folder / f"random-{seed}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_problem(path)


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _cluster(rng: np.random.Generator) -> dict[str, Any]:
    hosts = []
    left = int(rng.integers(4, 6))
    while left > 0:
        gpus = min(left, int(rng.integers(1, 4)))
        left -= gpus
        host: dict[str, Any] = {
            "hosts": f"n{len(hosts)}",
            "gpu_type": _pick(rng, ["h100-80g", "h100-80g", "a100-80g"]),
            "gpus": gpus,
        }
        if rng.random() < 0.3:
            host["memory_taken"] = {"0": f"{int(rng.integers(1, 60))} GiB"}
        hosts.append(host)
    levels: list[dict[str, Any]] = [
        {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"}
    ]
    if len(hosts) > 2 and rng.random() < 0.5:
        levels.append(
            {"name": "rack", "hosts": 2, "bandwidth": "50 GB/s", "latency": "13 us", "uplink": "60 GB/s"}
        )
    levels.append({"name": "cluster", "bandwidth": _pick(rng, ["50 GB/s", "25 GB/s"]), "latency": "15 us"})
    return {"kind": "cluster", "name": "small", "hosts": hosts, "levels": levels}


def _model(rng: np.random.Generator) -> dict[str, Any]:
    layers = int(rng.integers(2, 4))
    attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 64}
    dense = {"attention": attention, "mlp": {"width": int(rng.integers(4, 40)) * 256}}
    moe = {"experts": 4, "top_k": int(rng.integers(1, 3)), "width": int(rng.integers(2, 20)) * 256}
    if rng.random() < 0.3:
        moe["shared"] = {"width": 512}
    kind = rng.random()
    if kind < 0.15:
        groups = [{"layers": f"0-{layers - 1}", **dense}]
    elif kind < 0.4:
        groups = [{"layers": "0", **dense}, {"layers": f"1-{layers - 1}", "attention": attention, "moe": moe}]
    else:
        groups = [{"layers": f"0-{layers - 1}", "attention": attention, "moe": moe}]
    return {
        "kind": "model",
        "name": "small",
        "hidden": int(rng.integers(1, 9)) * 512,
        "vocabulary": 8000,
        "groups": groups,
    }


def _scenarios(rng: np.random.Generator) -> list[dict[str, Any]]:
    scenarios = []
    for number in range(int(rng.integers(1, 3))):
        batch = int(rng.integers(2, 40))
        scenarios.append(
            {
                "name": f"s{number}",
                "phase": _pick(rng, ["prefill", "decode"]),
                "batch": batch,
                "length": int(rng.integers(64, 4096)),
                "weight": float(rng.integers(1, 10)),
                "micro_batches": _pick(rng, [1, 1, 2]),
                "expert_loads": {
                    "generator": "zipf",
                    "skew": float(rng.random() * 1.5),
                    "seed": int(rng.integers(1000)),
                },
            }
        )
    return scenarios


def _strategy(rng: np.random.Generator, *, moe: bool) -> Any:
    kind = rng.random()
    if not moe:
        return _pick(rng, ["auto", "TP2_PP1", "TP1_PP2", "DP3_PP1", "TP2_PP2"])
    if kind < 0.45:
        return _pick(
            rng, ["TP2_PP1", "EP2_TP1_PP1", "EP2_PP2", "TP1_PP2", "EP2_TP2", "EP4_PP1", "EP2_ETP2", "DP3_PP1"]
        )
    if kind < 0.6:
        return {"stages": [{"layers": 0, "tp": 1}, {"ep": 2, "dp": 2}, {"layers": 0, "tp": 1}]}
    if kind < 0.7:
        return {"stages": [{"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}]}
    return "auto"


def _requirements(rng: np.random.Generator) -> dict[str, Any]:
    requirements: dict[str, Any] = {}
    if rng.random() < 0.3:
        requirements["max_gpus"] = 4
    if rng.random() < 0.2:
        requirements["tp_within"] = "nvlink"
    if rng.random() < 0.15:
        requirements["ep_within"] = "nvlink"
    if rng.random() < 0.3:
        requirements["redundant_experts"] = 2
    return requirements
