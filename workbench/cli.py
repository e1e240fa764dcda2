"""The command line. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 every planned trial is accounted for; 1 a trial failed; 2 bad input, nothing started; 3 somebody else runs
the study; 130 and 143 interrupted. Modules are imported when their command needs them, so that `--help` and `check`
answer at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workbench.errors import StoreError, StudyFileError, WorkbenchError
from workbench.object_store import folder_or_uri, local_folder

if TYPE_CHECKING:
    from workbench.records import StudyResults
    from workbench.study import Plan
    from workbench.study_file import Selection

INTERRUPTED = 130
_DATA_HELP = "a folder of pictures in COCO format, or its address in an object store (s3://...), which is copied first"
BROKEN_PIPE = 141  # what a shell reports when the reader of a pipe has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` default to the command line's."""
    options = build_parser().parse_args(arguments)
    try:
        code = options.command(options)
        sys.stdout.flush()
    except WorkbenchError as error:
        _write(sys.stderr, f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        _write(sys.stderr, "Interrupted. The same command goes on from here.\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return BROKEN_PIPE
    return code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench",
        description="Write down a claim about DETR, run one command, get an honest verdict.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    selection, runs = _selection_options(), _runs_option()

    run = _command(commands, "run", _run, "train what is missing, judge the claims, report", [selection, runs])
    run.add_argument("--until-decided", action="store_true", help="go on look by look while a claim is undecided")
    run.add_argument("--executor", choices=("ray", "inline"), default="ray", help="inline: in this process, no Ray")
    run.add_argument("--address", metavar="ADDR", help="of a running Ray cluster")
    run.add_argument("--allow-code", action="store_true", help="run the code that the study's custom parts name")

    plan = _command(commands, "plan", _plan, "trials, differences, reachable effects and time", [selection, runs])
    plan.add_argument("--explain", action="store_true", help="also each key's value and where it was set")
    _json_option(plan)

    _command(commands, "check", _check, "validate study files at every profile", [selection], studies="+")

    status = _command(commands, "status", _status, "states, metrics and verdicts", [selection, runs], studies="?")
    _json_option(status)

    report = _command(commands, "report", _report, "the verdicts with their evidence", [selection, runs])
    report.add_argument("--format", choices=("text", "md", "html", "latex"), default="text")
    report.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")

    _evaluate_options(commands)

    sync = commands.add_parser("sync", help="bring MLflow up to the records", parents=[runs], allow_abbrev=False)
    sync.add_argument("--tracking-uri", metavar="URI", help="of another MLflow than the one in the runs folder")
    sync.set_defaults(command=_sync)

    schema = commands.add_parser("schema", help="print the JSON schema of study files, for editors")
    schema.set_defaults(command=_schema)
    return parser


def _evaluate_options(commands: Any) -> None:
    text = "score a checkpoint on a folder in COCO format: ours, official DETR or Deformable DETR"
    parser = commands.add_parser("evaluate", help=text, description=text, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", required=True)
    parser.add_argument("--recipe", metavar="NAME", help="of an official file whose tensors fit several")
    parser.add_argument("--data", type=folder_or_uri, metavar="DIR", help=_DATA_HELP)
    parser.add_argument("--split", choices=("val", "tune"), default="val", help="the scored pictures; default: val")
    parser.add_argument("--num-pictures", type=int, metavar="N", help="only the first N")
    parser.add_argument("--parameters", choices=("raw", "averaged"), help="which weights; default: as configured")
    parser.add_argument("--predictions", type=Path, metavar="OUT.json", help="write the detections, a COCO result list")
    parser.add_argument(
        "--losses", action="store_true", help="also the mean of every loss term, and the gradient's norm"
    )
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--allow-code", action="store_true", help="run the code of parts of your own")
    _json_option(parser)
    parser.set_defaults(command=_evaluate)


def _command(
    commands: Any, name: str, command: Any, text: str, parents: list[Any], *, studies: str | None = None
) -> Any:
    parser = commands.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
    parser.add_argument("study", type=Path, metavar="STUDY", nargs=studies, help="a study file")
    parser.set_defaults(command=command)
    return parser


def _selection_options() -> argparse.ArgumentParser:
    """Return the options that say what of a study is meant, in every command about studies."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("selection")
    group.add_argument("--profile", metavar="P", help="the scale; default: laptop, or pictures with --data")
    group.add_argument("--data", type=folder_or_uri, metavar="DIR", help=_DATA_HELP)
    group.add_argument(
        "--variants", type=_names, metavar="A,B|all", help="which variants; the baseline is always among them"
    )
    group.add_argument("--seeds", type=int, metavar="N", help="one look of N seeds with alpha .05")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeatable")
    group.add_argument("--budget", metavar="10m", help="start no further look after this time")
    group.add_argument("--tracking-uri", metavar="URI", help="of another MLflow than the one in the runs folder")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _runs_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="the records; default: runs")
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)


def _tell(line: str) -> None:
    _write(sys.stderr, f"{line}\n")


def _write_result(options: argparse.Namespace, described: dict[str, Any], text: str) -> None:
    _write(sys.stdout, json.dumps(described, indent=2) + "\n" if options.json else text)


def _selected(options: argparse.Namespace) -> "Selection":
    from workbench.study_file import Selection

    return Selection(
        profile=options.profile,
        data=local_folder(options.data, tell=_tell),
        variants=options.variants,
        seeds=options.seeds,
        sets=tuple(options.set),
        budget=options.budget,
        tracking_uri=options.tracking_uri,
    )


def _planned(options: argparse.Namespace, *, pictures_needed: bool = False) -> "Plan":
    from workbench.plan import make_plan
    from workbench.study_file import load_study

    return make_plan(load_study(options.study, _selected(options)), pictures_needed=pictures_needed)


def _results(options: argparse.Namespace) -> "StudyResults":
    from workbench.store import Store

    plan = _planned(options)
    results = Store(options.runs, create=False).results_for(plan)
    _warn_of_unreadable(results.unreadable)
    return results


def _warn_of_unreadable(problems: Iterable[str]) -> None:
    for problem in dict.fromkeys(problems):
        _write(sys.stderr, f"Warning: left out of the records: {problem}\n")


def _run(options: argparse.Namespace) -> int:
    plan = _planned(options, pictures_needed=True)

    from workbench.runner import Options, run_study
    from workbench.store import Store

    chosen = Options(
        executor=options.executor,
        until_decided=options.until_decided,
        address=options.address,
        allow_code=options.allow_code,
    )
    return run_study(plan, Store(options.runs), chosen, out=sys.stdout, err=sys.stderr)


def _plan(options: argparse.Namespace) -> int:
    results = _results(options)

    from workbench import forecast

    for warning in results.plan.warnings:
        _write(sys.stderr, f"Warning: {warning}\n")
    described = forecast.describe(results, explain=options.explain)
    _write_result(options, described, forecast.as_text(described))
    return 0


def _check(options: argparse.Namespace) -> int:
    """Validate every study at every profile, or at the one that is named; tell all problems of all of them."""
    from dataclasses import replace

    from workbench.plan import check_data
    from workbench.study_file import load_study, profile_names

    problems: dict[str, None] = {}  # an ordered set
    for path in options.study:
        selection = _selected(options)
        named = selection.profile or selection.data
        profiles = [selection.profile_name()] if named else profile_names(path)
        before = len(problems)
        for profile in profiles:
            try:
                study = load_study(path, replace(selection, profile=profile))
                if selection.data:
                    check_data(study)
            except WorkbenchError as error:
                problems |= dict.fromkeys(str(error).splitlines())
        if len(problems) == before:
            _write(sys.stdout, f"{path}: valid ({', '.join(profiles)})\n")
    if problems:
        raise StudyFileError("\n".join(problems))
    return 0


def _status(options: argparse.Namespace) -> int:
    from workbench import status
    from workbench.store import Store

    if options.study is not None:
        described = status.describe(_results(options))
        _write_result(options, described, status.as_text(described))
        return 0
    store = Store(options.runs, create=False)
    known, unreadable = [], []
    for ref in store.studies():
        try:
            known.append(status.describe(store.results(ref)))
        except StoreError as error:
            unreadable.append(str(error))
    _warn_of_unreadable(unreadable)
    nothing = f"No study has been run in {options.runs}. Begin: python -m workbench run STUDY\n"
    _write_result(options, {"studies": known}, "\n".join(map(status.as_text, known)) or nothing)
    return 0


def _report(options: argparse.Namespace) -> int:
    results = _results(options)

    from workbench.report import render

    text = render(results, format=options.format, out=options.out)
    if options.out is None:
        _write(sys.stdout, text)
    else:
        _write(sys.stderr, f"Written: {options.out}\n")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from workbench.evaluate_command import as_text, evaluate

    options.data = local_folder(options.data, tell=_tell)
    described = evaluate(options, tell=_tell)
    _write_result(options, described, as_text(described))
    return 0


def _sync(options: argparse.Namespace) -> int:
    from workbench.mlflow_mirror import sync
    from workbench.store import Store

    return sync(Store(options.runs), tracking_uri=options.tracking_uri, err=sys.stderr)


def _schema(options: argparse.Namespace) -> int:  # noqa: ARG001 - every command takes the options
    from workbench.study_schema import schema_text

    _write(sys.stdout, schema_text())
    return 0
