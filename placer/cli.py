"""The command line: commands, progress, messages, exit codes.

Only typer is imported at the top. Whatever a command needs is imported inside it, so that `--help` answers at once and
OR-Tools (more than a second) is loaded by `solve` alone.

Exit codes: 0 done; 1 no placement exists, or `verify` found something wrong; 2 bad input or usage; 3 nothing was found
in time; 70 a fault in placer; 130 Ctrl-C. What was asked for goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

from placer.errors import ExportError, InputError, PlacerError, SolverError, nearest

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from placer.audit.placements import AuditWishes
    from placer.placement import Placement
    from placer.problem import Problem
    from placer.report.explanation import Explanation
    from placer.solver.clock import Clock
    from placer.solver.search import Progress, Result

DONE, FALSE, BAD_INPUT, NOTHING_FOUND, FAULT, INTERRUPTED = 0, 1, 2, 3, 70, 130
MAX_TIME_LIMIT = 1e7
#: Seconds that an explanation may take where a search has found that there is nothing, at least.
EXPLAIN_SECONDS = 10.0
MAX_WORKERS = 64
#: What CP-SAT takes.
MAX_SEED = 2**31 - 1
#: More files than this are counted and not listed.
LISTED_FILES = 12
#: More than this of what `verify` will find in an imported placement.
LISTED_FINDINGS = 5

Named = TypeVar("Named", bound=str)

app = typer.Typer(
    name="placer",
    help="Place the ranks, layers, experts and tensor shards of a model on the GPUs of a cluster.",
    epilog="Exit codes: 0 done; 1 no placement exists, or verify found something wrong; 2 bad input or usage; "
    "3 nothing was found in time.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
import_app = typer.Typer(
    help="Make placer's files from files you already have.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(import_app, name="import")

ProblemArgument = Annotated[
    str, typer.Argument(metavar="PROBLEM", help="Problem file: YAML, TOML or JSON.", show_default=False)
]
PlacementArgument = Annotated[
    str,
    typer.Argument(metavar="PLACEMENT", help="Placement file written by `placer solve`.", show_default=False),
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Degrees such as EP64_TP2_PP1, or `auto`; takes the place of what the problem file says.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="File to write; stdout without it.", show_default=False
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
NameOption = Annotated[str | None, typer.Option(metavar="NAME", help="Name to give it.", show_default=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves it."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(args=words, prog_name="placer", standalone_mode=False)
        _flush(sys.stdout)
    except PlacerError as error:
        _error(str(error))
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        # Typer's usage errors have no common public base over the versions that are admitted.
        message = getattr(error, "format_message", None)
        return _fault(error) if message is None else _usage_error(error, message())
    return code if isinstance(code, int) else DONE


def _usage_error(error: Exception, message: str) -> int:
    _error(message.rstrip("."))
    command = getattr(getattr(error, "ctx", None), "command_path", "placer")
    _talk(f"hint: `{command} --help` lists what it takes")
    return BAD_INPUT


def _fault(error: Exception) -> int:
    if os.environ.get("PLACER_TRACEBACK"):
        traceback.print_exception(error)
    _error(
        f"{type(error).__name__}: {error}; this is a fault in placer, please report it "
        "(PLACER_TRACEBACK=1 shows where it happened)"
    )
    return FAULT


def _version(wanted: bool) -> None:
    if wanted:
        from placer import __version__

        _print(f"placer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


# solve


@app.command()
def solve(
    problem: ProblemArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Placement file to write.")
    ] = Path("placement.json"),
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Stop after so many seconds.")] = 60.0,
    workers: Annotated[int, typer.Option(metavar="N", help="Threads of the solver, 1 to 64.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same placement.")] = 0,
    strategy: StrategyOption = None,
    as_json: JsonOption = False,
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="List every rank, however many.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE even when it is not a placement.")
    ] = False,
) -> int:
    """Find the placement of least modelled latency, with a bound on what is left to gain.

    Ctrl-C ends the search; the best placement so far is written and shown.
    """
    _check_numbers(time_limit, workers, seed)
    # Told now: after a long search it would be too late.
    _check_placement_output(output, problem, force=force)
    try:
        loaded, clock, result, found = _search(problem, strategy, time_limit, workers, seed)
    except KeyboardInterrupt:
        _talk("stopped by Ctrl-C before a placement was found and checked; nothing was written")
        return NOTHING_FOUND
    if found is None:
        return _nothing(loaded, problem, result, clock, as_json, seed)
    from placer.placement import dump_json, save_placement
    from placer.report.terminal import placement_report

    save_placement(found, output)
    written = f"written to `{output}` after {clock.elapsed:.1f} s"
    if clock.interrupted:
        _talk("stopped by Ctrl-C: this is the best placement found until then")
    if as_json:
        _print(dump_json(found.model_dump(mode="json")))
        _talk(written)
        return DONE
    cut_by = "Ctrl-C" if clock.interrupted else "the time limit"
    _show(placement_report(found, all_ranks=all_ranks, cut_by=cut_by))
    _print(written)
    return DONE


def _search(
    file: str, strategy: str | None, time_limit: float, workers: int, seed: int
) -> tuple[Problem, Clock, Result, Placement | None]:
    from placer.problem import load_problem

    problem = load_problem(file, strategy)
    # Only now: what is wrong with the file should not wait for OR-Tools.
    from placer.solver import answer
    from placer.solver.clock import Clock

    clock = Clock(time_limit)
    with _progress(clock) as report:
        result, placement = answer.solve(
            problem, time_limit=time_limit, workers=workers, seed=seed, report=report, clock=clock
        )
    return problem, clock, result, placement


def _nothing(problem: Problem, file: str, result: Result, clock: Clock, as_json: bool, seed: int) -> int:
    """Tell that there is no placement, and why, or that none was found, and return the exit code."""
    told = _explanation(problem, result, clock, seed)
    if told is not None and told.status == "infeasible":
        return _explained(told, as_json, _unsolved(result, clock))
    if as_json:
        _print(json.dumps(_unsolved(result, clock), indent=1))
        return FALSE if result.status == "infeasible" else NOTHING_FOUND
    from placer.report.terminal import no_placement_report, nothing_found_report

    if result.status == "infeasible":
        _show(no_placement_report(problem.model.name, problem.cluster.name, file, result.reasons), wrap=False)
        return FALSE
    if clock.interrupted:
        headline = f"Nothing was found in the {clock.elapsed:.1f} s before Ctrl-C"
    elif result.status == "out of time":
        headline = f"Nothing was found within the time limit of {clock.limit:g} s"
    else:
        headline = "Nothing was found by the ways there are of building a placement"
    _show(nothing_found_report(headline, result.reasons), wrap=False)
    return NOTHING_FOUND


def _unsolved(result: Result, clock: Clock) -> dict[str, Any]:
    bound = result.bound if result.bound is not None and math.isfinite(result.bound) else None
    return {
        "status": result.status,
        "reasons": result.reasons,
        "bound_s": bound,
        "candidates": result.candidates,
        "cut_short": result.cut_short or clock.interrupted,
    }


def _explanation(problem: Problem, result: Result, clock: Clock, seed: int) -> Explanation | None:
    """Return why a search found nothing; None where it was the time that ran out."""
    if result.status == "out of time" or clock.interrupted:
        return None
    from placer.explain import explaining

    told = explaining.check(problem, time_limit=max(EXPLAIN_SECONDS, clock.left()), seed=seed)
    if told.status == "feasible" and result.status == "infeasible":
        raise SolverError("a placement was said not to exist and then found, which is a fault in placer")
    return told


def _check_numbers(time_limit: float, workers: int, seed: int) -> None:
    if not 0 < time_limit <= MAX_TIME_LIMIT:
        expected = f"seconds above 0 and at most {MAX_TIME_LIMIT:,.0f}"
        raise InputError(f"found {time_limit:g}, expected {expected}", key="--time-limit")
    if not 1 <= workers <= MAX_WORKERS:
        raise InputError(f"found {workers}, expected 1 to {MAX_WORKERS}", key="--workers")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"found {seed}, expected 0 to {MAX_SEED}", key="--seed")


def _check_placement_output(path: Path, problem: str, *, force: bool) -> None:
    _check_ending(path, (".json",))
    _check_writable(path)
    if not path.exists():
        return
    if Path(problem).exists() and path.samefile(problem):
        raise InputError("is the problem file itself; choose another with -o", file=str(path))
    if not force and not _is_placement(path):
        raise InputError(
            "exists and is no placement file; choose another with -o, or replace it with --force",
            file=str(path),
        )


def _is_placement(path: Path) -> bool:
    """Whether a file says that it is a placement, of whatever version."""
    from placer.placement import FORMAT, read_placement_document

    try:
        data = read_placement_document(path).data
    except InputError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


@contextmanager
def _progress(clock: Clock) -> Iterator[Callable[[Progress], None] | None]:
    """Show on a terminal's stderr where the search stands; yield what the search is to tell it to."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.live import Live

    from placer.report.terminal import progress_line

    class View:
        """The last news, with the seconds counted on between them."""

        last: Progress | None = None

        def tell(self, progress: Progress) -> None:
            self.last = progress

        def __rich__(self) -> Text:
            if self.last is None:
                return progress_line(clock.elapsed, None, None, "starting")
            return progress_line(clock.elapsed, self.last.objective, self.last.bound, self.last.what)

    view = View()
    with Live(view, console=_console(stderr=True), transient=True, refresh_per_second=4):
        yield view.tell


