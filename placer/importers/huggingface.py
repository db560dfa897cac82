"""Hugging Face `config.json` -> model card.

A family is chosen by `model_type`, because a config leaves out what its modelling code fixes: biases, query and key
norms, gates. A family that is not known here is refused; a card written by hand is always possible. Shapes are then
worked out for every layer on its own, and like layers are put into one group.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from placer.errors import InputError, nearest
from placer.spec.dtypes import Dtype
from placer.spec.model import (
    MAX_LAYERS,
    Attention,
    Dtypes,
    Layer,
    LayerGroup,
    Mlp,
    ModelCard,
    Moe,
    fold_layer_numbers,
)
from placer.spec.names import check_name
from placer.spec.reading import Document, KeyPath, read_document

#: The largest size any key may state; the widest published model stays below 10 million.
MAX_SIZE = 10**8
MAX_EXPERTS = 65_536

LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
HIDDEN = ("hidden_size", "d_model", "n_embd", "n_embed")
HEADS = ("num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "attn_config.kv_n_heads")
WIDTH = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
EXPERTS = (
    "num_local_experts",
    "n_routed_experts",
    "num_experts",
    "moe_num_experts",
    "ffn_config.moe_num_experts",
)
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "ffn_config.moe_top_k",
)
EXPERT_WIDTH = ("moe_intermediate_size", "ffn_config.ffn_hidden_size", "intermediate_size")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")

#: Keys that change the shape of a model. One of them in a config whose family does not read it is refused.
_STRUCTURAL = re.compile(
    r"mamba|ssm|conv|lora_rank|latent|compress|altup|laurel|recurrent|lru_|delta_|kda|use_cla|cla_share|zero_expert"
    r"|shared_expert|n_routed|^num_experts$|^num_local_experts$|moe_num_experts|^index_|cross_attention|double_wide"
    r"|per_layer_input|per_layer_config|kv_shared|linear_num|linear_attn|hybrid_override|cross_decoder|^hc_mult"
)

#: Keys that only look so: they set a base, a format or a scale.
_HARMLESS = {"compress_rope_theta", "vocab_size_per_layer_input", "mamba_ssm_dtype", "use_mamba_kernels"} | {
    f"linear_attn_{factor}_factor" for factor in ("alpha", "beta")
}


@dataclass(frozen=True)
class _Family:
    """What the modelling code of a family fixes and its config does not say."""

    #: Keys that switch biases on, and whether the family has them when no key speaks.
    qkv_bias: tuple[tuple[str, ...], bool] = ((), False)
    out_bias: tuple[tuple[str, ...], bool] = ((), False)
    mlp_bias: tuple[tuple[str, ...], bool] = ((), False)
    #: `head`: two vectors of head_dim; `full`: one of every query and one of every key value.
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_key: str | None = None
    matrices: Literal[2, 3] = 3
    #: Norms of a layer, and vectors of each: 0 without weights, 1 with a weight, 2 with a bias too.
    norms: int = 2
    norm_vectors: int = 1
    tied: bool = False
    #: Which layers slide when `layer_types` is absent.
    window: Literal["none", "all", "qwen", "llama4"] | int = "none"
    moe: bool = False
    mixer: str = "gqa"
    #: `default_width` times hidden where the config may leave the MLP width out.
    default_width: int | None = None


_ATTENTION_BIAS: tuple[tuple[str, ...], bool] = (("attention_bias",), False)
_ALWAYS: tuple[tuple[str, ...], bool] = ((), True)
_USE_BIAS: tuple[tuple[str, ...], bool] = (("use_bias",), False)

_LLAMA = _Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=(("mlp_bias",), False))
_MISTRAL = _Family(window="all")
_QWEN2 = _Family(qkv_bias=_ALWAYS, window="qwen")
_QWEN3 = replace(_LLAMA, mlp_bias=((), False), qk_norm="head", window="qwen")
_GEMMA = replace(_LLAMA, mlp_bias=((), False), tied=True)
_GEMMA2 = replace(_GEMMA, norms=4, window=2)
_OLMO2 = replace(_LLAMA, mlp_bias=((), False), qk_norm="full")
_COHERE = replace(_LLAMA, mlp_bias=((), False), norms=1, tied=True)
_GPT2 = _Family(
    qkv_bias=_ALWAYS,
    out_bias=_ALWAYS,
    mlp_bias=_ALWAYS,
    matrices=2,
    norm_vectors=2,
    tied=True,
    default_width=4,
)
_DEEPSEEK = _Family(mixer="mla", moe=True)
_GRANITE = replace(_LLAMA)

FAMILIES: dict[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": replace(_MISTRAL),
    "mixtral": replace(_MISTRAL, moe=True),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, qkv_bias=(("qkv_bias",), True), moe=True),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, moe=True),
    "qwen3_next": replace(_QWEN3, moe=True, mixer="gated_delta_net", window="none"),
    "qwen3_5_moe": replace(_QWEN3, moe=True, mixer="gated_delta_net", window="none"),
    "qwen3_5": replace(_QWEN3, mixer="gated_delta_net", window="none"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": replace(_GEMMA2, qk_norm="head", window=6),
    "gemma4": replace(_GEMMA2, qk_norm="head", window=6, mixer="gemma4", moe=True),
    "phi": _Family(qkv_bias=_ALWAYS, out_bias=_ALWAYS, mlp_bias=_ALWAYS, matrices=2, norms=1, norm_vectors=2),
    "phi3": _MISTRAL,
    "phimoe": _Family(
        qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, norm_vectors=2, window="all", moe=True
    ),
    "gpt2": _GPT2,
    "gpt_neox": _Family(
        qkv_bias=(("attention_bias",), True),
        out_bias=(("attention_bias",), True),
        mlp_bias=_ALWAYS,
        matrices=2,
        norm_vectors=2,
    ),
    "starcoder2": _Family(
        qkv_bias=(("use_bias",), True),
        out_bias=(("use_bias",), True),
        mlp_bias=(("use_bias",), True),
        matrices=2,
        norm_vectors=2,
        tied=True,
        window="all",
    ),
    "opt": replace(_GPT2, default_width=None),
    "falcon": _Family(
        qkv_bias=(("bias",), False),
        out_bias=(("bias",), False),
        mlp_bias=(("bias",), False),
        matrices=2,
        norm_vectors=2,
        tied=True,
        default_width=4,
    ),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, window=4),
    "olmo": replace(_LLAMA, mlp_bias=((), False), norm_vectors=0),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, window=4),
    "olmoe": replace(_OLMO2, moe=True),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, mlp_bias=((), False), moe=True),
    "granitemoeshared": replace(_GRANITE, mlp_bias=((), False), moe=True),
    "glm": _Family(qkv_bias=_ATTENTION_BIAS),
    "glm4": _Family(qkv_bias=_ATTENTION_BIAS, norms=4),
    "glm4_moe": _Family(qkv_bias=_ATTENTION_BIAS, qk_norm="head", qk_norm_key="use_qk_norm", moe=True),
    "ernie4_5": _Family(qkv_bias=_USE_BIAS, out_bias=_USE_BIAS, mlp_bias=_USE_BIAS, tied=True),
    "ernie4_5_moe": _Family(qkv_bias=_USE_BIAS, out_bias=_USE_BIAS, mlp_bias=_USE_BIAS, tied=True, moe=True),
    "hunyuan_v1_moe": replace(_LLAMA, mlp_bias=((), False), qk_norm="head", moe=True),
    "hunyuan_v1_dense": replace(_LLAMA, mlp_bias=((), False), qk_norm="head"),
    "seed_oss": _Family(
        qkv_bias=(("attention_bias",), True),
        out_bias=(("attention_out_bias",), False),
        mlp_bias=(("mlp_bias",), False),
    ),
    "smollm3": replace(_LLAMA, tied=True, window="all"),
    "dots1": replace(_LLAMA, mlp_bias=((), False), qk_norm="head", moe=True),
    "dbrx": _Family(moe=True),
    "gpt_oss": _Family(
        qkv_bias=(("attention_bias",), True), out_bias=(("attention_bias",), True), window=2, moe=True
    ),
    "llama4": _Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, window="llama4", moe=True),
    "minimax": _Family(mixer="lightning", moe=True),
    "minimax_m2": _Family(qk_norm="full", qk_norm_key="use_qk_norm", moe=True),
    "mimo_v2_flash": _Family(qkv_bias=_ATTENTION_BIAS, mixer="mimo", moe=True),
    "jamba": _Family(mixer="jamba", moe=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": replace(_DEEPSEEK, mixer="dsa"),
    "glm_moe_dsa": replace(_DEEPSEEK, mixer="dsa"),
    "deepseek_v4": replace(_DEEPSEEK, mixer="deepseek_v4"),
    "kimi_linear": replace(_DEEPSEEK, mixer="kda"),
}
_SAME_AS = {
    "kimi_k2": "deepseek_v3",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "mistral3": "mistral",
    "minimax_text_01": "minimax",
    "minimax_m1": "minimax",
    "hunyuan_moe": "hunyuan_v1_moe",
}
#: Model types that are known and that a card cannot state, with the reason.
_REFUSED = {
    "nemotron_h": "its blocks are a mixer or an MLP alone, where a card's layer has both",
    "longcat_flash": "its layers hold two attentions each and experts without weights, which a card cannot state",
    "gemma3n": "its layers share keys and values and hold per-layer embeddings, which a card cannot state",
}
_SSM = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "falcon_h1",
    "bamba",
    "zamba",
    "zamba2",
    "lfm2",
)


class _Config:
    """Typed reading of one config, with the key in every error."""

    def __init__(self, document: Document, at: KeyPath, data: dict[str, Any]) -> None:
        self.document, self.at, self.data = document, at, data
        self.read: set[str] = set()

    def error(self, key: str, message: str) -> InputError:
        return self.document.error(self.at + tuple(key.split(".")), message)

    def get(self, *names: str) -> tuple[str, Any]:
        """Return the first of `names` that is present and not null, with its value; `("", None)` without one."""
        found: tuple[str, Any] = ("", None)
        for name in names:
            value: Any = self.data
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            self.read.add(name.split(".", maxsplit=1)[0])
            if value is not None and not found[0]:
                found = (name, value)
        return found

    def number(self, key: str, value: Any, least: int, most: int = MAX_SIZE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"found {_show(value)}, expected a whole number from {least} to {most:,}")
        return value

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        key, value = self.get(*names)
        if not key:
            if default is None:
                raise self.document.error(self.at, f"the key `{names[0]}` is missing")
            return default
        return self.number(key, value, least, most)

    def optional(self, *names: str, least: int = 0) -> int | None:
        key, value = self.get(*names)
        return self.number(key, value, least) if key else None

    def per_layer(self, layer: int, *names: str, default: int | None = None, least: int = 0) -> int:
        """Return a number that may be stated once or as a list with one entry a layer."""
        key, value = self.get(*names)
        if isinstance(value, list):
            if layer >= len(value):
                raise self.error(key, f"found a list of {len(value)}, expected one entry for every layer")
            return self.number(key, value[layer], least)
        return self.integer(*names, default=default, least=least)

    def flag(self, *names: str, default: bool = False) -> bool:
        key, value = self.get(*names)
        if not key:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"found {_show(value)}, expected true or false")
        return value

    def text(self, *names: str) -> str | None:
        key, value = self.get(*names)
        if key and not isinstance(value, str):
            raise self.error(key, f"found {_show(value)}, expected a text")
        return value if key else None

    def numbers(self, key: str, *, least: int = 0) -> list[int] | None:
        _, value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > 2 * MAX_LAYERS:
            raise self.error(key, f"found {_show(value)}, expected a list of whole numbers")
        return [self.number(key, item, least) for item in value]

    def words(self, key: str, count: int, known: Iterable[str]) -> list[str] | None:
        """Return a list of `count` words out of `known`."""
        _, value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self.error(
                key, f"found {_show(value)}, expected a list of {count} words, one for every layer"
            )
        for item in value:
            if not isinstance(item, str) or item not in known:
                raise self.error(key, f"found {_show(item)}, expected {', '.join(sorted(known))}")
        return list(value)

    def mapping(self, key: str) -> _Config | None:
        _, value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"found {_show(value)}, expected keys and values")
        return _Config(self.document, (*self.at, key), value)

    def switch(self, rule: tuple[tuple[str, ...], bool]) -> bool:
        return self.flag(*rule[0], default=rule[1]) if rule[0] else rule[1]


def import_model(path: str | Path, name: str | None = None) -> ModelCard:
    """Return the model card of a Hugging Face `config.json`, or of the one in the folder `path`.

    `name` defaults to the name of the folder. A `hf_quant_config.json` beside the file is read for the number
    formats. Parameter counts are exact for the text model; layers for multi-token prediction are left out, and so is a
    vision tower whose shapes are not known here: the card's `source` says which.

    Raises InputError when the file cannot be read, a key is missing or has a value that makes no sense, or the model
    is of a type that is not known here or that a card cannot state.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    document = read_document(path)
    if not isinstance(document.data, dict):
        raise document.error((), f"found {_show(document.data)}, expected the keys of a model's config.json")
    root = _Config(document, (), document.data)
    config = next(
        (inner for key in ("text_config", "llm_config", "language_config") if (inner := root.mapping(key))),
        root,
    )
    kind = _model_type(root, config)
    family = FAMILIES[kind]
    try:
        card = _card(root, config, kind, family, name or _default_name(path, kind), path)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        if "name" in first["loc"]:
            raise InputError(reason, key="name") from None
        where = ".".join(str(part) for part in first["loc"])
        raise document.error(
            config.at, f"does not make a model: {f'{where}: ' if where else ''}{reason}"
        ) from None
    except RecursionError:
        raise document.error((), "nests too deeply") from None
    _refuse_unread(config, kind)
    return card


