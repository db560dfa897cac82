"""The command line: exit codes, what goes where, and that no traceback reaches anyone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from placer import cli
from placer.placement import load_placement
from tests.launchers.by_hand import make_data
from tests.shared_data import ROOT

QUICKSTART = ROOT / "instances" / "quickstart.yaml"
PROBLEM = f"""\
kind: problem
name: tiny
cluster: {ROOT}/instances/clusters/two-h100-hosts.yaml
model: {ROOT}/models/mixtral-8x7b.yaml
workload:
  scenarios:
    - {{name: decode, phase: decode, batch: 64, length: 1024}}
strategy: STRATEGY
requirements:
  memory_reserve: RESERVE
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, on 80 columns without colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "PLACER_TRACEBACK", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write_problem(path: Path, strategy: str = "EP2_ETP1_TP2_DP4_PP1", reserve: str = "10 %") -> Path:
    path.write_text(PROBLEM.replace("STRATEGY", strategy).replace("RESERVE", reserve))
    return path


class Outcome:
    """What one command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in out + err


@pytest.fixture
def placer(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def start(*words: object, code: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own, after some code."""
    program = f"import sys\n{code}\nfrom placer.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *(str(word) for word in words)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {}),
        **options,
    )


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small problem and its placement."""
    folder = tmp_path_factory.mktemp("solved")
    write_problem(folder / "tiny.yaml")
    words = ["solve", folder / "tiny.yaml", "-o", folder / "placement.json"]
    assert cli.main([str(word) for word in words]) == 0
    return folder


# solve


def test_quickstart_is_solved_and_verified(placer: Any, place: Path) -> None:
    done = placer("solve", QUICKSTART)
    assert (done.code, done.err) == (0, "")
    placement = load_placement(place / "placement.json")
    rows = [row.split() for row in done.out.splitlines()]
    for record in placement.ranks:
        assert [str(record.rank), record.host, str(record.gpu)] in [row[:3] for row in rows]
    assert placement.strategy.name in done.out
    assert f"gap over all {placement.certificate.candidates} candidate strategies" in done.out
    assert placement.certificate.status in done.out
    assert "modelled time of one step" in done.out
    assert "written to `placement.json`" in done.out
    checked = placer("verify", "placement.json", QUICKSTART)
    assert checked.code == 0
    assert checked.out.startswith("verified: ")
    assert "0 findings" in checked.out


def test_json_is_the_placement_and_nothing_else(placer: Any, place: Path) -> None:
    done = placer("solve", write_problem(place / "p.yaml"), "--json", "-o", "x.json")
    assert done.code == 0
    assert json.loads(done.out) == json.loads((place / "x.json").read_text())
    assert json.loads(done.out)["format"] == "placer placement"
    assert "written to `x.json`" in done.err


def test_a_stated_strategy_takes_the_place_of_the_files(placer: Any, place: Path) -> None:
    problem = write_problem(place / "p.yaml")
    assert placer("solve", problem, "--strategy", "TP4_ETP1_DP2_EP8_PP1").code == 0
    assert load_placement("placement.json").strategy.name == "EP8_TP4_DP2_PP1"
    refused = placer("verify", "placement.json", problem)
    assert refused.code == 1
    assert "[strategy.request]" in refused.out
    assert "hint: " in refused.err
    assert placer("verify", "placement.json", problem, "--strategy", "TP4_ETP1_DP2_EP8_PP1").code == 0


def test_no_placement_exists(placer: Any, place: Path) -> None:
    problem = write_problem(place / "p.yaml", reserve="99 %")
    done = placer("solve", problem)
    assert done.code == 1
    assert done.out.startswith("× No placement of mixtral-8x7b on two-h100-hosts meets every requirement")
    assert "╰─▶ Because " in done.out
    assert "GiB" in done.out
    assert not (place / "placement.json").exists()
    told = placer("solve", problem, "--json")
    assert told.code == 1
    answer = json.loads(told.out)
    assert answer["status"] == "infeasible"
    assert answer["reasons"]
    assert answer["bound_s"] is None


def test_out_of_time(placer: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placer.solver.search.GRACE", 0)
    problem = write_problem(place / "p.yaml", strategy="auto")
    done = placer("solve", problem, "--time-limit", "0.000001")
    assert done.code == 3
    assert "within the time limit of 1e-06 s" in done.out
    assert "does not show that no placement exists" in done.out
    assert json.loads(placer("solve", problem, "--time-limit", "0.000001", "--json").out)["cut_short"] is True
    assert not (place / "placement.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--time-limit", "0"), "`--time-limit`: found 0, expected seconds above 0"),
        (("--time-limit", "nan"), "`--time-limit`: found nan"),
        (("--time-limit", "soon"), "--time-limit"),
        (("--workers", "0"), "`--workers`: found 0, expected 1 to 64"),
        (("--workers", "65"), "`--workers`: found 65"),
        (("--seed", "-1"), "`--seed`: found -1"),
        (("--strategy", "EQ4"), "`--strategy`: found 'EQ4'"),
        (("-o", "nowhere/p.json"), "there is no folder `nowhere`"),
        (("-o", "p.txt"), "expected `.json`"),
        (("-o", "folder.json"), "it is not a plain file"),
        (("-o", "other.json"), "is no placement file"),
        (("-o", "other.json", "--workers"), "--workers"),
        (("--bad",), "--bad"),
        (("extra",), "extra"),
    ],
)
def test_bad_usage_is_told_in_a_sentence_before_any_work(
    placer: Any, place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    (place / "folder.json").mkdir()
    (place / "other.json").write_text('{"precious": 1}')
    monkeypatch.setattr("placer.solver.answer.solve", lambda *_, **__: pytest.fail("it was solved"))
    done = placer("solve", write_problem(place / "p.yaml"), *words)
    assert done.code == 2
    assert done.out == ""
    first = done.err.splitlines()[0]
    assert first.startswith("error: ")
    assert says in first
    assert (place / "other.json").read_text() == '{"precious": 1}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: problem\ncluster: x.yaml\n", "`model` is missing"),
        ("a: [1", "is not YAML"),
        ("- 1\n", "expected a mapping"),
        (PROBLEM.replace("RESERVE", "RESERVE\n  max_gpu: 3"), "did you mean `max_gpus`?"),
    ],
)
def test_a_malformed_problem_is_bad_input(placer: Any, place: Path, text: str, says: str) -> None:
    (place / "p.yaml").write_text(text.replace("STRATEGY", "auto").replace("RESERVE", "10 %"))
    done = placer("solve", "p.yaml")
    assert done.code == 2
    assert done.err.startswith("error: p.yaml")
    assert says in done.err
    assert len(done.err.splitlines()) == 1


def test_only_a_placement_is_replaced_without_force(placer: Any, place: Path) -> None:
    problem = write_problem(place / "p.yaml")
    assert placer("solve", problem).code == 0
    first = (place / "placement.json").stat().st_ino
    assert placer("solve", problem).code == 0
    assert (place / "placement.json").stat().st_ino != first
    (place / "placement.json").write_text("[]")
    assert placer("solve", problem).code == 2
    assert placer("solve", problem, "--force").code == 0
    (place / "p.json").write_text("{}")
    assert "is the problem file itself" in placer("solve", "p.json", "-o", "p.json", "--force").err


#: The first strategy is built, then the search dawdles until it is told to stop.
DAWDLE = """
import time
from placer.solver import search

