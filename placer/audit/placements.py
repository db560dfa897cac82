"""Holds launcher files to a cluster and a model: what a placement costs, what is wrong with it, how near the best it is.

The files are told apart and read by `launch_files`, made into a plan by `stated_plan` and priced by `placement_costs`.
What breaks a rule is found by `verify`, which knows nothing of where a plan came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from placer import verify
from placer.audit import placement_costs as costs
from placer.audit.launch_files import LaunchFiles, read_files
from placer.audit.seats import NO_GPU, seat_flaws
from placer.audit.stated_plan import StatedPlan, stated_plan
from placer.audit.stated_problem import StatedProblem, problem_of
from placer.cost.constants import model_digest
from placer.cost.latency import CostModel, ScenarioLatency
from placer.errors import InputError
from placer.launchers.numbering import FrameworkName
from placer.problem import Problem
from placer.report.audit_placement import Balance, Comparison, Fill, Flaw, PlacementAudit
from placer.report.tables import count
from placer.strategy import Shape, StageRequest, StrategyRequest
from placer.verify.limits import check_step_limits

#: Findings that leave nothing to price: what they are about has no meaning to the cost model.
_STOPS = (
    "ranks.numbers", "ranks.count", "ranks.order", "ranks.coordinates", "gpu.exists", "gpu.distinct", "gpu.reachable",
    "host.known", "strategy.degrees", "strategy.divides", "layers.order", "layers.all", "layout", "experts.map",
    "experts.layers", "experts.ranks", "experts.slots", "experts.known", "experts.all",
)  # fmt: skip


@dataclass(frozen=True)
class AuditWishes:
    """How to audit: what the files are where their content is not to tell (`kinds`), a layout string, the problem,
    virtual stages (`vpp`), GPUs of local ranks, whose rank numbers they are and the tasks of a Slurm step's hosts; and
    whether and how long to solve for something better.
    """

    problem: StatedProblem
    kinds: tuple[str, ...] = ()
    layout: str | None = None
    vpp: int | None = None
    local_gpus: str = "all"
    framework: FrameworkName | None = None
    tasks: str | None = None
    solve: bool = True
    time_limit: float = 20.0
    workers: int = 2
    seed: int = 0


def audit_files(files: Sequence[str | Path], wishes: AuditWishes) -> PlacementAudit:
    """Return what the placement in these files costs and what is wrong with it.

    Together the files hold at most one map of ranks, one expert map and one layout. What they leave out is filled by
    assumptions, which the answer lists. Raises InputError for files and options that cannot be used.
    """
    if wishes.vpp is not None and not 1 <= wishes.vpp <= 1000:
        raise InputError(f"found {wishes.vpp}, expected 1 to 1000", key="--vpp")
    if not files and wishes.layout is None:
        raise InputError("there is no file to audit, and no --layout")
    given = read_files(files, wishes.kinds, wishes.layout, framework=wishes.framework, tasks=wishes.tasks)
    problem, assumed = problem_of(wishes.problem)
    from_file = wishes.problem.problem is not None
    found = stated_plan(given, problem, from_file=from_file, vpp=wishes.vpp, local_gpus=wishes.local_gpus)
    found.assumptions[:0] = assumed
    _verify(given, problem, found)
    return _told(given, problem, found, wishes)


def _verify(given: LaunchFiles, problem: Problem, found: StatedPlan) -> None:
    """Add what breaks a rule; what was found already, in more words, is not said twice."""
    flaws: list[Flaw] = []
    if found.plan is None:
        flaws += seat_flaws(problem, found.gpus)
    elif given.placement is not None and _whole(given, problem):
        flaws += [_flaw(finding) for finding in verify.check_placement(given.placement, problem)]
    else:
        if given.placement is not None:
            found.notes.append(
                "the placement was made for another problem, or is given with other files: its decisions alone were "
                "checked, not the times and sizes it states"
            )
        flaws += [_flaw(finding) for finding in verify.broken_decisions(found.problem, found.plan)]
    known = {flaw.code for flaw in found.flaws} | {"memory.limit", "max_memory"}
    if found.plan is not found.chunks:
        # The plan that is checked has even layers in the place of interleaved ones.
        known |= {"pin_layers", "exclude_layers"}
        if found.problem.requirements.model_fields_set & {"pin_layers", "exclude_layers"}:
            found.assumptions.append(
                "`pin_layers` and `exclude_layers` were not checked: virtual stages interleave"
            )
    # Memory is told once for a stage, by `placement_costs`, and not for each of its ranks.
    found.flaws += [flaw for flaw in flaws if flaw.code not in known]


def _flaw(finding: verify.Finding) -> Flaw:
    return Flaw("wrong", finding.code, finding.where, finding.message)


def _whole(given: LaunchFiles, problem: Problem) -> bool:
    """Whether a placement is of this very problem and stands alone, so that all it states can be checked."""
    assert given.placement is not None
    digests = problem.digests | {"cost model": model_digest()}
    return len(given.inputs) == 1 and given.placement.digests == digests


def _told(given: LaunchFiles, problem: Problem, found: StatedPlan, wishes: AuditWishes) -> PlacementAudit:
    cluster = problem.cluster
    hosts = {int(cluster.host_of[gpu]) for gpu in found.gpus.tolist() if gpu != NO_GPU}
    stopped = _stopped(found)
    fills: list[Fill] = []
    rows: list[Balance] = []
    latencies: list[ScenarioLatency] = []
    objective = None
    if stopped is None:
        cost = CostModel(found.problem)
        fills, flaws = costs.memory(found)
        found.flaws += flaws
        latencies = costs.price(found, cost)
        objective = cost.objective(latencies)
        found.flaws += _limits(found, latencies)
        rows, flaws = costs.balance(found, cost)
        found.flaws += [*costs.spans(found, cost), *flaws]
    names = [scenario.name for scenario in problem.scenarios]
    comparison, not_compared = (
        (None, "there is no cost to compare") if stopped is not None else _compared(problem, found, wishes)
    )
    return PlacementAudit(
        model=problem.model.name,
        cluster=cluster.name,
        strategy=found.strategy,
        ranks=len(found.gpus),
        hosts=len(hosts),
        inputs=given.inputs,
        assumptions=tuple(found.assumptions),
        notes=_notes(found),
        flaws=tuple(found.flaws),
        latency={
            name: dict(latency.terms) for name, latency in zip(names, latencies, strict=bool(latencies))
        },
        objective_s=objective,
        not_costed=stopped,
        memory=tuple(fills),
        balance=tuple(rows),
        comparison=comparison,
        not_compared=not_compared,
    )


def _notes(found: StatedPlan) -> tuple[str, ...]:
    generated = found.problem.generated_loads
    loads = (f"expert loads of {', '.join(generated)} are generated, not measured",) if generated else ()
    return (*found.notes, *loads)


def _stopped(found: StatedPlan) -> str | None:
    """Return why there is nothing to price, or None."""
    flaw = next((flaw for flaw in found.flaws if flaw.code in _STOPS), None)
    if flaw is not None:
        return f"{flaw.where} {flaw.message}"
    homeless = int((found.gpus == NO_GPU).sum())
    if homeless:
        return f"{count(homeless, 'rank')} of {len(found.gpus):,} {'has' if homeless == 1 else 'have'} no GPU"
    return None if found.plan is not None else "the files do not make a whole placement"


def _limits(found: StatedPlan, latencies: list[ScenarioLatency]) -> list[Flaw]:
    """Return the limits on a step that are not kept, unless they were found already."""
    known = {flaw.code for flaw in found.flaws}
    broken = (_flaw(finding) for finding in check_step_limits(latencies, found.problem))
    return [flaw for flaw in broken if flaw.code not in known]


# the best there is


def _compared(
    problem: Problem, found: StatedPlan, wishes: AuditWishes
) -> tuple[Comparison | None, str | None]:
    """Return what the solver makes of the same problem, or why it was not asked."""
    if not wishes.solve:
        return None, "the solver was not asked (--no-solve)"
    stated = wishes.problem.problem is not None
    words = f"strategy {problem.request.name()}" if stated else "the same degrees"
    # Only now: what is wrong with the files should not wait for OR-Tools.
    from placer.solver import answer

    try:
        # Without a problem file there is nothing but this placement to say what is wanted.
        asked = problem if stated else found.problem.with_request(_request(found.shapes or ()))
        result, placement = answer.solve(
            asked, time_limit=wishes.time_limit, workers=wishes.workers, seed=wishes.seed
        )
    except InputError as error:
        return None, str(error)
    except ValidationError:
        return None, "the degrees are larger than the solver takes"
    bound = result.bound if result.bound is not None and 0 < result.bound < float("inf") else None
    return (
        Comparison(
            status=result.status,
            asked=words,
            strategy=None if placement is None else placement.strategy.name,
            objective_s=result.objective,
            bound_s=bound,
            candidates=result.candidates,
            cut_short=result.cut_short,
            outside=_outside(found),
            latency={}
            if placement is None
            else {name: record.total_s for name, record in placement.latency.items()},
            reasons=tuple(result.reasons),
        ),
        None,
    )


def _outside(found: StatedPlan) -> str | None:
    """Return why a bound on the placements that a search looks at is none on this one."""
    if any(flaw.severity == "wrong" for flaw in found.flaws):
        return "something is wrong with it"
    if found.plan is not found.chunks:
        return "its virtual stages interleave, which the solver does not do"
    return None


def _request(shapes: tuple[Shape, ...]) -> StrategyRequest:
    first = shapes[0]
    if len(set(shapes)) == 1:
        return StrategyRequest(pp=len(shapes), tp=first.tp, dp=first.dp, ep=first.ep, etp=first.etp)
    stages = [StageRequest(tp=shape.tp, dp=shape.dp, ep=shape.ep, etp=shape.etp) for shape in shapes]
    return StrategyRequest(stages=stages)
