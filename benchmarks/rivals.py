"""The expert layouts that others use, to compare ours with: greedy balancing, start layouts, co-activation swaps.

A layout names the expert in every slot, as int64: (layers, slots), or (slots,) for one layer. With k slots on each GPU,
slot s is on GPU `s // k`. Loads are tokens (or shares) for each expert; every copy of an expert takes an equal part.

The greedy balancer is the one published as EPLB (https://github.com/deepseek-ai/EPLB) and served by vLLM and SGLang,
written anew here to go through all layers at once. It decides as the published one does, in float32 and by these rules
for ties, so that the same loads give the same slots:

- an expert for one more copy: the largest load per copy, the lowest expert among equals;
- copies in order of load: largest first, among equals the experts in order before the further copies;
- the GPU for a copy: the lightest that has room, the lowest among equals;
- as many GPUs as copies: copy c goes on GPU c, unsorted (and so for groups and hosts).

The published one does not ask for a stable sort: where copies have exactly equal loads, the library chooses which goes
first, and its layout may then have these in each other's places. GPU loads stay the same unless whole groups tie.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "coactivation_swaps",
    "greedy_as_served",
    "greedy_global",
    "greedy_hierarchical",
    "in_order",
    "round_robin",
]

#: The largest total of a layer: float32 ends at 3.4e38, and sums of rounded parts may exceed the total.
_LARGEST_TOTAL = 1e38


def greedy_global(loads: ArrayLike, slots: int, gpus: int) -> NDArray[np.int64]:
    """Return the (layers, slots) layout of the greedy balancer when it looks at no hosts.

    The expert with the largest load per copy gets one more until the slots are used; then the copies, heaviest first,
    each go on the lightest GPU with room. `loads` is (layers, experts). Raises ValueError for bad loads, fewer slots than
    experts, and slots that do not divide by GPUs.
    """
    return greedy_hierarchical(loads, slots, gpus, hosts=1, groups=1)


def greedy_hierarchical(
    loads: ArrayLike, slots: int, gpus: int, hosts: int, groups: int
) -> NDArray[np.int64]:
    """Return the (layers, slots) layout of the greedy balancer when each group of experts stays on one host.

    Groups (runs of `experts / groups` experts) go on hosts, then each host replicates its own experts and places the
    copies on its own GPUs, both as in `greedy_global`. `loads` is (layers, experts); the GPUs of host h are the h-th run
    of `gpus / hosts`. Raises ValueError as `greedy_global` does, and where experts do not divide by groups, or groups
    or GPUs by hosts.
    """
    checked = _checked_loads(loads)
    layers, experts = checked.shape
    _check_slots(experts, slots, gpus)
    _check_divides(experts, "experts", groups, "groups")
    _check_divides(groups, "groups", hosts, "hosts")
    _check_divides(gpus, "GPUs", hosts, "hosts")

    group_size, host_experts = experts // groups, experts // hosts
    group_order = _pack(checked.reshape(layers, groups, group_size).sum(axis=2), hosts)
    expert_order = (group_order[:, :, None] * group_size + np.arange(group_size)).reshape(layers, experts)
    # From here every host of every layer is a row of its own.
    host_loads = np.take_along_axis(checked, expert_order, axis=1).reshape(layers * hosts, host_experts)
    copies, copy_loads = _replicate(host_loads, slots // hosts)
    copies = np.take_along_axis(copies, _pack(copy_loads, gpus // hosts), axis=1)
    first_of_host = np.arange(0, experts, host_experts)[:, None]
    places = (copies.reshape(layers, hosts, slots // hosts) + first_of_host).reshape(layers, slots)
    return np.take_along_axis(expert_order, places, axis=1)


def greedy_as_served(loads: ArrayLike, slots: int, gpus: int, hosts: int, groups: int) -> NDArray[np.int64]:
    """Return the (layers, slots) layout that SGLang and vLLM choose when nothing is said about the policy.

    `greedy_hierarchical` when groups divide by hosts, else `greedy_global`. `groups` is the model's number of expert
    groups, 1 when it has none. Raises ValueError as these two do.
    """
    _check_positive(hosts, "hosts")
    _check_positive(groups, "groups")
    if groups % hosts == 0:
        return greedy_hierarchical(loads, slots, gpus, hosts, groups)
    return greedy_global(loads, slots, gpus)


def in_order(experts: int, slots: int, gpus: int) -> NDArray[np.int64]:
    """Return the (slots,) layout engines start with: the experts in order, then copies of experts 0, 1, 2 and so on.

    Raises ValueError for fewer slots than experts and for slots that do not divide by GPUs.
    """
    _check_slots(experts, slots, gpus)
    return np.arange(slots, dtype=np.int64) % experts


def round_robin(experts: int, slots: int, gpus: int) -> NDArray[np.int64]:
    """Return the (slots,) layout that deals the experts of `in_order`, copies included, to the GPUs in turn.

    Raises ValueError for fewer slots than experts and for slots that do not divide by GPUs.
    """
    return in_order(experts, slots, gpus).reshape(slots // gpus, gpus).T.reshape(slots)


def coactivation_swaps(
    coactivation: ArrayLike, load: ArrayLike, gpus: int, slack: float, *, starts: int = 1, seed: int = 0
) -> NDArray[np.int64]:
    """Return an (experts,) layout without copies that keeps experts which fire together on one GPU.

    Starts from `greedy_global` and swaps two experts at a time, always the two whose swap adds most to the pairs that
    fire together on one GPU, until no swap adds any. No GPU may get more than `1 + slack` times the largest load of that
    start. `coactivation` is (experts, experts): tokens whose choices hold both; the diagonal does not matter. `load` is
    (experts,). The pairs stand in for fan-out, the GPUs that a token reaches, which falls as they rise.

    One start is the plain form. With more `starts` the others are random within the same limit, drawn from `seed`, and
    the layout with most pairs is returned.

    Raises ValueError for other shapes, for numbers that are not finite, for loads below zero, for a coactivation that is
    not symmetric, for a slack below zero, for no start, and for experts that do not divide by GPUs.
    """
    pairs, loads = np.array(coactivation, dtype=np.float64), np.asarray(load, dtype=np.float64)
    if loads.ndim != 1 or pairs.shape != (loads.size, loads.size):
        raise ValueError(
            f"found a coactivation of shape {pairs.shape} and a load of shape {loads.shape}, "
            "expected (experts, experts) and (experts,)"
        )
    if not np.isfinite(pairs).all() or not np.array_equal(pairs, pairs.T):
        raise ValueError("found a coactivation that is not finite or not symmetric, expected counts of pairs")
    if not math.isfinite(slack) or slack < 0:
        raise ValueError(f"found the slack {slack}, expected a finite number of at least 0")
    _check_positive(starts, "starts")
    np.fill_diagonal(pairs, 0)
    balanced = np.empty(loads.size, np.int64)
    balanced[greedy_global(loads[None], loads.size, gpus)[0]] = np.arange(loads.size) // (loads.size // gpus)
    limit = (1 + slack) * float(np.bincount(balanced, loads, gpus).max())
    random = np.random.default_rng(seed)
    best, most = balanced, -math.inf
    for start in range(starts):
        gpu_of = balanced
        if start:
            # Swaps that please random pairs lead to a random layout within the limit.
            noise = random.random(pairs.shape)
            gpu_of = _swap_until_best(noise + noise.T, loads, gpu_of, gpus, limit)
        gpu_of = _swap_until_best(pairs, loads, gpu_of, gpus, limit)
        together = float(pairs[gpu_of[:, None] == gpu_of].sum())
        if together > most:
            best, most = gpu_of, together
    return np.argsort(best, kind="stable")


def _swap_until_best(
    pairs: NDArray[np.float64],
    loads: NDArray[np.float64],
    gpu_of: NDArray[np.int64],
    gpus: int,
    limit: float,
) -> NDArray[np.int64]:
    """Return the GPU of each expert once no swap that keeps to the limit adds pairs on one GPU."""
    gpu_of = gpu_of.copy()
    # A gain that is nothing but rounding could be swapped to and fro for ever.
    least_gain = 1e-12 * float(np.abs(pairs).sum())
    surplus = loads[:, None] - loads  # [i, j]: what the GPU of j gains in load when i and j change places
    while True:
        on_gpu = np.eye(gpus)[gpu_of]
        beside = (pairs @ on_gpu)[:, gpu_of]  # [i, j]: the pairs of i with the experts on the GPU of j
        own = np.diagonal(beside)
        gain = beside + beside.T - own[:, None] - own - 2 * pairs
        then = surplus + (loads @ on_gpu)[gpu_of]  # [i, j]: the load of the GPU of j after the swap
        fits = then <= limit
        allowed = fits & fits.T & (gpu_of[:, None] != gpu_of)
        gain[~allowed] = -np.inf
        first, second = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[first, second] <= least_gain:
            return gpu_of
        gpu_of[[first, second]] = gpu_of[[second, first]]


def _replicate(loads: NDArray[np.float32], slots: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (rows, slots) experts, each once in order and then the added copies as they came, and the load of each."""
    rows, experts = loads.shape
    every_row = np.arange(rows)
    copies = np.broadcast_to(np.arange(slots) % experts, (rows, slots)).copy()
    count = np.ones(loads.shape, np.float32)
    per_copy = loads.copy()
    for slot in range(experts, slots):
        hottest = per_copy.argmax(axis=1)
        copies[:, slot] = hottest
        count[every_row, hottest] += 1
        per_copy[every_row, hottest] = loads[every_row, hottest] / count[every_row, hottest]
    return copies, np.take_along_axis(per_copy, copies, axis=1)


