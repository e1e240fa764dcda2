"""What a store of many finished trials costs to read: status, the decision what to run, memory, and the dashboard.

    python benchmarks/records.py [--trials 2000] [--place DIR] [--lines 300] [--classes 80]

Writes a study of two variants with that many trials on record, all finished, as trials of the `coco12` kind leave them
(12 epochs, `--lines` lines of progress, scores of `--classes` classes) but without checkpoints and predictions. Then
each reader is timed in a process of its own, imports included: the least of some rounds. A page is timed up to what is
sent to the browser. The first line is of the one time when nothing is kept in the index yet. MLflow and Ray are left
out: with nothing to run, neither is started.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from workbench import durable
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study import Plan
from workbench.study_file import Selection, load_study

STUDY = """\
version: 1
study: many
question: How long does it take to read them?
baseline: plain
variants:
  plain: {}
  sharp: {why: boxes weigh more, set: {loss.weight_giou: 4.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""
EPOCHS = 12
LIMITS = {"status": "2 s", "decide": "5 s and 500 MB"}

TIMED = """
import io, resource, time
began = time.perf_counter()
{code}
wall = time.perf_counter() - began
print(wall, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
PLANNED = """
from pathlib import Path
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
plan = make_plan(load_study(Path({study!r}), Selection(profile="laptop", seeds={seeds})))
store = Store(Path({runs!r}))
"""
PAGE = """
import sys
from streamlit.testing.v1 import AppTest
sys.argv = ["app.py", "--runs", {runs!r}]
app = AppTest.from_file(APP, default_timeout=600)
app.switch_page("views/VIEW.py")
app.query_params["seeds"] = "true"
app.run()
assert not app.exception, app.exception
""".replace("APP", repr(str(Path(__file__).parents[1] / "dashboard" / "app.py")))
READERS = {
    "status": PLANNED
    + """
from workbench import status
status.as_text(status.describe(store.results_for(plan)))
""",
    "status of all studies": """
from pathlib import Path
from workbench import status
from workbench.store import Store
store = Store(Path({runs!r}))
for ref in store.studies():
    status.as_text(status.describe(store.results(ref)))
""",
    "decide": PLANNED
    + """
from workbench.options import Options
from workbench.driving import Run
ref = store.register(plan, source="")
run = Run(plan, store, ref, wishes=ref.path / "wish", options=Options(executor="inline"), err=io.StringIO())
store.results_for(plan)
assert run._candidates(plan.trials) == () and not run._elsewhere(plan.trials)
run.house.prepare(plan, run._candidates(plan.trials), at_once=1)
""",
    "decide, judge and report": PLANNED
    + """
from workbench.options import Options
from workbench.driving import Run
ref = store.register(plan, source="")
run = Run(plan, store, ref, wishes=ref.path / "wish", options=Options(executor="inline"), err=io.StringIO())
assert run.looks() == 0
run.report()
""",
    "the dashboard's entries": """
from pathlib import Path
from dashboard import load
load.entries(Path({runs!r}))
""",
    **{f"the dashboard's page {view}": PAGE.replace("VIEW", view) for view in ("studies", "compare", "runs")},
}


def write_records(place: Path, *, trials: int, lines: int, classes: int) -> tuple[Path, Plan]:
    """Put finished trials on record, as fast as files can be copied."""
    study, runs = place / "many.yaml", place / "runs"
    study.write_text(STUDY)
    plan = make_plan(load_study(study, Selection(profile="laptop", seeds=trials // 2)))
    store = Store(runs)
    ref = store.register(plan, source=STUDY)
    store.start_look(ref, 1)
    began = datetime.now(UTC) - timedelta(days=1)
    for number, spec in enumerate(plan.specs.values()):
        ap = 0.3 + 0.01 * ((number * 7919) % 100) / 100
        folder = store.trial_dir(spec.trial_id)
        per_class = {f"class {index}": {"ap": ap, "ap50": min(1.0, 1.6 * ap)} for index in range(classes)}
        _write_trial(folder, list(spec.evaluations), ap, per_class, lines=lines, began=began)
    return runs, plan


def _write_trial(
    folder: Path, evaluations: list[str], ap: float, per_class: dict[str, Any], *, lines: int, began: datetime
) -> None:
    scores = dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"), ap)
    metrics = {**scores, "ar_small": ap, "ar_medium": ap, "ar_large": ap, "per_class": per_class, "num_pictures": 5000}
    who = {"host": "node", "boot": "", "pid": 1, "started": 1}
    attempt = {"number": 1, "worker": who, "driver": who, "began_at": began.isoformat(), "outcome": "finished"}
    provenance = {"code_hash": "c0de", "torch": "2.14.1", "threads": 1, "device": "cpu", "kernel": "torch"}
    durable.write_derived(folder / "attempts" / "0001.json", {**attempt, "seconds": 9.0, "cpu_seconds": 9.0})
    for eval_id in evaluations:
        scored = {"eval_id": eval_id, "weights_hash": "f00", "metrics": metrics, "seconds": 1.0}
        durable.write_derived(folder / "evaluations" / eval_id / "metrics.json", scored)
    (folder / "events.jsonl").write_text("\n".join(_events(metrics, lines, began)) + "\n")
    result = {"trial_id": folder.name, "outcome": "finished", "reason": "", "step": lines, "weights_hash": "f00"}
    costs = {"seconds": 9.0, "total_seconds": 9.0, "finished_at": (began + timedelta(hours=9)).isoformat()}
    durable.write_derived(folder / "result.json", {**result, **costs, "provenance": provenance})


def _events(metrics: dict[str, Any], lines: int, began: datetime) -> list[str]:
    every = max(1, lines // EPOCHS)
    common = {"grad_norm": 0.5, "learning_rate": 1e-4, "pictures_per_s": 90.0, "losses": {"class": 1.0, "l1": 0.5}}
    total = {"total_steps": lines, "total_epochs": EPOCHS, "num_parameters": 7, "threads": 1, "device": "cpu"}
    found = [{"kind": "training_started", "step": 0, "process_id": 1, **total}]
    for step in range(1, lines + 1):
        found += [{"kind": "steps_taken", "step": step, "epoch": step / every, "seconds": 5.0 * step, **common}]
        if step % every == 0:
            epoch = {"kind": "epoch_finished", "step": step, "epoch": step // every, "peak_memory_bytes": 2**30}
            found += [{**epoch, "seconds": 5.0 * step, "metrics": {"averaged": metrics}, **common}]
    time = began.isoformat(timespec="milliseconds")
    return [json.dumps({"format": 1, "time": time, "attempt": 1, **item}, separators=(",", ":")) for item in found]


def timed(code: str) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak MiB of code in a fresh process, its imports included."""
    told = subprocess.run(
        [sys.executable, "-c", TIMED.format(code=code)], check=True, capture_output=True, text=True, timeout=600
    )
    wall, cpu, mebibytes = told.stdout.split()
    return float(wall), float(cpu), float(mebibytes)


def main() -> None:
    """Write the records and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, help="where to write, and leave, them; default: a temporary folder")
    parser.add_argument("--without", nargs="*", default=[], metavar="READER", help="leave these lines out")
    options = parser.parse_args()
    place = options.place or Path(tempfile.mkdtemp())
    try:
        shutil.rmtree(place / "runs", ignore_errors=True)
        runs, plan = write_records(place, trials=options.trials, lines=options.lines, classes=options.classes)
        mebibytes = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file()) / 2**20
        print(f"{len(plan.specs)} finished trials, {mebibytes:.0f} MiB of records\n")
        print("| reader | wall, s | CPU, s | peak, MiB | limit |\n|---|---|---|---|---|")
        readers = {"status, nothing in the index": READERS["status"], **READERS}
        for name, code in ((name, code) for name, code in readers.items() if name not in options.without):
            filled = code.format(study=str(place / "many.yaml"), runs=str(runs), seeds=options.trials // 2)
            rounds = [timed(filled) for _ in range(options.rounds if name in READERS else 1)]
            wall, cpu, _ = (min(column) for column in zip(*rounds, strict=True))
            peak = max(column[2] for column in rounds)
            print(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} | {LIMITS.get(name, '')} |", flush=True)
    finally:
        if options.place is None:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