scout = search.Search._scout

def dawdle(self, candidates):
    if FIND:
        scout(self, candidates)
    print("ready", file=sys.stderr, flush=True)
    while not self.clock.interrupted and self.clock.elapsed < 20:
        time.sleep(0.02)

search.Search._scout = dawdle
"""


@pytest.mark.parametrize("find", [True, False])
def test_ctrl_c_keeps_the_best_so_far(place: Path, find: bool) -> None:
    process = start("solve", write_problem(place / "p.yaml"), code=DAWDLE.replace("FIND", str(find)))
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert time.monotonic() - began < 10
    assert "Traceback" not in out + err
    if find:
        assert process.returncode == 0
        assert "stopped by Ctrl-C" in err
        assert load_placement(place / "placement.json").strategy.name in out
    else:
        assert process.returncode == 3
        assert "before Ctrl-C" in out
        assert not (place / "placement.json").exists()


def test_a_second_ctrl_c_ends_it_at_once(place: Path) -> None:
    stubborn = DAWDLE.replace("FIND", "True").replace("not self.clock.interrupted and ", "")
    process = start("solve", write_problem(place / "p.yaml"), code=stubborn)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 3
    assert "nothing was written" in err
    assert "Traceback" not in out + err
    assert not (place / "placement.json").exists()


def test_progress_goes_to_a_terminal_on_stderr_only(place: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(
        "solve",
        write_problem(place / "p.yaml"),
        "--json",
        stderr=theirs,
        env={"TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=30)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert process.returncode == 0
    assert json.loads(out)["format"] == "placer placement"
    assert b"starting" in seen
    assert b"written to" in seen


# verify


def test_verify_finds_what_was_changed(placer: Any, solved: Path, place: Path) -> None:
    data = json.loads((solved / "placement.json").read_text())
    data["ranks"][1]["gpu"] = data["ranks"][0]["gpu"]
    (place / "bad.json").write_text(json.dumps(data))
    done = placer("verify", "bad.json", solved / "tiny.yaml")
    assert done.code == 1
    assert "[gpu.distinct]" in done.out
    told = json.loads(placer("verify", "bad.json", solved / "tiny.yaml", "--json").out)
    assert told["verified"] is False
    assert {"code", "where", "message"} == set(told["findings"][0])
    good = placer("verify", solved / "placement.json", solved / "tiny.yaml", "--json")
    assert (good.code, json.loads(good.out)) == (0, {"verified": True, "findings": []})


def test_verify_refuses_what_is_no_placement(placer: Any, solved: Path) -> None:
    done = placer("verify", solved / "tiny.yaml", solved / "tiny.yaml")
    assert done.code == 2
    assert "is not a placement file" in done.err


# emit


def test_emit_writes_and_lists(placer: Any, solved: Path, place: Path) -> None:
    placement = solved / "placement.json"
    assert "torchrun" in placer("emit", "--list").out
    rows = [row.split()[:2] for row in placer("emit", "--list", placement).out.splitlines()]
    assert ["ranks", "yes"] in rows
    done = placer("emit", placement, "--to", "ranks", "-o", "launch")
    assert done.code == 0
    for row in done.out.splitlines():
        assert (place / row).is_file()
    again = placer("emit", placement, "--to", "ranks", "-o", "launch")
    assert again.code == 2
    assert "--force" in again.err
    assert placer("emit", placement, "--to", "ranks", "-o", "launch", "--force").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "PLACEMENT is missing"),
        (("P",), "--to is missing"),
        (("P", "--to", "ranks"), "-o is missing"),
        (("P", "--to", "torchrum", "-o", "d"), "did you mean `torchrun`?"),
        (("P", "--to", "ranks", "-o", "d", "--master-port", "0"), "found the port 0"),
        (("P", "--to", "ranks", "-o", "d", "--master-addr", "a b"), "master address"),
        (("P", "--to", "ranks", "-o", "d", "--command", "'x"), "`--command`"),
        (("P", "--to", "ranks", "-o", "d", "--command", '""'), "begins with an empty word"),
        (("P", "--to", "ranks", "-o", "d", "--image", "a/b:1"), "ranks starts no containers"),
        (("--list", "--visibility", "two"), "found 'two', expected one of one, host"),
        (("P", "--to", "ranks", "-o", "d", "--cluster", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_emit_says_what_is_wrong(
    placer: Any, solved: Path, place: Path, words: tuple[str, ...], says: str
) -> None:
    done = placer("emit", *(solved / "placement.json" if word == "P" else word for word in words))
    assert done.code == 2
    assert says in done.err
    assert not (place / "d").exists()


def test_emit_takes_the_command_and_the_cluster(placer: Any, solved: Path, place: Path) -> None:
    words = ("--command", "serve.py --name 'two words'", "--master-addr", "10.0.0.1", "--master-port", "1234")
    cluster = ("--cluster", ROOT / "instances" / "clusters" / "two-h100-hosts.yaml")
    done = placer("emit", solved / "placement.json", "--to", "torchrun", "-o", "d", *words, *cluster)
    assert (done.code, done.err) == (0, "")
    script = next(path for path in map(place.joinpath, done.out.split()) if path.name.startswith("torchrun-"))
    script, wrapper = script.read_text(), (place / "d" / "bind.sh").read_text()
    assert "'two words'" in wrapper
    assert "10.0.0.1" in script
    assert "1234" in script


# import

TOPOLOGY = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\t0-63\t0\nGPU1\tNV18\t X \t0-63\t0\n"


def test_import_cluster_writes_what_show_reads(placer: Any, place: Path) -> None:
    (place / "topo.txt").write_text(TOPOLOGY)
    words = ("import", "cluster", "topo.txt", "--hosts", "node[01-08]", "--gpu-type", "h100-80g")
    printed = placer(*words)
    assert printed.code == 0
    assert printed.err.startswith("note: ")
    written = placer(*words, "-o", "c.yaml", "--name", "mine", "--nic-bandwidth", "200 Gb/s")
    assert (written.code, written.out) == (0, "")
    assert printed.out != (place / "c.yaml").read_text()
    shown = placer("show", "c.yaml").out
    assert shown.startswith("cluster mine: 8 hosts, 16 GPUs, 16 usable")
    assert "25 GB/s" in shown
    refused = placer(*words, "-o", "c.yaml")
    assert (refused.code, "--force" in refused.err) == (2, True)
    wrong = placer(*words[:-1], "h100")
    assert (wrong.code, "h100-80g" in wrong.err) == (2, True)


def test_import_model_shows_parameters_and_writes_a_card(placer: Any, place: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    (place / "config.json").write_text(json.dumps(config))
    # Embedding and head 2 x 100 x 64; a layer: attention 64 x 16 x (2 x 4 + 2 x 2), MLP 3 x 64 x 128, 2 norms; one norm.
    total = 2 * 6400 + 2 * (12288 + 24576 + 128) + 64
    done = placer("import", "model", "config.json", "-o", "m.yaml", "--name", "small")
    assert done.code == 0
    assert f"{total:,}" in done.out
    shown = placer("show", "m.yaml").out
    assert shown.startswith("model small: 2 layers, hidden 64")
    assert f"{total:,}" in placer("show", "config.json").out
    printed = placer("import", "model", "config.json")
    assert "kind: model" in printed.out
    assert f"{total:,}" in printed.err


def test_import_routing_writes_counts_that_read_back(placer: Any, place: Path) -> None:
    (place / "loads.csv").write_text("0,0,0,0\n1,1,1,1\n4,0,0,4.5\n")
    done = placer("import", "routing", "loads.csv", "-o", "loads.json")
    assert done.code == 0
    assert "3, of which 2 have routed tokens" in done.out
    counts = json.loads((place / "loads.json").read_text())["logical_count"]
    assert counts == [[0, 0, 0, 0], [1, 1, 1, 1], [4, 0, 0, 4.5]]
    assert "2.12 x at worst" in " ".join(placer("show", "loads.json").out.split())
    bad = placer("import", "routing", "loads.txt")
    assert (bad.code, "expected `.json`" in bad.err) == (2, True)


# show


def test_show_knows_problems_and_placements(placer: Any, solved: Path) -> None:
    assert placer("show", solved / "tiny.yaml").out.startswith("problem tiny")
    shown = placer("show", solved / "placement.json")
    assert shown.code == 0
    assert "gap over the one candidate strategy" in shown.out


@pytest.mark.parametrize(
    ("name", "text"), [("x.json", "{}"), ("x.yaml", "hello"), ("x.txt", "{}"), ("x.json", '{"kind": "pet"}')]
)
def test_show_refuses_what_it_does_not_know(placer: Any, place: Path, name: str, text: str) -> None:
    (place / name).write_text(text)
    done = placer("show", name)
    assert done.code == 2
    assert done.err.startswith(f"error: {name}: ")


def test_nothing_in_a_placement_reaches_the_terminal_as_a_command(placer: Any, place: Path) -> None:
    data = make_data([("node1", 0)]) | {"notes": ["[red]a[/red]"], "format": "placer placement"}
    data["version"] = 1
    (place / "p.json").write_text(json.dumps(data))
    shown = placer("show", "p.json")
    assert shown.code == 0
    assert "[red]a[/red]" in shown.out
    for key, text in (
        ("notes", ["a\x1b[2Jb"]),
        ("strategy", data["strategy"] | {"name": "[link=http://x]\x07"}),
    ):
        (place / "p.json").write_text(json.dumps(data | {key: text}))
        shown = placer("show", "p.json")
        assert shown.code == 2
        assert not set(shown.out + shown.err) & {"\x1b", "\x07"}


# the whole


def test_help_and_version_need_nothing_heavy() -> None:
    code = (
        "import sys, placer.cli\n"
        "placer.cli.main(['--help'])\n"
        "heavy = {'ortools', 'numpy', 'pydantic', 'rich', 'ruamel', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("solve", "verify", "emit", "import", "show"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("words", [("show", "P"), ("verify", "P", "T"), ("emit", "--list")])
def test_only_solve_imports_ortools(solved: Path, words: tuple[str, ...]) -> None:
    files = {"P": str(solved / "placement.json"), "T": str(solved / "tiny.yaml")}
    code = (
        "import sys, placer.cli\n"
        f"assert placer.cli.main({[files.get(word, word) for word in words]!r}) == 0\n"
        "print('ortools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_no_words_give_the_help(placer: Any) -> None:
    done = placer()
    assert done.code == 0
    assert done.out.startswith("Usage: placer")


@pytest.mark.parametrize("words", [("solv",), ("solve",), ("import",), ("import", "pet"), ("--nope",)])
def test_a_command_typed_wrong_is_bad_usage(placer: Any, words: tuple[str, ...]) -> None:
    done = placer(*words)
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_module_and_version() -> None:
    from placer import __version__

    done = subprocess.run(
        [sys.executable, "-m", "placer", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"placer {__version__}\n")


def test_a_fault_is_one_line_and_a_traceback_only_when_asked(
    placer: Any, solved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("placer.placement.load_placement", fail)
    done = placer("verify", solved / "placement.json", solved / "tiny.yaml")
    assert done.code == 70
    assert done.err.startswith(
        "error: ZeroDivisionError: two lines; this is a fault in placer, please report it"
    )
    assert len(done.err.splitlines()) == 1
    monkeypatch.setenv("PLACER_TRACEBACK", "1")
    assert cli.main(["verify", str(solved / "placement.json"), str(solved / "tiny.yaml")]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_outside_solve_is_130(placer: Any, solved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("placer.placement.load_placement", interrupt)
    done = placer("verify", solved / "placement.json", solved / "tiny.yaml")
    assert (done.code, done.out, done.err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error(solved: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("show", solved / "placement.json", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence(solved: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start("show", solved / "placement.json", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("error: the output cannot be written: ")
    assert len(err.splitlines()) == 1


def test_a_terminal_without_unicode_still_gets_the_words(place: Path) -> None:
    problem = write_problem(place / "p.yaml", reserve="99 %")
    process = start("solve", problem, env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "")
    assert out.startswith("x No placement")
    assert "`-> Because" in out