def card_to_yaml(card: ModelCard) -> str:
    """Return `card` as YAML with the defaults left out, a part of a layer on one line where it fits.

    Reading the text back gives an equal card.
    """
    data = CommentedMap({"kind": card.kind})
    for key, value in card.model_dump(exclude_defaults=True, exclude={"kind", "groups"}).items():
        data[key] = _short(value) if isinstance(value, dict) else value
    data["groups"] = [
        CommentedMap(
            (key, _short(value) if isinstance(value, dict) else value)
            for key, value in sorted(
                group.model_dump(exclude_defaults=True).items(), key=lambda item: item[0] != "layers"
            )
        )
        for group in card.groups
    ]
    yaml = YAML()
    yaml.width = 110
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _short(values: dict[str, Any]) -> CommentedMap:
    mapping = CommentedMap(
        (key, _short(value) if isinstance(value, dict) else value) for key, value in values.items()
    )
    # A longer one would be broken in the middle of a value, so it is left with one key on a line.
    if len(str(values)) < 110:
        mapping.fa.set_flow_style()
    return mapping


def _default_name(path: Path, kind: str) -> str:
    name = re.sub(r"[^A-Za-z0-9 ._+/()-]+", "-", path.resolve().parent.name).lstrip("-._ +/()")[:100]
    try:
        return check_name(name)
    except ValueError:
        return kind


