"""The lines that users copy: what repeats a study, goes on with it or shows it, as if typed in this working directory.

Reports, `status`, the runner and the dashboard take them from here, so that they never disagree.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from workbench import provenance
from workbench.records import StudyResults, Verdict
from workbench.search import outcomes
from workbench.study import Search
from workbench.user_code import FLAG

DEFAULT_RUNS = "runs"


def command(results: StudyResults, *options: str, verb: str = "run", selection: Sequence[str] | None = None) -> str:
    """Return the line that does something with this study: same file, selection and runs folder, and more `options`.

    An option replaces the one of the same name in the selection. `selection` takes the place of the study's own.
    """
    study = results.plan.study
    words = study.selection if selection is None else selection
    chosen = [
        word
        for option, value in zip(words[::2], words[1::2], strict=True)
        if option not in options
        for word in (option, value)
    ]
    path = _from_here(study.path)
    code = [FLAG] if verb == "run" and any(spec.code for spec in results.plan.specs.values()) else []
    return shlex.join(["python", "-m", "workbench", verb, path, *chosen, *_runs(results.runs), *code, *options])


def next_run(results: StudyResults) -> tuple[str, str] | None:
    """Return why the study is to be run again and the line that does it.

    None while one of its trials runs, and when another run could add nothing.
    """
    study = results.plan.study
    states = Counter(results.records[trial.trial_id].state for trial in results.asked_for())
    if states["running"]:
        return None
    if study.search is not None:
        return _next_of_search(results, study.search)
    if states["failed"]:
        return "Trials failed. Read their errors; this line then tries them once more:", command(results)
    if states["interrupted"]:
        return "Nothing of it runs now. This line goes on from the checkpoints:", command(results)
    if states["pending"]:
        return "Nothing of it runs now. This line runs what is missing:", command(results)
    if not study.gives_verdicts:
        why = f"Profile {study.profile} tests the plumbing and gives no verdict. The default profile does:"
        return why, command(results, selection=())
    if any(wants_seeds(results, verdict) for verdict in results.verdicts):
        return "Claims are undecided. This line goes on, look by look:", command(results, "--until-decided")
    return None


def _next_of_search(results: StudyResults, search: Search) -> tuple[str, str]:
    if any(outcome.over < search.configurations for outcome in outcomes(results).values()):
        return "The search is not complete. This line goes on:", command(results)
    study = results.plan.study
    file = f"{study.path.parent}/tuned/{study.name}.{study.profile}.yaml"
    line = command(results, "--format", "tuned", "--out", file, verb="report")
    return "The best settings go into a file that a study names under tuned:", line


def wants_seeds(results: StudyResults, verdict: Verdict) -> bool:
    """Return whether a claim is undecided for want of seeds and a look with more of them is planned."""
    return verdict.more_seeds and results.looks_started < len(results.plan.study.looks)


def dashboard_command(runs: Path) -> str:
    """Return the line that opens the dashboard on a runs folder, for this machine alone."""
    root = Path(__file__).resolve().parent.parent
    # Elsewhere streamlit does not find our settings, listens to every network and reports its use to its makers.
    settings = [] if Path.cwd() == root else ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false"]
    ours = ["--", *named] if (named := _runs(runs)) else []
    words = ["run", _from_here(root / "dashboard" / "app.py"), *settings, *ours]
    return f"{provenance.tool('streamlit')} {shlex.join(words)}"


def mlflow_command(tracking_uri: str) -> str | None:
    """Return the line that opens MLflow's pages; None where a server shows them already."""
    if tracking_uri.startswith("http"):
        return None
    return f"{provenance.tool('mlflow')} ui --backend-store-uri {shlex.quote(tracking_uri)} --port 5000"


def _runs(folder: Path) -> list[str]:
    return [] if folder.absolute() == Path.cwd() / DEFAULT_RUNS else ["--runs", _from_here(folder)]


def _from_here(path: Path) -> str:
    """Return a path as it is typed here: not as an option, whatever it is called."""
    here = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f"./{here}" if here.startswith("-") else here
