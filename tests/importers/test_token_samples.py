"""Routing samples: the real ones, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from placer.errors import InputError
from placer.importers.routing import read_expert_loads, read_routing, read_routing_sample
from placer.importers.token_samples import Choices, check_sample, looks_like_choices
from tests.importers.refusals import answer_or_refusal
from tests.shared_data import SHARED, needs_shared

ROUTING = SHARED / "routing"
#: Three tokens, two layers, two of five experts.
TOPK = np.array([[[0, 1], [2, 3]], [[1, 4], [0, 2]], [[3, 0], [1, 0]]])


def npz(folder: Path, **members: Any) -> Path:
    np.savez(folder / "a.npz", **members)
    return folder / "a.npz"


def refused(path: Path, **wanted: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_routing_sample(path, **wanted)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@needs_shared
@pytest.mark.parametrize(
    ("name", "shape", "experts", "prompts"),
    [
        ("deepseek_v2_lite/tokens_sample.npz", (25073, 26, 6), 64, 171),
        ("qwen15_moe_a27b/tokens_gsm8k.npz", (4357, 5, 4), 60, 1),
        ("granite3_1b_a400m/tokens_tiny.npz", (216, 24, 8), 32, 8),
    ],
)
def test_real_samples_are_read_whole(
    name: str, shape: tuple[int, int, int], experts: int, prompts: int
) -> None:
    sample = read_routing_sample(ROUTING / name)
    assert sample.chosen.shape == shape
    assert sample.experts == experts
    assert len(np.unique(sample.prompt)) == prompts
    with np.load(ROUTING / name) as origin:
        np.testing.assert_array_equal(sample.chosen, origin["topk"])


@needs_shared
def test_layers_that_a_real_sample_skips_count_as_dense() -> None:
    read = read_routing(ROUTING / "qwen15_moe_a27b" / "tokens_gsm8k.npz", experts=60)
    assert np.flatnonzero(read.loads.any(axis=1)).tolist() == [0, 8, 12, 18, 23]
    assert (read.loads.sum(axis=1)[[0, 23]] == 4357 * 4).all()
    assert any("layers 1, 2, 3" in note for note in read.notes)


def test_everything_an_npz_says_is_kept(tmp_path: Path) -> None:
    path = npz(tmp_path, topk=TOPK, request=np.array([5, 5, 9], dtype=np.uint8), layers=[1, 3], experts=6)
    sample = read_routing_sample(path, experts=6, layers=[1, 3])
    assert sample.chosen.tolist() == TOPK.tolist()
    assert sample.chosen.dtype == np.int16
    assert sample.prompt.tolist() == [5, 5, 9]
    assert (sample.layers, sample.experts) == ((1, 3), 6)
    loads = read_expert_loads(path)
    assert loads.tolist() == [[0] * 6, [2, 2, 0, 1, 1, 0], [0] * 6, [2, 1, 2, 1, 0, 0]]
    assert read_routing(path).notes == ("the file has no choices in layers 0, 2: they count as dense",)


def test_what_is_taken_for_granted_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TOPK.astype(np.uint8))
    sample = read_routing_sample(tmp_path / "a.npy")
    assert (sample.experts, sample.layers, sample.prompt.tolist()) == (5, (0, 1), [0, 0, 0])
    assert read_routing_sample(tmp_path / "a.npy", experts=8, layers=[4, 7]).layers == (4, 7)
    notes = read_routing(npz(tmp_path, topk=TOPK)).notes
    assert any(note.startswith("5 experts a layer") for note in notes)
    assert any("one prompt" in note for note in notes)
    assert not any("experts a layer" in note for note in read_routing(tmp_path / "a.npz", experts=8).notes)


def test_padding_and_dense_layers_are_left_out() -> None:
    padded = np.full((5, 4, 3), -1)
    padded[:3, 1::2, :2] = TOPK
    padded[3, 1, :2] = [0, 1]
    read = check_sample(Choices(padded, np.arange(5), experts=5), "a")
    assert read.sample.chosen.tolist() == TOPK.tolist()
    assert read.sample.layers == (1, 3)
    assert read.sample.prompt.tolist() == [0, 1, 2]
    assert read.notes == ("2 of 5 tokens lack a choice and were left out as padding",)


@pytest.mark.parametrize(
    ("members", "wanted", "says"),
    [
        ({"topk": TOPK * 1.0}, {}, "expected whole expert numbers"),
        ({"topk": TOPK[0]}, {}, "expected (tokens, layers, top_k)"),
        ({"topk": TOPK[:0]}, {}, "none of them 0"),
        ({"topk": np.zeros((2, 1, 2), dtype=int)}, {}, "token 0 chose expert 0 twice in layer 0"),
        ({"topk": TOPK - 9}, {}, "no token chose an expert"),
        ({"topk": np.array([[[0], [-1]], [[-1], [0]]])}, {}, "every token lacks a choice"),
        ({"topk": TOPK}, {"experts": 4}, "token 1 chose expert 4 in layer 0, expected 0 to 3"),
        ({"topk": TOPK, "experts": 5}, {"experts": 8}, "found 5 experts, expected 8"),
        ({"topk": TOPK + 40000}, {}, "at most 32767"),
        ({"topk": TOPK, "experts": 0}, {}, "at least 1"),
        ({"topk": TOPK, "experts": [1, 2]}, {}, "one whole number"),
        ({"topk": TOPK, "experts": 1.5}, {}, "one whole number"),
        ({"topk": TOPK, "layers": [1]}, {}, "found 2 layers, expected 1"),
        ({"topk": TOPK, "layers": [1, 1]}, {}, "expected different numbers"),
        ({"topk": TOPK, "layers": [-1, 1]}, {}, "expected different numbers"),
        ({"topk": TOPK, "layers": [1, 10**12]}, {}, "expected different numbers"),
        ({"topk": TOPK, "layers": [1.0, 2.0]}, {}, "list of layer numbers"),
        ({"topk": TOPK, "layers": [1, 2]}, {"layers": [1, 3]}, "holds the layers 1, 2, expected 1, 3"),
        ({"topk": TOPK}, {"layers": [1, 2, 3]}, "found 2 layers, expected 3"),
        ({"topk": TOPK, "prompt": [1, 2]}, {}, "for each of 3 tokens"),
        ({"topk": TOPK, "prompt": [0.0, 0.0, 1.0]}, {}, "for each of 3 tokens"),
        ({"load": np.ones((2, 2))}, {}, "counts alone"),
    ],
)
def test_wrong_samples_are_refused_with_what_is_wrong(
    tmp_path: Path, members: dict[str, Any], wanted: dict[str, Any], says: str
) -> None:
    assert says in str(refused(npz(tmp_path, **members), **wanted))


def test_a_repeat_is_found_in_any_part_of_a_long_sample() -> None:
    long = np.tile(np.arange(4), (40_000, 2, 1))
    check_sample(Choices(long), "a")
    long[39_999, 1, 3] = 0
    with pytest.raises(InputError, match="token 39999 chose expert 0 twice in layer 1"):
        check_sample(Choices(long), "a")


def test_counts_and_samples_of_three_axes_are_told_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sample = generator.permuted(np.tile(np.arange(16), (60, 4, 1)), axis=2)[..., :4]
    counts = generator.integers(0, 50, (60, 4, 16))
    assert looks_like_choices(sample)
    assert not looks_like_choices(counts)
    assert not looks_like_choices(sample[:5])
    assert not looks_like_choices(sample.astype(float))
    np.save(tmp_path / "sample.npy", sample)
    np.save(tmp_path / "counts.npy", counts)
    read = read_routing(tmp_path / "sample.npy")
    assert read.sample is not None
    assert read.loads.shape == (4, 16)
    assert any("read as a routing sample" in note for note in read.notes)
    assert read_routing(tmp_path / "counts.npy").sample is None
    assert read_expert_loads(tmp_path / "sample.npy").shape == (4, 4)


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from(["i1", "u2", "i8", "u8", "f4"]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.none() | arrays.arrays("i8", arrays.array_shapes(max_dims=2, max_side=4)),
    st.none() | st.lists(st.integers(-2, 5), max_size=4),
    st.none() | st.integers(-1, 300),
)
def test_any_arrays_are_a_sample_or_refused(
    topk: Any, prompt: Any, layers: list[int] | None, experts: int | None
) -> None:
    with answer_or_refusal():
        sample = check_sample(Choices(topk, prompt, layers), "a", experts=experts).sample
        ordered = np.sort(sample.chosen, axis=-1)
        assert (ordered[..., 1:] > ordered[..., :-1]).all()
        assert ordered.min() >= 0
        assert ordered.max() < sample.experts
        assert sample.prompt.shape == (sample.tokens,)
        assert sample.chosen.shape[1] == len(set(sample.layers))
