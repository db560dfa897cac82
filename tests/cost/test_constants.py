"""The table of constants, what stands behind each, and how a cluster file changes one."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from placer.cost import compute
from placer.cost.constants import ABOUT, Constants, known_terms, table
from placer.errors import InputError
from placer.spec.gpu_types import GPU_CATALOGUE
from tests.cost.building import SYSTEMS, make_gpu, rows
from tests.shared_data import needs_shared

GPU_ROWS = [
    (gpu, term, row)
    for gpu, terms in table().items()
    if gpu not in ("sources", "base")
    for term, row in terms.items()
]

#: How a fitted row is called here: group and item there, and the names of the parameters in its `beta`.
FITTED = {
    "gemm": {"bfloat16": "bf16", "fp8 per tensor": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"},
    "moe": {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"},
    "attn_decode": {"GQA bf16 kv": "attention_decode.bf16", "GQA fp8 kv": "attention_decode.fp8"},
    "attn_prefill": {"GQA bf16": "attention_prefill"},
    "mla_decode": {"bf16 kv": "mla_decode"},
    "mla_prefill": {"bf16": "mla_prefill"},
    "nccl_1node": {f"all_reduce {size} GPUs": f"all_reduce.{size}" for size in (2, 4, 8)},
    "ep_ll": {
        f"{kind} {item}": f"{kind}_ll.{place}"
        for kind in ("dispatch", "combine")
        for item, place in (
            ("EP8 (1 node)", "domain"), ("EP8", "domain"), ("1 node", "domain"), ("EP16 (2 nodes)", "network"),
        )
    },
    "ep_ht": {
        f"{kind} {item} 24 SM": f"{kind}_ht.{place}"
        for kind in ("dispatch", "combine")
        for item, place in (("EP8", "domain"), ("EP16", "network"))
    },
}  # fmt: skip


def expected_values(row: dict[str, str]) -> dict[str, float]:
    """Return the parameters a fitted row gives."""
    group, betas = row["group"], [float(value) for value in row["beta"].split("|")]
    values = {"start_us": float(row["alpha_us"])}
    if group in ("gemm", "moe", "mla_decode"):
        values |= dict(zip(("flops", "bandwidth", "activation"), betas, strict=False))
    elif group in ("attn_prefill", "mla_prefill"):
        values["flops"] = betas[0]
    elif group == "attn_decode":
        values["bandwidth"] = betas[0]
    elif group == "nccl_1node" or (group == "ep_ll" and row["beta_unit"] == "GB/s"):
        values["bandwidth_GBps"] = betas[0]
    elif group == "ep_ll":
        values["efficiency"] = betas[0] / 50.0  # 47.5 of a 50 GB/s NIC
    elif "EP8" in row["item"]:
        # ep_ht gives us per token at H = 7168 and top-8; 8 (1 - (7/8)^8) 7/8 = 4.594 copies leave the rank, of
        # 7168 + 224 bytes (dispatch) or 14336 (combine).
        copies = 8 * (1 - (7 / 8) ** 8) * 7 / 8
        size = 7168 * (1 + 1 / 32) if "dispatch" in row["item"] else 2 * 7168
        values["bandwidth_GBps"] = round(copies * size / betas[0] / 1e3)
    return values


@needs_shared
def test_every_constant_equals_its_fit() -> None:
    """Each constant with a counterpart among the fits has the fit's parameters and its errors."""
    compared = set()
    for row in rows("fitted_constants"):
        name = FITTED.get(row["group"], {}).get(row["item"])
        if name is None or row["system"] not in SYSTEMS:
            continue
        term = f"{row['group']}.{name}" if row["group"] in ("gemm", "moe") else name
        ours = table()[SYSTEMS[row["system"]]][term]
        for key, value in expected_values(row).items():
            assert ours[key] == pytest.approx(value, rel=1e-3), (row["system"], term, key)
        assert ours["median_error"] == pytest.approx(float(row["median_err"])), (row["system"], term)
        assert ours["worst_error"] == pytest.approx(float(row["max_or_p90_err"])), (row["system"], term)
        compared.add((SYSTEMS[row["system"]], term))
    without = {(gpu, term) for gpu, term, _ in GPU_ROWS} - compared
    # What has no fit there: custom kernels, sends, the form of elementwise kernels, the network's ring, NVL72's ranges.
    assert {re.split(r"[.]", term)[0] for _, term in without} == {
        "custom_all_reduce", "p2p", "elementwise", "all_reduce", "dispatch_ht", "combine_ht",
    }  # fmt: skip
    assert {(gpu, term) for gpu, term in without if term.startswith(("all_reduce", "dispatch", "combine"))} == {
        ("h100-80g", "all_reduce.network"), ("gb200-186g", "dispatch_ht.domain"), ("gb200-186g", "combine_ht.domain"),
    }  # fmt: skip


