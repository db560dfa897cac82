"""`nvidia-smi topo -m`: every real file we have, and the ways in which a paste goes wrong."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from placer.errors import InputError
from placer.importers.nvidia_smi import (
    ImportedCluster,
    NvidiaTopology,
    choose_nics,
    cluster_yaml,
    import_cluster,
    parse_topology,
)
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.reading import read_document
from tests.shared_data import SHARED, needs_shared

REAL = SHARED / "topology" / "nvidia_smi_topo"

#: file: (GPU type, NIC columns, the NIC chosen for each GPU by its column, levels and how many domains each host has)
FILES = {
    "a100_4gpu_4nic.txt": ("a100-80g", 4, [0, 1, 2, 3], {"nvlink": 1}),
    "dgx_a100_8gpu_10nic.txt": ("a100-80g", 10, [0, 1, 2, 3, 4, 5, 6, 7], {"nvlink": 1}),
    "gb200_nvl72_tray_4gpu_8nic.txt": ("gb200-186g", 8, [0, 1, 4, 5], {"nvlink": 1}),
    "gb200_tray_4gpu_nonic.txt": ("gb200-186g", 0, [], {"nvlink": 1}),
    "hgx_h100_8gpu_10nic_tabs_gpurows_only.txt": ("h100-80g", 10, [0, 1, 2, 5, 6, 7, 8, 9], {"nvlink": 1}),
    "hgx_h100_8gpu_8nic.txt": ("h100-80g", 8, [0, 1, 2, 3, 4, 5, 6, 7], {"nvlink": 1}),
    "hgx_h200_8gpu_10nic_blank_affinity.txt": ("h200-141g", 10, [0, 3, 4, 5, 6, 7, 8, 9], {"nvlink": 1}),
    "hgx_h20-3e_8gpu_11nic.txt": ("h20-141g", 11, [0, 1, 2, 3, 4, 5, 6, 7], {"nvlink": 1}),
    "hgx_h20-3e_8gpu_nonic.txt": ("h20-141g", 0, [], {"nvlink": 1}),
    "l40s_4gpu_2nic_pcie.txt": ("l40s-48g", 2, [1, 0, 0, 1], {"numa": 2, "host": 1}),
    "l4_8gpu_pcie_2numa.txt": ("l4-24g", 0, [], {"phb": 2, "host": 1}),
    "rtx4090_8gpu_pcie_old_header.txt": ("rtx4090-24g", 0, [], {"numa": 2, "host": 1}),
    "rtx5090_2gpu_tabs.txt": ("rtx5090-32g", 0, [], {"host": 1}),
}

LEGEND = "\n\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n"


def table(*rows: str, header: str) -> str:
    """Return rows of words as the driver prints them: separated by TABs, one TAB more before the last cell."""
    lines = ["\t" + "\t".join(header.split("|"))]
    lines += ["\t".join(row.split()) for row in rows]
    return "\n".join(lines) + "\n"


TWO = table("GPU0 X NV18 0-63 0", "GPU1 NV18 X 0-63 0", header="GPU0|GPU1|CPU Affinity|NUMA Affinity")
FOUR_NICS = table(
    "GPU0 X NV18 PIX PIX 0-63 0",
    "GPU1 NV18 X PIX PIX 0-63 0",
    "NIC0 PIX PIX X PIX",
    "NIC1 PIX PIX PIX X",
    header="GPU0|GPU1|NIC0|NIC1|CPU Affinity|NUMA Affinity",
)


def matrix(size: int, link: dict[tuple[int, int], str], default: str = "SYS") -> str:
    """Return a table of `size` GPUs with the given links, the same both ways."""
    rows = []
    for row in range(size):
        words = [
            "X" if row == column else link.get((row, column), link.get((column, row), default))
            for column in range(size)
        ]
        rows.append(f"GPU{row} {' '.join(words)} 0-63 0")
    names = "|".join(f"GPU{number}" for number in range(size))
    return table(*rows, header=f"{names}|CPU Affinity|NUMA Affinity")


def load(folder: Path, imported: ImportedCluster) -> Cluster:
    path = folder / "cluster.yaml"
    path.write_text(imported.text)
    return load_cluster(read_document(path))


def refused(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        parse_topology(text, file="topo.txt")
    message = str(caught.value)
    assert message.startswith("topo.txt")
    assert "\n" not in message
    return caught.value


@needs_shared
def test_every_real_file_is_in_the_list() -> None:
    assert {path.name for path in REAL.iterdir()} == set(FILES)


@needs_shared
@pytest.mark.parametrize("name", FILES)
def test_real_files_become_clusters(tmp_path: Path, name: str) -> None:
    gpu_type, nics, chosen, levels = FILES[name]
    topology = parse_topology((REAL / name).read_text(), name)
    assert len(topology.nic_columns) == nics
    assert list(choose_nics(topology)) == chosen
    imported = import_cluster(REAL / name, hosts="node[01-03]", gpu_type=gpu_type)
    cluster = load(tmp_path, imported)
    gpus = len(topology.gpus)
    assert cluster.hosts == ("node01", "node02", "node03")
    assert cluster.gpus == 3 * gpus == 3 * int(name.split("gpu")[0].split("_")[-1])
    found = {level.name: len(level.domain_names) for level in cluster.levels}
    assert found == {**{level: 3 * count for level, count in levels.items()}, "network": 1}
    assert any("no NIC is shown" in note for note in imported.notes) == (nics == 0)
    assert None not in cluster.numa
    named = nics and None not in topology.nics
    assert [nic is not None for nic in cluster.nic] == [bool(named)] * cluster.gpus


@needs_shared
def test_affinity_of_real_files() -> None:
    def read(name: str) -> NvidiaTopology:
        return parse_topology((REAL / name).read_text(), name)

    blank = read("hgx_h200_8gpu_10nic_blank_affinity.txt")
    assert blank.cpus == (None,) * 4 + ("56",) * 4
    assert blank.numa == ("0",) * 4 + ("1",) * 4
    tray = read("gb200_nvl72_tray_4gpu_8nic.txt")
    assert tray.numa == ("0,3-9,11-17",) * 2 + ("1,19-25,27-33",) * 2
    assert read("rtx5090_2gpu_tabs.txt").cpus == ("0-63", "0-63")
    assert read("rtx5090_2gpu_tabs.txt").numa == ("0", "0")
    assert read("hgx_h20-3e_8gpu_11nic.txt").nics[8:] == ("mlx5_8", "mlx5_11", "mlx5_bond_0")


@needs_shared
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("rocm_smi_topo/mi308x_8gpu_xgmi.txt", "rocm-smi --showtopo"),
        ("rocm_smi_topo/mi2xx_4gpu_xgmi.txt", "rocm-smi --showtopo"),
        ("nccl_xml/azure_ndv5-topo.xml", "NCCL topology"),
        ("nccl_xml/azure_ncv4-graph.xml", "NCCL graph"),
        ("hwloc/nvidiaDGX2.xml", "hwloc"),
        ("slurm/topograph_block_12x8.conf", "topology.conf"),
        ("topograph/nvl72.yaml", "no GPU columns"),
        ("nvidia_smi_qx/qx-h100.xml.gz", "not UTF-8"),
    ],
)
def test_other_inputs_are_refused_by_name(name: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        import_cluster(SHARED / "topology" / name, hosts="a", gpu_type="h100-80g")


def test_query_xml_is_refused_by_name() -> None:
    assert "nvidia-smi -q -x" in str(refused("<?xml version='1.0'?>\n<nvidia_smi_log>\n"))


@pytest.mark.parametrize(
    "text",
    [
        TWO,
        "user@box:~$ nvidia-smi topo -m\n" + TWO + "user@box:~$ \n",
        "\x1b[4m" + TWO.replace("NUMA Affinity", "NUMA Affinity\x1b[0m"),
        "[4m" + TWO.replace("NUMA Affinity", "NUMA Affinity[0m"),
        TWO.replace("\n", "\r\n"),
        TWO + LEGEND,
        TWO.expandtabs(8),
        "    " + TWO.expandtabs(8).replace("\n", "\n    "),
        TWO.replace("\t0\n", "\t0\t\t\n"),
        TWO.replace("\t", "\t\t"),
    ],
    ids=[
        "tabs",
        "prompt",
        "colours",
        "colours without escape",
        "crlf",
        "legend",
        "spaces",
        "indented",
        "trailing",
        "double",
    ],
)
def test_forms_of_one_table_read_alike(text: str) -> None:
    topology = parse_topology(text)
    assert topology.gpus == ("GPU0", "GPU1")
    assert topology.links == (("X", "NV18"), ("NV18", "X"))
    assert topology.cpus == ("0-63", "0-63")
    assert topology.numa == ("0", "0")
    assert choose_nics(topology) == ()


@pytest.mark.parametrize("spaces", [False, True])
def test_blank_cells_and_the_tab_too_many(spaces: bool) -> None:
    text = (
        "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tNV4\t44-51,148-155\t0\t\tN/A\n"
        "GPU1\tNV4\t X \t\t1\t\tN/A\n"
    )
    topology = parse_topology(text.expandtabs(8) if spaces else text)
    assert topology.cpus == ("44-51,148-155", None)
    assert topology.numa == ("0", "1")


def test_numa_not_available_leaves_it_out(tmp_path: Path) -> None:
    text = TWO.replace("\t0\n", "\t\tN/A\n")
    assert parse_topology(text).numa == (None, None)
    assert parse_topology(text).cpus == ("0-63", "0-63")
    cluster = load(tmp_path, cluster_yaml(parse_topology(text), hosts="a,b", gpu_type="h100-80g"))
    assert cluster.numa == (None,) * 4
    assert cluster.cpus == ("0-63",) * 4


def test_two_gpus_that_share_two_nics_get_one_each(tmp_path: Path) -> None:
    text = FOUR_NICS + "\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_bond_7\n"
    plain = parse_topology(FOUR_NICS + "\nNIC Legend:\n  NIC0: mlx5_0\n  NIC1: mlx5_1\n")
    assert choose_nics(plain) == (0, 1)
    bonded = parse_topology(text)
    assert bonded.nics == ("mlx5_0", "mlx5_bond_7")
    assert choose_nics(bonded) == (0, 0)
    imported = cluster_yaml(bonded, hosts="a,b", gpu_type="h100-80g")
    cluster = load(tmp_path, imported)
    assert cluster.nic == ("mlx5_0",) * 4
    assert cluster.levels[0].uplink.tolist() == [50e9, 50e9]
    assert any("share 1 NICs" in note for note in imported.notes)


def test_nearness_comes_before_evenness() -> None:
    text = table(
        "GPU0 X NV18 PIX SYS 0 0",
        "GPU1 NV18 X PIX SYS 0 0",
        header="GPU0|GPU1|NIC0|NIC1|CPU Affinity|NUMA Affinity",
    )
    assert choose_nics(parse_topology(text)) == (0, 0)


def test_a_tie_is_left_to_the_gpu_that_has_no_other() -> None:
    text = table(
        "GPU0 X NV18 PIX PIX 0 0",
        "GPU1 NV18 X PIX NODE 0 0",
        header="GPU0|GPU1|NIC0|NIC1|CPU Affinity|NUMA Affinity",
    )
    assert choose_nics(parse_topology(text)) == (1, 0)


def test_random_ties_are_spread_as_evenly_as_any_choice() -> None:
    rank = {"PIX": 1, "NODE": 4, "SYS": 5}
    random = np.random.default_rng(5)
    for _ in range(60):
        gpus, nics = int(random.integers(1, 5)), int(random.integers(1, 5))
        links = random.choice(["PIX", "NODE", "SYS"], size=(gpus, nics)).tolist()
        topology = NvidiaTopology(
            gpus=tuple(f"GPU{gpu}" for gpu in range(gpus)),
            links=tuple(tuple("X" if a == b else "NV1" for b in range(gpus)) for a in range(gpus)),
            nic_columns=tuple(f"NIC{nic}" for nic in range(nics)),
            nics=tuple(f"m{nic}" for nic in range(nics)),
            nic_links=tuple(tuple(row) for row in links),
            nic_peers=(),
            cpus=(None,) * gpus,
            numa=(None,) * gpus,
        )

        def score(choice: tuple[int, ...], links: list[list[str]] = links) -> tuple[int, int]:
            return (
                sum(rank[links[gpu][nic]] for gpu, nic in enumerate(choice)),
                sum(choice.count(nic) ** 2 for nic in set(choice)),
            )

        best = min(score(choice) for choice in product(range(nics), repeat=gpus))
        assert score(choose_nics(topology)) == best


def test_older_drivers_name_the_nic_in_the_column(tmp_path: Path) -> None:
    text = table(
        "GPU0 X SYS NODE SYS 0-63 0",
        "GPU1 SYS X SYS NODE 64-127 1",
        "mlx5_0 NODE SYS X SYS",
        "mlx5_1 SYS NODE SYS X",
        header="GPU0|GPU1|mlx5_0|mlx5_1|CPU Affinity|NUMA Affinity",
    )
    imported = cluster_yaml(parse_topology(text), hosts="a", gpu_type="h100-80g")
    assert load(tmp_path, imported).nic == ("mlx5_0", "mlx5_1")
    assert any("topo -mp" in note for note in imported.notes)


def test_a_gpu_without_nvlink_stands_alone(tmp_path: Path) -> None:
    link = {(a, b): "NV18" for a in range(4) for b in range(a) if 2 not in (a, b)}
    imported = cluster_yaml(parse_topology(matrix(4, link, "NODE")), hosts="a,b", gpu_type="b200-180g")
    cluster = load(tmp_path, imported)
    assert "# " in imported.text
    assert "standing alone: GPU2" in imported.text
    assert any("GPU2 lost NVLink" in note for note in imported.notes)
    nvlink = cluster.levels[0]
    assert nvlink.bandwidth == 900e9
    domains = nvlink.domain_of.tolist()
    assert domains[0] == domains[1] == domains[3] != domains[2]
    assert domains[0] != domains[4]
    assert cluster.levels[cluster.meeting_level(0, 2)].name == "host"
    assert cluster.levels[1].bandwidth == 64e9


def test_nvlink_in_two_halves_is_two_domains(tmp_path: Path) -> None:
    link = {(a, b): "NV18" for a in range(8) for b in range(a) if a // 4 == b // 4}
    imported = cluster_yaml(parse_topology(matrix(8, link)), hosts="a", gpu_type="h200-141g")
    assert load(tmp_path, imported).levels[0].domain_of.tolist() == [0] * 4 + [1] * 4
    assert "    gpus: 4" in imported.text


def test_a_partial_mesh_keeps_only_sets_joined_throughout(tmp_path: Path) -> None:
    link = {(a, b): "NV2" for a in range(8) for b in range(a) if a // 4 == b // 4} | {
        (a, a + 4): "NV1" for a in range(4)
    }
    imported = cluster_yaml(parse_topology(matrix(8, link)), hosts="a", gpu_type="a100-40g")
    topology, cluster = parse_topology(matrix(8, link)), load(tmp_path, imported)
    domains = cluster.levels[0].domain_of
    assert sorted(np.bincount(domains).tolist()) == [4, 4]
    for first in range(8):
        for second in range(first):
            assert domains[first] != domains[second] or topology.joined(first, second)
    assert any("different sets" in note for note in imported.notes)
    assert any("NV1, NV2" in note for note in imported.notes)


def test_interleaved_pcie_domains_are_written_out(tmp_path: Path) -> None:
    link = {(0, 2): "PIX", (1, 3): "PIX"}
    imported = cluster_yaml(
        parse_topology(matrix(4, link)), hosts="a,b", gpu_type="l4-24g", pcie_bandwidth="20 GB/s"
    )
    cluster = load(tmp_path, imported)
    assert [level.name for level in cluster.levels] == ["pix", "host", "network"]
    assert [level.bandwidth for level in cluster.levels] == [20e9, 10e9, 50e9]
    assert cluster.meeting_level(0, 2) == 0
    assert cluster.meeting_level(0, 1) == 1
    assert cluster.meeting_level(0, 4) == 2


def test_gb200_says_that_its_domain_was_cut_or_takes_how_far_it_goes(tmp_path: Path) -> None:
    link = {(a, b): "NV18" for a in range(4) for b in range(a)}
    topology = parse_topology(matrix(4, link))
    cut = cluster_yaml(topology, hosts="t[01-36]", gpu_type="gb200-186g")
    assert any("spans hosts" in note for note in cut.notes)
    assert "spans hosts" in cut.text
    assert len(load(tmp_path, cut).levels[0].domain_names) == 36
    whole = cluster_yaml(topology, hosts="t[01-36]", gpu_type="gb200-186g", nvlink_hosts=18)
    assert not any("spans hosts" in note for note in whole.notes)
    cluster = load(tmp_path, whole)
    assert np.bincount(cluster.levels[0].domain_of).tolist() == [72, 72]
    with pytest.raises(InputError, match="expected 1 to 36") as caught:
        cluster_yaml(topology, hosts="t[01-36]", gpu_type="gb200-186g", nvlink_hosts=72)
    assert caught.value.key == "nvlink_hosts"


def test_a_lost_gpu_in_a_domain_of_several_hosts(tmp_path: Path) -> None:
    link = {(a, b): "NV18" for a in range(4) for b in range(a) if 3 not in (a, b)}
    topology = parse_topology(matrix(4, link))
    cluster = load(tmp_path, cluster_yaml(topology, hosts="t[1-4]", gpu_type="gb200-186g", nvlink_hosts=2))
    assert sorted(np.bincount(cluster.levels[0].domain_of).tolist()) == [1, 1, 1, 1, 6, 6]


def test_gaps_in_gpu_numbers_are_kept(tmp_path: Path) -> None:
    text = TWO.replace("GPU1", "GPU5")
    cluster = load(tmp_path, cluster_yaml(parse_topology(text), hosts="a", gpu_type="h100-80g"))
    assert cluster.index.tolist() == [0, 5]


def test_a_single_gpu(tmp_path: Path) -> None:
    text = table("GPU0 X 0-63 0", header="GPU0|CPU Affinity|NUMA Affinity")
    cluster = load(tmp_path, cluster_yaml(parse_topology(text), hosts="a[1-3]", gpu_type="l4-24g"))
    assert cluster.gpus == 3
    assert [level.name for level in cluster.levels] == ["network"]


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("", "is empty", None),
        ("   \n\n", "is empty", None),
        ("hello\n", "no GPU columns", None),
        ("\x00\x01\x02GPU0", "control characters", None),
        (TWO.split("\n", 1)[1], "no header line", 1),
        (
            TWO.replace("GPU0\tX\tNV18", "GPU0\tX\tNV18NV18"),
            "run together in the row of `GPU0`: `NV18NV18`",
            2,
        ),
        (
            FOUR_NICS.replace("NIC0\tPIX\tPIX\tX\tPIX", "NIC0\tPIX\tPIXX\tPIX"),
            "run together in the row of `NIC0`",
            4,
        ),
        (FOUR_NICS.replace("NIC0\tNIC1", "NIC0NIC1"), "run together: `NIC0NIC1`", 1),
        (FOUR_NICS.expandtabs(8).replace("NIC1    CPU", "NIC1CPU"), "run together: `NIC1CPU Affinity`", 1),
        (TWO.replace("GPU1\tNV18\tX\t0-63\t0\n", ""), "not square: the row of GPU1 is missing", 1),
        (FOUR_NICS.replace("NIC1\tPIX\tPIX\tPIX\tX\n", ""), "not square: the row of NIC1 is missing", 1),
        (TWO.replace("GPU1\tNV18\tX\t0-63\t0", "GPU1\tNV18"), "row of `GPU1` is cut: it has 1 of 2 links", 3),
        (TWO.replace("GPU1\tNV18\tX\t", "GPU1\tNV18\t"), "row of `GPU1` is cut: it has 1 of 2 links", 3),
        (TWO.replace("GPU1\tNV18", "GPU1\tNV12"), "not symmetric: `GPU1` to `GPU0` is `NV12`", 3),
        (FOUR_NICS.replace("NIC1\tPIX", "NIC1\tSYS"), "not symmetric: `NIC1` to `GPU0`", 5),
        (TWO.replace("GPU1\tNV18", "GPU1\tFOO"), "found `FOO` between `GPU1` and `GPU0`", 3),
        (TWO.replace("GPU1\tNV18", "GPU1\tOK").replace("X\tNV18", "X\tOK"), "topo -p2p", 2),
        (TWO.replace("GPU1\tNV18\tX", "GPU1\tNV18\tNV18"), "between `GPU1` and `GPU1`, expected `X`", 3),
        (TWO.replace("X\tNV18", "X\tX"), "between `GPU0` and `GPU1`, expected a link", 2),
        (TWO + "GPU2\tX\n", "`GPU2`, which is not among the columns", 4),
        (TWO + "GPU1\tNV18\tX\t0-63\t0\n", "second row for `GPU1`", 4),
        (TWO + "\n" + TWO, "second matrix", 5),
        (TWO.replace("GPU0\tGPU1", "GPU0\tGPU0"), "column `GPU0` twice", 1),
        (TWO.replace("GPU0\tX\tNV18\t0-63\t0", "GPU0\tX\nNV18\t0-63\t0"), "is cut", 2),
        (TWO.replace("0-63\t0\n", "x-63\t0\n"), "under `CPU Affinity`", 2),
        (TWO.replace("0-63\t0\n", "0-63\t0\t1\t2\n"), "more cells than there are columns", 2),
        (FOUR_NICS + "NIC Legend:\n NIC0: a;b\n", "expected a device name", 7),
        (FOUR_NICS + "NIC Legend:\n NIC0: a\n NIC1: a\n", "a second time", 8),
    ],
)
def test_damage_is_refused_with_its_line(text: str, says: str, line: int | None) -> None:
    error = refused(text)
    assert says in error.message
    assert error.line == line


@needs_shared
def test_every_cut_of_a_real_file_is_read_or_refused() -> None:
    text = (REAL / "hgx_h20-3e_8gpu_11nic.txt").read_text()
    last_gpu_row = text.index("\nNIC0 ")
    for end in range(0, len(text), 37):
        try:
            topology = parse_topology(text[:end])
        except InputError:
            continue
        assert end >= last_gpu_row - len("48-95,144-191   1     N/A")
        assert len(topology.gpus) == 8


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"gpu_type": "h100-80gb"}, "gpu_type", "did you mean `h100-80g`?"),
        ({"gpu_type": "zzz"}, "gpu_type", "known: a100-40g"),
        ({"hosts": "node[1-"}, "hosts", "host list"),
        ({"name": "a\nb"}, "name", "expected a name"),
        ({"nic_bandwidth": "400"}, "nic_bandwidth", "bare number"),
        ({"nic_bandwidth": "0 Gb/s"}, "nic_bandwidth", "above 0"),
        ({"nvlink_latency": "3"}, "nvlink_latency", "bare number"),
        ({"nvlink_hosts": 0}, "nvlink_hosts", "expected 1 to 2"),
    ],
)
def test_values_that_cannot_be_used_are_refused(change: dict[str, object], key: str, says: str) -> None:
    given: dict[str, object] = {"hosts": "a,b", "gpu_type": "h100-80g", **change}
    with pytest.raises(InputError) as caught:
        cluster_yaml(parse_topology(TWO), **given)  # type: ignore[arg-type]
    assert caught.value.key == key
    assert says in caught.value.message


def test_host_names_that_yaml_would_read_otherwise(tmp_path: Path) -> None:
    cluster = load(
        tmp_path, cluster_yaml(parse_topology(TWO), hosts="no,1e3,007", gpu_type="h100-80g", name="yes")
    )
    assert cluster.hosts == ("no", "1e3", "007")
    assert cluster.name == "yes"


def test_missing_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        import_cluster(tmp_path / "x", hosts="a", gpu_type="l4-24g")
    (tmp_path / "big").write_bytes(b" " * 3_000_000)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        import_cluster(tmp_path / "big", hosts="a", gpu_type="l4-24g")