def _pack(weights: NDArray[np.float32], packs: int) -> NDArray[np.int64]:
    """Return (rows, items) the items of pack 0 in the order they came, then those of pack 1, and so on.

    In each row, the items go heaviest first on the lightest pack with room; every pack gets equally many.
    """
    rows, items = weights.shape
    room = items // packs
    if room == 1:
        return np.broadcast_to(np.arange(items), (rows, items)).copy()
    order = np.argsort(-weights, axis=1, kind="stable")
    # One line per step, not per row: what a step needs lies together.
    items_by_step = np.ascontiguousarray(order.T)
    weights_by_step = np.ascontiguousarray(np.take_along_axis(weights, order, axis=1).T)
    packed = np.empty(rows * items, np.int64)
    totals = np.zeros((rows, packs), np.float32)
    flat_totals = totals.reshape(-1)
    taken = np.zeros(rows * packs, np.int64)
    first_pack = np.arange(rows) * packs
    for step in range(items):
        pack = totals.argmin(axis=1)
        pack += first_pack
        seat = taken[pack]
        packed[pack * room + seat] = items_by_step[step]
        seat += 1
        taken[pack] = seat
        # A full pack is never the lightest.
        flat_totals[pack] = np.where(seat == room, np.inf, flat_totals[pack] + weights_by_step[step])
    return packed.reshape(rows, items)


def _checked_loads(loads: ArrayLike) -> NDArray[np.float32]:
    """Return the loads as float32, in which the published balancer decides."""
    given = np.asarray(loads, dtype=np.float64)
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(f"found loads of shape {given.shape}, expected (layers, experts)")
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("found a load that is not finite or below zero, expected counts of tokens")
    with np.errstate(over="ignore"):
        if given.sum(axis=1).max() > _LARGEST_TOTAL:
            raise ValueError(f"found a layer whose loads sum to more than {_LARGEST_TOTAL:g}")
    return given.astype(np.float32)


def _check_slots(experts: int, slots: int, gpus: int) -> None:
    _check_positive(experts, "experts")
    if slots < experts:
        raise ValueError(f"found {slots} slots, expected at least one for each of {experts} experts")
    _check_divides(slots, "slots", gpus, "GPUs")


def _check_divides(number: int, what: str, divisor: int, of_what: str) -> None:
    _check_positive(divisor, of_what)
    if number % divisor:
        raise ValueError(f"found {number} {what}, expected a multiple of the {divisor} {of_what}")


def _check_positive(number: int, what: str) -> None:
    if number < 1:
        raise ValueError(f"found {number} {what}, expected at least 1")