def _model_type(root: _Config, config: _Config) -> str:
    stated = config.text("model_type") or root.text("model_type")
    candidates = [stated] if stated else []
    # A remote-code model may name itself anew and still use a class that is known.
    architectures = root.get("architectures")[1] or config.get("architectures")[1]
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        candidates.append(_snake(architectures[0]))
    if not candidates:
        raise config.document.error(config.at, "the key `model_type` is missing")
    if root.flag("is_encoder_decoder"):
        raise root.error("is_encoder_decoder", "found true, expected a decoder-only model")
    for candidate in candidates:
        kind = candidate.removesuffix("_text")
        kind = _SAME_AS.get(kind, kind)
        squeezed = {key.replace("_", ""): key for key in FAMILIES}
        if kind in FAMILIES or kind in _REFUSED or kind in _SSM:
            break
        if kind.replace("_", "") in squeezed:
            kind = squeezed[kind.replace("_", "")]
            break
    else:
        kind = candidates[0]
        raise config.error(
            "model_type" if stated else "architectures",
            f"found {_show(kind)}, a model type that is not understood{nearest(kind, FAMILIES)}; "
            "write a model card for it instead",
        )
    if kind in _REFUSED:
        raise config.error("model_type", f"found {_show(kind)}, which is not understood: {_REFUSED[kind]}")
    if kind in _SSM:
        raise config.error("model_type", f"found {_show(kind)}, whose state-space layers are not understood")
    return kind


def _snake(architecture: str) -> str:
    stem = re.sub(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel|Model)$", "", architecture)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()


def _refuse_unread(config: _Config, kind: str) -> None:
    for key, value in config.data.items():
        if (
            key not in config.read | _HARMLESS
            and _STRUCTURAL.search(str(key))
            and value not in (None, False, 0, [], {})
        ):
            raise config.error(
                str(key), f"found {_show(value)}, a key that is not understood in a `{kind}` model"
            )


def _card(root: _Config, config: _Config, kind: str, family: _Family, name: str, path: Path) -> ModelCard:
    hidden = config.integer(*HIDDEN)
    count = config.integer(*LAYERS, most=MAX_LAYERS)
    vocabulary = config.integer("vocab_size")
    tied = (config if config.get("tie_word_embeddings")[0] else root).flag(
        "tie_word_embeddings", default=family.tied
    )
    notes = [f"Hugging Face config.json of model type {kind}"]

    biased = (
        kind == "phi"
        or config.flag("lm_head_bias")
        or (kind == "ernie4_5_moe" and config.switch(family.mlp_bias))
    )
    head_bias = vocabulary if biased else 0
    head = (0 if tied else vocabulary * hidden) + head_bias
    embedding = vocabulary * hidden
    if kind == "gpt2":
        embedding += hidden * config.integer("n_positions", "max_position_embeddings", "n_ctx")
    elif kind == "opt":
        # Two positions are kept for padding.
        embedding += hidden * (config.integer("max_position_embeddings") + 2)
        if config.integer("word_embed_proj_dim", default=hidden) != hidden:
            raise config.error(
                "word_embed_proj_dim", f"found a width other than the hidden {hidden}, not understood"
            )
        if not config.flag("do_layer_norm_before", default=True):
            raise config.error("do_layer_norm_before", "found false, a layout that is not understood")
    final_norm = hidden * family.norm_vectors
    if kind == "deepseek_v4":
        streams = config.integer("hc_mult")
        final_norm += streams * streams * hidden + streams + 1

    groups: dict[Layer, list[int]] = {}
    for number in range(count):
        groups.setdefault(_layer(config, family, kind, number, count, hidden), []).append(number)

    other = 0
    vision = root.mapping("vision_config")
    if vision and kind == "gemma4":
        other = _gemma4_vision(vision, hidden)
    elif vision:
        notes.append("the vision tower is left out")
    if root.mapping("audio_config"):
        notes.append("the audio tower is left out")
    ahead = [
        config.optional(key)
        for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    ]
    if any(ahead):
        notes.append("the layers for multi-token prediction are left out")
    dtypes, remarks = _dtypes(root, config, path, kind, groups)

    return ModelCard(
        name=name,
        source="; ".join(notes + remarks),
        hidden=hidden,
        vocabulary=vocabulary,
        tied_embeddings=tied,
        embedding_parameters=None if embedding == vocabulary * hidden else embedding,
        head_parameters=None if head == (0 if tied else vocabulary * hidden) else head,
        final_norm_parameters=None if final_norm == hidden else final_norm,
        other_parameters=other,
        dtypes=dtypes,
        groups=[
            LayerGroup(
                layers=fold_layer_numbers(numbers),
                attention=layer.attention,
                mlp=layer.mlp,
                moe=layer.moe,
                norm_parameters=layer.norm_parameters,
            )
            for layer, numbers in groups.items()
        ],
    )