# check


@app.command()
def check(
    problem: ProblemArgument,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Stop after so many seconds.")] = 20.0,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same answer.")] = 0,
    strategy: StrategyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Tell whether anything fits, and if not: the smallest conflict, and the smallest ways out of it.

    Exit 1 when it is proven that nothing fits, 3 when that was not decided in the time.
    """
    _check_numbers(time_limit, 1, seed)
    from placer.problem import load_problem

    loaded = load_problem(problem, strategy)
    from placer.explain import explaining

    return _explained(explaining.check(loaded, time_limit=time_limit, seed=seed), as_json)


def _explained(told: Explanation, as_json: bool, beside: dict[str, Any] | None = None) -> int:
    """Show an explanation, in JSON with what a search has to say `beside` it, and return the exit code."""
    from placer.report.explanation import explanation_report

    code = {"feasible": DONE, "infeasible": FALSE}.get(told.status, NOTHING_FOUND)
    if as_json:
        _print(json.dumps((beside or {}) | told.as_json(), indent=1))
    else:
        _show(explanation_report(told), wrap=False)
    return code


# verify


@app.command()
def verify(
    placement: PlacementArgument,
    problem: ProblemArgument,
    strategy: StrategyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check a placement against its problem, everything recomputed; exit 1 when something is wrong.

    A placement solved with --strategy is verified with the same --strategy.
    """
    from placer.placement import load_placement
    from placer.problem import load_problem
    from placer.verify import check_placement

    read = load_placement(placement)
    findings = check_placement(read, load_problem(problem, strategy))
    if as_json:
        told = [
            {"code": finding.code, "where": finding.where, "message": finding.message} for finding in findings
        ]
        _print(json.dumps({"verified": not findings, "findings": told}, indent=1))
        return FALSE if findings else DONE
    if findings:
        from placer.report.terminal import findings_report

        _show(findings_report([str(finding) for finding in findings]), wrap=False)
        if strategy is None and any(finding.code == "strategy.request" for finding in findings):
            _talk("hint: a placement solved with --strategy is verified with the same --strategy")
        return FALSE
    layers = max(stage.layers[1] for stage in read.strategy.stages)
    _print(
        f"verified: the seats of {len(read.ranks):,} ranks, {layers:,} layers, {len(read.experts):,} layers of "
        "experts, every requirement, memory, modelled latency, objective and gap recomputed, 0 findings; "
        "the bound is compared with the objective and not proven again"
    )
    return DONE


