"""What the files of a placement amount to: degrees, seats, layers and experts as a plan, and what is assumed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from placer.audit.launch_files import LaunchFiles
from placer.audit.seats import NO_GPU, Seated, first_gpus, seat_ranks
from placer.errors import InputError
from placer.expert_maps.base import NO_SLOT, ExpertMap
from placer.expert_maps.registry import read_expert_map
from placer.expert_maps.source import open_document
from placer.importers.megatron_layout import PipelineLayout
from placer.launchers.numbering import servers
from placer.launchers.ranks import RankRow
from placer.placement import Placement, Plan, RankRecord, StagePlan
from placer.problem import Problem
from placer.report.audit_placement import Flaw
from placer.report.tables import count, fold_numbers
from placer.strategy import Shape, Strategy, StrategyRequest, stage_bounds

NUMBERING = "ranks are numbered TP fastest, then DP, then stage, as Megatron's `tp-cp-ep-dp-pp` does"


@dataclass
class StatedPlan:
    """The plan of some files, as far as they make one.

    `problem` has as many expert slots as the files. `plan` has one stage for each pipeline stage; `chunks` has one for
    each run of layers a micro-batch passes, which is more where virtual stages interleave and the layers of `plan` are
    then even ones in their place. `held` is the layers of each pipeline stage. `from_file` is whether the problem was
    stated in a file, which then also says how many copies of experts there are to be.
    """

    problem: Problem
    from_file: bool = True
    gpus: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    shapes: tuple[Shape, ...] | None = None
    plan: Plan | None = None
    chunks: Plan | None = None
    held: list[list[int]] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def strategy(self) -> str | None:
        """The name of the strategy."""
        return Strategy(self.shapes).name() if self.shapes else None

    def seat(self, seated: Seated) -> None:
        """Take seats, with what is wrong and what was assumed of them."""
        self.gpus = seated.gpus
        self.flaws += seated.flaws
        self.assumptions += seated.assumptions

    def wrong(self, code: str, where: str, message: str) -> None:
        """Note that something is wrong."""
        self.flaws.append(Flaw("wrong", code, where, message))


def stated_plan(
    given: LaunchFiles,
    problem: Problem,
    *,
    from_file: bool = True,
    vpp: int | None = None,
    local_gpus: str = "all",
) -> StatedPlan:
    """Return the plan that the files state for a problem; what they leave open is assumed, and told.

    Raises InputError where the strategy leaves a degree open that nothing else tells.
    """
    found = StatedPlan(problem, from_file)
    if given.ranks is not None:
        found.seat(seat_ranks(given.ranks, problem.cluster, local_gpus, given.job))
        found.notes += given.ranks.notes
    found.shapes = _shapes(given, found, vpp)
    if found.shapes is None:
        return found
    total = sum(shape.ranks for shape in found.shapes)
    if given.ranks is None:
        found.seat(first_gpus(problem, total))
    order = _own_numbers(given, found, total)
    if given.records:
        _check_coordinates(given.records, found, found.shapes, order)
    if total != len(found.gpus):
        if not any(flaw.code == "ranks.count" for flaw in found.flaws):
            found.wrong(
                "ranks.count", "ranks", f"are {len(found.gpus):,}, but {found.strategy} has {total:,}"
            )
        return found
    if order is not None and len(order) == total:
        # What the framework calls rank r is rank order[r] of the placement.
        found.gpus = found.gpus[np.argsort(order)]
    bounds = _layers(given, found, found.shapes, vpp)
    experts = _experts(given, found, found.shapes, bounds)
    if experts is not None and not (found.gpus == NO_GPU).any():
        _make_plans(found, found.shapes, bounds, experts)
    return found


def _make_plans(
    found: StatedPlan,
    shapes: tuple[Shape, ...],
    bounds: list[tuple[int, int]],
    experts: dict[int, NDArray[np.int64]],
) -> None:
    """Fill in the plans: one stage for each of `bounds`, which come back to the first pipeline stage after the last."""
    stages = len(shapes)
    ends = np.cumsum([shape.ranks for shape in shapes])
    seats = np.split(found.gpus, ends[:-1])
    chunks = [
        StagePlan(first, last, shapes[number % stages], seats[number % stages])
        for number, (first, last) in enumerate(bounds)
    ]
    found.chunks = found.plan = Plan(tuple(chunks), experts)
    found.held = [[layer for chunk in chunks[n::stages] for layer in chunk.layers] for n in range(stages)]
    if len(bounds) != stages:
        even = _even(found.problem.model.layer_count, stages)
        whole = [StagePlan(*even[n], shape, seats[n]) for n, shape in enumerate(shapes)]
        found.plan = Plan(tuple(whole), experts)


# degrees


def _shapes(given: LaunchFiles, found: StatedPlan, vpp: int | None) -> tuple[Shape, ...] | None:
    """Return the shape of every stage, None where what was found makes none."""
    request = found.problem.request
    try:
        if given.placement is not None:
            return tuple(
                Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
                for stage in given.placement.strategy.stages
            )
        if given.records:
            return _shapes_of_records(given.records)
        if given.framework is None:
            found.assumptions.append(NUMBERING)
        if request.stages is not None:
            return tuple(stage.shape() for stage in request.stages)
        return _shapes_of_degrees(given, found, request, vpp)
    except ValueError as error:
        found.wrong("strategy.degrees", "strategy", str(error))
        return None


def _shapes_of_records(records: Sequence[RankRow | RankRecord]) -> tuple[Shape, ...]:
    """Return the shapes that coordinates reach up to; raise ValueError where those make none."""
    largest: dict[int, list[int]] = {}
    for record in records:
        row = (record.tp, record.dp, record.ep, record.etp)
        before = largest.setdefault(record.stage, [0, 0, 0, 0])
        largest[record.stage] = [max(old, new) for old, new in zip(before, row, strict=True)]
    missing = next((number for number in range(len(largest)) if number not in largest), None)
    if missing is not None:
        raise ValueError(f"the ranks are on stage {max(largest)}, but none is on stage {missing}")
    return tuple(
        Shape(tp=tp + 1, dp=dp + 1, ep=ep + 1, etp=etp + 1)
        for _, (tp, dp, ep, etp) in sorted(largest.items())
    )


def _shapes_of_degrees(
    given: LaunchFiles, found: StatedPlan, request: StrategyRequest, vpp: int | None
) -> tuple[Shape, ...] | None:
    """Return like stages of the degrees that are stated and the number of ranks; None and a flaw where they disagree."""
    moe = found.problem.model.moe is not None
    for degree, value, needed in (("TP", request.tp, True), ("EP", request.ep, moe)):
        if needed and value is None:
            raise InputError(
                f"is `{request.name()}`, which does not say {degree}; expected degrees such as `EP8_TP2_PP1`",
                key="--strategy",
            )
    tp, ep, etp = request.tp or 1, request.ep or 1, request.etp or 1
    pp = request.pp or _stages_of_layout(given.layout, vpp)
    if request.pp is None:
        found.assumptions.append(f"PP {pp}: the strategy does not say it")
    if moe and request.etp is None:
        found.assumptions.append("ETP 1: the strategy does not say it")
    if given.ranks is None:
        per_stage = tp * request.dp if request.dp is not None else max(tp, ep * etp * (request.edp or 1))
    else:
        per_stage, over = divmod(len(found.gpus), pp)
        if over or per_stage % tp:
            found.wrong(
                "ranks.count",
                "ranks",
                f"are {len(found.gpus):,}, no multiple of TP {tp} x PP {pp} = {tp * pp:,}",
            )
            return None
    shape = Shape(tp=tp, dp=per_stage // tp, ep=ep, etp=etp)
    if request.dp not in (None, shape.dp):
        found.wrong(
            "ranks.count",
            "ranks",
            f"are {len(found.gpus):,}, but TP {tp} x DP {request.dp} x PP {pp} is {tp * (request.dp or 1) * pp:,}",
        )
        return None
    return (shape,) * pp


def _stages_of_layout(layout: PipelineLayout | None, vpp: int | None) -> int:
    return 1 if layout is None else max(1, len(layout.stages) // (vpp or 1))


def _own_numbers(given: LaunchFiles, found: StatedPlan, total: int) -> NDArray[np.int64] | None:
    """Return (ranks,) the placement's number of each rank that a framework numbers; None where they have it already."""
    if given.framework is None or found.shapes is None or total != len(found.gpus):
        return None
    found.notes.append(
        f"ranks have the numbers that {given.framework} gives them in the file, and the placement's own in all that follows"
    )
    return np.concatenate(servers(given.framework, found.shapes, moe=found.problem.model.moe is not None))


