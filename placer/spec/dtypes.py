"""Number formats and what one stored value costs, scales included."""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4"]
DTYPES: tuple[str, ...] = get_args(Dtype)

#: Bytes per stored value. Block formats carry their scales: fp8_block one fp32 per 128 x 128 block (DeepSeek-V3),
#: int4 one 16-bit scale per 128 values (GPTQ/AWQ), mxfp4 8 bits per 32 (OCP MX), nvfp4 8 bits per 16.
BYTES_PER_VALUE: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,
    "mxfp4": 0.5 + 1.0 / 32,
    "nvfp4": 0.5 + 1.0 / 16,
}
