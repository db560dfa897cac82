"""Layers side by side on a few threads, each with one thread of linear algebra.

Most time goes into many small matrix products; a BLAS that starts threads of its own for each of them makes two
workers wait for one another: measured, ten times slower and worse on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from placer.solver.experts.spread import Ints


def over_layers(place: Callable[[Ints], Ints], layers: int, workers: int) -> Ints:
    """Return what `place` returns for runs of layers, put together in order: (layers, ...).

    `place` is given the places of some layers, and must not depend on which others it is given with them.
    """
    from concurrent.futures import ThreadPoolExecutor

    parts = [part for part in np.array_split(np.arange(layers), max(1, workers)) if len(part)]
    with threadpool_limits(limits=1, user_api="blas"):
        if len(parts) == 1:
            return place(parts[0])
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return np.concatenate(list(pool.map(place, parts)))
