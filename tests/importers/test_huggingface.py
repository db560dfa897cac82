"""The reader of Hugging Face configs, against exact counts and against configs that are wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from placer.errors import InputError
from placer.importers.huggingface import FAMILIES, card_to_yaml, import_model
from placer.spec.model import ModelCard, load_model
from placer.spec.reading import read_document
from tests.shared_data import SHARED, needs_shared

CONFIGS = SHARED / "hf_configs"


def counts() -> dict[str, Any]:
    path = CONFIGS / "param_counts.json"
    return json.loads(path.read_text())["models"] if path.exists() else {}


COUNTS = counts()
names = pytest.mark.parametrize("name", sorted(COUNTS) or ["none"])

# In the counts, the parameters of a layer are told apart by their names: a norm after the attention falls to `attn`,
# and ERNIE's 64 correction values, which sit in the router, fall to the shared expert.
ERNIE_CORRECTION = 64


@needs_shared
@names
def test_counts_are_exact(name: str) -> None:
    want = COUNTS[name]
    card = import_model(CONFIGS / name)
    got = card.parameters()
    assert got["total"] == want["total"]
    assert got["active"] == want["active_text"]
    assert got["embedding"] == want["embed_in"]
    assert got["head"] == want["lm_head"]
    assert got["routed"] == want["routed_experts"]
    assert got["other"] == want["vision"]
    assert card.final_norm == want["final_norm_and_other"]
    between = sum(got[part] for part in ("attention", "mlp", "router", "shared", "norms")) - card.final_norm
    assert between == want["layers_other"]


@needs_shared
@names
def test_every_layer_group_is_exact(name: str) -> None:
    card = import_model(CONFIGS / name)
    seen = 0
    for group in COUNTS[name]["layer_groups"]:
        seen += group["count"]
        numbers = [number for number in group["layers"] if number != "..."]
        for number in numbers:
            layer = card.layer(number)
            # One vector of the hidden size (two in phi-3.5, whose norms have a bias) is the norm after the attention.
            vectors = 2 if "phi" in name else 1
            after = vectors * card.hidden
            assert layer.attention.parameters(card.hidden) == group["attn"] - after
            assert card.norms(layer) == group["norm"] + after
            correction = ERNIE_CORRECTION if "ernie" in name and layer.moe else 0
            mlp = layer.mlp.parameters(card.hidden) if layer.mlp else 0
            shared = layer.moe.shared_parameters(card.hidden) if layer.moe else 0
            assert mlp + shared == group.get("mlp_dense_or_shared", 0) - correction
            if layer.moe:
                assert layer.moe.router(card.hidden) == group["router"] + correction
                assert layer.moe.experts * layer.moe.expert_parameters(card.hidden) == group["routed"]
                assert (layer.moe.experts, layer.moe.top_k) == (
                    COUNTS[name]["experts"],
                    COUNTS[name]["top_k"],
                )
            else:
                assert "routed" not in group
    assert seen == card.layer_count


@needs_shared
@names
def test_every_card_survives_yaml(name: str, tmp_path: Path) -> None:
    card = import_model(CONFIGS / name)
    path = tmp_path / "card.yaml"
    text = card_to_yaml(card)
    assert max(len(line) for line in text.splitlines()) <= 115
    assert not any(line.endswith(": ") for line in text.splitlines())
    path.write_text(text)
    again = load_model(read_document(path))
    assert again == card
    assert again.parameters() == card.parameters()


@needs_shared
def test_norms_after_attention_are_where_the_test_says() -> None:
    """The split above would pass with both norms in the wrong place; here is one layer in full."""
    card = import_model(CONFIGS / "mixtral-8x7b")
    layer = card.layer(0)
    assert layer.attention.parameters(4096) == 41_943_040
    assert card.norms(layer) == 8192


@needs_shared
@pytest.mark.parametrize(
    ("name", "number", "field", "value"),
    [
        ("gpt-oss-120b", 0, "window", 128),
        ("gpt-oss-120b", 1, "window", None),
        ("llama-4-scout-17b-16e", 0, "window", 8192),
        ("llama-4-scout-17b-16e", 3, "window", None),
        ("gemma-4-26b-a4b", 0, "window", 1024),
        ("gemma-4-26b-a4b", 5, "window", None),
        ("qwen2-57b-a14b", 0, "window", None),
        ("deepseek-v3.2", 0, "sparse_tokens", 2048),
        ("glm-5", 0, "sparse_tokens", 2048),
        ("deepseek-v4-flash", 0, "window", 128),
        ("deepseek-v4-flash", 2, "sparse_tokens", 512 + 128),
        ("deepseek-v4-flash", 3, "sparse_tokens", None),
        ("qwen3.5-35b-a3b", 0, "kind", "linear"),
        ("qwen3.5-35b-a3b", 3, "kind", "gqa"),
        ("qwen3.5-35b-a3b", 0, "state_values", 32 * 128 * 128 + 8192 * 3),
        ("derived/kimi-linear-48b-a3b", 0, "kind", "linear"),
        ("derived/kimi-linear-48b-a3b", 4, "kind", "mla"),
        ("deepseek-v4-flash", 2, "state_values", 128 * 512),
    ],
)
def test_what_the_cost_model_needs(name: str, number: int, field: str, value: object) -> None:
    assert getattr(import_model(CONFIGS / name).layer(number).attention, field) == value


@needs_shared
@pytest.mark.parametrize(
    ("name", "number", "cached"),
    [
        ("deepseek-v3", 0, 576),
        ("deepseek-v3.2", 0, 576 + 128),
        ("deepseek-v4-flash", 0, 512),
        ("deepseek-v4-flash", 2, (512 + 128) // 4),
        ("deepseek-v4-flash", 3, 512 // 128),
        ("mixtral-8x7b", 0, 2048),
        ("qwen3.5-35b-a3b", 0, 0),
        ("gemma-4-26b-a4b", 5, 2 * 2 * 512),
    ],
)
def test_cached_values(name: str, number: int, cached: int) -> None:
    assert import_model(CONFIGS / name).layer(number).attention.cached_values_per_token() == cached


@needs_shared
@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("mixtral-8x7b", {}),
        ("deepseek-v3", {"weights": "fp8_block"}),
        ("qwen3-235b-a22b-fp8", {"weights": "fp8_block"}),
        ("minimax-m2.5", {"weights": "fp8_block"}),
        ("gpt-oss-120b", {"experts": "mxfp4"}),
        ("deepseek-v4-flash", {"weights": "fp8_block", "experts": "mxfp4"}),
        ("deepseek-v3.1-nvfp4", {"weights": "nvfp4", "attention": "bf16", "kv_cache": "fp8"}),
    ],
)
def test_dtypes_of_real_configs(name: str, stated: dict[str, str]) -> None:
    assert import_model(CONFIGS / name).dtypes.model_dump(exclude_defaults=True) == stated


@needs_shared
def test_group_limited_routing() -> None:
    moe = import_model(CONFIGS / "deepseek-v3").moe
    assert moe is not None
    assert (moe.groups, moe.top_groups) == (8, 4)
    moe = import_model(CONFIGS / "deepseek-v2").moe
    assert moe is not None
    assert (moe.groups, moe.top_groups, moe.shared and moe.shared.width) == (8, 3, 2 * 1536)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def read(tmp_path: Path, config: object, name: str | None = "m") -> ModelCard:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return import_model(path, name)


def without(key: str, config: dict[str, Any] = MIXTRAL) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_llama_by_hand(tmp_path: Path) -> None:
    card = read(tmp_path, LLAMA)
    attention = 64 * 64 + 2 * 64 * 16 + 64 * 64
    assert card.parameters()["total"] == 2 * 64_000 + 4 * (attention + 3 * 64 * 96 + 128) + 64
    assert [group.layers for group in card.groups] == ["0-3"]
    biased = read(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert biased.parameters()["total"] - card.parameters()["total"] == 4 * (64 + 2 * 16 + 64 + 2 * 96 + 64)
    tied = read(tmp_path, LLAMA | {"tie_word_embeddings": True})
    assert card.parameters()["total"] - tied.parameters()["total"] == 64_000


def test_a_null_key_is_an_absent_one(tmp_path: Path) -> None:
    assert (
        read(tmp_path, LLAMA | {"head_dim": None, "num_key_value_heads": None}).groups[0].attention.kv_heads
        == 8
    )


# Totals that `transformers` 5.23 builds from its class defaults with these changes.
@pytest.mark.parametrize(
    ("config", "total"),
    [
        (
            {
                "model_type": "gpt2",
                "vocab_size": 50257,
                "n_positions": 1024,
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_inner": None,
            },
            124_439_808,
        ),
        (
            {
                "model_type": "phi3",
                "vocab_size": 32064,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
            },
            3_821_079_552,
        ),
        (
            {
                "model_type": "gemma2",
                "vocab_size": 256000,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
            },
            2_614_341_888,
        ),
        (
            {
                "model_type": "starcoder2",
                "vocab_size": 49152,
                "hidden_size": 3072,
                "intermediate_size": 12288,
                "num_hidden_layers": 30,
                "num_attention_heads": 24,
                "num_key_value_heads": 2,
            },
            3_030_371_328,
        ),
        (
            {
                "model_type": "falcon",
                "vocab_size": 65024,
                "hidden_size": 4544,
                "num_hidden_layers": 32,
                "num_attention_heads": 71,
            },
            6_921_720_704,
        ),
        (
            {
                "model_type": "jamba",
                "vocab_size": 65536,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_experts": 16,
                "num_experts_per_tok": 2,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "attn_layer_period": 8,
                "attn_layer_offset": 4,
                "mamba_d_state": 16,
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "mamba_dt_rank": "auto",
            },
            51_570_323_328,
        ),
        (
            {
                "model_type": "dbrx",
                "d_model": 6144,
                "n_heads": 48,
                "n_layers": 40,
                "vocab_size": 100352,
                "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
                "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            },
            131_596_523_520,
        ),
        (
            {
                "model_type": "qwen3_next",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "num_experts_per_tok": 10,
                "num_experts": 512,
                "full_attention_interval": 4,
            },
            79_674_391_296,
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_families_without_a_file(config: dict[str, Any], total: int, tmp_path: Path) -> None:
    assert read(tmp_path, config).parameters()["total"] == total


def test_text_config_and_architecture_names(tmp_path: Path) -> None:
    inner = without("tie_word_embeddings", LLAMA)
    outer = {
        "model_type": "unheard_of",
        "text_config": inner,
        "tie_word_embeddings": True,
        "vision_config": {"a": 1},
    }
    card = read(tmp_path, outer)
    assert card.tied_embeddings
    assert "vision tower is left out" in str(card.source)
    unnamed = without("model_type") | {"architectures": ["MixtralForCausalLM"]}
    assert read(tmp_path, unnamed).moe is not None


def test_name_comes_from_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my model, v2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert import_model(folder).name == "my model- v2"
    with pytest.raises(InputError, match="expected a name"):
        import_model(folder, "a\nb")


def test_moe_layers_by_every_key(tmp_path: Path) -> None:
    base = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    qwen = base | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert read(tmp_path, qwen).moe_layers == (1,)
    glm = base | {"model_type": "glm4_moe", "first_k_dense_replace": 2}
    assert read(tmp_path, glm).moe_layers == (2, 3)
    dots = base | {"model_type": "dots1", "moe_layer_freq": [0, 1, 1, 0]}
    assert read(tmp_path, dots).moe_layers == (1, 2)
    words = base | {"model_type": "glm4_moe", "mlp_layer_types": ["dense", "sparse", "dense", "dense"]}
    assert read(tmp_path, words).moe_layers == (1,)


@pytest.mark.parametrize(
    ("quantization", "stated"),
    [
        ({"quant_method": "fp8"}, {"weights": "fp8"}),
        ({"quant_method": "awq", "bits": 4}, {"weights": "int4"}),
        ({"quant_method": "gptq", "bits": 8}, {"weights": "int8"}),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            {"weights": "fp8", "kv_cache": "fp8"},
        ),
        ({"quant_method": "mxfp4"}, {"experts": "mxfp4"}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["gate", "lm_head"]}, {"weights": "fp8"}),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]},
            {"weights": "bf16", "experts": "fp8"},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
                "ignore": ["lm_head", "re:.*self_attn.*"],
            },
            {"experts": "int4"},
        ),
    ],
)
def test_quantization(quantization: dict[str, Any], stated: dict[str, str], tmp_path: Path) -> None:
    card = read(tmp_path, MIXTRAL | {"quantization_config": quantization})
    assert {key: value for key, value in card.dtypes.model_dump().items() if stated.get(key)} == stated
    assert card.dtypes.embedding == "bf16"
    if "self_attn" in json.dumps(quantization):
        assert card.dtypes.of("attention") == "bf16"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "expected the keys"),
        (3, "expected the keys"),
        (None, "expected the keys"),
        ({}, "`model_type` is missing"),
        ({"model_type": 3}, "`model_type`: found 3"),
        (MIXTRAL | {"model_type": "mixtrall"}, "did you mean `mixtral`"),
        (MIXTRAL | {"model_type": "nemotron_h"}, "nemotron_h"),
        (MIXTRAL | {"model_type": "mamba2"}, "state-space"),
        (without("hidden_size"), "`hidden_size` is missing"),
        (without("num_experts_per_tok"), "`num_experts_per_tok` is missing"),
        (without("vocab_size"), "`vocab_size` is missing"),
        (MIXTRAL | {"hidden_size": "4096"}, "`hidden_size`: found '4096'"),
        (MIXTRAL | {"hidden_size": -1}, "`hidden_size`: found -1"),
        (MIXTRAL | {"hidden_size": True}, "`hidden_size`: found True"),
        (MIXTRAL | {"hidden_size": 64.0}, "`hidden_size`: found 64.0"),
        (MIXTRAL | {"hidden_size": 10**30}, "`hidden_size`: found 1000"),
        (MIXTRAL | {"hidden_size": [64]}, "`hidden_size`: found"),
        (MIXTRAL | {"num_hidden_layers": 10**6}, "`num_hidden_layers`: found 1000000"),
        (MIXTRAL | {"num_local_experts": 70_000}, "`num_local_experts`: found 70,000"),
        (MIXTRAL | {"num_local_experts": [4, 4]}, "`num_local_experts`: found a list of 2"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "top_k"),
        (MIXTRAL | {"num_key_value_heads": 3}, "does not divide the 8"),
        (MIXTRAL | {"num_attention_heads": 7, "num_key_value_heads": 7}, "do not divide the hidden size"),
        (MIXTRAL | {"tie_word_embeddings": "no"}, "`tie_word_embeddings`: found 'no'"),
        (MIXTRAL | {"torch_dtype": "int3"}, "`torch_dtype`: found 'int3'"),
        (MIXTRAL | {"is_encoder_decoder": True}, "decoder-only"),
        (MIXTRAL | {"mamba_d_state": 16}, "`mamba_d_state`"),
        (MIXTRAL | {"n_shared_experts": "x"}, "`n_shared_experts`: found 'x'"),
        (MIXTRAL | {"text_config": 3}, "`text_config`: found 3"),
        (MIXTRAL | {"quantization_config": {"quant_method": "magic"}}, "`quantization_config.quant_method`"),
        (MIXTRAL | {"quantization_config": {"quant_method": "awq"}}, "`bits` is missing"),
        (MIXTRAL | {"quantization_config": {"quant_method": "awq", "bits": 3}}, "expected 4 or 8"),
        (
            MIXTRAL | {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["re:("]}},
            "regular expression",
        ),
        (LLAMA | {"model_type": "gpt_oss", "layer_types": ["full_attention"]}, "expected a list of 4"),
        (LLAMA | {"model_type": "gemma2", "layer_types": ["odd"] * 4}, "found 'odd'"),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(config: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, config)
    text = str(caught.value)
    assert words in text
    assert text.startswith(str(tmp_path / "config.json"))
    assert "\n" not in text
    assert len(text) < 600 + len(str(tmp_path))


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        import_model(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        import_model(tmp_path)


def test_a_spoilt_quantization_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP5"}}')
    with pytest.raises(InputError, match=r"hf_quant_config\.json: `quantization\.quant_algo`: found 'NVFP5'"):
        read(tmp_path, MIXTRAL)


def samples() -> list[dict[str, Any]]:
    real = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("**/config.json"))]
    return [MIXTRAL, LLAMA, *real]


def test_no_spoilt_value_ever_escapes_as_another_error(tmp_path: Path) -> None:
    """Spoil one key at a time, in every config there is: the result is a card or an InputError, never anything else."""
    dice = random.Random(7)
    wrong: list[Any] = [
        None,
        "x",
        -1,
        0,
        1.5,
        True,
        10**40,
        [],
        [1],
        [[]],
        {},
        {"a": {}},
        [None] * 3,
        ["x"] * 48,
    ]
    refused = several_lines = 0
    for config in samples():
        inner = config.get("text_config", config)
        keys = sorted(inner)
        for key in dice.sample(keys, min(12, len(keys))):
            for value in dice.sample(wrong, 4):
                spoilt = inner | {key: value}
                whole = config | {"text_config": spoilt} if "text_config" in config else spoilt
                try:
                    assert read(tmp_path, whole).parameters()["total"] > 0
                except InputError as error:
                    refused += 1
                    several_lines += str(error).count("\n")
    assert refused > 20
    assert several_lines == 0


def test_every_family_says_what_is_missing(tmp_path: Path) -> None:
    for kind in FAMILIES:
        with pytest.raises(InputError, match="is missing"):
            read(tmp_path, {"model_type": kind})