# audit


@app.command()
def audit(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="A plan file; or files that say where ranks, layers and experts go: a placement, ranks.tsv, a Slurm "
            "host file, an Open MPI rank file, what scontrol shows of a job or step, an expert map, a Megatron layout.",
            show_default=False,
        ),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="PROBLEM", help="Problem file that launcher files are held against.", show_default=False
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Cluster file, with --model instead of --problem.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE", help="Model card or config.json.", show_default=False)
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Degrees of launcher files, such as EP8_TP2_PP1.", show_default=False
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="decode (unless told) or prefill; with --model.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Sequences of a step, 128 unless told; with --model.", show_default=False
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of a sequence, 4096 unless told; with --model.", show_default=False
        ),
    ] = None,
    loads: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Expert loads, even unless told; with --model.", show_default=False
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT", help="Megatron pipeline layout: Et*3|(tt|)*29,m|L.", show_default=False
        ),
    ] = None,
    vpp: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Virtual stages of each pipeline rank of a layout.", show_default=False
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            metavar="KIND",
            help="What a FILE is, once for each: placement, ranks, slurm, openmpi, machines, scontrol, layout, expert-map or a "
            "format of one, auto; by its content unless told.",
            show_default=False,
        ),
    ] = None,
    local_gpus: Annotated[
        str,
        typer.Option(
            metavar="WORD",
            help="GPUs of the ranks of a host, in order: all, usable, job, or indices: 3,1,0,2.",
        ),
    ] = "all",
    framework: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose rank numbers, where no file says it.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tasks of the hosts of a Slurm step, in order: block:8(x3),4.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="Stop solving after so many seconds.")
    ] = 20.0,
    workers: Annotated[int, typer.Option(metavar="N", help="Threads of the solver, 1 to 64.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same answer.")] = 0,
    no_solve: Annotated[
        bool, typer.Option("--no-solve", help="Leave open what only solving can tell, such as `optimal`.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Hold each claim of a written plan to its arithmetic; exit 1 when one is refuted.

    Or say what the placement in launcher files costs, against --problem or --cluster and --model; exit 1 when
    something is wrong with it.
    """
    _check_numbers(time_limit, workers, seed)
    from placer.audit.plans import is_plan

    files = files or []
    # An expert map may be YAML as well, but a plan names its model and cluster itself.
    against = problem or cluster or model or layout
    if not against and any(is_plan(file) for file in files):
        return _audit_plan(files, None if no_solve else (time_limit, workers, seed), as_json)
    from placer.audit.placements import AuditWishes
    from placer.audit.stated_problem import StatedProblem
    from placer.launchers.numbering import FRAMEWORK_NAMES

    stated = StatedProblem(
        problem=problem, cluster=cluster, model=model, strategy=strategy, batch=batch, length=length, phase=phase,
        loads=loads,
    )  # fmt: skip
    wishes = AuditWishes(
        problem=stated, kinds=tuple(kinds or ()), layout=layout, vpp=vpp, local_gpus=local_gpus,
        framework=_one_of(framework, FRAMEWORK_NAMES, "--framework"), tasks=tasks, solve=not no_solve,
        time_limit=time_limit, workers=workers, seed=seed,
    )  # fmt: skip
    return _audit_placement(files, wishes, as_json)


def _audit_placement(files: Sequence[str], wishes: AuditWishes, as_json: bool) -> int:
    from placer.audit.placements import audit_files

    told = audit_files(files, wishes)
    if as_json:
        _print(json.dumps(told.as_json(), indent=1))
    else:
        from placer.report.audit_placement import audit_report

        _show(audit_report(told), wrap=False)
    return FALSE if told.wrong else DONE


def _audit_plan(files: Sequence[str], solving: tuple[float, int, int] | None, as_json: bool) -> int:
    from placer.audit.plans import audit_plan
    from placer.audit.solving import Solver

    if len(files) > 1:
        raise InputError("stands beside other files, expected one plan file alone", file=files[1])
    found = audit_plan(files[0], None if solving is None else Solver(*solving))
    if as_json:
        _print(json.dumps(found.to_data(), indent=1))
    else:
        from placer.report.audit import audit_report

        _show(audit_report(found.name, found.source, found.verdicts, found.counts))
    return FALSE if found.counts["refuted"] else DONE


# experts


@app.command()
def experts(
    loads: Annotated[
        list[str],
        typer.Argument(
            metavar="LOADS...",
            help="Expert loads or routing of tokens, one scenario each: SGLang's JSON or .pt, .npy, .npz, .csv, "
            "a folder of TensorRT-LLM statistics.",
            show_default=False,
        ),
    ],
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs, one EP rank each.", show_default=False)],
    slots: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Slots of a layer over all GPUs, copies with them; one per expert unless told."
        ),
    ] = None,
    hosts: Annotated[
        str,
        typer.Option(
            metavar="N|LIST", help="Hosts, or their names: node[01-04]; each has as many consecutive GPUs."
        ),
    ] = "1",
    gpus_per_host: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="GPUs of each host where they differ: 8,8,7,8.", show_default=False
        ),
    ] = None,
    uneven: Annotated[
        bool, typer.Option("--uneven", help="Slots may differ between GPUs by one, where they do not divide.")
    ] = False,
    slots_per_gpu: Annotated[
        str | None, typer.Option(metavar="LIST", help="Slots of each GPU: 9x16,8x16.", show_default=False)
    ] = None,
    speeds: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Relative speed of each GPU: 1x16,0.6x16.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="LIST", help="Weight of each scenario.", show_default=False)
    ] = None,
    worst: Annotated[
        float, typer.Option(metavar="SHARE", help="0: weighted mean of the scenarios, 1: the worst one.")
    ] = 0.0,
    number_of_experts: Annotated[
        int | None,
        typer.Option(
            "--experts", metavar="N", help="Experts of a layer, where no file says.", show_default=False
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Routing of single tokens, for fan-out.", show_default=False),
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Least GPUs per token (hosts, where several) while mean / max load is at least this.",
            show_default=False,
        ),
    ] = None,
    replicas_across: Annotated[
        str,
        typer.Option(
            metavar="gpu|host", help="Copies of an expert stay on different GPUs, or on different hosts."
        ),
    ] = "gpu",
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="For a permutation: routing groups stay on blocks of slots.")
    ] = False,
    groups: Annotated[int, typer.Option(metavar="N", help="Routing groups (n_group) of the model.")] = 1,
    from_map: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="MAP", help="The map that is running: re-plan from it.", show_default=False
        ),
    ] = None,
    from_format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its format, where it cannot be told.", show_default=False),
    ] = None,
    move_price: Annotated[
        float | None,
        typer.Option(
            metavar="PRICE",
            help="How far a layer's max / mean load must fall for one moved copy, such as 0.001.",
            show_default=False,
        ),
    ] = None,
    move_cap: Annotated[
        int | None,
        typer.Option(metavar="N", help="Copies that may move, over all layers.", show_default=False),
    ] = None,
    inside_weight: Annotated[
        float, typer.Option(metavar="W", help="What a move inside a host weighs beside one between hosts.")
    ] = 1.0,
    lost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host that is lost, or HOST:GPU; with --from, several times if need be. Unnamed hosts are host00, host01 ...",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Slots of all layers together, shared out between them.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Model card or config.json: weigh everything by modelled time.",
            show_default=False,
        ),
    ] = None,
    gpu_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Built-in type such as h100-80g; with --model.", show_default=False
        ),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="prefill (unless told) or decode, for all or each scenario; with --model.",
            show_default=False,
        ),
    ] = None,
    tokens_per_gpu: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens of a step on a GPU, for all or each scenario; with --model.",
            show_default=False,
        ),
    ] = None,
    nic_bandwidth: Annotated[
        str, typer.Option(metavar="BANDWIDTH", help="Of the NIC of one GPU; with --model.")
    ] = "400 Gb/s",
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps until the next re-plan, which moves must pay off in; with --model and --from.",
            show_default=False,
        ),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="Score this map on LOADS and place nothing; --format then names its format.",
            show_default=False,
        ),
    ] = None,
    output: OutputOption = None,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Of the map: sglang, tensorrt-llm, vllm-ascend, omni, permutation, vllm-physical, vllm-rank, "
            "vllm-arrays, lightllm; by its ending unless told.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Stop after so many seconds.")] = 60.0,
    workers: Annotated[int, typer.Option(metavar="N", help="Threads, 1 to 64.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same map.")] = 0,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> int:
    """Place experts alone, from load files: copies and slots for all scenarios at once, with a bound.

    Writes the map in the form a framework reads. With --simulate, scores a map of any of these forms instead.
    """
    from placer.experts import Wishes, read_question

    _check_numbers(time_limit, workers, seed)
    if replicas_across not in ("gpu", "host"):
        raise InputError(f"found {replicas_across[:40]!r}, expected gpu or host", key="--replicas-across")
    asked = Wishes(
        loads=tuple(loads), gpus=gpus, slots=slots, hosts=hosts, gpus_per_host=gpus_per_host, room=slots_per_gpu,
        uneven=uneven or format_name == "omni", speeds=speeds, weights=weights, worst=worst,
        experts=number_of_experts, sample=sample, balance=balance, apart=replicas_across,
        contiguous=contiguous or (format_name == "permutation" and simulate is None), groups=groups, before=from_map,
        before_format=from_format, price=move_price, cap=move_cap, links=(inside_weight, 1.0),
        lost=tuple(lost or ()), budget=budget, time_limit=time_limit, workers=workers, seed=seed,
        simulating=simulate is not None, model=model, gpu_type=gpu_type, phases=phases,
        tokens_per_gpu=tokens_per_gpu, nic_bandwidth=nic_bandwidth, steps=steps,
    )  # fmt: skip
    if simulate is not None:
        if output is not None:
            raise InputError("cannot stand beside --simulate, which writes no map", key="-o")
        return _simulate(asked, simulate, format_name, as_json)
    written_as = _map_format(output, format_name)
    if budget is not None and output is not None and written_as != "omni":
        raise InputError(
            f"shares slots out unevenly between layers, which {written_as} cannot express, expected --format omni",
            key="--budget",
        )
    _check_new_file(output, _map_endings(written_as), force=force)
    from placer.expert_maps.registry import render_expert_map
    from placer.experts import answer, preview

    question = read_question(asked)
    if output is not None:
        _check_not_input(output, [*loads, sample, from_map, model])
        if budget is None:
            # What the format cannot express is told now: after the search it would be too late.
            render_expert_map(preview(question), written_as, groups=groups)
    found = answer(question)
    if output is not None:
        _write_map(output, found.map, written_as, groups)
    if as_json:
        _print(json.dumps(found.as_json(), indent=1))
        return DONE
    from placer.report.experts import placed_report

    several = len(set(question.names)) > 1
    _show(
        placed_report(
            found.objective, found.bound, found.gap, found.proven, found.score,
            cut_by=found.cut_by,
            moved=None if found.moved is None else (found.moved.inside, found.moved.between),
            moves=[(point.moved, point.objective) for point in found.moves],
            reach=found.reach, reach_of="hosts" if several else "GPUs", unit=found.unit, notes=found.notes,
        )
    )  # fmt: skip
    return DONE


def _simulate(asked: Any, path: str, format_name: str | None, as_json: bool) -> int:
    from placer.cost.expert_score import as_json as score_json
    from placer.experts import read_question, simulate
    from placer.report.experts import simulation_report

    score = simulate(read_question(asked), path, format_name)
    if as_json:
        _print(json.dumps(score_json(score), indent=1))
    else:
        _show(simulation_report(score, title=Path(path).name))
    return DONE


#: What a map is written as where only the ending of its file is known.
_FORMAT_OF_ENDING = {
    ".json": "sglang",
    ".yaml": "tensorrt-llm",
    ".yml": "tensorrt-llm",
    ".npy": "omni",
    ".npz": "vllm-arrays",
}


def _check_not_input(output: Path, inputs: Sequence[str | None]) -> None:
    for name in inputs:
        if name is not None and output.exists() and Path(name).exists() and output.samefile(name):
            raise InputError("is one of the files read; choose another with -o", file=str(output))


def _map_format(output: Path | None, name: str | None) -> str:
    from placer.expert_maps.registry import format_named

    if name is not None:
        return format_named(name).name
    return _FORMAT_OF_ENDING.get(output.suffix.lower(), "sglang") if output is not None else "sglang"


def _map_endings(name: str) -> tuple[str, ...]:
    """Return the endings a map in a format may be written under."""
    endings = {"tensorrt-llm": (".yaml", ".yml"), "omni": (".npy",), "vllm-arrays": (".npz",)}
    return (".json", ".npz") if name == "permutation" else endings.get(name, (".json",))


def _write_map(path: Path, found: Any, name: str, groups: int) -> None:
    from placer.expert_maps.registry import render_expert_map
    from placer.experts import file_of
    from placer.placement import write_bytes

    write_bytes(path, file_of(render_expert_map(found, name, groups=groups), path))
    _talk(f"written to `{path}` as {name}")


# emit


@app.command()
def emit(
    placement: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLACEMENT]", help="Placement file written by `placer solve`.", show_default=False
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="NAME", help="Launcher; --list tells which.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write into.", show_default=False),
    ] = None,
    force: ForceOption = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List the launchers, and which can express PLACEMENT.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Cluster file: CPUs, NUMA nodes and NICs as it has them.", show_default=False
        ),
    ] = None,
    master_addr: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Where rank 0 listens; its host unless told.", show_default=False
        ),
    ] = None,
    master_port: Annotated[int, typer.Option(metavar="PORT", help="Port rank 0 listens on.")] = 29500,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", help="Program and its first arguments, quoted as one.", show_default=False
        ),
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose rank numbers: megatron, vllm, sglang, trtllm, deepspeed.",
            show_default=False,
        ),
    ] = None,
    visibility: Annotated[
        str | None,
        typer.Option(
            metavar="one|host", help="A process sees its GPU, or all of its host.", show_default=False
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Container image, for kubernetes.", show_default=False),
    ] = None,
) -> int:
    """Write what a launcher needs to start a placement."""
    from placer.launchers.base import VISIBILITIES, Options
    from placer.launchers.numbering import FRAMEWORK_NAMES
    from placer.launchers.registry import emit as write_files
    from placer.launchers.registry import list_launchers
    from placer.placement import load_placement

    if listing:
        from placer.report.terminal import launchers_report

        named = _one_of(framework, FRAMEWORK_NAMES, "--framework")
        _one_of(visibility, VISIBILITIES, "--visibility")
        listed = list_launchers(None if placement is None else load_placement(placement), named)
        rows = [(item.name, item.summary, item.cannot) for item in listed]
        _show(launchers_report(rows, of_placement=placement is not None))
        return DONE
    for value, what in ((placement, "PLACEMENT"), (to, "--to"), (output, "-o")):
        if value is None:
            raise InputError(f"{what} is missing: `placer emit PLACEMENT --to NAME -o DIR`")
    assert placement is not None
    assert to is not None
    assert output is not None
    read = load_placement(placement)
    options = Options(
        master_addr=master_addr,
        master_port=master_port,
        command=_words(command),
        cluster=None if cluster is None else _read_cluster(cluster, read),
        framework=_one_of(framework, FRAMEWORK_NAMES, "--framework"),
        visibility=_one_of(visibility, VISIBILITIES, "--visibility"),
        image=image,
    )
    paths = write_files(read, to, output, force=force, options=options)
    for path in paths[:LISTED_FILES]:
        _print(str(path))
    if len(paths) > LISTED_FILES:
        _print(f"and {len(paths) - LISTED_FILES:,} more")
    return DONE


def _one_of(value: str | None, known: Sequence[Named], option: str) -> Named | None:
    """Return the known name that an option states; raise InputError with the nearest one for another."""
    if value is None:
        return None
    for name in known:
        if value == name:
            return name
    raise InputError(
        f"found {value[:60]!r}, expected one of {', '.join(known)}{nearest(value, known)}", key=option
    )


def _words(command: str | None) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command or ""))
    except ValueError as error:
        raise InputError(f"found {command!r}: {str(error).lower()}", key="--command") from None


def _read_cluster(file: str, placement: Placement) -> Any:
    from placer.spec.cluster import load_cluster
    from placer.spec.reading import read_document

    document = read_document(file)
    cluster = load_cluster(document)
    if placement.digests.get("cluster", document.digest) != document.digest:
        _talk(f"note: the placement was made from another version of `{file}`")
    return cluster


# import


@import_app.command("cluster")
def import_cluster(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Output of `nvidia-smi topo -m`.", show_default=False)
    ],
    hosts: Annotated[
        str, typer.Option(metavar="LIST", help="The hosts, all alike: node[01-08].", show_default=False)
    ],
    gpu_type: Annotated[
        str, typer.Option(metavar="TYPE", help="Built-in type such as h100-80g.", show_default=False)
    ],
    output: OutputOption = None,
    name: NameOption = None,
    nvlink_hosts: Annotated[int, typer.Option(metavar="N", help="Hosts that share one NVLink domain.")] = 1,
    nic_bandwidth: Annotated[
        str, typer.Option(metavar="BANDWIDTH", help="Of one NIC; the matrix shows none.")
    ] = "400 Gb/s",
    force: ForceOption = False,
) -> int:
    """Write the cluster file of hosts that are alike, from the topology of one of them."""
    from placer.importers.nvidia_smi import import_cluster as read

    _check_new_file(output, (".yaml", ".yml"), force=force)
    imported = read(
        file,
        hosts=hosts,
        gpu_type=gpu_type,
        name=name,
        nvlink_hosts=nvlink_hosts,
        nic_bandwidth=nic_bandwidth,
    )
    _write(output, imported.text)
    for note in imported.notes:
        _talk(f"note: {note}")
    return DONE


@import_app.command("model")
def import_model(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Hugging Face config.json, or the folder that holds it.", show_default=False
        ),
    ],
    output: OutputOption = None,
    name: NameOption = None,
    force: ForceOption = False,
) -> int:
    """Write the model card of a Hugging Face config, and show its parameters by part."""
    from placer.importers.huggingface import card_to_yaml
    from placer.importers.huggingface import import_model as read
    from placer.report.inputs import parameters_report

    _check_new_file(output, (".yaml", ".yml"), force=force)
    card = read(file, name)
    _write(output, card_to_yaml(card))
    _show(parameters_report(card), stderr=output is None)
    return DONE


@import_app.command("routing")
def import_routing(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Expert loads: SGLang's JSON or .pt, .npy, .npz, .csv, a folder of TensorRT-LLM statistics.",
            show_default=False,
        ),
    ],
    output: OutputOption = None,
    force: ForceOption = False,
) -> int:
    """Write expert loads as SGLang's logical_count JSON, and show how uneven they are."""
    from placer.importers.routing import read_expert_loads
    from placer.report.inputs import loads_report

    _check_new_file(output, (".json",), force=force)
    loads = read_expert_loads(file)
    rows = [[int(value) if value.is_integer() else value for value in row] for row in loads.tolist()]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    _write(output, f'{{"logical_count": [\n{lines}\n]}}\n')
    _show(loads_report(loads, Path(file).name), stderr=output is None)
    return DONE


@import_app.command("placement")
def import_placement(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="What started it: ranks.tsv, a Slurm host file, an Open MPI rank file, a machine file, `scontrol show "
            "job -d` or `show step`, a placement; an expert map.",
            show_default=False,
        ),
    ],
    problem: Annotated[
        str | None,
        typer.Option(metavar="PROBLEM", help="Problem file it is a placement of.", show_default=False),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Cluster file, with --model instead of --problem.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE", help="Model card or config.json.", show_default=False)
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Degrees, such as EP8_TP2_PP1, where no file has coordinates.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="COUNTS", help="Layers of each stage: 10,22.", show_default=False)
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT", help="Or a Megatron pipeline layout: Et*10|t*22L.", show_default=False
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="in-order",
            help="Experts lie in order over the EP ranks; no map is given.",
            show_default=False,
        ),
    ] = None,
    local_gpus: Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="GPUs of the ranks of a host, in order, where no file names them: all, usable, job, or indices: 3,1,0,2.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tasks of the hosts of a Slurm step, in order: block:8(x3),4.",
            show_default=False,
        ),
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose rank numbers, where no file says it.", show_default=False),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            metavar="KIND",
            help="What a FILE is, once for each, as for `placer audit`; by its content unless told.",
            show_default=False,
        ),
    ] = None,
    output: OutputOption = None,
    force: ForceOption = False,
) -> int:
    """Write the placement that is running, read back from the files that started it.

    `placer verify` reads it, and `max_moves` starts from it. What the files leave open is stated by options.
    """
    from placer.audit.imported import ImportWishes
    from placer.audit.imported import import_placement as read
    from placer.audit.stated_problem import StatedProblem
    from placer.launchers.numbering import FRAMEWORK_NAMES
    from placer.placement import dump_json

    _check_new_file(output, (".json",), force=force)
    imported = read(
        files,
        ImportWishes(
            problem=StatedProblem(problem=problem, cluster=cluster, model=model, strategy=strategy),
            kinds=tuple(kinds or ()),
            layers=layers,
            layout=layout,
            tasks=tasks,
            local_gpus=local_gpus,
            framework=_one_of(framework, FRAMEWORK_NAMES, "--framework"),
            experts=experts,
        ),
    )
    _write(output, dump_json(imported.placement.model_dump(mode="json")))
    for file, word in imported.inputs:
        _talk(f"read `{file}` as {word}")
    for text in imported.assumptions:
        _talk(f"assumed: {text}")
    for text in imported.notes:
        _talk(f"note: {text}")
    for finding in imported.findings[:LISTED_FINDINGS]:
        _talk(f"note: `placer verify` will find: {finding}")
    if len(imported.findings) > LISTED_FINDINGS:
        _talk(f"note: and {len(imported.findings) - LISTED_FINDINGS:,} more")
    return DONE


