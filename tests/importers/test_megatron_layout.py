"""Megatron's pipeline layout strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers.megatron_layout import MAX_LAYERS, PipelineLayout, looks_like_layout, parse_layout
from tests.importers.refusals import answer_or_refusal

#: Strings with their stages as counted by hand.
COUNTED = [
    ("EtL", ["EtL"]),
    ("Et|tL", ["Et", "tL"]),
    ("E,t*3|t,t|tL", ["Ettt", "tt", "tL"]),
    ("Et*3|(tt|)*2,m|L", ["Ettt", "tt", "tt", "m", "L"]),
    ("E|(t|)*3,L", ["E", "t", "t", "t", "L"]),
    ("E(t|t)*2L", ["Et", "tt", "tL"]),
    ("Et|*3L", ["Et", "", "", "L"]),
    ("E(t*2|)*2t*0L", ["Ett", "tt", "L"]),
    ("E||L", ["E", "", "L"]),
]


@pytest.mark.parametrize(("text", "stages"), COUNTED)
def test_stages_are_those_counted_by_hand(text: str, stages: list[str]) -> None:
    """A layout unfolds into the stages that a person counts."""
    assert list(parse_layout(text).stages) == stages


def test_layout_of_deepseek_v3() -> None:
    """The layout of a 61-layer model with one MTP layer has 32 stages: 3 layers, 29 times 2, MTP, loss."""
    layout = parse_layout("Et*3|(tt|)*29,m|L\n")
    assert (len(layout.stages), layout.layers, layout.mtp_layers) == (32, 61, 1)
    assert layout.bounds()[:3] == [(0, 3), (3, 5), (5, 7)]
    assert layout.bounds()[-3:] == [(59, 61), (61, 61), (61, 61)]
    assert layout.faults(61) == []
    assert layout.faults(61, vpp=2) == []


item = st.tuples(st.sampled_from("EtmL|"), st.integers(0, 4))
group = st.tuples(st.lists(item, min_size=1, max_size=4), st.integers(0, 4))


@given(st.lists(st.one_of(item, group), max_size=8), st.randoms(use_true_random=False))
def test_unfolding_undoes_folding(parts: list[tuple[object, int]], random: object) -> None:
    """Whatever is written with repetitions, brackets and commas unfolds into what was meant."""

    def written(sign: str, times: int) -> str:
        return sign if times == 1 and random.random() < 0.5 else f"{sign}*{times}"  # type: ignore[attr-defined]

    texts, meant = [], ""
    for what, times in parts:
        if isinstance(what, str):
            texts.append(written(what, times))
            meant += what * times
        else:
            inner = what if isinstance(what, list) else []
            texts.append(f"({''.join(written(sign, n) for sign, n in inner)})*{times}")
            meant += "".join(sign * n for sign, n in inner) * times
    text = random.choice(["", ","]).join(texts)  # type: ignore[attr-defined]
    if not text:
        return
    assert "|".join(parse_layout(text).stages) == meant


@given(st.text(alphabet="EtmL|()*,019 x", max_size=30))
@settings(max_examples=300)
def test_any_text_is_an_answer_or_a_refusal(text: str) -> None:
    """No text makes the reader fail in any other way than with a sentence."""
    with answer_or_refusal():
        layout = parse_layout(text)
        assert layout.bounds()[-1][1] == layout.layers
        layout.faults(3, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("t*999999999", "more than 10000 times"),
        ("t*" + "9" * 5000, "more than 10000 times"),
        ("(t|)*9999", "unfolds to more than 10000"),
        ("(t*9999|)*9999", "unfolds to more than 10000"),
        ("E" * 30_000, "30000 characters"),
        ("((t)*2)*3", "brackets inside brackets at sign 1"),
        ("Et(t", "a bracket that is not closed at sign 3"),
        ("Et)t", "closes a bracket at sign 3"),
        ("E(t)L", "expected `(...)*n`"),
        ("E()*2L", "expected `(...)*n`"),
        ("*3", "'*' at sign 1"),
        ("t**3", "without a number"),
        ("t*", "without a number"),
        ("t*2*3", "'*' at sign 4"),
        ("2t", "'2' at sign 1"),
        ("E t L", "' ' at sign 2"),
        ("Edt", "'d' at sign 2"),
        ("E,t(tx|)*2L", "'x' at sign 5"),
        ("$(touch x)", "'$' at sign 1"),
        ("", "empty pipeline layout"),
    ],
)
def test_what_megatron_does_not_read_is_refused(text: str, says: str) -> None:
    """A refusal says what stands where, and never unfolds what is too large."""
    with pytest.raises(InputError) as caught:
        parse_layout(text, key="--layout")
    assert says in str(caught.value)
    assert str(caught.value).startswith("`--layout`: ")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "vpp", "says"),
    [
        ("t*4|L", 1, ["0 embeddings"]),
        ("Et*2|Et*2L", 1, ["2 embeddings"]),
        ("tE,t*3|L", 1, ["`E` in stage 0 of 2, expected it before everything else"]),
        ("Et*4", 1, ["0 losses"]),
        ("Et*2|L|t*2", 1, ["`L` in stage 1 of 3, expected it after everything else"]),
        ("Et*2|tL", 1, ["holds 3 decoder layers, but the model has 4"]),
        ("Et*2|m|t*2L", 1, ["`t` after the MTP layer `m` in stage 1"]),
        ("Et*4|m|t*0|L", 2, ["MTP layer `m` in stage 1, expected it in the last chunk"]),
        ("Et*4|mL,L", 1, []),
        ("Et*4|L,L", 1, ["2 losses"]),
        ("t|t", 1, ["0 embeddings", "0 losses", "holds 2 decoder"]),
    ],
)
def test_faults_are_those_of_a_four_layer_model(text: str, vpp: int, says: list[str]) -> None:
    """What does not fit a model of four layers is told, all of it and nothing else."""
    faults = parse_layout(text).faults(4, vpp)
    assert len(faults) == len(says)
    assert all(part in fault for part, fault in zip(says, faults, strict=True))


@pytest.mark.parametrize("text", ["Et*3|(tt|)*29,m|L", "EtL\n", "|", "Et*4,L"])
def test_layouts_are_told_from_other_text(text: str) -> None:
    """A layout string looks like one."""
    assert looks_like_layout(text)


@pytest.mark.parametrize(
    "text", ["", "node01\nnode02", "t1*4", "t*4", "Et L", "rank 0=t slot=0", "E" * 30_000]
)
def test_other_text_is_no_layout(text: str) -> None:
    """Host files, rank files and endless texts do not look like a layout."""
    assert not looks_like_layout(text)


def test_bounds_hold_every_layer_once() -> None:
    """Stages without layers have empty bounds, and the others follow on one another."""
    layout = PipelineLayout("", ("E", "tt", "", "t", "L"))
    assert layout.bounds() == [(0, 0), (0, 2), (2, 2), (2, 3), (3, 3)]


def test_the_largest_layout_is_read() -> None:
    """What is just within the limit unfolds."""
    assert parse_layout(f"t*{MAX_LAYERS}").layers == MAX_LAYERS
