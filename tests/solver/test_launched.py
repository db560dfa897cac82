"""The search with a launcher asked for: two searches in one time limit, the price between them, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from placer import verify
from placer.errors import SolverError
from placer.placement import LauncherPrice, load_placement, save_placement
from placer.problem import Problem
from placer.report.terminal import launcher_price_text, placement_report
from placer.solver import launched
from placer.solver.answer import search, solve
from placer.solver.clock import Clock
from placer.solver.search import Result
from tests.solver.building import cluster_data, make_problem
from tests.solver.launched import every_launcher

pytestmark = pytest.mark.usefixtures("every_launcher")
__all__ = ["every_launcher"]

UNLIKE = cluster_data([2, 2], ["h100-80g", "a100-80g"])


def asked(folder: Path, launcher: str | None, strategy: Any = "PP2_DP2_EP2", **more: Any) -> Problem:
    stated = {"launcher": launcher} if launcher else {}
    return make_problem(folder, cluster=UNLIKE, strategy=strategy, requirements=stated, **more)


def find(problem: Problem, clock: Clock) -> Result:
    return search(problem, clock, workers=1)


def test_without_a_launcher_there_is_no_price(tmp_path: Path) -> None:
    """Nothing is asked, so nothing is told."""
    _, placement = solve(asked(tmp_path, None), workers=1)
    assert placement is not None
    assert placement.launcher_price is None


def test_the_best_of_all_is_the_answer_where_it_can_be_expressed(tmp_path: Path) -> None:
    """Then there is one search, no price, and the placement that is found without the launcher."""
    searched: list[str | None] = []

    def noted(problem: Problem, clock: Clock) -> Result:
        searched.append(problem.requirements.launcher)
        return find(problem, clock)

    problem = asked(tmp_path, "torchrun")
    result, price = launched.search(problem, Clock(60), noted)
    assert searched == [None]
    assert price is not None
    assert (price.cost_s, price.why, price.cut_short) == (0.0, "", False)
    free = find(asked(tmp_path, None), Clock(60))
    assert result.plan is not None
    assert free.plan is not None
    np.testing.assert_array_equal(result.plan.gpus, free.plan.gpus)
    assert price.without_s == result.objective == free.objective


def test_a_price_is_what_the_two_differ_by(tmp_path: Path) -> None:
    """Stages that vLLM has on the hosts of a DP rank: the price is the difference, with the reason and every scenario."""
    problem = asked(tmp_path, "vllm")
    _, placement = solve(problem, workers=1)
    _, free = solve(asked(tmp_path, None), workers=1)
    assert placement is not None
    assert free is not None
    price = placement.launcher_price
    assert price is not None
    assert price.cost_s > 0
    assert price.strategy == free.strategy.name
    assert "each host must hold one unbroken run of ranks" in price.why
    assert not price.why.startswith("cannot")
    assert price.without_s == pytest.approx(free.certificate.objective_s, rel=1e-12)
    assert price.cost_s == pytest.approx(placement.certificate.objective_s - price.without_s, abs=1e-15)
    assert price.without == {name: record.total_s for name, record in free.latency.items()}
    # The bound of the problem without the launcher holds with it.
    assert placement.certificate.bound_s >= free.certificate.bound_s * (1 - 1e-12)


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    """Two runs, one placement and one price."""
    problem = asked(tmp_path, "vllm", "auto")
    first, second = (solve(problem, workers=1, seed=5)[1] for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.digest() == second.digest()
    assert first.launcher_price == second.launcher_price


def test_both_searches_are_inside_the_time_limit(tmp_path: Path) -> None:
    """The free search gets its share, and the other what is left; what asks nothing of placements gets all for one."""
    limits: list[float] = []

    def noted(problem: Problem, clock: Clock) -> Result:
        limits.append(clock.limit)
        clock.cut_short = True
        return Result("nothing found", None, None, 0.0, 1, True)

    clock = Clock(100)
    result, price = launched.search(asked(tmp_path, "sglang"), clock, noted)
    assert limits == [pytest.approx(launched.SHARE * 100, abs=1), pytest.approx(100, abs=1)]
    assert clock.cut_short
    assert result.objective is None
    assert price is None
    limits.clear()
    launched.search(asked(tmp_path, "slurm"), Clock(100), noted)
    assert limits[0] == pytest.approx(100, abs=1)


def test_a_search_that_is_cut_short_is_said(tmp_path: Path) -> None:
    """What could be expressed is kept unless the other search has better, and the price says that it is as far as found."""
    problem = asked(tmp_path, "torchrun")
    whole = find(problem, Clock(60))

    def cut(problem: Problem, clock: Clock) -> Result:
        if problem.requirements.launcher is None:
            return replace(whole, cut_short=True)
        return Result("out of time", None, None, 0.0, 1, True)

    result, price = launched.search(problem, Clock(60), cut)
    assert result.plan is whole.plan
    assert result.cut_short
    assert price is not None
    assert price.cut_short
    assert price.cost_s == 0


def test_a_price_is_never_negative(tmp_path: Path) -> None:
    """A worse answer of the free search is none: the placement itself is one without the launcher."""
    problem = asked(tmp_path, "megatron")
    good = find(problem, Clock(60))
    assert good.objective is not None
    assert good.plan is not None

    def worse(problem: Problem, clock: Clock) -> Result:
        if problem.requirements.launcher is not None:
            return good
        assert good.objective is not None
        return replace(good, plan=None, objective=None, status="out of time", cut_short=True, bound=0.0)

    result, price = launched.search(problem, Clock(60), worse)
    assert price is not None
    assert price.cost_s == 0
    assert price.without_s == result.objective


def test_what_has_no_placement_without_it_has_none_with_it(tmp_path: Path) -> None:
    """One search is enough, and its proof is the answer's."""
    searched: list[str | None] = []

    def noted(problem: Problem, clock: Clock) -> Result:
        searched.append(problem.requirements.launcher)
        return find(problem, clock)

    late = {"max_step": {"decode": "1 us"}, "launcher": "sglang"}
    problem = make_problem(tmp_path, cluster=UNLIKE, strategy="PP2_DP2_EP2", requirements=late)
    result, price = launched.search(problem, Clock(60), noted)
    assert (result.status, price, searched) == ("infeasible", None, [None])


