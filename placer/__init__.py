"""placer: which rank, layer, expert and tensor shard goes on which GPU, so that the modelled latency is least."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("placer")
except PackageNotFoundError:
    __version__ = "0+unknown"
