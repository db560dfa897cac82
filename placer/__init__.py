"""placer: which rank, layer, expert and tensor shard goes on which GPU, so that the modelled latency is least.

The Python API, imported when first used, so that `import placer` stays quick:

    problem = placer.load_problem("instances/quickstart.yaml")
    result, placement = placer.solve(problem, time_limit=60)
    told = placer.check(problem)  # does anything fit, and if not, why, and what would
    findings = placer.check_placement(placement, problem)
    placer.save_placement(placement, "placement.json")
    audited = placer.audit_plan("instances/plans/plan-002.yaml")
    placer.emit(placement, "torchrun", "launch")

`placer.verify` is the module that re-checks placements, and its function is exported as `check_placement`: a name of
this package can be a function or a submodule and never both, since importing a submodule overwrites the attribute.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from placer.version import __version__

if TYPE_CHECKING:
    from placer.audit.plans import audit_plan
    from placer.errors import ExportError, InputError, PlacerError, SolverError
    from placer.expert_maps.base import ExpertMap
    from placer.expert_maps.registry import read_expert_map, render_expert_map
    from placer.explain.explaining import check
    from placer.importers.routing import read_routings
    from placer.launchers.registry import emit, list_launchers
    from placer.placement import Placement, load_placement, save_placement
    from placer.problem import Problem, load_problem
    from placer.solver.answer import solve
    from placer.solver.experts.placing import ExpertProblem, place_experts
    from placer.verify import check_placement

__all__ = [
    "ExpertMap",
    "ExpertProblem",
    "ExportError",
    "InputError",
    "Placement",
    "PlacerError",
    "Problem",
    "SolverError",
    "__version__",
    "audit_plan",
    "check",
    "check_placement",
    "emit",
    "list_launchers",
    "load_placement",
    "load_problem",
    "place_experts",
    "read_expert_map",
    "read_routings",
    "render_expert_map",
    "save_placement",
    "solve",
]

#: Where each exported name lives.
_HOMES = {
    "ExpertMap": "placer.expert_maps.base",
    "ExpertProblem": "placer.solver.experts.placing",
    "place_experts": "placer.solver.experts.placing",
    "read_expert_map": "placer.expert_maps.registry",
    "read_routings": "placer.importers.routing",
    "render_expert_map": "placer.expert_maps.registry",
    "ExportError": "placer.errors",
    "InputError": "placer.errors",
    "Placement": "placer.placement",
    "PlacerError": "placer.errors",
    "Problem": "placer.problem",
    "SolverError": "placer.errors",
    "audit_plan": "placer.audit.plans",
    "check": "placer.explain.explaining",
    "check_placement": "placer.verify",
    "emit": "placer.launchers.registry",
    "list_launchers": "placer.launchers.registry",
    "load_placement": "placer.placement",
    "load_problem": "placer.problem",
    "save_placement": "placer.placement",
    "solve": "placer.solver.answer",
}
#: Submodules that are part of the API and so are there without an import of their own.
_MODULES = ("errors", "placement", "problem", "verify")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"placer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'placer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    # Kept, so that this function is asked only once.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