def test_what_counting_rules_out_is_not_priced(tmp_path: Path) -> None:
    """Copies that vLLM has not, or too few GPUs: the answer is there without a search for its price."""
    searched: list[str | None] = []

    def noted(problem: Problem, clock: Clock) -> Result:
        searched.append(problem.requirements.launcher)
        return find(problem, clock)

    copies = make_problem(tmp_path, requirements={"launcher": "vllm", "redundant_experts": 8})
    for problem in (copies, asked(tmp_path, "sglang", "DP8_PP1")):
        result, price = launched.search(problem, Clock(60), noted)
        assert (result.status, price, searched.pop(), searched) == (
            "infeasible",
            None,
            problem.requirements.launcher,
            [],
        )
        assert result.reasons


def test_a_false_placement_prices_nothing(tmp_path: Path) -> None:
    """What was found without the launcher passes the same check as an answer does."""
    problem = asked(tmp_path, "sglang")
    good = find(problem, Clock(60))
    assert good.plan is not None
    first = good.plan.stages[0]
    broken = replace(good.plan, stages=(replace(first, gpus=first.gpus[::-1] * 0), *good.plan.stages[1:]))
    with pytest.raises(SolverError, match="without the launcher fails its own check"):
        launched.search(problem, Clock(60), lambda *_: replace(good, plan=broken))


def test_the_file_keeps_the_price_and_verify_checks_it(tmp_path: Path) -> None:
    """Read back as it was; another launcher, sum, scenario or a negative difference is found."""
    problem = asked(tmp_path, "sglang", "PP1")
    _, placement = solve(problem, workers=1)
    assert placement is not None
    save_placement(placement, tmp_path / "out.json")
    assert load_placement(tmp_path / "out.json").launcher_price == placement.launcher_price
    price = placement.launcher_price
    assert price is not None
    less = {name: 0.5 * step for name, step in price.without.items()}
    for change, said in (
        ({"launcher": "vllm"}, "do not name"),
        ({"without": {}}, "expected"),
        ({"without_s": 2 * price.without_s}, "its steps make"),
        ({"cost_s": price.cost_s + 1e-3 * price.without_s}, "recomputed"),
        ({"without": less, "without_s": 0.5 * price.without_s}, "recomputed"),
        (
            {"without": {n: 2 * s for n, s in price.without.items()}, "without_s": 2 * price.without_s},
            "more than this placement",
        ),
    ):
        false = placement.model_copy(update={"launcher_price": price.model_copy(update=change)})
        found = verify.check_placement(false, problem)
        assert [finding.code for finding in found] == ["launcher_price"], change
        assert said in found[0].message


PRICE = LauncherPrice(
    launcher="torchrun",
    cost_s=12.3e-6,
    without_s=287.1e-6,
    without={"decode": 287.1e-6},
    strategy="EP8_TP1_DP8_PP1",
    why="host n1 holds the ranks 0, 2, and each host must hold one unbroken run of ranks",
)


def test_the_price_in_words() -> None:
    """What it costs of what, and why; nothing where nothing; and that a search was cut short."""
    assert launcher_price_text(PRICE, 1) == (
        "launcher torchrun costs 12.3 us a step (4.3 %), as modelled: without it, 287.1 us is the best found, "
        "EP8_TP1_DP8_PP1, which it cannot express (host n1 holds the ranks 0, 2, and each host must hold one unbroken run "
        "of ranks)"
    )
    assert "a step in the weighted mean" in launcher_price_text(PRICE, 2)
    nothing = PRICE.model_copy(update={"cost_s": 0.0, "why": ""})
    assert launcher_price_text(nothing, 1) == (
        "launcher torchrun costs nothing: the best found without it is one it can express"
    )
    cut = nothing.model_copy(update={"cut_short": True})
    assert launcher_price_text(cut, 1) == (
        "launcher torchrun costs nothing as far as found: nothing better was found without it in the time that there was"
    )
    assert "the best found in the time that there was" in launcher_price_text(
        PRICE.model_copy(update={"cut_short": True}), 1
    )


def test_the_report_tells_the_price(tmp_path: Path) -> None:
    """`placer solve` and `placer show` have a line on it."""
    _, placement = solve(asked(tmp_path, "torchrun"), workers=1)
    assert placement is not None
    console = Console(record=True, width=200, file=(tmp_path / "seen").open("w"))
    console.print(placement_report(placement))
    assert "launcher torchrun costs nothing" in console.export_text()


def test_ctrl_c_in_the_free_search_still_gives_what_the_launcher_can_express(tmp_path: Path) -> None:
    """The second search has no time left, and gives what it finds at once."""
    clock = Clock(60)

    def pressed(problem: Problem, part: Clock) -> Result:
        found = find(problem, part)
        clock.interrupted = True
        return found

    problem = asked(tmp_path, "vllm")
    result, price = launched.search(problem, clock, pressed)
    assert result.plan is not None
    assert verify.broken_decisions(problem, result.plan) == []
    assert result.cut_short
    assert price is not None
    assert price.cut_short
    assert price.cost_s > 0
