"""The model cards of this repository, against published figures and against exact counts."""

from __future__ import annotations

import pytest

from placer.importers.huggingface import import_model
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.model import ModelCard, load_model
from placer.spec.reading import read_document
from tests.shared_data import ROOT, SHARED, needs_shared

MODELS = ROOT / "models"

#: Card: published billions (total, active) as printed, and the exact counts.
PUBLISHED: dict[str, tuple[float, float, int, int]] = {
    "mixtral-8x7b": (46.7, 12.9, 46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (141, 39, 140_620_634_112, 39_152_031_744),
    "deepseek-v3": (671, 37, 671_026_404_352, 37_552_282_624),
    "qwen3-235b-a22b": (235, 22, 235_093_634_560, 22_190_763_520),
    "gpt-oss-120b": (116.83, 5.71, 116_829_156_672, 5_711_982_912),
    "llama-3.1-70b": (70.6, 70.6, 70_553_706_496, 70_553_706_496),
}

#: Card: layers, experts, total, active.
PLANS: dict[str, tuple[int, int, int, int]] = {
    "plan-000-moe-16l": (16, 64, 4_428_694_528, 267_944_960),
    "plan-001-moe-16l-1024": (16, 64, 4_428_694_528, 267_944_960),
    "plan-002-moe-16l-4096": (16, 64, 138_779_168_768, 5_635_182_592),
    "plan-003-moe-16e": (16, 16, 29_992_554_496, 4_919_005_184),
    "plan-004-moe-30b": (16, 64, 29_997_171_712, 1_066_959_872),
}


def card(name: str) -> ModelCard:
    return load_model(read_document(MODELS / f"{name}.yaml"))


def rounds_to(count: int, printed: float) -> bool:
    """Whether a count, in billions, is within one unit of the last digit that was printed."""
    text = str(printed)
    decimals = len(text.partition(".")[2])
    return abs(count / 1e9 - printed) < 10.0**-decimals


def test_every_card_is_listed_and_named_as_its_file() -> None:
    files = {path.stem for path in MODELS.glob("*.yaml")}
    assert files == PUBLISHED.keys() | PLANS.keys()
    for name in files:
        assert card(name).name == name
        assert (MODELS / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    total, active, exact_total, exact_active = PUBLISHED[name]
    parts = card(name).parameters()
    assert parts["total"] == exact_total
    assert parts["active"] == exact_active
    assert rounds_to(parts["total"], total)
    assert rounds_to(parts["active"], active)


def test_rounding_is_not_too_kind() -> None:
    assert not rounds_to(46_802_792_704, 46.7)
    assert not rounds_to(672_100_000_000, 671)


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_cards_equal_what_the_reader_makes_of_the_published_config(name: str) -> None:
    read = import_model(SHARED / "hf_configs" / name, name)
    assert read.model_copy(update={"source": card(name).source}) == card(name)


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    layers, experts, total, active = PLANS[name]
    model = card(name)
    assert model.moe is not None
    assert (model.layer_count, model.moe.experts, model.moe.top_k, model.moe.matrices) == (
        layers,
        experts,
        2,
        2,
    )
    parts = model.parameters()
    assert (parts["total"], parts["active"]) == (total, active)


def expert_bytes(name: str) -> float:
    """Bytes of one expert of one layer."""
    model = card(name)
    assert model.moe is not None
    return model.moe.expert_parameters(model.hidden) * BYTES_PER_VALUE[model.dtypes.of("experts")]


def test_the_figures_of_the_plans_that_the_comments_rest_on() -> None:
    mib = 2**20
    assert expert_bytes("plan-000-moe-16l") == 16 * mib
    assert 16 * expert_bytes("plan-001-moe-16l-1024") == 64 * mib
    assert 32 * expert_bytes("plan-002-moe-16l-4096") == 8192 * mib
    # 30 B in bf16, and activations halved from 84.42 to 73.69 GB in all.
    weights = 2 * card("plan-003-moe-16e").parameters()["total"] / 1e9
    assert weights == pytest.approx(60, abs=0.05)
    assert 73.69 - (84.42 - 73.69) - weights == pytest.approx(2.96, abs=0.05)
    assert card("plan-004-moe-30b").parameters()["total"] / 64 == pytest.approx(468_750_000, rel=1e-3)


@pytest.mark.parametrize(("name", "step"), [("plan-003-moe-16e", 16), ("plan-004-moe-30b", 16)])
def test_the_width_is_the_nearest_that_the_comment_says(name: str, step: int) -> None:
    model = card(name)
    moe = model.moe
    assert moe is not None
    assert moe.width % step == 0
    one_step = model.layer_count * moe.experts * 2 * model.hidden * step
    assert abs(model.parameters()["total"] - 30_000_000_000) <= one_step / 2


def test_cards_do_not_point_outside() -> None:
    for path in MODELS.glob("*.yaml"):
        assert "/work" not in path.read_text()