def _layer(config: _Config, family: _Family, kind: str, number: int, count: int, hidden: int) -> Layer:
    moe = (
        _moe(config, family, kind, number, hidden)
        if family.moe and _has_experts(config, kind, number, count)
        else None
    )
    norms = family.norms
    mlp: Mlp | None = None
    if kind == "gemma4":
        # The dense MLP runs beside the experts, each with norms of its own.
        mlp = _mlp(config, family, kind, number, hidden)
        norms = 7 if moe else 4
    elif moe is None:
        mlp = _mlp(config, family, kind, number, hidden)
    elif kind == "granitemoeshared" or kind.startswith("minimax"):
        width = config.integer("shared_intermediate_size", default=0, least=0)
        moe = moe.model_copy(update={"shared": Mlp(width=width) if width else None})
    if kind == "falcon":
        norms = 1 if config.flag("parallel_attn", default=True) else 2
        if config.flag("new_decoder_architecture"):
            norms = config.integer("num_ln_in_parallel_attn", default=2)
    parameters = norms * family.norm_vectors * hidden
    return Layer(
        attention=_MIXERS[family.mixer](config, family, number, count, hidden, kind),
        mlp=mlp,
        moe=moe,
        norm_parameters=None if parameters == 2 * hidden else parameters,
    )


def _mlp(config: _Config, family: _Family, kind: str, number: int, hidden: int) -> Mlp:
    names = ("intermediate_size_mlp", *WIDTH) if kind == "llama4" else WIDTH
    default = family.default_width * hidden if family.default_width else None
    width = config.per_layer(number, *names, default=default, least=1)
    matrices = family.matrices
    bias = (matrices - 1) * width + hidden if config.switch(family.mlp_bias) else 0
    if kind == "gemma4" and config.flag("use_double_wide_mlp"):
        raise config.error("use_double_wide_mlp", "found true, a layout that is not understood")
    return Mlp(width=width, matrices=matrices, extra_parameters=bias)


def _has_experts(config: _Config, kind: str, number: int, count: int) -> bool:
    """Whether a layer holds experts, by every way that configs have of saying so."""
    if config.per_layer(number, *EXPERTS, default=0) < (2 if kind in ("jamba", "hunyuan_v1_moe") else 1):
        return False
    if kind == "gemma4":
        return config.flag("enable_moe_block")
    words = config.words("mlp_layer_types", count, ("dense", "sparse", "moe", "hash_moe"))
    if words:
        return words[number] != "dense"
    chosen = config.numbers("moe_layers")
    if chosen is not None:
        return number in chosen
    if config.get("moe_layer_num_skipped")[0] and number < config.integer("moe_layer_num_skipped", least=0):
        return False
    if number < config.integer("first_k_dense_replace", default=0, least=0):
        return False
    key, frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return config.per_layer(number, key) != 0
    if key and number % config.integer(key):
        return False
    if number in (config.numbers("mlp_only_layers") or []):
        return False
    every = "interleave_moe_layer_step" if kind == "llama4" else "decoder_sparse_step"
    if (number + 1) % config.integer(every, default=1):
        return False
    if kind == "jamba":
        period = config.integer("expert_layer_period", default=2)
        return number % period == config.integer("expert_layer_offset", default=1, least=0)
    if kind == "ernie4_5_moe":
        key, end = config.get("moe_layer_end_index")
        last = count - 1 if end == -1 or not key else config.number(key, end, 0)
        first = config.integer("moe_layer_start_index", default=0, least=0)
        return first <= number <= last and (number + 1) % config.integer("moe_layer_interval", default=1) == 0
    return True


def _moe(config: _Config, family: _Family, kind: str, number: int, hidden: int) -> Moe:
    experts = config.per_layer(number, *EXPERTS, least=1)
    if experts > MAX_EXPERTS:
        key = config.get(*EXPERTS)[0]
        raise config.error(key, f"found {experts:,}, expected at most {MAX_EXPERTS:,} experts")
    width = config.per_layer(number, *EXPERT_WIDTH, least=1)
    router = experts * hidden
    per_expert = 0
    shared: Mlp | None = None
    if kind == "gpt_oss":
        router += experts
        per_expert = 2 * width + hidden
    elif kind == "ernie4_5_moe":
        # The bias that corrects the choice is a parameter here; the packed experts have none.
        router += experts
    elif kind == "gemma4":
        router += hidden + experts
    elif kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe"):
        # The shared expert has a sigmoid gate of one row.
        router += hidden
        shared = Mlp(width=config.integer("shared_expert_intermediate_size"))
    elif kind == "qwen3_moe":
        if config.integer("shared_expert_intermediate_size", default=0, least=0):
            raise config.error(
                "shared_expert_intermediate_size", "found a shared expert, which qwen3_moe has not"
            )
    elif kind == "llama4":
        shared = Mlp(width=width)
    elif kind == "mimo_v2_flash" and config.per_layer(number, *SHARED_EXPERTS, default=0):
        raise config.error(config.get(*SHARED_EXPERTS)[0], "found shared experts, which this type has not")
    if shared is None and kind not in ("qwen3_moe", "gemma4"):
        several = config.per_layer(number, *SHARED_EXPERTS, default=1 if kind == "hunyuan_v1_moe" else 0)
        if several:
            extra = 0
            if kind == "deepseek_v4":
                extra = _hyper_connection(config, hidden)
            elif kind == "ernie4_5_moe" and config.switch(family.mlp_bias):
                extra = 2 * several * width + hidden
            shared = Mlp(width=several * width, extra_parameters=extra)
    grouped = config.integer("n_group", "num_expert_group", default=1)
    # DeepSeek-V4 and models without a group limit still carry the keys; only the limited ones have more than one.
    return Moe(
        experts=experts,
        top_k=config.per_layer(number, *TOP_K, default=1 if kind == "llama4" else None, least=1),
        width=width,
        extra_parameters_per_expert=per_expert,
        router_parameters=None if router == experts * hidden else router,
        groups=grouped,
        top_groups=config.integer("topk_group", default=1) if grouped > 1 else 1,
        shared=shared,
    )


