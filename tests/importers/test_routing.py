"""Expert loads from files: the real ones, and every way in which one can be wrong."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from placer.errors import InputError
from placer.importers.routing import read_expert_loads, zipf_loads
from tests.shared_data import SHARED, needs_shared

ROUTING = SHARED / "routing"
LOADS = [[1.0, 2.0, 3.0], [4.0, 0.0, 6.0]]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, **wanted: int) -> InputError:
    with pytest.raises(InputError) as caught:
        read_expert_loads(path, **wanted)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@needs_shared
def test_sglang_counts_of_deepseek_v3_are_read_whole() -> None:
    loads = read_expert_loads(
        ROUTING / "deepseek_v3_sglang" / "decode_in1000out1000.json", layers=61, experts=256
    )
    assert loads.shape == (61, 256)
    assert not loads[:3].any()
    assert loads[3:].all(axis=1).any()
    assert (loads[3:].sum(axis=1) > 0).all()


@needs_shared
def test_counts_and_aggregate_of_one_model_agree() -> None:
    from_json = read_expert_loads(ROUTING / "deepseek_v2_lite" / "logical_count.json")
    from_npz = read_expert_loads(ROUTING / "deepseek_v2_lite" / "aggregate.npz")
    np.testing.assert_array_equal(from_json, from_npz)


@needs_shared
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("olmoe_1b_7b/expert_counts.json", "logical_count"),
        ("omni_placements/ep32_redundant_sc.npz", "'hosts'"),
        ("eplb_readme_example.json", "'weight'"),
    ],
)
def test_files_of_another_kind_are_refused_by_what_they_hold(name: str, says: str) -> None:
    assert says in str(refused(ROUTING / name))


@pytest.mark.parametrize(
    "content",
    [LOADS, {"logical_count": LOADS}, {"logical_count": [[[1, 1, 3], [4, 0, 0]], [[0, 1, 0], [0, 0, 6]]]}],
)
def test_json_forms_give_the_same_loads(tmp_path: Path, content: object) -> None:
    loads = read_expert_loads(write(tmp_path, "a.json", json.dumps(content)), layers=2, experts=3)
    assert loads.dtype == np.float64
    assert loads.tolist() == LOADS


def test_csv_with_and_without_heading_and_remarks(tmp_path: Path) -> None:
    plain = write(tmp_path, "a.csv", "1,2,3\n4,0,6\n")
    headed = write(tmp_path, "b.csv", "# by layer\nexpert 0,expert 1,expert 2\n1, 2, 3\n\n4,0,6.0\n")
    assert read_expert_loads(plain).tolist() == read_expert_loads(headed).tolist() == LOADS


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<f4", "|u1"])
def test_npy_keeps_numbers_in_any_layout(tmp_path: Path, order: str, dtype: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(LOADS, dtype=dtype, order=order))  # type: ignore[call-overload]
    assert read_expert_loads(path).tolist() == LOADS


def test_zero_rows_are_dense_layers(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps([[0, 0, 0], *LOADS]))
    assert read_expert_loads(path).tolist() == [[0, 0, 0], *LOADS]


def test_npy_steps_are_summed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([LOADS, LOADS]))
    assert read_expert_loads(tmp_path / "a.npy").tolist() == (2 * np.array(LOADS)).tolist()


def test_npz_takes_a_single_array_or_a_named_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", anything=LOADS)
    np.savez_compressed(tmp_path / "named.npz", other=np.ones((9, 9)), counts=LOADS)
    np.savez(tmp_path / "none.npz", a=LOADS, b=LOADS)
    assert read_expert_loads(tmp_path / "one.npz").tolist() == LOADS
    assert read_expert_loads(tmp_path / "named.npz").tolist() == LOADS
    assert "`logical_count`" in str(refused(tmp_path / "none.npz"))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[[1, 2], [3, "4"]]', "[1][1]"),
        ("[[1, 2], [3, true]]", "[1][1]"),
        ("[[1, 2], [3, null]]", "[1][1]"),
        ("[[1, NaN]]", "[0][1]"),
        ("[[1, 1e999]]", "[0][1]"),
        ("[[1, -2]]", "[0][1]"),
        ('{"logical_count": [[1, 2], [3]]}', "logical_count[1]"),
        ('{"logical_count": [[[1, 2]], [[1, 2], [3, 4]]]}', "logical_count[1]"),
        ('{"logical_count": [[[1, 2]], [[1, "x"]]]}', "logical_count[1][0][1]"),
        ('{"logical_count": 5}', "logical_count"),
        ('{"logical_count": [[0, 0], [0, 0]]}', "logical_count"),
        ("[[1, [2]]]", "[0][1]"),
        ("[[]]", "[0]"),
        ("[1, 2]", "[0]"),
        (f"[[1, 1{'0' * 400}]]", "[0]"),
    ],
)
def test_wrong_json_is_refused_where_it_is_wrong(tmp_path: Path, content: str, place: str) -> None:
    assert refused(write(tmp_path, "a.json", content)).key == place


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[]",
        "{}",
        "5",
        "null",
        '{"logical_count": [], "logical_count": [[1]]}',
        "[" * 100_000,
        f"[[1{'0' * 5000}]]",
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, content: str) -> None:
    refused(write(tmp_path, "a.json", content))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("1,2\n3\n", 2),
        ("1,2\n3,x\n", 2),
        ("1,nan\n", 1),
        ("nan,nan\n1,2\n", 1),
        ("1,2\n\n3,-4\n", 3),
        ("1,1_0\n", 1),
        ("1,\n", 1),
        ("1;2\n3;4\n", 1),
        ("a,b\nc,d\n1,2\n", 2),
        ("expert 0,12 tokens\n1,2\n", 1),
        ("expert 0,-.5x\n1,2\n", 1),
        (",expert 0\n0,2\n", 1),
        ("layer,expert 0\n0,2\n", 1),
        ("expert 0,expert 1\n1,2,3\n", 2),
    ],
)
def test_wrong_csv_is_refused_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    assert refused(write(tmp_path, "a.csv", content)).line == line


def test_wrong_counts_of_layers_and_experts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps(LOADS))
    assert "found 2 layers, expected 3" in str(refused(path, layers=3))
    assert "found 3 experts, expected 4" in str(refused(path, layers=2, experts=4))


def test_arrays_that_are_not_numbers_or_not_tables_are_refused(tmp_path: Path) -> None:
    for number, array in enumerate(
        [
            np.array([["a"]]),
            np.array([[True]]),
            np.ones(3),
            np.ones((1, 1, 1, 1)),
            np.ones((2, 0)),
            np.array([[np.nan]]),
        ]
    ):
        np.save(tmp_path / f"{number}.npy", array)
        refused(tmp_path / f"{number}.npy")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    assert "expected numbers" in str(refused(tmp_path / "a.npy"))
    assert not (tmp_path / "sprung").exists()


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)}
    )
    assert "cut or damaged" in str(refused(write(tmp_path, "a.npy", buffer.getvalue())))
    good = io.BytesIO()
    np.save(good, np.ones((4, 4)))
    assert "cut or damaged" in str(refused(write(tmp_path, "b.npy", good.getvalue()[:-1])))


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.npz", b"PK\x03\x04 not a zip"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("load.npy", b"\x93NUMPY nonsense")
    refused(tmp_path / "b.npz")
    np.savez_compressed(tmp_path / "c.npz", load=np.arange(1000.0).reshape(10, 100))
    raw = bytearray((tmp_path / "c.npz").read_bytes())
    raw[200:260] = b"\xff" * 60
    refused(write(tmp_path, "d.npz", bytes(raw)))


@pytest.mark.parametrize("name", ["a.pt", "a.pkl", "missing.npy", "missing.json"])
def test_other_endings_and_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name)


def test_generated_loads_follow_the_rule() -> None:
    loads = zipf_loads(4, 8, skew=1.0, seed=7, moe_layers=[1, 3])
    assert not loads[[0, 2]].any()
    np.testing.assert_allclose(loads.sum(axis=1), [0, 1, 0, 1])
    expected = 1 / np.arange(1, 9)
    np.testing.assert_allclose(np.sort(loads[1])[::-1], expected / expected.sum())
    assert loads[1].tolist() != loads[3].tolist()
    np.testing.assert_allclose(zipf_loads(1, 5, skew=0, seed=0, moe_layers=[0]), 0.2)


def test_a_generated_layer_does_not_depend_on_the_others() -> None:
    alone = zipf_loads(6, 16, skew=0.8, seed=3, moe_layers=[5])
    together = zipf_loads(6, 16, skew=0.8, seed=3, moe_layers=range(6))
    np.testing.assert_array_equal(alone[5], together[5])
    assert zipf_loads(6, 16, skew=0.8, seed=4, moe_layers=[5])[5].tolist() != alone[5].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"experts": 0},
        {"skew": -1.0},
        {"skew": float("nan")},
        {"seed": -1},
        {"moe_layers": [4]},
    ],
)
def test_impossible_generators_are_refused(change: dict[str, object]) -> None:
    given: dict[str, object] = {"layers": 4, "experts": 8, "skew": 1.0, "seed": 0, "moe_layers": [0]}
    with pytest.raises(ValueError, match="expected"):
        zipf_loads(**{**given, **change})  # type: ignore[arg-type]
