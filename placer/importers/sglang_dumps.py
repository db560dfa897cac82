"""What SGLang's expert distribution recorder dumps, once read from its `.pt` file.

A `stat` dump holds `logical_count` (steps, layers, experts), summed over ranks by SGLang. The dumps of `per_pass` and
`per_token` hold `records`, one for each forward pass of **one** rank, and `last_physical_to_logical_map`; expert
numbers in the records are physical, which is to say slots. Format: `python/sglang/srt/eplb/expert_distribution.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.importers.arrays import listed
from placer.importers.load_tables import MAX_LAYERS
from placer.importers.token_samples import MAX_EXPERTS, Choices

#: Numbers in all records together; a file may hold one record many times over.
MAX_RECORD_NUMBERS = 2**27

_COUNTS, _CHOSEN, _MAP = "global_physical_count", "topk_ids_of_layer", "last_physical_to_logical_map"
_MOVED = "experts are told apart by the slots they had when the dump was written"


@dataclass(frozen=True)
class Dump:
    """Loads as in the file, (layers, experts) or (steps, layers, experts), and the choices of a `per_token` dump."""

    loads: NDArray[Any] | None
    choices: Choices | None
    key: str | None
    notes: tuple[str, ...] = ()


def find_dump(data: Any, file: str) -> Dump:
    """Return what a `.pt` file holds: one of the three dumps, or a lone tensor of loads.

    Token ids and positions are dropped. A record counts once, even if a file holds the same pass as several ranks saw
    it. A `per_token` dump without counts gives its choices alone. Raises InputError where the file is none of these.
    """
    if isinstance(data, np.ndarray):
        return Dump(data, None, None)
    if not isinstance(data, dict):
        raise InputError(f"holds a {type(data).__name__}, expected a recorder's dump or a tensor", file=file)
    if "logical_count" in data:
        return _stat(data, file)
    if "records" in data:
        return _records(data, file)
    raise InputError(
        f"found the keys {listed(key for key in data if type(key) is str)}, expected `logical_count`, or `records` and `{_MAP}`",
        file=file,
    )


def _stat(data: dict[Any, Any], file: str) -> Dump:
    counts = data["logical_count"]
    if not isinstance(counts, np.ndarray):
        raise InputError("expected a tensor", file=file, key="logical_count")
    layout = data.get("logical_count_layout", "step_layer_expert")
    if type(layout) is not str or not layout.endswith("layer_expert"):
        found = layout[:40] if type(layout) is str else type(layout).__name__
        raise InputError(
            f"found {found!r}, expected axes that end in `layer_expert`",
            file=file,
            key="logical_count_layout",
        )
    return Dump(counts, None, "logical_count")


def _records(data: dict[Any, Any], file: str) -> Dump:
    records, experts_of = data["records"], data.get(_MAP)
    if not isinstance(records, list) or not records:
        raise InputError("expected a list of at least one record", file=file, key="records")
    slots = _slots(experts_of, file)
    experts = int(slots.max()) + 1
    kept = _distinct(records, slots.shape, file)
    ranks = {record["rank"] for record in kept if type(record.get("rank")) is int}
    notes: tuple[str, ...] = (_MOVED,) if (slots != np.arange(slots.shape[1])).any() else ()
    if len(ranks) == 1:
        notes += (f"as EP rank {ranks.pop()} saw it; dumps of other ranks may hold other tokens",)
    with_counts = [_COUNTS in record for record in kept]
    with_choices = [_CHOSEN in record for record in kept]
    loads = None
    if all(with_counts):
        total = np.zeros(slots.shape)
        for record in kept:
            total += record[_COUNTS]
        loads = _to_experts(total, slots, experts)
    choices = _choices(kept, slots, experts, file) if all(with_choices) else None
    if loads is None and choices is None:
        raise InputError(f"expected `{_COUNTS}` or `{_CHOSEN}` in every record", file=file, key="records")
    return Dump(loads, choices, "records", notes)


def _slots(experts_of: Any, file: str) -> NDArray[np.int64]:
    """Return (layers, slots) the expert in each slot."""

    def refuse(message: str) -> InputError:
        return InputError(message, file=file, key=_MAP)

    if not isinstance(experts_of, np.ndarray) or experts_of.dtype.kind not in "iu":
        raise refuse("expected a tensor of whole numbers")
    if experts_of.ndim != 2 or 0 in experts_of.shape or experts_of.shape[0] > MAX_LAYERS:
        raise refuse(f"found the shape {experts_of.shape}, expected (layers, slots)")
    highest = min(experts_of.shape[1], MAX_EXPERTS) - 1
    if experts_of.min() < 0 or experts_of.max() > highest:
        wrong = experts_of[(experts_of < 0) | (experts_of > highest)][0]
        raise refuse(f"found expert {wrong}, expected 0 to {highest}")
    return experts_of.astype(np.int64)


def _distinct(records: list[Any], shape: tuple[int, ...], file: str) -> list[dict[Any, Any]]:
    """Return the records, each checked, without those that repeat what another rank saw in the same pass."""
    kept: list[dict[Any, Any]] = []
    seen: dict[tuple[Any, ...], int] = {}
    numbers = 0
    for number, record in enumerate(records):
        key = f"records[{number}]"
        if not isinstance(record, dict):
            raise InputError(f"found a {type(record).__name__}, expected a record", file=file, key=key)
        held = [name for name in _CHECKS if name in record]
        for name in held:
            _CHECKS[name](record[name], shape, file, f"{key}.{name}")
            numbers += record[name].size
        if numbers > MAX_RECORD_NUMBERS:
            raise InputError(
                f"hold more than {MAX_RECORD_NUMBERS} numbers, the most that are read",
                file=file,
                key="records",
            )
        step, gatherer, rank = (record.get(name) for name in ("forward_pass_id", "gatherer_key", "rank"))
        if type(step) is int and type(gatherer) in (str, type(None)) and type(rank) is int:
            content = hashlib.sha256(b"".join(record[name].tobytes() for name in held)).digest()
            if seen.setdefault((step, gatherer, content), rank) != rank:
                continue
        kept.append(record)
    return kept


def _check_counts(counts: Any, shape: tuple[int, ...], file: str, key: str) -> None:
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iuf" or counts.shape != shape:
        raise InputError(
            f"found {_what(counts)}, expected counts of the shape {shape} as in `{_MAP}`", file=file, key=key
        )
    if counts.size and not (counts.min() >= 0 and np.isfinite(counts.max())):
        raise InputError(
            "holds a count that is negative, infinite or not a number, expected counts of tokens",
            file=file,
            key=key,
        )


def _check_chosen(chosen: Any, shape: tuple[int, ...], file: str, key: str) -> None:
    if not isinstance(chosen, np.ndarray) or chosen.dtype.kind not in "iu" or chosen.ndim != 3:
        raise InputError(
            f"found {_what(chosen)}, expected whole numbers of the shape (layers, tokens, top_k)",
            file=file,
            key=key,
        )
    if not chosen.size:  # a pass without tokens, whose shape says nothing
        return
    if chosen.shape[0] != shape[0]:
        raise InputError(
            f"has {chosen.shape[0]} layers, expected {shape[0]} as in `{_MAP}`", file=file, key=key
        )
    if chosen.max() >= shape[1]:
        raise InputError(
            f"found slot {chosen.max()}, expected 0 to {shape[1] - 1}; record with shared experts not fused",
            file=file,
            key=key,
        )


_CHECKS: dict[str, Callable[[Any, tuple[int, ...], str, str], None]] = {
    _COUNTS: _check_counts,
    _CHOSEN: _check_chosen,
}


def _what(value: Any) -> str:
    return (
        f"{value.dtype.name} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    )


def _to_experts(counts: NDArray[np.float64], slots: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """Return (layers, experts) the sums over the slots of each expert."""
    layers = slots.shape[0]
    flat = (np.arange(layers)[:, None] * experts + slots).ravel()
    summed = np.bincount(flat, weights=counts.ravel(), minlength=layers * experts)
    return summed.astype(np.float64).reshape(layers, experts)


def _choices(records: list[dict[Any, Any]], slots: NDArray[np.int64], experts: int, file: str) -> Choices:
    """Return the choices of all records, by expert instead of by slot."""
    parts: list[NDArray[Any]] = []
    prompts: list[NDArray[np.int64]] = []
    follower, small = _Prompts(), slots.astype(np.int16)
    for number, record in enumerate(records):
        chosen = record[_CHOSEN]
        if not chosen.size:
            continue
        if parts and chosen.shape[2] != parts[0].shape[2]:
            raise InputError(
                f"has {chosen.shape[2]} choices a token, expected {parts[0].shape[2]} as in the first record",
                file=file,
                key=f"records[{number}].{_CHOSEN}",
            )
        layer = np.arange(slots.shape[0])[:, None, None]
        by_expert = small[layer, np.maximum(chosen, 0)]
        by_expert[chosen < 0] = -1
        parts.append(by_expert.transpose(1, 0, 2))
        prompts.append(follower.of_record(record, chosen.shape[1]))
    if not parts:
        raise InputError("no record holds a token", file=file, key="records")
    return Choices(
        np.concatenate(parts),
        np.concatenate(prompts),
        layers=range(slots.shape[0]),
        experts=experts,
        model_layers=slots.shape[0],
        key="records",
        notes=("prompts are told apart by positions and lengths; a prompt read in chunks counts as several",),
    )


@dataclass
class _Prompts:
    """Numbers the prompts that the tokens of each record belong to.

    SGLang names no requests. Where tokens are read in (`extend_seq_lens` is given), each run is a prompt. Where tokens
    are generated, each continues the prompt at its place in the batch if every position is one on from the last;
    otherwise the batch has changed, and all tokens of the record are one prompt.
    """

    following: int = 0
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    open: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def of_record(self, record: dict[Any, Any], tokens: int) -> NDArray[np.int64]:
        """Return (tokens,) prompt numbers."""
        positions = _whole_numbers(record.get("positions"))
        lengths = _whole_numbers(record.get("extend_seq_lens"))
        known = positions is not None and len(positions) == tokens
        if lengths is not None and len(lengths) and (lengths > 0).all() and lengths.sum() == tokens:
            fresh = self.following + np.arange(len(lengths))
            self.following += len(lengths)
            if known and positions is not None:
                self.positions = np.concatenate([self.positions, positions[np.cumsum(lengths) - 1]])
                self.open = np.concatenate([self.open, fresh])
            return np.repeat(fresh, lengths)
        if known and positions is not None and np.array_equal(positions, self.positions + 1):
            self.positions = positions
            return self.open
        fresh = np.full(tokens, self.following)
        self.following += 1
        if known and positions is not None:
            self.positions, self.open = positions, fresh
        return fresh


def _whole_numbers(values: Any) -> NDArray[np.int64] | None:
    """Return a list or tensor of whole numbers as an array, or None where it is no such thing."""
    if isinstance(values, list) and all(type(value) is int and abs(value) < 2**40 for value in values):
        return np.array(values, dtype=np.int64)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    return None
