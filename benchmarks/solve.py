"""Solve the instances one after another, each in a fresh process, and print what each took and gave.

    python -m benchmarks.solve [NAMES...] [--time-limit S] [--strategy auto] [--workers N]

One line per instance: strategy, GPUs, wall seconds of the whole process, its peak memory, objective, bound, gap,
status, and its wall time over the quickstart's in the same run. Every placement is verified after the clock stops.
Objective and bound are modelled seconds. Wall time and memory are of this machine; compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTANCES = ROOT / "instances"
#: What the wall times are divided by; always solved first.
YARDSTICK = "quickstart"

_HEAD = (
    "instance",
    "strategy",
    "GPUs",
    "wall s",
    "x quick",
    "peak MiB",
    "objective",
    "bound",
    "gap",
    "status",
)
_ALIGN = "<<>>>>>>><"


@dataclass(frozen=True)
class Run:
    """What one child process took and told."""

    name: str
    seconds: float
    told: dict[str, Any]


def instance_names() -> list[str]:
    """Return the names of the problem files in `instances/`, the yardstick first, the rest in order."""
    names = sorted(path.stem for path in INSTANCES.glob("*.yaml"))
    return sorted(names, key=lambda name: (name != YARDSTICK, name))


def solve_here(name: str, strategy: str | None, time_limit: float, workers: int) -> dict[str, Any]:
    """Solve one instance in this process, verify the placement, and return what is to be printed."""
    from placer.errors import PlacerError
    from placer.problem import load_problem
    from placer.solver.answer import solve
    from placer.verify import check_placement

    try:
        problem = load_problem(INSTANCES / f"{name}.yaml", strategy)
        result, placement = solve(problem, time_limit=time_limit, workers=workers, seed=0)
    except PlacerError as error:
        return {"status": f"error: {error}"}
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    told: dict[str, Any] = {"status": result.status, "cut_short": result.cut_short, "peak_mib": peak}
    if placement is None:
        return told | {"reasons": result.reasons}
    return told | {
        "strategy": placement.strategy.name,
        "gpus": len(placement.ranks),
        "objective": placement.certificate.objective_s,
        "bound": placement.certificate.bound_s,
        "gap": placement.certificate.gap,
        "status": placement.certificate.status,
        "findings": [str(finding) for finding in check_placement(placement, problem)],
        "solved_at": time.time(),
    }


def solve_in_child(name: str, strategy: str | None, time_limit: float, workers: int) -> Run:
    """Solve one instance in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.solve", "--child", name]
    command += ["--time-limit", str(time_limit), "--workers", str(workers)]
    if strategy is not None:
        command += ["--strategy", strategy]
    begin = time.time()
    try:
        # The search stops by itself at the limit; a process that does not is ended and told.
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=2 * time_limit + 60, check=False
        )
    except subprocess.TimeoutExpired:
        return Run(name, time.time() - begin, {"status": "error: did not stop at the time limit"})
    seconds = time.time() - begin
    if done.returncode != 0 or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Run(name, seconds, {"status": f"error: exit code {done.returncode}: {last}"})
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return Run(name, told.get("solved_at", begin + seconds) - begin, told)


def row_of(run: Run, yardstick: float | None) -> tuple[str, ...]:
    """Return the cells of one line."""
    told = run.told
    status = str(told["status"])
    if told.get("cut_short"):
        status += ", CUT SHORT by the time limit"
    if told.get("findings"):
        status += f", VERIFY FOUND {len(told['findings'])} FAULTS, first: {told['findings'][0]}"
    if told.get("reasons"):
        status += f": {told['reasons'][0]}"
    ratio = "-" if yardstick is None else f"{run.seconds / yardstick:.1f}"
    peak = f"{told['peak_mib']:.0f}" if "peak_mib" in told else "-"
    if "objective" not in told:
        return (run.name, "-", "-", f"{run.seconds:.1f}", ratio, peak, "-", "-", "-", status)
    return (
        run.name,
        str(told["strategy"]),
        str(told["gpus"]),
        f"{run.seconds:.1f}",
        ratio,
        peak,
        f"{told['objective'] * 1e3:.4g} ms",
        f"{told['bound'] * 1e3:.4g} ms",
        f"{told['gap']:.2%}",
        status,
    )


def print_row(cells: tuple[str, ...], widths: tuple[int, ...]) -> None:
    """Print one line, each column as wide as it was made for."""
    padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, _ALIGN, widths, strict=True)]
    print("  ".join(padded).rstrip(), flush=True)


def main() -> int:
    """Solve what was asked for; 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solve", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="instances; all of them when none is named")
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="S", help="seconds for each instance"
    )
    parser.add_argument(
        "--strategy", metavar="NAME", help="takes the place of what the files say; `auto` or degrees"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    stated = parser.parse_args()
    if stated.child:
        told = solve_here(stated.child, stated.strategy, stated.time_limit, stated.workers)
        print(json.dumps(told))
        return 0
    known = instance_names()
    unknown = [name for name in stated.names if name not in known]
    if unknown:
        parser.error(f"there is no instance `{unknown[0]}`; there are {', '.join(known)}")
    wanted = [name for name in known if not stated.names or name in stated.names or name == YARDSTICK]
    widths = (max(map(len, wanted)), 30, 4, 6, 7, 8, 10, 10, 6, 8)
    print(
        f"strategy: {stated.strategy or 'as the files say'}; at most {stated.time_limit:g} s each; times modelled"
    )
    print_row(_HEAD, widths)
    yardstick: float | None = None
    runs: list[Run] = []
    for name in wanted:
        run = solve_in_child(name, stated.strategy, stated.time_limit, stated.workers)
        if name == YARDSTICK and "objective" in run.told:
            yardstick = run.seconds
        runs.append(run)
        print_row(row_of(run, yardstick), widths)
    cut = [run.name for run in runs if run.told.get("cut_short")]
    if cut:
        print(f"cut short by the time limit, so worse than a longer run may give: {', '.join(cut)}")
    failed = [run.name for run in runs if "objective" not in run.told or run.told["findings"]]
    if failed:
        print(f"without a verified placement: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
