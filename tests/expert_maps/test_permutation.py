from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placer.errors import ExportError, InputError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.permutation import Permutation, apply_permutation, inverse_of, permutation_of
from placer.expert_maps.registry import read_expert_map, render_expert_map
from placer.expert_maps.source import npz_bytes
from tests.expert_maps.building import read_bytes, read_data, small_map
from tests.shared_data import SHARED, needs_shared

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MoeLayer:
    """A small MoE layer in float64, routed as DeepSeek-V3 does it, or with a softmax over all experts."""

    router: Floats  # (experts, hidden)
    bias: Floats  # (experts,)
    gate: Floats  # (experts, inner, hidden)
    up: Floats  # (experts, inner, hidden)
    down: Floats  # (experts, hidden, inner)
    groups: int
    kept_groups: int
    top_k: int
    softmax: bool = False

    def chosen(self, tokens: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Return (tokens, top_k) experts and their weights."""
        logits = tokens @ self.router.T
        if self.softmax:
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        else:
            scores = 1 / (1 + np.exp(-logits))
        biased = scores + self.bias
        grouped = biased.reshape(len(tokens), self.groups, -1)
        # A group counts by its two best experts, and the other groups are out.
        value = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-value, axis=1, kind="stable")[:, : self.kept_groups]
        inside = np.zeros(value.shape, dtype=bool)
        np.put_along_axis(inside, kept, True, axis=1)
        masked = np.where(inside[:, :, None], grouped, -np.inf).reshape(biased.shape)
        experts = np.argsort(-masked, axis=1, kind="stable")[:, : self.top_k]
        weights = np.take_along_axis(scores, experts, axis=1)
        return experts, weights / weights.sum(axis=1, keepdims=True)

    def output(self, tokens: Floats) -> Floats:
        """Return (tokens, hidden)."""
        experts, weights = self.chosen(tokens)
        gate = np.einsum("tkih,th->tki", self.gate[experts], tokens)
        up = np.einsum("tkih,th->tki", self.up[experts], tokens)
        inner = gate / (1 + np.exp(-gate)) * up
        result: Floats = np.einsum("tk,tkhi,tki->th", weights, self.down[experts], inner)
        return result

    def reordered(self, order: NDArray[np.int64]) -> MoeLayer:
        """Return the layer with its experts in a new order."""
        return replace(
            self,
            router=apply_permutation(order, self.router),
            bias=apply_permutation(order, self.bias),
            gate=apply_permutation(order, self.gate),
            up=apply_permutation(order, self.up),
            down=apply_permutation(order, self.down),
        )


def make_layer(seed: int, experts: int, groups: int, kept_groups: int, softmax: bool = False) -> MoeLayer:
    rng = np.random.default_rng(seed)
    return MoeLayer(
        router=rng.normal(size=(experts, 8)),
        bias=rng.normal(size=experts) * 0.1,
        gate=rng.normal(size=(experts, 5, 8)),
        up=rng.normal(size=(experts, 5, 8)),
        down=rng.normal(size=(experts, 8, 5)),
        groups=groups,
        kept_groups=kept_groups,
        top_k=4,
        softmax=softmax,
    )


def map_of(order: NDArray[np.int64], ep: int, rng: np.random.Generator) -> ExpertMap:
    """Return the map of one layer that has these positions on its ranks, slots in any order."""
    return ExpertMap({0: rng.permuted(order.reshape(ep, -1), axis=1)}, len(order))


def legal_order(rng: np.random.Generator, experts: int, groups: int) -> NDArray[np.int64]:
    """Return groups in any order, and experts in any order inside each."""
    inside = rng.permuted(np.arange(experts).reshape(groups, -1), axis=1)
    return inside[rng.permutation(groups)].ravel()


SHAPES = [
    (16, 4, 2, 2),
    (16, 4, 2, 4),
    (16, 4, 2, 8),
    (16, 4, 2, 16),
    (12, 2, 1, 3),
    (16, 1, 1, 4),
    (18, 3, 2, 2),
]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("experts", "groups", "kept_groups", "ep"), SHAPES)
def test_a_legal_permutation_leaves_the_outputs_as_they_are(
    experts: int, groups: int, kept_groups: int, ep: int, softmax: bool
) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        layer = make_layer(seed, experts, groups, kept_groups, softmax)
        tokens = rng.normal(size=(40, 8))
        (order,) = permutation_of(map_of(legal_order(rng, experts, groups), ep, rng), groups)
        assert (order != np.arange(experts)).any()
        moved = layer.reordered(order)
        before, weights = layer.chosen(tokens)
        after, weights_after = moved.chosen(tokens)
        # The same experts under new numbers, in the same order of score: scores are not equal here.
        assert np.array_equal(order[after], before)
        assert np.allclose(weights, weights_after, rtol=0, atol=1e-14)
        # Not bit for bit: matrix products may round otherwise when their rows change places.
        assert np.allclose(layer.output(tokens), moved.output(tokens), rtol=0, atol=1e-12)


def test_a_permutation_that_breaks_groups_changes_the_outputs_and_is_refused() -> None:
    layer = make_layer(7, experts=16, groups=4, kept_groups=2)
    tokens = np.random.default_rng(1).normal(size=(40, 8))
    order = np.arange(16)
    order[[0, 15]] = order[[15, 0]]
    assert not np.allclose(layer.output(tokens), layer.reordered(order).output(tokens), rtol=0, atol=1e-3)
    swapped = ExpertMap({5: order.reshape(4, 4)}, 16)
    with pytest.raises(ExportError, match="layer 5: group 0 of 4"):
        permutation_of(swapped, groups=4)
    # Without groups the same swap is harmless.
    plain = replace(layer, groups=1, kept_groups=1)
    (found,) = permutation_of(swapped)
    assert np.array_equal(found, order)
    assert np.allclose(plain.output(tokens), plain.reordered(found).output(tokens), rtol=0, atol=1e-12)


def test_ties_are_where_the_promise_ends() -> None:
    layer = make_layer(3, experts=8, groups=1, kept_groups=1)
    tied = replace(layer, router=np.zeros_like(layer.router), bias=np.zeros(8))
    order = np.arange(8)[::-1].copy()
    tokens = np.ones((1, 8))
    assert not np.allclose(tied.output(tokens), tied.reordered(order).output(tokens))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (12, 2), (12, 3), (12, 4), (6, 3)]), st.data())
def test_it_is_found_exactly_where_some_order_of_the_groups_fits(shape: tuple[int, int], data: Any) -> None:
    experts, groups = shape
    ep = data.draw(st.sampled_from([ep for ep in range(1, experts + 1) if experts % ep == 0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Nearly legal: a random order is hardly ever legal, and one swap often still is.
    order = legal_order(rng, experts, groups)
    for _ in range(data.draw(st.integers(0, 2))):
        one, other = rng.integers(0, experts, size=2)
        order[[one, other]] = order[[other, one]]
    expert_map = map_of(order, ep, rng)
    size = experts // groups
    rank_of = np.empty(experts, dtype=int)
    rank_of[expert_map.layers[0].ravel()] = np.arange(experts) // (experts // ep)
    rank_of_position = np.arange(experts) // (experts // ep)
    fits = groups > 5 or any(
        all(
            sorted(rank_of[group * size : (group + 1) * size])
            == rank_of_position[block * size : (block + 1) * size].tolist()
            for block, group in enumerate(chosen)
        )
        for chosen in permutations(range(groups))
    )
    reason = Permutation(groups).cannot(expert_map)
    assert fits == (reason is None), reason
    if reason is not None:
        assert reason.startswith("layer 0: ")
        return
    (found,) = permutation_of(expert_map, groups)
    blocks = found.reshape(groups, size) // size
    assert (blocks == blocks[:, :1]).all()
    assert sorted(blocks[:, 0]) == list(range(groups))
    for rank, held in enumerate(found.reshape(ep, -1)):
        assert sorted(held) == sorted(expert_map.layers[0][rank])


@pytest.mark.parametrize(
    ("rows", "groups", "message"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 4]], 1, "expert 4 has 2 copies in layer 0"),
        ([[0, 1, 2, 3], [4, 5, 6]], 1, "in layer 0 EP rank 1 has 3 slots and EP rank 0 has 4"),
        (
            [[0, 1, 2, 4], [3, 5, 6, 7]],
            4,
            "layer 0: group 1 of 4 (experts 2 to 3) is on EP ranks 0 and 1, and grouped routing needs it on one, where "
            "2 whole groups fit",
        ),
        (
            [[0, 1, 2, 4], [3, 5, 6, 7]],
            2,
            "layer 0: group 0 of 2 (experts 0 to 3) is on EP ranks 0 and 1, and grouped routing needs it on one, where "
            "1 whole group fits",
        ),
        (
            [[0, 4], [1, 2], [3, 5], [6, 7]],
            2,
            "layer 0: group 0 of 2 (experts 0 to 3) shares EP rank 0 with group 1, and grouped routing needs it alone "
            "on 2 ranks",
        ),
        (
            [[0, 1], [4, 5], [2, 3], [6, 7]],
            2,
            "layer 0: group 0 of 2 (experts 0 to 3) is on EP ranks 0, 2, where no 4 consecutive positions that begin "
            "at a multiple of 4 are, as grouped routing needs",
        ),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 3, "8 experts cannot be 3 groups of equal size"),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 0, "8 experts cannot be 0 groups of equal size"),
    ],
)
def test_why_a_map_is_no_permutation(rows: list[list[int]], groups: int, message: str) -> None:
    expert_map = small_map(rows, experts=1 + max(map(max, rows)))
    with pytest.raises(ExportError) as caught:
        permutation_of(expert_map, groups)
    assert str(caught.value).startswith(message)
    assert Permutation(groups).cannot(expert_map) == str(caught.value)


@pytest.mark.parametrize(("ep", "groups"), [(1, 1), (2, 8), (4, 4), (8, 4), (16, 2), (2, 1)])
def test_experts_in_order_stay_in_order(ep: int, groups: int) -> None:
    order = np.arange(16)
    assert permutation_of(ExpertMap({0: order.reshape(ep, -1)}, 16), groups).tolist() == [order.tolist()]


def test_apply_and_back() -> None:
    array = np.random.default_rng(0).normal(size=(3, 6, 2))
    order = np.array([4, 2, 0, 5, 1, 3])
    moved = apply_permutation(order, array, axis=1)
    assert np.array_equal(moved[:, 0], array[:, 4])
    assert np.array_equal(apply_permutation(inverse_of(order), moved, axis=-2), array)
    assert inverse_of([order, np.arange(6)]).tolist() == [[2, 4, 1, 5, 0, 3], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("order", "axis", "message"),
    [
        ([0, 0, 1], 0, "is not a permutation"),
        ([0, 1, 3], 0, "is not a permutation"),
        ([0.0, 1.0, 2.0], 0, "is not a permutation"),
        ([[0, 1, 2]], 0, "is not a permutation"),
        ([0, 1], 0, r"an array of the shape \(3, 2\) has no 2 experts along axis 0"),
        ([0, 1], 2, "has no 2 experts along axis 2"),
    ],
)
def test_apply_refuses_what_does_not_fit(order: Any, axis: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        apply_permutation(order, np.zeros((3, 2)), axis)


def test_both_files_say_the_same() -> None:
    expert_map = small_map([[3, 2], [1, 0]], [[0, 1], [2, 3]], first=3)
    files = render_expert_map(expert_map, "permutation", groups=2)
    data = json.loads(files["expert_permutation.json"])
    assert data == {
        "layers": [3, 4],
        "ep": 2,
        "groups": 2,
        "order": [[3, 2, 1, 0], [0, 1, 2, 3]],
        "position": [[3, 2, 1, 0], [0, 1, 2, 3]],
    }
    with np.load(io.BytesIO(files["expert_permutation.npz"])) as arrays:
        assert set(arrays) == set(data)
        for name, array in arrays.items():
            assert array.tolist() == (data[name] if isinstance(data[name], list) else [data[name]])


GOOD = {"layers": [3, 5], "ep": 2, "order": [[3, 2, 0, 1], [0, 1, 2, 3]]}


def test_position_and_groups_may_be_left_out(tmp_path: Path) -> None:
    found = read_data(tmp_path, GOOD, ep=2)
    assert sorted(found.layers) == [3, 5]
    assert found.layers[3].tolist() == [[3, 2], [0, 1]]


@pytest.mark.parametrize(
    ("change", "known", "message"),
    [
        ({"order": [[3, 2, 0, 1]]}, {}, "`order`: has 1 layers, expected 2 as in `layers`"),
        (
            {"order": [[3, 2, 0, 1], [0, 1]]},
            {},
            "`order[1]`: has 2 experts, expected 4 as in the first layer",
        ),
        (
            {"order": [[3, 2, 0, 0], [0, 1, 2, 3]]},
            {},
            "`order[0]`: has expert 0 twice, expected a permutation",
        ),
        ({"order": [[3, 2, 0, 4], [0, 1, 2, 3]]}, {}, "`order[0][3]`: found expert 4, expected 0 to 3"),
        (
            {"order": [[3, 2, 0, True], [0, 1, 2, 3]]},
            {},
            "`order[0][3]`: found true, expected a whole number",
        ),
        ({"order": [[3, 2, 0, 1], 4]}, {}, "`order[1]`: found 4, expected a list"),
        ({"ep": 3}, {}, "`order[0]`: has 4 experts, which 3 EP ranks cannot share equally"),
        ({"ep": 4}, {"ep": 2}, "`ep`: is for 4 EP ranks, expected 2"),
        ({"ep": 0}, {}, "`ep`: found 0, expected a whole number of at least 1"),
        ({"groups": "4"}, {}, "`groups`: found '4'"),
        ({"layers": [5, 3]}, {}, "`layers`: found [5, 3], expected layers in ascending order"),
        ({"layers": [3, 3]}, {}, "`layers`: found [3, 3]"),
        ({"position": [[0, 1, 2, 3], [0, 1, 2, 3]]}, {}, "`position`: is not the inverse of `order`"),
        ({"position": [[True]]}, {}, "`position[0][0]`: found true"),
        ({"rank": 2}, {}, "unknown key `rank`"),
        ({}, {"model_layers": 5}, "holds layer 5, expected fewer than 5"),
        ({}, {"experts": 8}, "has 4 slots in layer 3, too few for 8 experts"),
    ],
)
def test_wrong_files_are_refused(
    tmp_path: Path, change: dict[str, Any], known: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, GOOD | change, **known)
    assert message in str(caught.value)


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    good = {"layers": np.array([0]), "ep": np.array([1]), "order": np.array([[1, 0]])}
    for change, message in (
        ({"order": np.array([[1.0, 0.0]])}, "`order`: holds float64, expected whole numbers"),
        ({"order": np.array([1, 0])}, r"`order`: found the shape \(2,\), expected \(layers, experts\)"),
        ({"other": np.array([1])}, "unknown array 'other'"),
        ({"ep": np.zeros(0, dtype=int)}, r"`ep`: found the shape \(0,\)"),
    ):
        with pytest.raises(InputError, match=message):
            read_bytes(tmp_path, "map.npz", npz_bytes(**(good | change)))


@needs_shared
def test_a_real_placement_without_copies_is_a_permutation_and_breaks_the_groups_of_its_model() -> None:
    path = SHARED / "routing" / "omni_placements" / "ep16_prefill_rearrange.npz"
    found = read_expert_map(path, dense_layers={0, 1, 2}, model_layers=61)
    order = permutation_of(found)
    assert order.shape == (58, 256)
    assert (np.sort(order, axis=1) == np.arange(256)).all()
    with pytest.raises(ExportError, match=r"layer 3: group 0 of 8 .* shares EP rank"):
        permutation_of(found, groups=8)
