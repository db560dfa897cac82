"""Model cards: parameter counts by hand, layer numbers, and cards that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import InputError
from placer.spec.model import (
    Attention,
    Layer,
    Mlp,
    ModelCard,
    Moe,
    fold_layer_numbers,
    load_model,
    parse_layer_numbers,
)
from placer.spec.reading import Document, read_document

GQA: dict[str, Any] = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8}
DENSE: dict[str, Any] = {"layers": "0-1", "attention": GQA, "mlp": {"width": 10}}
SPARSE: dict[str, Any] = {
    "layers": "2-4",
    "attention": GQA,
    "moe": {"experts": 6, "top_k": 2, "width": 5, "shared": {"width": 7, "extra_parameters": 3}},
}
CARD: dict[str, Any] = {"name": "m", "hidden": 16, "vocabulary": 100, "groups": [DENSE, SPARSE]}


def load(data: Any) -> ModelCard:
    return load_model(Document(data=data, file="card.yaml", digest=""))


def test_counts_by_hand() -> None:
    model = load(CARD)
    parts = model.parameters()
    attention = 16 * 8 * (4 + 2 + 2 + 4)
    assert parts == {
        "embedding": 1600,
        "head": 1600,
        "attention": 5 * attention,
        "mlp": 2 * 3 * 10 * 16,
        "router": 3 * 16 * 6,
        "shared": 3 * (3 * 7 * 16 + 3),
        "routed": 3 * 6 * 3 * 5 * 16,
        "norms": 16 + 5 * 32,
        "other": 0,
        "total": parts["total"],
        "active": parts["total"] - 3 * 4 * 3 * 5 * 16,
    }
    assert parts["total"] == sum(value for key, value in parts.items() if key not in ("total", "active"))


def test_stated_counts_win_over_shapes() -> None:
    plain = load(CARD).parameters()
    stated = load(
        CARD
        | {
            "embedding_parameters": 1700,
            "head_parameters": 5,
            "final_norm_parameters": 0,
            "other_parameters": 9,
        }
    ).parameters()
    assert (stated["embedding"], stated["head"], stated["other"]) == (1700, 5, 9)
    assert plain["norms"] - stated["norms"] == 16
    assert stated["total"] - stated["active"] == plain["total"] - plain["active"] + 9
    assert load(CARD | {"tied_embeddings": True}).parameters()["head"] == 0


def test_mla_by_hand() -> None:
    shape = {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
    full = Attention(kind="mla", heads=2, **shape)
    shared = 16 * (6 + 2) + 6 * 2 * (3 + 4) + 2 * 4 * 16
    assert full.parameters(16) == 16 * 10 + shared
    low = full.model_copy(update={"q_lora_rank": 5, "extra_parameters": 11})
    assert low.parameters(16) == 5 * (16 + 10) + shared + 11
    assert full.cached_values_per_token() == 8


def test_cached_values() -> None:
    gqa = Attention(kind="gqa", heads=4, kv_heads=2, head_dim=8)
    assert gqa.cached_values_per_token() == 32
    assert gqa.model_copy(update={"cached_values": 7}).cached_values_per_token() == 7
    assert Attention(kind="linear", heads=4).cached_values_per_token() == 0


def test_two_matrices_and_biases() -> None:
    assert Mlp(width=10, matrices=2, extra_parameters=1).parameters(16) == 321
    moe = Moe(experts=4, top_k=1, width=5, matrices=2, extra_parameters_per_expert=2, router_parameters=70)
    assert (moe.expert_parameters(16), moe.router(16), moe.shared_parameters(16)) == (162, 70, 0)


def test_layers_are_found_by_number() -> None:
    model = load(CARD)
    assert model.layer_count == 5
    assert model.moe_layers == (2, 3, 4)
    assert model.group_of == (0, 0, 1, 1, 1)
    assert model.layer(1).mlp is not None
    assert load(CARD | {"groups": [DENSE]}).moe is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", [0]),
        ("0-2", [0, 1, 2]),
        ("3,7,11", [3, 7, 11]),
        ("0-6:2", [0, 2, 4, 6]),
        ("0, 2 - 3", [0, 2, 3]),
    ],
)
def test_layer_numbers(text: str, numbers: list[int]) -> None:
    assert parse_layer_numbers(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "1,1", "0-9999", "0-4:0", "-1", "1-2-3", "0-1999999999", "9999"]
)
def test_bad_layer_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse_layer_numbers(text)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_folding_is_undone_by_parsing(numbers: set[int]) -> None:
    assert parse_layer_numbers(fold_layer_numbers(sorted(numbers))) == sorted(numbers)


def test_folding_is_short() -> None:
    assert fold_layer_numbers([0, 1, 2]) == "0-2"
    assert fold_layer_numbers([0, 2, 4]) == "0-4:2"
    assert fold_layer_numbers([0, 1, 2, 4, 5, 6]) == "0-2,4-6"


def changed(data: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return data | keys


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(CARD, hidden=0), "`hidden`: found 0"),
        (changed(CARD, hiden=3), "did you mean `hidden`"),
        (changed(CARD, groups=[]), "`groups`"),
        (changed(CARD, groups=[DENSE, DENSE]), r"layer 0 stands in `groups\[0\]` and in `groups\[1\]`"),
        (changed(CARD, groups=[SPARSE]), "layer 0 stands in no group"),
        (changed(CARD, groups=[{"layers": "0", "attention": GQA}]), "neither `mlp` nor `moe`"),
        (changed(CARD, name="../m"), "`name`"),
        (changed(CARD, dtypes={"weights": "fp7"}), "did you mean `fp"),
        (changed(CARD, groups=[changed(DENSE, layers="0-x")]), "layer numbers such as"),
        (
            changed(
                CARD,
                groups=[
                    DENSE,
                    changed(SPARSE, layers="2"),
                    changed(SPARSE, layers="3", moe={"experts": 5, "top_k": 1, "width": 3}),
                ],
            ),
            "one number for all MoE layers",
        ),
        (
            changed(CARD, groups=[changed(DENSE, moe={"experts": 2, "top_k": 3, "width": 1})]),
            "more than the 2 experts",
        ),
        (
            changed(CARD, groups=[changed(DENSE, moe={"experts": 4, "top_k": 1, "width": 1, "groups": 3})]),
            "does not divide the 4 experts",
        ),
        (
            changed(
                CARD,
                groups=[
                    changed(DENSE, moe={"experts": 4, "top_k": 1, "width": 1, "groups": 2, "top_groups": 3})
                ],
            ),
            "more than the 2 groups",
        ),
    ],
)
def test_bad_cards(data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(data)


def test_a_card_read_from_a_file_says_the_line(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("name: m\nhidden: sixteen\nvocabulary: 3\ngroups: []\n")
    with pytest.raises(InputError, match=r"card\.yaml:2: `hidden`: found 'sixteen'"):
        load_model(read_document(path))


def test_norms_of_a_layer() -> None:
    model = load(CARD)
    layer = Layer(attention=Attention(kind="gqa", heads=1), mlp=Mlp(width=1))
    assert model.norms(layer) == 32
    assert model.norms(layer.model_copy(update={"norm_parameters": 0})) == 0