# show


@app.command()
def show(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Problem, cluster, model card, Hugging Face config, placement or expert loads.",
            show_default=False,
        ),
    ],
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="List every rank, however many.")] = False,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE", help="Draw a placement into FILE instead.", show_default=False),
    ] = None,
) -> int:
    """Show any of placer's files, for a person."""
    if svg is None:
        _show(_describe(Path(file), all_ranks))
    else:
        _draw(file, svg)
    return DONE


def _draw(file: str, path: Path) -> None:
    """Draw a placement; a picture that is there already is replaced, any other file is not."""
    from placer.placement import load_placement
    from placer.report.figure import placement_svg

    _check_ending(path, (".svg",), key="--svg")
    _check_writable(path)
    if path.exists() and not path.read_bytes().lstrip().startswith(b"<svg"):
        raise ExportError(f"{path}: exists and is no picture of a placement")
    _write(path, placement_svg(load_placement(file)))


def _describe(path: Path, all_ranks: bool) -> RenderableType:
    from placer.importers.huggingface import import_model as read_config
    from placer.importers.routing import read_expert_loads
    from placer.placement import FORMAT, load_placement, read_placement_document
    from placer.problem import load_problem
    from placer.report.inputs import cluster_report, loads_report, model_report, problem_report
    from placer.report.terminal import placement_report
    from placer.spec.cluster import load_cluster
    from placer.spec.model import load_model

    if path.is_dir() and (path / "meta_info.json").exists():
        return loads_report(read_expert_loads(path), path.name)
    if path.is_dir():
        return model_report(read_config(path))
    if path.suffix.lower() in (".npy", ".npz", ".csv", ".pt", ".pth"):
        return loads_report(read_expert_loads(path), path.name)
    # A placement is the largest of these files, so what is read may be as large as one.
    document = read_placement_document(path)
    data = document.data
    if isinstance(data, list) or (isinstance(data, dict) and "logical_count" in data):
        return loads_report(read_expert_loads(path), path.name)
    if not isinstance(data, dict):
        raise InputError("holds no keys and values, so it is none of placer's files", file=str(path))
    kind = data.get("kind")
    if data.get("format") == FORMAT:
        return placement_report(load_placement(path), all_ranks=all_ranks)
    if kind == "problem" or "workload" in data:
        return problem_report(load_problem(path))
    if kind == "cluster" or "levels" in data:
        return cluster_report(load_cluster(document))
    if kind == "model" or "groups" in data:
        return model_report(load_model(document))
    if "model_type" in data or "architectures" in data:
        return model_report(read_config(path))
    raise InputError(
        "is none of the files shown here: a problem, a cluster, a model card, a Hugging Face config.json, "
        "a placement, expert loads",
        file=str(path),
    )


