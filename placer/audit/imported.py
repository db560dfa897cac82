"""A running layout read back: the files that started it, as a placement file that `verify` reads and `max_moves` starts from.

The files are read and made into a plan as for an audit. An audit assumes what they leave open; a placement that is written
is to be the one that runs, so here whatever decides where something is has to be in a file or in an option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from placer import verify
from placer.audit.launch_files import LaunchFiles, read_files
from placer.audit.stated_plan import StatedPlan, stated_plan
from placer.audit.stated_problem import StatedProblem, problem_of
from placer.cost.latency import CostModel
from placer.errors import InputError
from placer.importers.megatron_layout import parse_layout
from placer.launchers.numbering import FrameworkName
from placer.placement import Placement, Plan, expert_records, rank_records, strategy_record
from placer.problem import Problem
from placer.spec.names import MAX_PROSE
from placer.verify.findings import Decisions
from placer.verify.form import check_form

IN_ORDER = "in-order"
#: Faults that leave the decisions of the files as they are: they are told, and the placement is written.
_TOLD = ("redundant_experts", "host.tasks")


@dataclass(frozen=True)
class ImportWishes:
    """What the files do not say: see the options of `placer import placement`, which these are.

    `layers` is the counts of the stages, such as `10,22`; `experts` is `in-order` or None; `framework` is whose numbers
    ranks have in files that do not say it.
    """

    problem: StatedProblem
    kinds: tuple[str, ...] = ()
    layers: str | None = None
    layout: str | None = None
    tasks: str | None = None
    local_gpus: str | None = None
    framework: FrameworkName | None = None
    experts: str | None = None


@dataclass(frozen=True)
class Imported:
    """A placement that was read back, and what to tell of it: `inputs` is (file, what it was read as)."""

    placement: Placement
    inputs: tuple[tuple[str, str], ...]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    findings: tuple[verify.Finding, ...]


def import_placement(files: Sequence[str | Path], wishes: ImportWishes) -> Imported:
    """Return the placement that these files state, priced for a problem but with nothing proven of it.

    Raises InputError where the files leave a decision open, contradict one another, or make no placement. What makes a
    sound placement and breaks a requirement of the problem is in `findings`, as `placer verify` finds it.
    """
    layout = _layout(wishes)
    given = read_files(files, wishes.kinds, layout, framework=wishes.framework, tasks=wishes.tasks)
    if wishes.layers is not None:
        given = replace(given, inputs=(("--layers", "layers of the stages"), *given.inputs[1:]))
    problem, _ = problem_of(wishes.problem)
    if wishes.problem.problem is None:
        problem = replace(problem, name="imported")
    _check_open(given, problem, wishes)
    found = stated_plan(
        given,
        problem,
        from_file=wishes.problem.problem is not None,
        local_gpus=wishes.local_gpus or "all",
    )
    plan = _whole_plan(given, found, problem, wishes)
    assumptions = tuple(found.assumptions)
    placement = _placement(found.problem, plan, given, assumptions)
    findings = tuple(verify.check_placement(placement, problem))
    return Imported(placement, given.inputs, assumptions, _notes(given, found, placement), findings)


# what is left open


def _layout(wishes: ImportWishes) -> str | None:
    """Return the layout string, made of the counts of layers where those are stated instead."""
    if wishes.experts not in (None, IN_ORDER):
        raise InputError(f"found {str(wishes.experts)[:40]!r}, expected `{IN_ORDER}`", key="--experts")
    if wishes.layers is None:
        return wishes.layout
    if wishes.layout is not None:
        raise InputError("cannot stand beside --layout, which says it already", key="--layers")
    counts = wishes.layers.split(",")
    if len(wishes.layers) > 5_000 or not all(part.isascii() and part.isdigit() for part in counts):
        raise InputError(
            f"found {wishes.layers[:40]!r}, expected a count for each stage such as `10,22`", key="--layers"
        )
    text = f"E{'|'.join(f't*{part}' if int(part[:9]) else '' for part in counts)}L"
    parse_layout(text, key="--layers")
    return text


def _check_open(given: LaunchFiles, problem: Problem, wishes: ImportWishes) -> None:
    """Raise InputError for the first thing that an audit would assume and a placement must not."""
    if given.ranks is None:
        raise InputError(
            "there is no file that says which rank is on which host: a placement, ranks.tsv, a Slurm host file, an Open "
            "MPI rank file, a machine file, or a Slurm step with --tasks"
        )
    if wishes.local_gpus is None and any(row.gpu is None for row in given.ranks.rows):
        raise InputError(
            f"is missing: `{given.ranks.file}` names hosts and no GPUs; say which GPUs the ranks of a host have, in order: "
            "`all`, `usable`, `job` (with `scontrol show job -d`) or indices such as `3,1,0,2`",
            key="--local-gpus",
        )
    if given.placement is not None:
        return
    request = problem.request
    if not given.records and request.stages is None and request.pp is None and given.layout is None:
        raise InputError(
            f"is `{request.name()}`, which does not say PP; expected degrees such as `EP8_TP2_PP1`",
            key="--strategy",
        )
    if problem.model.moe is not None and given.experts is None and wishes.experts is None:
        raise InputError(
            f"is missing: no file says which experts are where; give the expert map of {problem.model.name}, or state "
            f"`--experts {IN_ORDER}` where experts lie in order over the EP ranks",
            key="--experts",
        )
    if wishes.experts is not None and given.experts is not None:
        raise InputError(f"cannot stand beside the expert map `{given.experts.file}`", key="--experts")


def _check_layers(given: LaunchFiles, found: StatedPlan, problem: Problem) -> None:
    stages = problem.request.stages
    told = given.layout is not None or given.placement is not None
    told = told or (stages is not None and all(stage.layers is not None for stage in stages))
    if found.shapes is not None and len(found.shapes) > 1 and not told:
        raise InputError(
            f"is missing: no file says how many layers each of the {len(found.shapes)} stages holds; state the counts, such as "
            "`10,22`, or a Megatron layout as --layout",
            key="--layers",
        )


# the placement


def _whole_plan(given: LaunchFiles, found: StatedPlan, problem: Problem, wishes: ImportWishes) -> Plan:
    """Return the plan of the files; raise InputError, with the first reason, where they do not make one."""
    wrong = [flaw for flaw in found.flaws if flaw.severity == "wrong"]
    if found.plan is not None:
        wrong = [flaw for flaw in wrong if flaw.code not in _TOLD]
    if wrong:
        more = f" (and {len(wrong) - 1} more: `placer audit` lists them)" if len(wrong) > 1 else ""
        raise InputError(f"the files make no placement: {wrong[0].where} {wrong[0].message}{more}")
    _check_layers(given, found, problem)
    if found.plan is not found.chunks:
        raise InputError(
            "the layout has more stages than the strategy: virtual stages interleave, and a placement file has one run of "
            "layers for each stage",
            key="--layers" if wishes.layers is not None else "--layout",
        )
    if found.plan is None:
        raise InputError("the files make no whole placement; `placer audit` says what is missing")
    plan = found.plan
    decisions = Decisions(strategy_record(plan), rank_records(found.problem, plan), expert_records(plan))
    findings, sound = check_form(decisions, found.problem)
    if sound is None:
        more = f" (and {len(findings) - 1} more: `placer audit` lists them)" if len(findings) > 1 else ""
        raise InputError(f"the files make no placement: {findings[0].where} {findings[0].message}{more}")
    apart = next(
        (item for item in verify.broken_decisions(found.problem, plan) if item.code == "gpu.reachable"), None
    )
    if apart is not None:
        raise InputError(f"the files make no placement: {apart.where} {apart.message}")
    return plan


def _placement(problem: Problem, plan: Plan, given: LaunchFiles, assumptions: tuple[str, ...]) -> Placement:
    """Return the placement file of a plan that no search found: 0 is all that is known to be below its time."""
    # Only now: what is wrong with the files should not wait for the solver's modules.
    from placer.solver.answer import make_placement
    from placer.solver.search import Result

    cost = CostModel(problem)
    result = Result("feasible", plan, cost.objective(cost.price(plan)), 0.0, candidates=0, cut_short=False)
    placement = make_placement(problem, result, seed=0)
    sources = ", ".join(word for _, word in given.inputs)
    own = [f"read back from {sources}; nothing was searched, so its bound is 0"]
    own += [f"assumed: {text}" for text in assumptions]
    return placement.model_copy(update={"notes": [*map(_prose, own), *placement.notes]})


def _prose(text: str) -> str:
    """Return a text as a placement file may hold it: a path in it can be anything."""
    printable = "".join(sign if sign.isprintable() else "?" for sign in text)
    return re.sub(r"\$+(?=[({])", "", printable)[:MAX_PROSE]


def _notes(given: LaunchFiles, found: StatedPlan, placement: Placement) -> tuple[str, ...]:
    """Return what is worth telling, and whether these are the decisions of the placement that the file of ranks names."""
    notes = [f"{flaw.where} {flaw.message}" for flaw in found.flaws]
    if given.digest == placement.digest():
        notes.append(
            f"the decisions are those of the placement {given.digest[:12]} that the file of ranks was made from"
        )
    elif given.digest is not None:
        notes.append(
            f"the file of ranks was made from the placement {given.digest[:12]}, and this one differs: in GPUs, layers, "
            "experts or UUIDs, or the file was changed"
        )
    return (*notes, *found.notes)