def _check_coordinates(
    records: Sequence[RankRow | RankRecord],
    found: StatedPlan,
    shapes: tuple[Shape, ...],
    order: NDArray[np.int64] | None,
) -> None:
    """Note the first rank whose coordinates are not those that its number stands for.

    `order` is (ranks,) the placement's own number of each, where a framework numbered them.
    """
    misnumbered = any(flaw.code == "ranks.numbers" for flaw in found.flaws)
    if misnumbered or sum(shape.ranks for shape in shapes) != len(records):
        return
    names = ("stage", "dp", "tp", "ep", "etp", "edp")
    expected = []
    for number, shape in enumerate(shapes):
        columns = {"stage": np.full(shape.ranks, number)} | shape.coordinates()
        expected.append(np.stack([columns[name] for name in names], axis=1))
    every = np.concatenate(expected) if order is None else np.concatenate(expected)[order]
    ordered = sorted(records, key=lambda record: record.rank)
    stated = np.array([[getattr(record, name) for name in names] for record in ordered])
    differing = np.flatnonzero((stated != every).any(axis=1))
    if len(differing):
        rank = int(differing[0])
        wanted = every[rank]
        column = int(np.flatnonzero(stated[rank] != wanted)[0])
        more = f" ({len(differing)} ranks alike)" if len(differing) > 1 else ""
        found.wrong(
            "ranks.coordinates",
            f"rank {ordered[rank].rank}",
            f"states {names[column]} {stated[rank, column]}, expected {wanted[column]} under {found.strategy}{more}",
        )