@needs_shared
def test_sends_equal_their_fit() -> None:
    """Start and rate of a send, stated here as shares of the nominal links, are those fitted to Vidur's profiles."""
    fits = {row["item"]: row for row in rows("fitted_constants", group="p2p")}
    ours = table()["h100-80g"]
    for item, term, link, latency in (
        ("same-node send_recv", "p2p.domain", 450.0, 3.0),
        ("cross-node send_recv", "p2p.network", 50.0, 13.0),
    ):
        assert ours[term]["start_us"] + latency == float(fits[item]["alpha_us"])
        assert ours[term]["efficiency"] * link == pytest.approx(float(fits[item]["beta"]), rel=2e-3)


@pytest.mark.parametrize(("gpu", "term", "row"), GPU_ROWS, ids=[f"{g}-{t}" for g, t, _ in GPU_ROWS])
def test_every_row_is_complete(gpu: str, term: str, row: dict[str, Any]) -> None:
    """A row names a known source, is of a built-in type, has finite parameters and, where fitted, its errors."""
    assert gpu in GPU_CATALOGUE
    assert row["source"] in table()["sources"]
    for name in set(row) - set(ABOUT):
        assert math.isfinite(row[name]), name
        assert row[name] > 0 or name in ("loss",), name
    if row["source"] in ("aic", "deepep", "nvl72"):
        assert 0 < row["median_error"] < row["worst_error"] < 3
    else:
        assert "median_error" not in row
    assert set(row) - set(ABOUT) == known_terms()[term]


@pytest.mark.parametrize("name", GPU_CATALOGUE)
def test_every_built_in_type_finds_every_term(name: str) -> None:
    """No built-in GPU type lacks a parameter of a term, and what it borrows says from whom."""
    constants = Constants(make_gpu(name).type)
    for term, parameters in known_terms().items():
        constant = constants.get(term)
        assert set(constant.values) == parameters
        assert constant.source in table()["sources"].values()
        own = term in table().get(name, {})
        assert (constant.borrowed_from is None) == own
        if not own:
            assert term in table()[constant.borrowed_from]


def test_the_nearest_relative_lends_first() -> None:
    """GB200 borrows its kernels from B200, B200 its sends from H100, H100 the fp4 kernels it has no parent for."""

    def lender(name: str, term: str) -> str | None:
        return Constants(make_gpu(name).type).get(term).borrowed_from

    assert lender("gb200-186g", "gemm.bf16") == "b200-180g"
    assert lender("gb200-186g", "p2p.domain") == "h100-80g"
    assert lender("h20-96g", "moe.fp8") == "h200-141g"
    assert lender("h20-96g", "mla_prefill") == "h100-80g"
    assert lender("h100-80g", "gemm.nvfp4") == "b200-180g"
    assert lender("h100-80g", "gemm.bf16") is None


def test_a_bandwidth_borrowed_over_to_a_slower_link_shrinks_with_it() -> None:
    """An L4's ring is not 374 GB/s over 32 GB/s of PCIe, and B200 is not credited with a kernel nobody measured."""

    def bandwidth(name: str, term: str) -> float:
        return Constants(make_gpu(name).type).get(term)["bandwidth_GBps"]

    assert bandwidth("l4-24g", "all_reduce.8") == pytest.approx(374e9 * 32 / 450)
    assert bandwidth("h800-80g", "all_reduce.8") == pytest.approx(374e9 * 200 / 450)
    assert bandwidth("a100-40g", "all_reduce.8") == 190e9
    assert bandwidth("b200-180g", "dispatch_ht.domain") == 281e9


@needs_shared
def test_h800_is_near_the_published_exchange() -> None:
    """DeepEP publishes 153 and 158 GB/s for 8 H800; borrowed from H100 by the link: 125 and 127, 20 % less."""
    published = {
        row["phase"]: float(row["bottleneck_GBps"]) * 1e9
        for row in rows("deepep_readme_tables", gpu="H800", kernel="normal", ep=8)
    }
    constants = Constants(make_gpu("h800-80g").type)
    for kind, value in published.items():
        assert constants.get(f"{kind}_ht.domain")["bandwidth_GBps"] == pytest.approx(value, rel=0.22)