# files


def _check_ending(path: Path, endings: tuple[str, ...], key: str = "-o") -> None:
    if path.suffix.lower() not in endings:
        # Files are read by their ending: under another one placer could not read its own file back.
        raise InputError(
            f"found the ending `{path.suffix}`, expected `{endings[0]}`", file=str(path), key=key
        )


def _check_writable(path: Path) -> None:
    """Raise ExportError unless a file can be written at `path`; nothing is left behind."""
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise ExportError(f"{path}: cannot be written: it is not a plain file")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: cannot be written: there is no folder `{path.parent}`")
    try:
        with tempfile.TemporaryFile(dir=path.parent, prefix=".placer."):
            pass
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from None


def _check_new_file(path: Path | None, endings: tuple[str, ...], *, force: bool) -> None:
    if path is None:
        return
    _check_ending(path, endings)
    _check_writable(path)
    if path.exists() and not force:
        raise ExportError(f"{path}: exists already and is replaced only with --force")


def _write(path: Path | None, text: str) -> None:
    """Write a file, or print it where none is named."""
    if path is None:
        _print(text.removesuffix("\n"))
        return
    from placer.placement import write_text

    write_text(path, text)
    _talk(f"written to `{path}`")


# output

#: What stands in for signs that a terminal without Unicode cannot show.
_ASCII = str.maketrans({"×": "x", "╰": "`", "─": "-", "▶": ">"})


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # No markup anywhere: host names and messages may hold square brackets.
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def _show(what: RenderableType, *, stderr: bool = False, wrap: bool = True) -> None:
    """Print a renderable; without `wrap`, sentences stay on one line and the terminal folds them."""
    from rich.console import Console

    # Drawn into memory: rich itself ends the process, or fails, when what it writes to does.
    target, drawn = _console(stderr=stderr), io.StringIO()
    console = Console(
        file=drawn,
        width=target.width,
        force_terminal=target.is_terminal,
        color_system=target.color_system,  # type: ignore[arg-type]
        no_color=target.no_color,
        markup=False,
        highlight=False,
        emoji=False,
    )
    console.print(what, soft_wrap=not wrap)
    text = drawn.getvalue().rstrip("\n")
    if not target.is_terminal:
        text = "\n".join(row.rstrip() for row in text.split("\n"))
    _send(text, sys.stderr if stderr else sys.stdout)


def _print(text: str) -> None:
    _send(text.removesuffix("\n"), sys.stdout)


def _talk(text: str) -> None:
    _send("".join(char if char.isprintable() else repr(char)[1:-1] for char in text), sys.stderr)


def _error(message: str) -> None:
    _talk(f"error: {' '.join(message.split())}")


def _send(text: str, stream: TextIO | None) -> None:
    # Without a stream (`placer show x >&-`) there is nobody to tell.
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeError:
        text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    with _may_fail(stream):
        stream.write(f"{text}\n")


def _flush(stream: TextIO | None) -> None:
    if stream is not None:
        with _may_fail(stream):
            stream.flush()


@contextmanager
def _may_fail(stream: TextIO) -> Iterator[None]:
    """Let `placer show x | head` end without a word, and a full disk with one sentence.

    After either, nothing more is written, or Python would fail once more on its way out.
    """
    try:
        yield
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError) and stream is sys.stdout:
            raise ExportError(f"the output cannot be written: {error.strerror or error}") from None
