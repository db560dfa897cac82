"""Quantities with units: bytes, bytes per second, seconds and FLOP/s inside, words outside.

A bare number is refused wherever a unit is expected, because GB and GiB, and bits and bytes, are
the commonest way in which a written plan goes wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}

#: A thousand times the largest size still fits a 64-bit integer.
MAX_BYTES = 2**50

BYTE_UNITS = {f"{prefix}B": factor for prefix, factor in {**_SI, **_BINARY}.items()}
BANDWIDTH_UNITS = {f"{prefix}B/s": factor for prefix, factor in {**_SI, **_BINARY}.items()} | {
    f"{prefix}{bit}": factor / 8 for prefix, factor in _SI.items() for bit in ("b/s", "bit/s", "bps")
}
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
TOKEN_RATE_UNITS = {
    f"{prefix}tokens/{time}": factor / TIME_UNITS[time]
    for prefix, factor in {"": 1.0, "k": 1e3, "M": 1e6}.items()
    for time in ("s", "ms", "min")
}
FLOPS_UNITS = {f"{prefix}{name}": factor for prefix, factor in _SI.items() for name in ("FLOP/s", "FLOPS")}

_QUANTITY = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(\S.*?)?\s*")


def parse_quantity(value: object, units: Mapping[str, float], what: str, example: str) -> float:
    """Return `value`, such as `"80 GiB"`, in the base unit of `units`.

    Raises ValueError, in words for a person, when the value is not a number followed by one of the units.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"found {value!r}, expected {what} such as `{example}`")
    if isinstance(value, int | float):
        raise ValueError(
            f"found the bare number {value!r}, expected {what} with its unit, such as `{example}`"
        )
    match = _QUANTITY.fullmatch(value) if len(value) < 100 else None
    if match is None:
        raise ValueError(f"found {value[:60]!r}, expected {what} such as `{example}`")
    number, unit = float(match.group(1)), match.group(2)
    if unit is None:
        raise ValueError(
            f"found the bare number {value!r}, expected {what} with its unit, such as `{example}`"
        )
    if unit not in units:
        hint = _unit_hint(unit, units)
        raise ValueError(
            f"found {value!r} with the unknown unit `{unit}`{hint}; expected {what} such as `{example}`"
        )
    result = number * units[unit]
    if not math.isfinite(result) or result < 0:
        raise ValueError(f"found {value!r}, expected {what} that is finite and not negative")
    return result


def _unit_hint(unit: str, units: Mapping[str, float]) -> str:
    """Return `, did you mean `GB/s` or `Gb/s`?`: every unit of the same letters, for case tells bits from bytes."""

    def letters(name: str) -> str:
        return re.sub(r"(bps|bit/s)$", "b/s", name.lower())

    alike: dict[float, str] = {}
    for name, factor in units.items():
        if letters(name) == letters(unit):
            alike.setdefault(factor, name)
    return f", did you mean {' or '.join(f'`{name}`' for name in alike.values())}?" if alike else ""


def parse_bytes(value: object) -> int:
    """Return a size in bytes, rounded to the nearest byte; what a 64-bit count cannot hold is refused."""
    size = round(parse_quantity(value, BYTE_UNITS, "a size", "80 GiB"))
    if size >= MAX_BYTES:
        raise ValueError(f"found {value!r}, expected a size below 1 PiB, such as `80 GiB`")
    return size


def parse_bandwidth(value: object) -> float:
    """Return a bandwidth in bytes per second; `Gb/s` counts bits, `GB/s` bytes."""
    return parse_quantity(value, BANDWIDTH_UNITS, "a bandwidth", "400 Gb/s` or `50 GB/s")


def parse_time(value: object) -> float:
    """Return a duration in seconds."""
    return parse_quantity(value, TIME_UNITS, "a time", "3 us")


def parse_flops(value: object) -> float:
    """Return a compute rate in FLOP/s."""
    return parse_quantity(value, FLOPS_UNITS, "a compute rate", "989 TFLOP/s")


def parse_token_rate(value: object) -> float:
    """Return a throughput in tokens per second."""
    return parse_quantity(value, TOKEN_RATE_UNITS, "a throughput", "20000 tokens/s")


def parse_fraction(value: object) -> float:
    """Return a share between 0 and 1 from `0.1` or `"10 %"`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"found {value!r}, expected a share such as `0.1` or `10 %`")
    percent = isinstance(value, str)
    if isinstance(value, int) and not 0 <= value <= 1:
        # A whole number may be too long for a float.
        raise ValueError(f"found {str(value)[:40]}, expected a share between 0 and 1")
    result = parse_quantity(value, {"%": 0.01}, "a share", "10 %") if percent else float(value)
    if not 0 <= result <= 1:
        raise ValueError(f"found {value!r}, expected a share between 0 and 1")
    return result


def parse_whole(value: object) -> object:
    """Return `value` for pydantic to read as an integer; `true` and text are refused, which it would take."""
    if isinstance(value, bool):
        raise ValueError(f"found {str(value).lower()}, expected a whole number")
    if isinstance(value, str):
        raise ValueError(f"found {value[:40]!r}, expected a whole number")
    return value


def _pydantic(parse: Callable[[object], Any], example: str) -> tuple[Any, ...]:
    return (
        BeforeValidator(parse),
        WithJsonSchema({"type": "string", "examples": [example]}),
    )


Whole = Annotated[int, BeforeValidator(parse_whole)]
Bytes = Annotated[int, *_pydantic(parse_bytes, "80 GiB")]
Bandwidth = Annotated[float, *_pydantic(parse_bandwidth, "400 Gb/s")]
Seconds = Annotated[float, *_pydantic(parse_time, "3 us")]
Flops = Annotated[float, *_pydantic(parse_flops, "989 TFLOP/s")]
TokenRate = Annotated[float, *_pydantic(parse_token_rate, "20000 tokens/s")]
Fraction = Annotated[float, *_pydantic(parse_fraction, "10 %")]


def format_bytes(value: float) -> str:
    """Return `value` bytes for a person, in binary units: `79.6 GiB`. `parse_bytes` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        # A rack's memory is easier to compare with a GPU's in GiB, so TiB begin at ten.
        if abs(value) >= BYTE_UNITS[unit] * (10 if unit == "TiB" else 1):
            return f"{value / BYTE_UNITS[unit]:.1f} {unit}"
    return f"{value:.0f} B"


def format_bandwidth(value: float) -> str:
    """Return `value` bytes per second for a person: `50 GB/s`. `parse_bandwidth` reads it back."""
    for unit in ("TB/s", "GB/s", "MB/s", "kB/s"):
        if abs(value) >= BANDWIDTH_UNITS[unit] * (10 if unit == "TB/s" else 1):
            return f"{value / BANDWIDTH_UNITS[unit]:.4g} {unit}"
    return f"{value:.4g} B/s"


def format_time(value: float) -> str:
    """Return `value` seconds for a person: `12.41 ms`. `parse_time` reads it back."""
    if value == 0:
        return "0 s"
    for unit in ("s", "ms", "us"):
        if abs(value) >= TIME_UNITS[unit]:
            return f"{value / TIME_UNITS[unit]:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"


def format_token_rate(value: float) -> str:
    """Return `value` tokens per second for a person: `20000 tokens/s`. `parse_token_rate` reads it back."""
    return f"{value:.0f} tokens/s" if 1000 <= value < 1e12 else f"{value:.4g} tokens/s"