# layers


def _layers(
    given: LaunchFiles, found: StatedPlan, shapes: tuple[Shape, ...], vpp: int | None
) -> list[tuple[int, int]]:
    """Return the layers of every stage, half open; of every chunk in turn where virtual stages interleave."""
    layers, stages = found.problem.model.layer_count, len(shapes)
    if given.layout is not None:
        bounds = _layout_bounds(given.layout, found, stages, vpp)
        return _even(layers, stages) if bounds is None else bounds
    if given.placement is not None:
        return _placed_layers(given.placement, found)
    request = found.problem.request.stages
    if request is not None and len(request) == stages and any(stage.layers is not None for stage in request):
        counts = [stage.layers for stage in request]
        left, open_stages = layers - sum(value or 0 for value in counts), counts.count(None)
        shares = iter(_even_counts(max(0, left), open_stages))
        if open_stages:
            found.assumptions.append("layers even over the stages that do not say how many they hold")
        return stage_bounds([next(shares) if value is None else value for value in counts])
    if stages > 1:
        split = ", ".join(str(value) for value in _even_counts(layers, stages)[:16])
        found.assumptions.append(f"layers even over the stages: {split}{', ...' if stages > 16 else ''}")
    return _even(layers, stages)


def _placed_layers(placement: Placement, found: StatedPlan) -> list[tuple[int, int]]:
    """Return the layers of a placement's stages; even ones and a flaw where those are not all layers in order."""
    bounds = [stage.layers for stage in placement.strategy.stages]
    layers = found.problem.model.layer_count
    ends = [0, *(last for _, last in bounds)]
    if [first for first, _ in bounds] != ends[:-1] or ends != sorted(ends):
        found.wrong("layers.order", "strategy.stages", "do not hold the layers in one unbroken order")
    elif ends[-1] != layers:
        found.wrong(
            "layers.all",
            "strategy.stages",
            f"hold {ends[-1]} layers, but {found.problem.model.name} has {layers}",
        )
    else:
        return bounds
    return _even(layers, len(bounds))


