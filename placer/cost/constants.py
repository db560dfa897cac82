"""The measured constants of the latency model: read, overridden by the user, looked up.

A constant is found for a GPU type by its term (`gemm.bf16`, `all_reduce.8`, ...), first among the user's overrides,
then in the package's table, then in the table of the type it is based on; what is borrowed says so.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from placer.errors import InputError, nearest
from placer.spec.cluster import GpuType
from placer.spec.gpu_types import GPU_CATALOGUE

ABOUT = ("median_error", "worst_error", "source")

#: Largest value that makes sense, by parameter: shares of a peak (78 instead of 0.78 is a slip), and the loss of a
#: group over 2 domains or more, e (1 - loss / N), which must leave something.
_MOST = {"flops": 2.0, "bandwidth": 2.0, "efficiency": 2.0, "loss": 1.99}

#: Number formats whose kernels stand in where a format has none of its own: weight-only formats compute in bf16.
_STAND_IN = {
    "fp16": "bf16", "fp32": "bf16", "int8": "fp8", "int4": "bf16", "mxfp4": "nvfp4", "nvfp4": "fp8",
    "fp8_block": "fp8", "fp8": "bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """One term's parameters, the errors of its fit, its source, and the GPU type it was borrowed from, if any."""

    term: str
    values: Mapping[str, float]
    median_error: float | None
    worst_error: float | None
    source: str
    borrowed_from: str | None = None

    def __getitem__(self, name: str) -> float:
        """Return a parameter in SI units: `start_us` and `per_doubling_us` give seconds, `bandwidth_GBps` bytes/s."""
        value = self.values.get(name, 0.0)
        if name.endswith("_us"):
            return value * 1e-6
        return value * 1e9 if name.endswith("_GBps") else value


@cache
def table() -> dict[str, Any]:
    """Return the package's table of constants as it stands in `constants.toml`."""
    return tomllib.loads(files("placer.cost").joinpath("constants.toml").read_text(encoding="utf-8"))


#: Raised whenever a formula of the latency or memory model changes, so that a placement knows what priced it.
MODEL_VERSION = 2


@cache
def model_digest() -> str:
    """Return the SHA-256 that names this version of the cost model: its constants and the version of its formulas."""
    text = files("placer.cost").joinpath("constants.toml").read_text(encoding="utf-8")
    return hashlib.sha256(f"{MODEL_VERSION}\n{text}".encode()).hexdigest()


@cache
def known_terms() -> dict[str, set[str]]:
    """Return the parameters of every term that the table knows."""
    terms: dict[str, set[str]] = {}
    for gpu, rows in table().items():
        if gpu not in ("sources", "base"):
            for term, row in rows.items():
                terms.setdefault(term, set()).update(set(row) - set(ABOUT))
    return terms


@dataclass
class Constants:
    """The constants of one GPU type."""

    gpu_type: GpuType
    _found: dict[str, Constant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_overrides(self.gpu_type)

    def get(self, term: str) -> Constant:
        """Return the constant of a term; raise KeyError for a term that no type has."""
        if term not in self._found:
            self._found[term] = self._find(term)
        return self._found[term]

    def kernel(self, kind: str, dtype: str) -> Constant:
        """Return the constant of a kernel for a number format, or for the format that stands in for it."""
        name: str | None = dtype
        while name is not None:
            if self._measured(f"{kind}.{name}") or (name == "bf16"):
                return self.get(f"{kind}.{name}")
            name = _STAND_IN.get(name)
        return self.get(f"{kind}.bf16")

    def kernel_dtype(self, kind: str, dtype: str) -> str:
        """Return the number format whose peak and kernel `kernel` uses for `dtype`."""
        return self.kernel(kind, dtype).term.split(".", 1)[1]

    def _measured(self, term: str) -> bool:
        computes = term.split(".", 1)[1]
        supported = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4"}.get(computes, "bf16")
        if supported not in self.gpu_type.peak_flops:
            return False
        return term in known_terms()

    def _find(self, term: str) -> Constant:
        if term not in known_terms():
            raise KeyError(term)
        name = next(name for name in _lenders(self.gpu_type.like) if term in table().get(name, {}))
        row: dict[str, Any] = table()[name][term]
        values = {key: float(value) for key, value in row.items() if key not in ABOUT}
        # Borrowed over to a slower link, a bandwidth keeps its share of the link; over to a faster one it stays as
        # measured: DeepEP's high-throughput kernels are no quicker on B200's links than on H100's.
        if name in GPU_CATALOGUE and "bandwidth_GBps" in values:
            link = GPU_CATALOGUE[name].link_bandwidth
            values["bandwidth_GBps"] *= min(1.0, self.gpu_type.nominal_link_bandwidth / link)
        own = self.gpu_type.constants.get(term, {})
        values |= {key: float(value) for key, value in own.items() if key not in ABOUT}
        return Constant(
            term=term,
            values=values,
            median_error=(own or row).get("median_error"),
            worst_error=(own or row).get("worst_error"),
            source=str(own.get("source", "the cluster file"))
            if own
            else table()["sources"].get(row.get("source"), ""),
            borrowed_from=name if not own and name != self.gpu_type.like else None,
        )


def _lenders(name: str) -> list[str]:
    """Return the types a constant is looked up in, in order: the type, those it is based on, then every other."""
    chain = [name]
    while chain[-1] in table()["base"]:
        chain.append(table()["base"][chain[-1]])
    return chain + [other for other in table() if other not in ("sources", "base", *chain)]


def _check_overrides(gpu_type: GpuType) -> None:
    terms = known_terms()
    for term, row in gpu_type.constants.items():
        key = f"gpu_types.{gpu_type.name}.constants.{term}"
        if term not in terms:
            raise InputError(f"names a term that the latency model has not{nearest(term, terms)}", key=key)
        for name, value in row.items():
            if name == "source":
                if not isinstance(value, str):
                    raise InputError(f"found {value!r} for `source`, expected text", key=key)
                continue
            if name not in terms[term] and name not in ABOUT:
                raise InputError(
                    f"unknown key `{name}`{nearest(name, terms[term])}; known: {', '.join(sorted(terms[term]))}",
                    key=key,
                )
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or value < 0
            ):
                raise InputError(f"found {value!r} for `{name}`, expected a number from 0", key=key)
            if value == 0 and not name.endswith("_us") and name not in ("loss", "activation", *ABOUT):
                raise InputError(f"found 0 for `{name}`, expected a number above 0", key=key)
            if value > _MOST.get(name, math.inf):
                raise InputError(
                    f"found {value!r} for `{name}`, expected a share such as 0.8, at most {_MOST[name]}",
                    key=key,
                )
