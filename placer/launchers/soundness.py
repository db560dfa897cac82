"""Whether a placement is sound enough to be made into scripts: its numbers, and nothing about memory, limits or times."""

from __future__ import annotations

from itertools import pairwise

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from placer.errors import InputError
from placer.launchers.job import in_rank_order
from placer.placement import Placement, RankRecord
from placer.strategy import Shape


def check_placement(placement: Placement) -> None:
    """Raise InputError unless a placement is sound enough to be made into scripts.

    The model's own checks are run again, since an object can be built without them; then numbers that would start
    the wrong thing: ranks, GPUs, coordinates and slots. Memory, limits and times are the business of `verify`.
    """
    try:
        Placement.model_validate(placement.model_dump(warnings=False))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"the placement cannot be used: {first['msg']}", key=place) from None
    except (PydanticSerializationError, AttributeError, TypeError) as error:
        raise InputError(f"the placement cannot be used: {error}") from None
    if placement.edited:
        raise InputError(
            "the ranks, experts or stages were changed after the file was written; where `placer verify` finds nothing "
            "wrong with them, remove this line",
            key="decisions",
        )
    _check_ranks(placement)
    _check_layers(placement)


def _check_ranks(placement: Placement) -> None:
    ranks = in_rank_order(placement)
    for number, record in enumerate(ranks):
        if record.rank != number:
            found = "is missing" if record.rank > number else "is listed twice"
            raise InputError(f"rank {min(number, record.rank)} {found}", key="ranks")
    gpus: dict[tuple[str, int], int] = {}
    hosts: dict[str, str] = {}
    uuids: dict[str, int] = {}
    for record in ranks:
        first = gpus.setdefault((record.host, record.gpu), record.rank)
        if first != record.rank:
            raise InputError(
                f"ranks {first} and {record.rank} are both on GPU {record.host}/{record.gpu}", key="ranks"
            )
        other = hosts.setdefault(record.host.lower(), record.host)
        if other != record.host:
            raise InputError(
                f"the hosts {other} and {record.host} differ in upper and lower case alone, and are one to the network",
                key="ranks",
            )
        if record.uuid is not None:
            first = uuids.setdefault(record.uuid.lower(), record.rank)
            if first != record.rank:
                raise InputError(
                    f"ranks {first} and {record.rank} have the same UUID {record.uuid}", key="ranks"
                )
    _check_beginnings(ranks)
    expected: list[tuple[int, ...]] = []
    for number, stage in enumerate(placement.strategy.stages):
        try:
            shape = Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
        except ValueError as error:
            raise InputError(str(error), key=f"strategy.stages.{number}") from None
        if shape.ranks > len(ranks):
            raise InputError(f"stage {number} needs {shape.ranks} ranks, found {len(ranks)}", key="ranks")
        columns = shape.coordinates()
        rows = zip(*(columns[name].tolist() for name in ("dp", "tp", "ep", "etp", "edp")), strict=True)
        expected.extend((number, *row) for row in rows)
    if len(expected) != len(ranks):
        raise InputError(f"the stages need {len(expected)} ranks, found {len(ranks)}", key="ranks")
    for record, wanted in zip(ranks, expected, strict=True):
        found_at = (record.stage, record.dp, record.tp, record.ep, record.etp, record.edp)
        if found_at != wanted:
            raise InputError(
                f"rank {record.rank} is at (stage, dp, tp, ep, etp, edp) {found_at}, "
                f"but the strategy numbers it {wanted}",
                key="ranks",
            )


def _check_beginnings(ranks: list[RankRecord]) -> None:
    """CUDA takes the beginning of a UUID for the whole: on a host, none may begin as another is."""
    known = sorted(
        ((record.host, record.uuid.lower(), record) for record in ranks if record.uuid is not None),
        key=lambda each: each[:2],
    )
    for (host, short, one), (other_host, long, other) in pairwise(known):
        if host == other_host and long.startswith(short):
            raise InputError(
                f"ranks {one.rank} and {other.rank} are on {host} with the UUIDs {one.uuid} and {other.uuid}, and the "
                "first could be either: state both in full",
                key="ranks",
            )


def _check_layers(placement: Placement) -> None:
    ep_of_layer: dict[int, int] = {}
    end = 0
    for number, stage in enumerate(placement.strategy.stages):
        first, last = stage.layers
        if first != end or last < first:
            raise InputError(
                f"stage {number} holds the layers {first} up to {last}, expected them to begin at {end}",
                key=f"strategy.stages.{number}.layers",
            )
        ep_of_layer.update(dict.fromkeys(range(first, last), stage.ep))
        end = last
    for layer, rows in placement.experts.items():
        key = f"experts.{layer}"
        if layer not in ep_of_layer:
            raise InputError(f"found experts of layer {layer}, which no stage holds", key=key)
        if len(rows) != ep_of_layer[layer]:
            raise InputError(f"found slots of {len(rows)} EP ranks, expected {ep_of_layer[layer]}", key=key)
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise InputError("expected the same number of slots, 1 or more, on every EP rank", key=key)
        if min(min(row) for row in rows) < 0:
            raise InputError("found a negative expert number", key=key)
