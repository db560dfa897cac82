"""The report on an expert map: what it says of small maps, and that it fits its width."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from placer.cost.expert_score import score_map
from placer.expert_maps.base import ExpertMap
from placer.importers.routing import Routing
from placer.report.experts import simulation_report
from placer.spec.routing import RoutingSample
from tests.expert_maps.building import small_map


def lines(what: RenderableType, width: int = 100) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False, emoji=False).print(what)
    return [row.rstrip() for row in stream.getvalue().splitlines()]


def text(what: RenderableType) -> str:
    return "\n".join(lines(what))


def routing(
    name: str, loads: Any, sample: RoutingSample | None = None, notes: tuple[str, ...] = ()
) -> Routing:
    return Routing(name, np.array(loads, dtype=np.float64), sample, notes, "", f"{name}.json")


def one_layer(*rows: list[int], experts: int = 4) -> ExpertMap:
    return small_map(list(rows), experts=experts, first=1)


LOADS = [[0, 0, 0, 0], [50, 10, 20, 20]]
SAMPLE = RoutingSample(np.array([[[0, 1]], [[0, 2]]], dtype=np.int16), np.zeros(2, np.int64), (1,), 4)


def test_one_scenario_with_counts_alone() -> None:
    score = score_map(one_layer([0, 1], [2], [3]), [routing("decode", LOADS)], host_of=np.array([0, 0, 1]))
    found = text(simulation_report(score, title="map.json"))
    assert found.startswith("map.json: 1 MoE layer, 4 experts, 4 slots a layer; 3 EP ranks, 2 hosts\n")
    assert "load of the EP ranks\nscenario  balance  max / mean  worst layer  max / mean there" in found
    assert "decode     0.5556      1.8000            1            1.8000" in found
    assert "the files hold counts, not tokens" in found
    assert "    1       +80 %        0  0: 83 %, 1: 17 %                0" in found
    assert "one copy alone is above the mean load of a rank" in found
    assert "need more copies  1 layer: 1" in found
    assert "slowest EP ranks  0 in 1 of 1 layer" in found
    for absent in ("weight", "wasted", "idle", "fetch", "worst in"):
        assert absent not in found


def test_several_scenarios_are_weighed() -> None:
    routings = [routing("decode", LOADS), routing("prefill", [LOADS[0], [20, 20, 30, 30]])]
    score = score_map(one_layer([0, 1], [2], [3]), routings, host_of=np.zeros(3, int), weights=[1, 3])
    found = text(simulation_report(score))
    assert "decode           25 %   0.5556      1.8000" in found
    assert "prefill          75 %   0.8333      1.2000" in found
    assert "weighted mean   100 %   0.7639      1.3500" in found
    assert "worst scenario: decode" in found
    assert "    1       +35 %  decode          0" in found
    assert "0 in 2 of 2 (2 scenarios x 1 layer)" in found


def test_tokens_and_the_links_they_take() -> None:
    loads = [[0] * 4, [2, 1, 1, 0]]
    routings = [routing("tokens", loads, SAMPLE), routing("counts", loads)]
    hosts = np.array([0, 0, 1, 1])
    score = score_map(one_layer([0], [1], [2], [3]), routings, host_of=hosts, token_bytes=(1024.0, 3072.0))
    found = " ".join(text(simulation_report(score)).split())
    assert "where a token goes, per token and layer" in found
    # Two ranks; one host or two. In the host 2 x 1/2; to other hosts 1/2 x 1.5. Each expert: 1/4 near, 1/2 far.
    assert "tokens 2.00 1.50 high throughput 1.00 (4.0 KiB) 0.75 (3.0 KiB)" in found
    assert "low latency 0.50 (2.0 KiB) 1.00 (4.0 KiB)" in found
    assert "counts alone, no tokens: counts" in found
    assert "in brackets: bytes of dispatch and combine together" in found
    bare = score_map(one_layer([0], [1], [2], [3]), routings, host_of=hosts)
    plain = " ".join(text(simulation_report(bare)).split())
    assert "high throughput 1.00 0.75" in plain
    assert "in brackets" not in plain


def test_wasted_slots_and_idle_copies() -> None:
    score = score_map(one_layer([0, 0, 1], [2, 3, 1]), [routing("decode", LOADS)], host_of=np.zeros(2, int))
    found = " ".join(text(simulation_report(score)).split())
    assert (
        "wasted 1 slot, another copy of an expert on the same EP rank: expert 0 on EP rank 0 in layer 1"
        in found
    )
    assert "idle copies 2 of 2 experts with copies" in found
    assert "expert 0 in layer 1 (2 copies), expert 1 in layer 1 (2 copies)" in found


def test_moves_by_link() -> None:
    before = one_layer([0], [1], [2], [3])
    after = one_layer([1, 0], [1], [2], [3, 0])
    arguments: dict[str, Any] = {"host_of": np.array([0, 0, 1, 1]), "before": before}
    score = score_map(after, [routing("decode", LOADS)], **arguments, expert_bytes=2.0**30)
    found = text(simulation_report(score))
    assert "inside a host       1            17 %  1.0 GiB" in found
    assert "between hosts       1            17 %  1.0 GiB" in found
    assert "together       2 of 6            33 %  2.0 GiB" in found
    assert "most in layer 1: 2 of 6" in found
    unknown = text(simulation_report(score_map(after, [routing("decode", LOADS)], **arguments)))
    assert "together       2 of 6            33 %      -" in unknown


def test_speeds_are_told_as_time() -> None:
    score = score_map(
        one_layer([0, 1], [2, 3]), [routing("decode", LOADS)], host_of=np.zeros(2, int), speeds=[1, 2]
    )
    found = text(simulation_report(score))
    assert "time of the EP ranks" in found
    assert "balance: mean / max time of the EP ranks" in found
    assert "its mean is total load / sum of speeds" in found


def test_only_the_worst_layers_are_listed() -> None:
    rows = [[0, 1], [2, 3]]
    expert_map = small_map(*[rows] * 12, model_layers=12)
    loads = [[10 + layer, 10, 10, 10] for layer in range(12)]
    score = score_map(expert_map, [routing("decode", loads)], host_of=np.zeros(2, int))
    found = lines(simulation_report(score, most=3))
    start = found.index("layers that hurt most")
    assert [row.split()[0] for row in found[start + 2 : start + 6]] == ["11", "10", "9", "above"]
    assert "layers, the worst first" in lines(simulation_report(score, most=12))


def test_names_cannot_act_on_the_terminal_and_notes_are_told() -> None:
    routings = [routing("de\x1b[31mcode[bold]", LOADS, notes=("two steps were added",))]
    score = score_map(one_layer([0, 1], [2, 3]), routings, host_of=np.zeros(2, int))
    found = text(simulation_report(score))
    assert "\x1b" not in found
    assert "de\\x1b[31mcode[bold]" in found
    assert "note: de\\x1b[31mcode[bold]: two steps were added" in found


@pytest.mark.parametrize("name", ["prefill_in1000out1000", "x" * 90])
def test_it_fits_100_columns(name: str) -> None:
    rng = np.random.default_rng(5)
    experts, ep, numbers = 256, 16, range(3, 61)
    layers = {
        layer: np.concatenate([rng.permutation(experts), rng.integers(0, experts, 32)]).reshape(ep, -1)
        for layer in numbers
    }
    loads = np.zeros((61, experts))
    loads[3:] = rng.pareto(0.7, (58, experts)) + 1
    chosen = rng.random((5, 58, experts)).argsort(axis=2)[:, :, :8].astype(np.int16)
    sample = RoutingSample(chosen, np.zeros(5, np.int64), tuple(numbers), experts)
    expert_map = ExpertMap(layers, experts)
    score = score_map(
        expert_map,
        [routing(name, loads, sample), routing(name + "2", loads)],
        host_of=np.arange(ep) // 8,
        token_bytes=(7392, 14336),
        expert_bytes=44e6,
        before=ExpertMap({layer: rows[::-1] for layer, rows in layers.items()}, experts),
    )
    found = lines(simulation_report(score, title="map.json"))
    assert max(map(len, found)) <= 100
    # No figure is folded: each is on the line of its scenario or layer.
    figures = f"{score.scenarios[0].mean_balance:.4f} {score.scenarios[0].mean_imbalance:.4f}"
    assert any(" ".join(row.split()).startswith(f"{name[:22]} 50 % {figures}") for row in found)
    assert any("high throughput" in row and row.count("KiB)") == 2 for row in found)
    start = next(number for number, row in enumerate(found) if row.startswith("layer  above mean"))
    worst = score.hurting[0]
    row = found[start + 1]
    assert row.split()[0] == str(worst.layer)
    assert (
        f"{worst.straggler}  "
        + ", ".join(f"{expert}: {100 * share:.0f} %" for expert, share in worst.hottest if share >= 0.005)
        in row
    )
