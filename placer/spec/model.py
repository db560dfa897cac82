"""The network: layers, experts and shards, as a model card states them.

A card lists groups of layers that are alike. Parameter counts follow from the shapes; what the shapes do not show
(biases, query and key norms, attention sinks, gates) is stated as `extra_parameters`, so that the total is exact.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from placer.spec.base import Stated
from placer.spec.dtypes import Dtype
from placer.spec.names import Name
from placer.spec.reading import Document, validate

MAX_LAYERS = 2000


class Attention(Stated):
    """The attention (or other token mixer) of one layer.

    `gqa` covers MHA, GQA and MQA; `mla` is DeepSeek's multi-head latent attention; `linear` is any mixer whose state
    does not grow with the context (gated delta net, KDA, Mamba).
    """

    kind: Literal["gqa", "mla", "linear"]
    heads: int = Field(ge=1)
    kv_heads: int = Field(1, ge=1, description="gqa: key/value heads")
    head_dim: int = Field(128, ge=1, description="gqa and linear: width of one head")
    q_lora_rank: int | None = Field(
        None, ge=1, description="mla: rank of the query projection; null for a full one"
    )
    kv_lora_rank: int = Field(512, ge=1, description="mla: rank of the latent that is cached")
    qk_nope_head_dim: int = Field(128, ge=0, description="mla")
    qk_rope_head_dim: int = Field(64, ge=0, description="mla")
    v_head_dim: int = Field(128, ge=1, description="mla")
    window: int | None = Field(
        None, ge=1, description="tokens a query can see, for sliding windows and chunks"
    )
    sparse_tokens: int | None = Field(
        None, ge=1, description="tokens a query reads, for learned sparse attention"
    )
    cached_values: int | None = Field(
        None, ge=0, description="values cached per token, where the shapes do not tell"
    )
    state_values: int = Field(0, ge=0, description="values kept per sequence whatever its length")
    matrix_parameters: int | None = Field(
        None, ge=0, description="projection weights, where the shapes do not tell"
    )
    extra_parameters: int = Field(0, ge=0, description="biases, norms of queries and keys, sinks, indexers")

    def projection_parameters(self, hidden: int) -> int:
        """Return the weights of the projection matrices."""
        if self.matrix_parameters is not None:
            return self.matrix_parameters
        if self.kind == "mla":
            query = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            queries = hidden * query if self.q_lora_rank is None else self.q_lora_rank * (hidden + query)
            latent = hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
            expand = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
            return queries + latent + expand + self.heads * self.v_head_dim * hidden
        return hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def parameters(self, hidden: int) -> int:
        """Return every parameter of this attention."""
        return self.projection_parameters(hidden) + self.extra_parameters

    def cached_values_per_token(self) -> int:
        """Return the values that one token adds to the KV cache of this layer, before any split over TP."""
        if self.cached_values is not None:
            return self.cached_values
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.head_dim if self.kind == "gqa" else 0


class Mlp(Stated):
    """A dense MLP or a shared expert."""

    width: int = Field(ge=1)
    matrices: Literal[2, 3] = Field(3, description="3 when gated (SwiGLU), 2 when plain")
    extra_parameters: int = Field(0, ge=0)

    def parameters(self, hidden: int) -> int:
        """Return every parameter of this MLP."""
        return self.matrices * self.width * hidden + self.extra_parameters


class Moe(Stated):
    """The mixture of experts of one layer: `experts` routed ones of which a token takes `top_k`."""

    experts: int = Field(ge=1, le=65_536)
    top_k: int = Field(ge=1)
    width: int = Field(ge=1)
    matrices: Literal[2, 3] = 3
    extra_parameters_per_expert: int = Field(0, ge=0, description="biases of one expert")
    router_parameters: int | None = Field(None, ge=0, description="where it is not hidden x experts")
    groups: int = Field(1, ge=1, description="groups the router chooses among first")
    top_groups: int = Field(1, ge=1, description="groups a token may choose experts from")
    shared: Mlp | None = Field(None, description="the shared expert, all of them together")

    @model_validator(mode="after")
    def _shapes_agree(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"`top_k` is {self.top_k}, more than the {self.experts} experts")
        if self.experts % self.groups:
            raise ValueError(f"`groups` is {self.groups}, which does not divide the {self.experts} experts")
        if self.top_groups > self.groups:
            raise ValueError(f"`top_groups` is {self.top_groups}, more than the {self.groups} groups")
        return self

    def expert_parameters(self, hidden: int) -> int:
        """Return the parameters of one routed expert."""
        return self.matrices * self.width * hidden + self.extra_parameters_per_expert

    def router(self, hidden: int) -> int:
        """Return the parameters of the router."""
        return hidden * self.experts if self.router_parameters is None else self.router_parameters

    def shared_parameters(self, hidden: int) -> int:
        """Return the parameters of the shared expert, 0 without one."""
        return self.shared.parameters(hidden) if self.shared else 0


class Layer(Stated):
    """One layer: attention, then a dense MLP or experts (or, in some models, both side by side)."""

    attention: Attention
    mlp: Mlp | None = None
    moe: Moe | None = None
    norm_parameters: int | None = Field(None, ge=0, description="norms of the layer; default 2 x hidden")

    @model_validator(mode="after")
    def _something_after_attention(self) -> Layer:
        if self.mlp is None and self.moe is None:
            raise ValueError("has neither `mlp` nor `moe`")
        return self


class LayerGroup(Layer):
    """A run of like layers, named by their numbers."""

    layers: str = Field(description="layer numbers such as `0-2`, `3,7,11` or `0-46:2` (every second)")

    @field_validator("layers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("layers")
    @classmethod
    def _parses(cls, value: str) -> str:
        parse_layer_numbers(value)
        return value


class Dtypes(Stated):
    """Number formats by part of the model."""

    weights: Dtype = Field("bf16", description="whatever has no format of its own below")
    attention: Dtype | None = None
    mlp: Dtype | None = None
    experts: Dtype | None = None
    embedding: Dtype = "bf16"
    kv_cache: Dtype = "bf16"
    activations: Dtype = "bf16"

    def of(self, part: Literal["attention", "mlp", "experts"]) -> str:
        """Return the format of a part."""
        return getattr(self, part) or self.weights


class ModelCard(Stated):
    """A model card as written, and the model itself: nothing needs expanding."""

    kind: Literal["model"] = "model"
    name: Name
    source: str | None = Field(None, max_length=2000, description="where the figures come from, for people")
    hidden: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    tied_embeddings: bool = False
    embedding_parameters: int | None = Field(None, ge=0, description="where it is not vocabulary x hidden")
    head_parameters: int | None = Field(
        None, ge=0, description="where it is not vocabulary x hidden, or 0 when tied"
    )
    final_norm_parameters: int | None = Field(
        None, ge=0, description="norms after the last layer; default hidden"
    )
    other_parameters: int = Field(0, ge=0, description="held once and by no layer, such as a vision tower")
    dtypes: Dtypes = Field(default_factory=Dtypes)
    groups: list[LayerGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_layer_once(self) -> ModelCard:
        seen: dict[int, int] = {}
        for number, group in enumerate(self.groups):
            for layer in parse_layer_numbers(group.layers):
                if layer in seen:
                    raise ValueError(
                        f"layer {layer} stands in `groups[{seen[layer]}]` and in `groups[{number}]`"
                    )
                seen[layer] = number
        missing = sorted(set(range(len(seen))) - set(seen))
        if missing:
            raise ValueError(f"layer {missing[0]} stands in no group, though layer {max(seen)} does")
        experts = {layer.moe.experts for layer in self.groups if layer.moe}
        if len(experts) > 1:
            raise ValueError(
                f"layers have {sorted(experts)} experts; one number for all MoE layers is expected"
            )
        return self

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group number of every layer, in order."""
        numbers = {
            layer: i for i, group in enumerate(self.groups) for layer in parse_layer_numbers(group.layers)
        }
        return tuple(numbers[layer] for layer in range(len(numbers)))

    @property
    def layer_count(self) -> int:
        """How many layers there are."""
        return len(self.group_of)

    def layer(self, number: int) -> LayerGroup:
        """Return what layer `number` looks like."""
        return self.groups[self.group_of[number]]

    @property
    def moe(self) -> Moe | None:
        """The experts of the first MoE layer; None in a dense model."""
        return next((group.moe for group in self.groups if group.moe), None)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, in order."""
        return tuple(number for number in range(self.layer_count) if self.layer(number).moe)

    def norms(self, layer: Layer) -> int:
        """Return the norm parameters of a layer."""
        return 2 * self.hidden if layer.norm_parameters is None else layer.norm_parameters

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return (
            self.vocabulary * self.hidden if self.embedding_parameters is None else self.embedding_parameters
        )

    @property
    def head(self) -> int:
        """Parameters of the output head; 0 when tied to the embedding."""
        if self.head_parameters is not None:
            return self.head_parameters
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @property
    def final_norm(self) -> int:
        """Parameters of the norms after the last layer."""
        return self.hidden if self.final_norm_parameters is None else self.final_norm_parameters

    def parameters(self) -> dict[str, int]:
        """Return the exact parameter count of every part, with `total` and `active` (one token's path).

        `active` counts both embedding tables, and `top_k` of the routed experts of every MoE layer; a vision tower
        or other part outside the layers is left out of it.
        """
        parts = dict.fromkeys(
            ("embedding", "head", "attention", "mlp", "router", "shared", "routed", "norms", "other"), 0
        )
        parts |= {
            "embedding": self.embedding,
            "head": self.head,
            "norms": self.final_norm,
            "other": self.other_parameters,
        }
        idle = 0
        for number in range(self.layer_count):
            layer = self.layer(number)
            parts["attention"] += layer.attention.parameters(self.hidden)
            parts["norms"] += self.norms(layer)
            if layer.mlp:
                parts["mlp"] += layer.mlp.parameters(self.hidden)
            if layer.moe:
                expert = layer.moe.expert_parameters(self.hidden)
                parts["router"] += layer.moe.router(self.hidden)
                parts["shared"] += layer.moe.shared_parameters(self.hidden)
                parts["routed"] += layer.moe.experts * expert
                idle += (layer.moe.experts - layer.moe.top_k) * expert
        total = sum(parts.values())
        return parts | {"total": total, "active": total - parts["other"] - idle}


def parse_layer_numbers(text: str) -> list[int]:
    """Return the layer numbers of `0-2`, `3,7,11` or `0-46:2`; raise ValueError."""
    numbers: list[int] = []
    try:
        if not text.isascii():
            raise ValueError
        for part in text.replace(" ", "").split(","):
            span, _, step = part.partition(":")
            first, dash, last = span.partition("-")
            start, end = int(first), int(last if dash else first)
            # Checked before anything is built from it: `0-999999999` must not fill the memory.
            if max(start, end) > MAX_LAYERS:
                raise ValueError
            numbers.extend(range(start, end + 1, int(step or 1)))
            if len(numbers) > MAX_LAYERS:
                raise ValueError
    except ValueError:
        raise ValueError(
            f"found {text[:60]!r}, expected layer numbers such as `0-2`, `3,7,11` or `0-46:2`, at most {MAX_LAYERS}"
        ) from None
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"found {text[:60]!r}, which names no layer or one layer twice")
    return numbers


def fold_layer_numbers(numbers: list[int]) -> str:
    """Return layer numbers in the short form that `parse_layer_numbers` reads."""
    parts: list[str] = []
    position = 0
    while position < len(numbers):
        end, step = position + 1, 1
        if end < len(numbers):
            step = numbers[end] - numbers[position]
            while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
                end += 1
        run = numbers[position:end]
        if len(run) == 1:
            parts.append(str(run[0]))
        elif step == 1:
            parts.append(f"{run[0]}-{run[-1]}")
        elif len(run) == 2:
            parts.append(str(run[0]))
            end = position + 1
        else:
            parts.append(f"{run[0]}-{run[-1]}:{step}")
        position = end
    return ",".join(parts)


def load_model(document: Document, data: Any = None, at: tuple[str | int, ...] = ()) -> ModelCard:
    """Return the model that `data` (by default the whole document) describes; raise InputError."""
    return validate(ModelCard, document, data, at)
