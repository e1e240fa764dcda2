"""The command line. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 every planned trial is accounted for; 1 a trial failed, or a gate is not passed; 2 bad input, nothing
started; 3 somebody else runs the study; 4 stopped by a limit of the run; 130 and 143 interrupted. Modules are imported
when their command needs them, so that `--help` and `check` answer at once.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.arguments import doctor_options, evaluate_options, json_option, number, runs_option, selection_options
from workbench.errors import StoreError, StudyFileError, WorkbenchError
from workbench.object_store import local_folder
from workbench.terminal import visible

if TYPE_CHECKING:
    from workbench.records import StudyResults
    from workbench.study import Plan
    from workbench.study_file import Selection

BROKEN_PIPE = 141  # what a shell reports when the reader of a pipe has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` default to the command line's."""
    options = build_parser().parse_args(arguments)
    try:
        code = options.command(options)
        sys.stdout.flush()
    except WorkbenchError as error:
        _tell(str(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        _tell("Interrupted. The same command goes on from here.")
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
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
    selection, runs = selection_options(), runs_option()

    run = _command(commands, "run", _run, "train what is missing, judge the claims, report", [selection, runs])
    run.add_argument("--until-decided", action="store_true", help="go on look by look while a claim is undecided")
    run.add_argument("--executor", choices=("ray", "inline"), default="ray", help="inline: in this process, no Ray")
    run.add_argument("--address", metavar="ADDR", help="of a running Ray cluster")
    run.add_argument("--allow-code", action="store_true", help="run the code that the study's custom parts name")
    run.add_argument("--on-end", metavar="COMMAND|URL", help="told how the run ended, as JSON by stdin or POST")
    run.add_argument("--gpu-hours", type=number, metavar="N", help="limit of all attempts of the study here")
    run.add_argument("--without-gate", action="store_true", help="go on without a passed gate: docs/budget.md")
    run.add_argument("--wait", action="store_true", help="for another run of the same plan to end; else exit code 3")

    for name, wanted, text in (
        ("stop", "stop", "end a running study in good order, from another shell"),
        ("pause", "pause", "let a running study checkpoint and wait, from another shell"),
        ("resume", None, "let a paused study go on"),
    ):
        _command(commands, name, _steer, text, [selection, runs]).set_defaults(wanted=wanted)

    plan = _command(commands, "plan", _plan, "trials, differences, reachable effects and time", [selection, runs])
    plan.add_argument("--explain", action="store_true", help="also each key's value and where it was set")
    plan.add_argument("--gpus", type=number, metavar="N", help="as on a cluster with N GPUs in all")
    plan.add_argument("--probe", action="store_true", help="train a few steps here where no trial is on record")
    plan.add_argument("--allow-code", action="store_true", help="with --probe: run the code of custom parts")
    json_option(plan)

    _command(commands, "check", _check, "validate study files at every profile", [selection], studies="+")

    status = _command(commands, "status", _status, "states, metrics and verdicts", [selection, runs], studies="?")
    json_option(status)

    report = _command(commands, "report", _report, "the verdicts with their evidence", [selection, runs])
    report.add_argument("--format", choices=("text", "md", "html", "latex", "tuned"), default="text")
    report.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")

    evaluate_options(commands).set_defaults(command=_evaluate)

    doctor_options(commands, runs).set_defaults(command=_doctor)

    sync = commands.add_parser("sync", help="bring MLflow up to the records", parents=[runs], allow_abbrev=False)
    sync.add_argument("--tracking-uri", metavar="URI", help="of another MLflow than the one in the runs folder")
    sync.set_defaults(command=_sync)

    fetch = commands.add_parser("fetch", help="rebuild records from MLflow", parents=[runs], allow_abbrev=False)
    fetch.add_argument("--tracking-uri", metavar="URI", required=True, help="of the MLflow that has a copy")
    fetch.add_argument("--study", metavar="NAME", required=True, help="the study's name in its file")
    fetch.add_argument("--profile", metavar="P", help="the scale; default: all")
    fetch.set_defaults(command=_fetch)

    schema = commands.add_parser("schema", help="print the JSON schema of study files, for editors")
    schema.set_defaults(command=_schema)
    return parser


def _command(
    commands: Any, name: str, command: Any, text: str, parents: list[Any], *, studies: str | None = None
) -> Any:
    parser = commands.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
    parser.add_argument("study", type=Path, metavar="STUDY", nargs=studies, help="a study file")
    parser.set_defaults(command=command)
    return parser


def _write(text: str) -> None:
    sys.stdout.write(visible(text))


def _tell(line: str) -> None:
    sys.stderr.write(visible(f"{line}\n"))


def _write_result(options: argparse.Namespace, described: dict[str, Any], text: str) -> None:
    _write(json.dumps(described, indent=2) + "\n" if options.json else text)


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
        _tell(f"Warning: left out of the records: {problem}")


def _run(options: argparse.Namespace) -> int:
    plan = _planned(options, pictures_needed=True)

    from workbench.options import Options
    from workbench.runner import run_study
    from workbench.store import Store

    chosen = Options(
        executor=options.executor,
        until_decided=options.until_decided,
        address=options.address,
        allow_code=options.allow_code,
        wait=options.wait,
        on_end=options.on_end,
        gpu_hours=options.gpu_hours,
        without_gate=options.without_gate,
    )
    return run_study(plan, Store(options.runs), chosen, out=sys.stdout, err=sys.stderr)


def _steer(options: argparse.Namespace) -> int:
    from workbench.steering import steer
    from workbench.store import Store

    _write(steer(_planned(options), Store(options.runs, create=False), options.wanted) + "\n")
    return 0


def _plan(options: argparse.Namespace) -> int:
    results = _results(options)

    from workbench import forecast
    from workbench.costs import machine_for

    for warning in results.plan.warnings:
        _tell(f"Warning: {warning}")
    machine = machine_for(results.plan, gpus=options.gpus)
    if options.probe:
        from workbench.probe import probe_where_needed

        probe_where_needed(results, machine, allow_code=options.allow_code, tell=_tell)
    described = forecast.describe(results, explain=options.explain, machine=machine)
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
            _write(f"{path}: valid ({', '.join(profiles)})\n")
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
        _write(text)
    else:
        _tell(f"Written: {options.out}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from workbench.evaluate_command import as_text, evaluate

    options.data = local_folder(options.data, tell=_tell)
    described = evaluate(options, tell=_tell)
    _write_result(options, described, as_text(described))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """Look at the machine, or with a profile at detector and data."""
    if options.profile is None:
        from workbench import doctor

        if options.checkpoint or options.data or options.record_band:
            raise WorkbenchError("doctor: --checkpoint, --data and --record-band need --profile P")
        findings = doctor.examine(options.runs)
        _write_result(options, doctor.describe(findings), doctor.as_text(findings))
        return 1 if any(item.state == "problem" for item in findings) else 0

    from workbench.gate_command import doctor as gate

    return gate(options, write=lambda described, text: _write_result(options, described, text), tell=_tell)


def _sync(options: argparse.Namespace) -> int:
    from workbench.mlflow_mirror import sync
    from workbench.store import Store
    from workbench.tracking import checked

    uri = options.tracking_uri and checked(options.tracking_uri)
    return sync(Store(options.runs), tracking_uri=uri, err=sys.stderr)


def _fetch(options: argparse.Namespace) -> int:
    from workbench.fetch import fetch
    from workbench.store import Store

    return fetch(
        Store(options.runs),
        tracking_uri=options.tracking_uri,
        study=options.study,
        profile=options.profile,
        out=sys.stdout,
        err=sys.stderr,
    )


def _schema(options: argparse.Namespace) -> int:  # noqa: ARG001 - every command takes the options
    from workbench.study_schema import schema_text

    _write(schema_text())
    return 0
