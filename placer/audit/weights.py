"""What each GPU of a stage holds of a model's weights, in bytes, by part."""

from __future__ import annotations

from math import ceil

from placer.cost.memory import layer_weights
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.model import ModelCard
from placer.strategy import Shape


def weights(
    model: ModelCard, shape: Shape, first: int, last: int, is_first: bool, is_last: bool
) -> dict[str, int]:
    """Return weight bytes on each rank of a stage that holds layers `first` up to but without `last`.

    The parts are attention, mlp (with the shared expert), experts, other, embedding (first stage), head (last stage).
    Experts are taken as one of each, spread evenly.
    """
    parts = dict.fromkeys(("attention", "mlp", "experts", "other", "embedding", "head"), 0)
    experts = model.moe.experts if model.moe else 0
    for number in range(first, last):
        for name, size in layer_weights(model, model.layer(number), shape, experts).items():
            parts[name] += size
    per_value = BYTES_PER_VALUE[model.dtypes.embedding] / shape.tp
    if is_first:
        parts["embedding"] = ceil(model.embedding * per_value)
    if is_last:
        tied = model.head or is_first
        parts["head"] = ceil((model.head if tied else model.embedding) * per_value) + 2 * model.final_norm
    return parts