def _hyper_connection(config: _Config, hidden: int) -> int:
    """Parameters of one manifold-constrained hyper-connection: a matrix, its base and three scales."""
    streams = config.integer("hc_mult")
    mixes = streams * (streams + 2)
    return mixes * streams * hidden + mixes + 3


def _heads(config: _Config, hidden: int, kind: str) -> tuple[int, int, int]:
    """Return the query heads, the key/value heads and the width of one."""
    heads = config.integer(*HEADS)
    kv_heads = config.integer(*KV_HEADS, default=heads)
    if kind == "falcon" and not config.flag("new_decoder_architecture"):
        kv_heads = 1 if config.flag("multi_query", default=True) else heads
    key, width = config.get("head_dim")
    head_dim = config.number(key, width, 1) if key else hidden // heads
    if not key and hidden % heads:
        raise config.error(
            config.get(*HEADS)[0],
            f"found {heads} heads, which do not divide the hidden size {hidden}; `head_dim` is missing",
        )
    if heads % kv_heads:
        raise config.error(
            config.get(*KV_HEADS)[0], f"found {kv_heads}, which does not divide the {heads} attention heads"
        )
    return heads, kv_heads, head_dim


def _window(config: _Config, family: _Family, number: int, count: int) -> int | None:
    """Return how many tokens a query of a layer can see, None for all of them."""
    words = config.words(
        "layer_types",
        count,
        ("full_attention", "sliding_attention", "chunked_attention", "linear_attention"),
    )
    rule = family.window
    if rule == "qwen" and not words:
        if not config.flag("use_sliding_window") or number < config.integer(
            "max_window_layers", default=28, least=0
        ):
            return None
        return config.optional("sliding_window") or None
    if words:
        if words[number] == "chunked_attention":
            return config.integer("attention_chunk_size")
        return config.integer("sliding_window") if words[number] == "sliding_attention" else None
    if rule == "llama4":
        rotary = config.numbers("no_rope_layers")
        every = config.integer("no_rope_layer_interval", default=4)
        if rotary and len(rotary) < count:
            raise config.error("no_rope_layers", f"found a list of {len(rotary)}, expected {count} entries")
        local = bool(rotary[number]) if rotary else (number + 1) % every != 0
        return config.optional("attention_chunk_size") or None if local else None
    if rule == "all":
        if config.get("use_sliding_window")[0] and not config.flag("use_sliding_window"):
            return None
        return config.optional("sliding_window") or None
    if isinstance(rule, int):
        every = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=rule)
        return (config.optional("sliding_window") or None) if (number + 1) % every else None
    return None