@pytest.mark.parametrize("term", known_terms())
def test_a_cluster_file_overrides_every_term(term: str) -> None:
    """One stated parameter replaces the table's, the others of the term stay, and the source is the user's."""
    name = sorted(known_terms()[term])[0]
    before = Constants(make_gpu().type).get(term)
    after = Constants(
        make_gpu(constants={term: {name: 0.5, "source": "our rack", "median_error": 0.04}}).type
    ).get(term)
    assert after.values == {**before.values, name: 0.5}
    assert (after.source, after.borrowed_from, after.median_error) == ("our rack", None, 0.04)
    unnamed = Constants(make_gpu(constants={term: {name: 0.5}}).type).get(term)
    assert (unnamed.source, unnamed.median_error, unnamed.worst_error) == ("the cluster file", None, None)


def test_an_override_changes_the_time() -> None:
    """Half the share of the peak FLOP/s doubles a product that FLOP/s bind, less its start."""
    size = {"tokens": 8192.0, "parameters": 8192.0 * 8192, "dtype": "bf16", "values_in_out": 16384}
    before = compute.gemm(make_gpu(), **size) - 3.3e-6  # type: ignore[arg-type]
    slower = make_gpu(constants={"gemm.bf16": {"flops": 0.39}})
    assert compute.gemm(slower, **size) - 3.3e-6 == pytest.approx(2 * before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"gemm.bf61": {"flops": 0.5}}, "did you mean `gemm.bf16`?"),
        ({"gemm.bf16": {"flop": 0.5}}, "unknown key `flop`, did you mean `flops`?"),
        ({"gemm.bf16": {"flops": math.nan}}, "found nan for `flops`"),
        ({"gemm.bf16": {"flops": math.inf}}, "found inf for `flops`"),
        ({"gemm.bf16": {"flops": -0.5}}, "found -0.5 for `flops`"),
        ({"gemm.bf16": {"flops": 0}}, "found 0 for `flops`, expected a number above 0"),
        ({"gemm.bf16": {"flops": "0.5"}}, "found '0.5' for `flops`"),
        ({"gemm.bf16": {"flops": True}}, "found True for `flops`"),
        ({"gemm.bf16": {"flops": None}}, "found None for `flops`"),
        ({"gemm.bf16": {"flops": 78}}, "found 78 for `flops`, expected a share"),
        ({"gemm.bf16": {"source": 3}}, "found 3 for `source`, expected text"),
        ({"gemm.bf16": {"median_error": "small"}}, "found 'small' for `median_error`"),
        ({"all_reduce.8": {"bandwidth_GBps": 0}}, "found 0 for `bandwidth_GBps`"),
        ({"combine_ht.network": {"loss": 2}}, "found 2 for `loss`"),
    ],
)
def test_bad_overrides_are_refused(stated: dict[str, Any], sentence: str) -> None:
    """What cannot be a constant is refused with its key path, what was found and the nearest name."""
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        make_gpu(constants=stated)
    assert caught.value.key == f"gpu_types.h100-80g.constants.{next(iter(stated))}"


def test_zero_is_a_start_and_a_loss() -> None:
    """A start of 0 us and a loss of 0 are numbers that make sense."""
    stated = {"p2p.domain": {"start_us": 0}, "all_reduce.network": {"loss": 0}, "moe.bf16": {"activation": 0}}
    constants = Constants(make_gpu(constants=stated).type)
    assert constants.get("p2p.domain")["start_us"] == 0.0
    assert constants.get("all_reduce.network")["loss"] == 0.0


def test_formats_without_a_kernel_use_another() -> None:
    """A format that the GPU does not compute in uses the kernel of the next that it does."""

    def used(name: str, dtype: str, **kwargs: Any) -> str:
        return Constants(make_gpu(name, **kwargs).type).kernel_dtype("gemm", dtype)

    assert used("a100-80g", "fp8_block") == "bf16"
    assert used("h100-80g", "fp8_block") == "fp8_block"
    assert used("h100-80g", "nvfp4") == "fp8"
    assert used("b200-180g", "mxfp4") == "nvfp4"
    assert used("h100-80g", "int4") == "bf16"
    # A type of the user's own that computes in fp4 has kernels too, though nothing it is based on was measured.
    stated = {"like": "h100-80g", "peak": {"nvfp4": "4 PFLOP/s"}}
    assert used("fp4-card", "nvfp4", stated=stated) == "nvfp4"
    assert compute.gemm(make_gpu("fp4-card", stated=stated), 8.0, 1e6, "nvfp4", 2000) > 9e-6


def test_an_unknown_term_is_a_mistake_of_the_program() -> None:
    """A term that no type has is not looked up silently."""
    with pytest.raises(KeyError, match=re.escape("gemm.fp6")):
        Constants(make_gpu().type).get("gemm.fp6")