def _layout_bounds(
    layout: PipelineLayout, found: StatedPlan, stages: int, vpp: int | None
) -> list[tuple[int, int]] | None:
    """Return the layers of each chunk of a layout; None and flaws where it does not fit the model and the stages."""
    chunks = len(layout.stages)
    times = vpp or max(1, chunks // stages)
    where = "layout"
    faults = layout.faults(found.problem.model.layer_count, times)
    if chunks != stages * times:
        word = f" x {times} virtual" if times > 1 else ""
        faults.append(f"has {count(chunks, 'stage')}, but the strategy has {count(stages, 'stage')}{word}")
    for fault in faults:
        found.wrong("layout", where, fault)
    if faults:
        return None
    if times > 1:
        found.assumptions.append(
            f"{times} virtual stages on each pipeline rank, as the layout has {chunks} stages"
        )
    if layout.mtp_layers:
        found.assumptions.append(
            f"{count(layout.mtp_layers, 'MTP layer')} of the layout left out: the model card holds decoder layers"
        )
    return layout.bounds()


def _even(layers: int, stages: int) -> list[tuple[int, int]]:
    return stage_bounds(_even_counts(layers, stages))


def _even_counts(layers: int, stages: int) -> list[int]:
    """Return as many layers for each stage as can be, one more for the first few where they do not divide."""
    if stages == 0:
        return []
    return [layers // stages + (number < layers % stages) for number in range(stages)]


# experts


def _experts(
    given: LaunchFiles, found: StatedPlan, shapes: tuple[Shape, ...], bounds: list[tuple[int, int]]
) -> dict[int, NDArray[np.int64]] | None:
    """Return the experts of every MoE layer; None and a flaw where the map given cannot be used."""
    model = found.problem.model
    if model.moe is None:
        if given.experts is None:
            return {}
        found.wrong("experts.map", given.experts.file, f"maps experts, but {model.name} has none")
        return None
    if given.experts is not None:
        if given.placement is not None:
            found.assumptions.append(f"experts are those of `{given.experts.file}`, not of the placement")
        return _mapped(given.experts.file, given.experts.format, found, shapes)
    if given.placement is not None:
        return _placed(given.placement.experts, found)
    found.assumptions.append(
        "experts in order over the EP ranks, copies from the first on: no expert map was given"
    )
    experts, slots = model.moe.experts, found.problem.slots
    held = {
        layer: shapes[number % len(shapes)].ep
        for number, (first, last) in enumerate(bounds)
        for layer in model.moe_layers
        if first <= layer < last
    }
    odd = [ep for ep in held.values() if slots % ep]
    if odd:
        found.wrong(
            "strategy.divides", "strategy", f"ep {odd[0]} does not divide the {slots} expert slots of a layer"
        )
        return None
    rows = {ep: (np.arange(slots) % experts).reshape(ep, -1) for ep in set(held.values())}
    return {layer: rows[ep] for layer, ep in held.items()}


def _mapped(
    file: str, format_name: str, found: StatedPlan, shapes: tuple[Shape, ...]
) -> dict[int, NDArray[np.int64]] | None:
    model = found.problem.model
    assert model.moe is not None
    degrees = {shape.ep for shape in shapes if shape.ep > 1} or {1}
    if len(degrees) > 1:
        found.wrong("experts.map", file, f"is one map, but the stages have EP {fold_numbers(degrees)}")
        return None
    # Opened here first, so that a file which cannot be read at all is told as bad input.
    open_document(file)
    try:
        read = read_expert_map(
            file,
            ep=degrees.pop(),
            experts=model.moe.experts,
            format=format_name,
            dense_layers=[n for n in range(model.layer_count) if not model.layer(n).moe],
            model_layers=model.layer_count,
        )
    except InputError as error:
        found.wrong("experts.map", file, _without_file(error))
        return None
    found.notes += read.notes
    return _rows_of(read, file, found)


def _without_file(error: InputError) -> str:
    return str(InputError(error.message, key=error.key, line=error.line))


def _rows_of(read: ExpertMap, file: str, found: StatedPlan) -> dict[int, NDArray[np.int64]] | None:
    if not read.even:
        layer = next(layer for layer, rows in read.layers.items() if (rows == NO_SLOT).any())
        found.wrong("experts.slots", file, f"gives EP ranks unequal numbers of slots in layer {layer}")
        return None
    slots = {layer: read.slots(layer) for layer in read.layers}
    if len(set(slots.values())) > 1:
        few, many = min(slots, key=slots.__getitem__), max(slots, key=slots.__getitem__)
        found.wrong(
            "experts.slots", file, f"has {slots[few]} slots in layer {few} and {slots[many]} in layer {many}"
        )
        return None
    _adopt_slots(found, next(iter(slots.values())), file)
    return {layer: rows.astype(np.int64) for layer, rows in read.layers.items()}


def _placed(stated: dict[int, list[list[int]]], found: StatedPlan) -> dict[int, NDArray[np.int64]] | None:
    experts: dict[int, NDArray[np.int64]] = {}
    for layer, rows in stated.items():
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            found.wrong(
                "experts.slots", f"experts.{layer}", "gives EP ranks unequal numbers of slots, or none"
            )
            return None
        try:
            experts[layer] = np.array(rows, dtype=np.int64)
        except OverflowError:
            found.wrong("experts.known", f"experts.{layer}", "names an expert of more than 18 digits")
            return None
    if experts:
        _adopt_slots(found, next(iter(experts.values())).size, "placement")
    return experts


def _adopt_slots(found: StatedPlan, slots: int, where: str) -> None:
    """Make the problem one with as many slots as the map has; where it states another number, that is a flaw."""
    problem = found.problem
    assert problem.model.moe is not None
    copies = slots - problem.model.moe.experts
    if slots == problem.slots or copies < 0:
        return
    if found.from_file:
        found.wrong(
            "redundant_experts",
            where,
            f"has {slots} slots a layer, but the problem asks for {problem.slots} "
            f"(`redundant_experts: {problem.requirements.redundant_experts}`)",
        )
    requirements = problem.requirements.model_copy(update={"redundant_experts": copies})
    found.problem = replace(problem, requirements=requirements)