def _gqa(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    heads, kv_heads, head_dim = _heads(config, hidden, kind)
    clip = config.mapping("attn_config") if kind == "dbrx" else None
    if clip is not None:
        clip.get("kv_n_heads", "clip_qkv")
    extra = (heads + 2 * kv_heads) * head_dim if config.switch(family.qkv_bias) else 0
    extra += hidden if config.switch(family.out_bias) else 0
    extra += _qk_norms(config, family, kind, heads, kv_heads, head_dim)
    if kind == "gpt_oss":
        extra += heads
    if kind == "hunyuan_v1_moe" and config.flag("use_cla"):
        raise config.error("use_cla", "found true: attention shared across layers is not understood")
    if kind == "phi" and config.flag("qk_layernorm"):
        raise config.error("qk_layernorm", "found true, a layout that is not understood")
    return Attention(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=_window(config, family, number, count),
        extra_parameters=extra,
    )


def _qk_norms(config: _Config, family: _Family, kind: str, heads: int, kv_heads: int, head_dim: int) -> int:
    if kind == "cohere":
        return (heads + kv_heads) * head_dim if config.flag("use_qk_norm") else 0
    if family.qk_norm == "none":
        return 0
    if family.qk_norm_key and not config.flag(family.qk_norm_key, default=kind == "minimax_m2"):
        return 0
    return 2 * head_dim if family.qk_norm == "head" else (heads + kv_heads) * head_dim


def _mla(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    rank = config.optional("q_lora_rank", least=1)
    latent = config.integer("kv_lora_rank")
    rope = config.integer("qk_rope_head_dim", least=0)
    extra = latent + (rank or 0)
    if config.flag("attention_bias"):
        extra += (rank or 0) + latent + rope + hidden
    return Attention(
        kind="mla",
        heads=config.integer(*HEADS),
        q_lora_rank=rank,
        kv_lora_rank=latent,
        qk_nope_head_dim=config.integer("qk_nope_head_dim", least=0),
        qk_rope_head_dim=rope,
        v_head_dim=config.integer("v_head_dim"),
        extra_parameters=extra,
    )


def _dsa(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    """MLA with an indexer that picks the tokens a query reads and caches one key of its own per token."""
    plain = _mla(config, family, number, count, hidden, kind)
    if plain.q_lora_rank is None:
        raise config.document.error(config.at, "the key `q_lora_rank` is missing, which the indexer needs")
    heads, width = config.integer("index_n_heads"), config.integer("index_head_dim")
    indexer = plain.q_lora_rank * heads * width + hidden * width + 2 * width + hidden * heads
    return plain.model_copy(
        update={
            "sparse_tokens": config.integer("index_topk"),
            "cached_values": plain.cached_values_per_token() + width,
            "extra_parameters": plain.extra_parameters + indexer,
        }
    )


_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _deepseek_v4(
    config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str
) -> Attention:
    """Attention over a short window and over compressed entries, one for every `ratio` tokens.

    Ratio 4 compresses with overlap and picks entries by an indexer; ratio 128 reads them all; ratio 0 has the window
    alone. Keys and values are the same vector. The window is kept per sequence, so it counts as state.
    """
    heads, width, rank = config.integer(*HEADS), config.integer("head_dim"), config.integer("q_lora_rank")
    groups, out_rank = config.integer("o_groups"), config.integer("o_lora_rank")
    window = config.integer("sliding_window")
    if config.integer(*KV_HEADS, default=1) != 1:
        raise config.error("num_key_value_heads", "found more than the one key/value head that is understood")
    ratios = config.numbers("compress_ratios")
    words = config.words("layer_types", count, tuple(_RATIOS))
    if words:
        rates = config.mapping("compress_rates")
        ratios = [_RATIOS[word] and (rates.integer(word) if rates else _RATIOS[word]) for word in words]
    if ratios is None:
        raise config.document.error(config.at, "the key `compress_ratios` is missing")
    ahead = config.integer("num_nextn_predict_layers", default=0, least=0)
    if len(ratios) not in (count, count + ahead):
        raise config.error("compress_ratios", f"found a list of {len(ratios)}, expected {count} entries")
    ratio = ratios[number]
    if ratio not in (0, 4, 128):
        raise config.error("compress_ratios", f"found {ratio}, expected 0, 4 or 128")
    matrices = hidden * rank + rank * heads * width + hidden * width
    matrices += out_rank * heads * width + groups * out_rank * hidden
    extra = heads + rank + width + _hyper_connection(config, hidden)
    cached, sparse = 0, None
    index_heads, index = config.integer("index_n_heads"), config.integer("index_head_dim")
    top = config.integer("index_topk")
    if ratio:
        spread = 2 if ratio == 4 else 1
        matrices += 2 * hidden * spread * width
        extra += ratio * spread * width + width
        cached = width // ratio
    if ratio == 4:
        extra += ratio * 2 * index + index
        extra += 2 * hidden * 2 * index + rank * index_heads * index + hidden * index_heads
        cached = (width + index) // ratio
        sparse = top + window
    return Attention(
        kind="gqa",
        heads=heads,
        kv_heads=1,
        head_dim=width,
        window=None if ratio else window,
        sparse_tokens=sparse,
        cached_values=cached if ratio else width,
        state_values=window * width if ratio else 0,
        matrix_parameters=matrices,
        extra_parameters=extra,
    )


def _is_linear(config: _Config, number: int, count: int, default: bool) -> bool:
    words = config.words("layer_types", count, ("full_attention", "linear_attention"))
    return words[number] == "linear_attention" if words else default


def _gated_delta_net(
    config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str
) -> Attention:
    every = config.integer("full_attention_interval", default=4)
    kernel = config.integer("linear_conv_kernel_dim")
    key_heads, value_heads = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    key_dim, value_dim = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    gated = config.flag("attn_output_gate", default=True)
    if not _is_linear(config, number, count, (number + 1) % every != 0):
        plain = _gqa(config, replace(family, window="none"), number, count, hidden, kind)
        if not gated:
            return plain
        # The query projection also makes a gate for every value that comes out.
        gate = plain.heads * plain.head_dim
        matrices = plain.projection_parameters(hidden) + hidden * gate
        bias = gate if config.switch(family.qkv_bias) else 0
        return plain.model_copy(
            update={"matrix_parameters": matrices, "extra_parameters": plain.extra_parameters + bias}
        )
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    return Attention(
        kind="linear",
        heads=value_heads,
        kv_heads=key_heads,
        head_dim=value_dim,
        matrix_parameters=hidden * (channels + values + 2 * value_heads) + values * hidden,
        extra_parameters=channels * kernel + 2 * value_heads + value_dim,
        state_values=value_heads * key_dim * value_dim + channels * (kernel - 1),
    )


def _kda(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    inner = config.mapping("linear_attn_config")
    source = inner or config
    heads = source.integer("num_heads" if inner else "linear_num_heads")
    width = source.integer("head_dim" if inner else "linear_head_dim")
    kernel = source.integer("short_conv_kernel_size" if inner else "linear_conv_kernel_dim", default=4)
    # The published list counts layers from 1.
    full = inner.numbers("full_attn_layers", least=1) if inner else None
    if full is None and not config.get("layer_types")[0]:
        raise config.document.error(
            config.at, "neither `layer_types` nor `linear_attn_config.full_attn_layers` is there"
        )
    if not _is_linear(config, number, count, (number + 1) not in (full or [])):
        return _mla(config, family, number, count, hidden, kind)
    values = heads * width
    return Attention(
        kind="linear",
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        matrix_parameters=4 * hidden * values + 2 * (hidden * width + width * values) + hidden * heads,
        extra_parameters=3 * values * kernel + values + heads + width,
        state_values=heads * width * width + 3 * values * (kernel - 1),
    )


def _lightning(
    config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str
) -> Attention:
    kinds = config.numbers("attn_type_list")
    if kinds is not None and len(kinds) != count:
        raise config.error("attn_type_list", f"found a list of {len(kinds)}, expected {count} entries")
    if kinds is None and not config.get("layer_types")[0]:
        raise config.document.error(config.at, "the key `layer_types` is missing")
    plain = _gqa(config, replace(family, window="none"), number, count, hidden, kind)
    if not _is_linear(config, number, count, bool(kinds) and kinds is not None and kinds[number] == 0):
        return plain
    values = plain.heads * plain.head_dim
    return Attention(
        kind="linear",
        heads=plain.heads,
        kv_heads=plain.heads,
        head_dim=plain.head_dim,
        matrix_parameters=5 * hidden * values,
        extra_parameters=values,
        state_values=plain.heads * plain.head_dim**2,
    )


def _jamba(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    period = config.integer("attn_layer_period", default=8)
    inner = hidden * config.integer("mamba_expand", default=2)
    state = config.integer("mamba_d_state", default=16)
    kernel = config.integer("mamba_d_conv", default=4)
    rank_key, rank = config.get("mamba_dt_rank")
    rank = math.ceil(hidden / 16) if rank in (None, "auto") else config.number(rank_key, rank, 1)
    conv_bias = config.flag("mamba_conv_bias", default=True)
    bias = config.flag("mamba_proj_bias")
    if number % period == config.integer("attn_layer_offset", default=4, least=0):
        return _gqa(config, family, number, count, hidden, kind)
    matrices = 2 * inner * hidden + (rank + 2 * state) * inner + rank * inner + inner * hidden
    extra = inner * kernel + inner * state + 2 * inner + rank + 2 * state
    extra += (inner if conv_bias else 0) + (2 * inner + hidden if bias else 0)
    # Every channel has a state of its own, so a channel is what a head is elsewhere.
    return Attention(
        kind="linear",
        heads=inner,
        kv_heads=inner,
        head_dim=1,
        matrix_parameters=matrices,
        extra_parameters=extra,
        state_values=inner * state + inner * (kernel - 1),
    )


def _mimo(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    """Windowed layers with twice the key/value heads and attention sinks between full ones; values are narrower."""
    pattern = config.numbers("hybrid_layer_pattern")
    if pattern is not None and len(pattern) != count:
        raise config.error(
            "hybrid_layer_pattern", f"found a list of {len(pattern)}, expected {count} entries"
        )
    words = config.words("layer_types", count, ("full_attention", "sliding_attention"))
    if words is None and pattern is None:
        raise config.document.error(config.at, "the key `layer_types` is missing")
    sliding = words[number] == "sliding_attention" if words else bool(pattern and pattern[number])
    heads, kv_heads, key_dim = _heads(config, hidden, kind)
    value_dim = config.integer("v_head_dim", default=key_dim)
    window = config.integer("sliding_window", "sliding_window_size")
    sinks = sliding and config.flag("add_swa_attention_sink_bias", default=True)
    if config.flag("add_full_attention_sink_bias"):
        raise config.error("add_full_attention_sink_bias", "found true, a layout that is not understood")
    if sliding:
        for key, expected in (
            ("swa_num_attention_heads", heads),
            ("swa_head_dim", key_dim),
            ("swa_v_head_dim", value_dim),
        ):
            if config.integer(key, default=expected) != expected:
                raise config.error(
                    key, f"found a number other than {expected}, a layout that is not understood"
                )
        kv_heads = config.integer("swa_num_key_value_heads", default=2 * kv_heads)
    bias = heads * key_dim + kv_heads * (key_dim + value_dim) if config.switch(family.qkv_bias) else 0
    return Attention(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=key_dim,
        window=window if sliding else None,
        cached_values=kv_heads * (key_dim + value_dim),
        matrix_parameters=hidden * (heads + kv_heads) * (key_dim + value_dim),
        extra_parameters=bias + (heads if sinks else 0),
    )


def _gemma4(config: _Config, family: _Family, number: int, count: int, hidden: int, kind: str) -> Attention:
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if config.integer(key, default=0, least=0):
            raise config.error(key, "found a number other than 0, a layout that is not understood")
    plain = _gqa(config, family, number, count, hidden, kind)
    if plain.window is not None:
        return plain
    # Full layers have wider heads, and with `attention_k_eq_v` no projection for values; both are cached all the same.
    width = config.integer("global_head_dim")
    alike = config.flag("attention_k_eq_v")
    kv_heads = (
        config.integer("num_global_key_value_heads", default=plain.kv_heads) if alike else plain.kv_heads
    )
    bias = config.switch(family.qkv_bias)
    projections = 1 if alike else 2
    extra = 2 * width + ((plain.heads + projections * kv_heads) * width + hidden if bias else 0)
    return plain.model_copy(
        update={
            "head_dim": width,
            "kv_heads": kv_heads,
            "matrix_parameters": hidden * width * (2 * plain.heads + kv_heads) if alike else None,
            "extra_parameters": extra,
        }
    )


def _gemma4_vision(vision: _Config, hidden: int) -> int:
    """Parameters of Gemma 4's vision encoder and of the projection into the text model."""
    width, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    kv_heads = vision.integer("num_key_value_heads", default=heads)
    head_dim = vision.integer("head_dim", default=max(width // heads, 1))
    attention = 2 * width * head_dim * (heads + kv_heads) + 2 * head_dim
    if vision.flag("attention_bias"):
        attention += (heads + 2 * kv_heads) * head_dim + width
    if vision.flag("use_clipped_linears"):
        raise vision.error("use_clipped_linears", "found true, a layout that is not understood")
    layer = attention + 3 * width * vision.integer("intermediate_size") + 4 * width
    patches = (
        2 * vision.integer("position_embedding_size") * width + 3 * vision.integer("patch_size") ** 2 * width
    )
    return vision.integer("num_hidden_layers", most=MAX_LAYERS) * layer + patches + hidden * width


_MIXERS: dict[str, Callable[[_Config, _Family, int, int, int, str], Attention]] = {
    "gqa": _gqa,
    "mla": _mla,
    "dsa": _dsa,
    "deepseek_v4": _deepseek_v4,
    "gated_delta_net": _gated_delta_net,
    "kda": _kda,
    "lightning": _lightning,
    "jamba": _jamba,
    "mimo": _mimo,
    "gemma4": _gemma4,
}

_PLAIN: dict[str, Dtype] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}


def _dtypes(
    root: _Config, config: _Config, path: Path, kind: str, groups: dict[Layer, list[int]]
) -> tuple[Dtypes, list[str]]:
    """Return the number formats, and remarks on what they leave out."""
    stated = config.text("dtype", "torch_dtype") or root.text("dtype", "torch_dtype") or "bfloat16"
    stated = stated.removeprefix("torch.")
    if stated not in _PLAIN:
        owner = config if config.get("dtype", "torch_dtype")[0] else root
        raise owner.error(
            owner.get("dtype", "torch_dtype")[0], f"found {_show(stated)}, expected {', '.join(_PLAIN)}"
        )
    base = _PLAIN[stated]
    quantization = _quantization(root, config, path)
    plain = Dtypes(weights=base, embedding=base, kv_cache=base, activations=base)
    if quantization is None:
        return plain, []
    fmt, only, left_out, cache = quantization
    kv_cache: Dtype = cache or base
    remarks: list[str] = []
    parts: dict[str, Dtype | None] = {}
    for part in ("attention", "mlp", "experts"):
        modules = [
            names for layer, numbers in groups.items() for n in numbers if (names := _modules(layer, part, n))
        ]
        if not modules:
            parts[part] = None
            continue
        chosen = [
            [(not only or _matches(name, only)) and not _matches(name, left_out) for name in names]
            for names in modules
        ]
        whole = sum(all(row) for row in chosen)
        some = sum(any(row) for row in chosen)
        # One format stands for all layers: the wider one, unless every matrix of most layers is quantized.
        parts[part] = fmt if 2 * whole > len(chosen) else base
        if whole != len(chosen) and some:
            remarks.append(f"of the {part} weights only some are {fmt}; all are taken for {parts[part]}")
    key, expert = config.get("expert_dtype")
    if not key:
        inner = root.mapping("quantization_config")
        expert = inner.text("expert_dtype") if inner else None
    if expert is not None:
        if expert not in ("fp4", "fp8"):
            raise config.error("expert_dtype", f"found {_show(expert)}, expected fp4 or fp8")
        parts["experts"] = "mxfp4" if expert == "fp4" else parts["experts"]
    # `weights` speaks for whatever has no format of its own; where experts alone are quantized, that is plain.
    weights = fmt if fmt in (parts["attention"], parts["mlp"]) else base
    return (
        Dtypes(
            weights=weights,
            attention=_unless(parts["attention"], weights),
            mlp=_unless(parts["mlp"], weights),
            experts=_unless(parts["experts"], weights),
            embedding=base,
            kv_cache=kv_cache,
            activations=base,
        ),
        remarks,
    )


def _unless(value: Dtype | None, default: Dtype) -> Dtype | None:
    return None if value == default else value


_Quantization = tuple[Dtype, list[str], list[str], Dtype | None]


def _quantization(root: _Config, config: _Config, path: Path) -> _Quantization | None:
    """Return the format, what alone has it (empty: everything), what has it not, and the format of the KV cache."""
    beside = path.parent / "hf_quant_config.json"
    if beside.is_file():
        document = read_document(beside)
        if not isinstance(document.data, dict):
            raise document.error((), f"found {_show(document.data)}, expected keys and values")
        inner = _Config(document, (), document.data).mapping("quantization")
        if inner is None:
            raise document.error((), "the key `quantization` is missing")
        return _modelopt(inner)
    settings = config.mapping("quantization_config") or root.mapping("quantization_config")
    settings = settings or config.mapping("compression_config") or root.mapping("compression_config")
    if settings is None:
        return None
    method = settings.text("quant_method")
    left_out = _patterns(settings, "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    if method in ("fp8", "fbgemm_fp8"):
        blocks = settings.numbers("weight_block_size", least=1)
        if blocks is not None and blocks != [128, 128]:
            raise settings.error("weight_block_size", f"found {blocks}, expected [128, 128]")
        return "fp8_block" if blocks else "fp8", [], left_out, None
    if method == "mxfp4":
        return "mxfp4", ["experts"], left_out, None
    if method in ("awq", "gptq"):
        if settings.get("dynamic")[1]:
            raise settings.error("dynamic", "found rules for single modules, which are not understood")
        return _integers(settings, "bits", "w_bit"), [], left_out, None
    if method == "modelopt":
        return _modelopt(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings, left_out)
    known = "fp8, fbgemm_fp8, mxfp4, awq, gptq, modelopt, compressed-tensors"
    raise settings.error("quant_method", f"found {_show(method)}, expected {known}")


def _integers(settings: _Config, *names: str) -> Dtype:
    bits = settings.integer(*names, default=None)
    if bits not in (4, 8):
        raise settings.error(settings.get(*names)[0], f"found {bits}, expected 4 or 8 bits")
    return "int4" if bits == 4 else "int8"


def _modelopt(settings: _Config) -> _Quantization:
    algorithm = settings.text("quant_algo")
    formats: dict[str | None, Dtype] = {
        "NVFP4": "nvfp4",
        "FP8": "fp8",
        "FP8_PB_WO": "fp8_block",
        "W4A16_AWQ": "int4",
    }
    if algorithm not in formats:
        raise settings.error(
            "quant_algo", f"found {_show(algorithm)}, expected NVFP4, FP8, FP8_PB_WO or W4A16_AWQ"
        )
    left_out = _patterns(settings, "exclude_modules", "ignore")
    cache = settings.text("kv_cache_quant_algo")
    if cache not in (None, "FP8"):
        raise settings.error("kv_cache_quant_algo", f"found {_show(cache)}, expected FP8 or null")
    scheme = settings.mapping("kv_cache_scheme")
    eight = cache == "FP8" or (scheme is not None and scheme.integer("num_bits") == 8)
    return formats[algorithm], [], left_out, "fp8" if eight else None


def _compressed_tensors(settings: _Config, left_out: list[str]) -> _Quantization:
    groups = settings.mapping("config_groups")
    if groups is None or not groups.data:
        raise settings.document.error(settings.at, "the key `config_groups` is missing")
    formats: set[Dtype] = set()
    targets: list[str] = []
    for key in groups.data:
        group = groups.mapping(key)
        weights = group.mapping("weights") if group else None
        if group is None or weights is None:
            raise groups.error(str(key), "the key `weights` is missing")
        bits, kind = weights.integer("num_bits"), weights.text("type") or "int"
        if kind == "int":
            formats.add(_integers(weights, "num_bits"))
        elif (kind, bits) == ("float", 8):
            formats.add("fp8_block" if weights.text("strategy") == "block" else "fp8")
        elif (kind, bits) == ("float", 4):
            size = weights.integer("group_size")
            if size not in (16, 32):
                raise weights.error("group_size", f"found {size}, expected 16 (nvfp4) or 32 (mxfp4)")
            formats.add("nvfp4" if size == 16 else "mxfp4")
        else:
            raise weights.error(
                "num_bits", f"found {bits} bits of type {_show(kind)}, which is not understood"
            )
        targets += _patterns(group, "targets")
    if len(formats) != 1:
        raise groups.document.error(
            groups.at, f"found the formats {', '.join(sorted(formats))}, expected one"
        )
    scheme = settings.mapping("kv_cache_scheme")
    cache: Dtype | None = "fp8" if scheme is not None and scheme.integer("num_bits") == 8 else None
    return formats.pop(), [] if "Linear" in targets else targets, left_out, cache


def _patterns(settings: _Config, *names: str) -> list[str]:
    key, value = settings.get(*names)
    if not key:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise settings.error(key, f"found {_show(value)}, expected a list of module names")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error:
                raise settings.error(
                    key, f"found {_show(item)}, expected a regular expression after `re:`"
                ) from None
    return value


def _modules(layer: Layer, part: str, number: int) -> list[str]:
    """Return names of the matrices of a part, as checkpoints spell them."""
    prefix = f"model.layers.{number}"
    if part == "attention":
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if layer.attention.kind == "mla":
            names = ["q_proj"] if layer.attention.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
            names += ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        block = "linear_attn" if layer.attention.kind == "linear" else "self_attn"
        return [f"{prefix}.{block}.{name}" for name in names]
    matrices = ("gate_proj", "up_proj", "down_proj")
    if part == "experts":
        return [f"{prefix}.mlp.experts.0.{name}" for name in matrices] if layer.moe else []
    if layer.mlp:
        return [f"{prefix}.mlp.{name}" for name in matrices]
    shared = layer.moe.shared if layer.moe else None
    return [f"{prefix}.mlp.shared_experts.{name}" for name in matrices] if shared else []


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a module is named by one of the patterns: a regular expression, a glob, or whole parts of the name."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") or f".{pattern}." in f".{name}.":
            return True
    return False


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
