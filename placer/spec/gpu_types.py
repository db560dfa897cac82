"""Built-in GPU types: peak figures as published by the makers, dense (without sparsity).

Sources: NVIDIA data sheets for A100 (2020), H100 and H200 SXM (2023, 2024), B200 and GB200 (2024, 2025), L4, L40S, H20,
H800; AMD's for MI300X. `link_bandwidth` is the nominal NVLink (or xGMI, or PCIe) bandwidth per GPU and direction, the
figure that measured bus bandwidths are divided by to give an efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class CatalogueEntry:
    """Published peaks of one GPU type, in bytes, bytes/s and FLOP/s."""

    memory_bytes: int
    memory_bandwidth: float
    peak_flops: dict[str, float]
    link_bandwidth: float


def _entry(
    memory_gib: float,
    bandwidth_gb: float,
    link_gb: float,
    *,
    bf16: float,
    fp8: float | None = None,
    fp4: float | None = None,
) -> CatalogueEntry:
    peak = {"bf16": bf16 * _TERA, "fp16": bf16 * _TERA}
    if fp8 is not None:
        peak |= {"fp8": fp8 * _TERA, "int8": fp8 * _TERA}
    if fp4 is not None:
        peak |= {"nvfp4": fp4 * _TERA, "mxfp4": fp4 * _TERA}
    return CatalogueEntry(int(memory_gib * _GIB), bandwidth_gb * _GIGA, peak, link_gb * _GIGA)


#: Memory is what a process can see, which the makers' decimal GB understate or overstate by a few per cent.
GPU_CATALOGUE: dict[str, CatalogueEntry] = {
    "a100-40g": _entry(40, 1555, 300, bf16=312),
    "a100-80g": _entry(80, 2039, 300, bf16=312),
    "h100-80g": _entry(80, 3350, 450, bf16=989, fp8=1979),
    "h800-80g": _entry(80, 3350, 200, bf16=989, fp8=1979),
    "h200-141g": _entry(141, 4800, 450, bf16=989, fp8=1979),
    "h20-96g": _entry(96, 4000, 450, bf16=148, fp8=296),
    "h20-141g": _entry(141, 4800, 450, bf16=148, fp8=296),
    "b200-180g": _entry(180, 7700, 900, bf16=2250, fp8=4500, fp4=9000),
    "gb200-186g": _entry(186, 8000, 900, bf16=2500, fp8=5000, fp4=10000),
    "l4-24g": _entry(24, 300, 32, bf16=121, fp8=242),
    "l40s-48g": _entry(48, 864, 32, bf16=362, fp8=733),
    "rtx4090-24g": _entry(24, 1008, 32, bf16=165, fp8=330),
    "rtx5090-32g": _entry(32, 1792, 64, bf16=210, fp8=419),
    "mi300x-192g": _entry(192, 5300, 448, bf16=1307, fp8=2615),
}
