"""What `run` costs besides training: to start, between trials, for MLflow; and how it grows with the number of trials.

    python benchmarks/orchestration.py [--trials 20] [--seconds 10] [--without-mirror]
    python benchmarks/orchestration.py --laptop runs/studies/NAME/laptop/PLAN
    python benchmarks/orchestration.py --growth [--out FOLDER]

The first runs `python -m workbench run` in a temporary folder on trials of a real small detector (the laptop profile's,
with steps for about ten seconds, scoring included), as many at once as there are cores. `--without-mirror` runs it
again with the mirror switched off. `--laptop` reads what the last run in the folder of a plan recorded. `--growth`
measures what trials of no length cost (`benchmarks/trial_growth.py`).
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from measure import table
from process_times import ProcessTimes, measured
from trial_growth import growth
from trial_times import trial_times

from workbench.records import StudyResults
from workbench.spending import own_seconds
from workbench.store import Store

STUDY = """\
version: 1
study: overhead
question: What does a run cost besides training?
baseline: w2
variants:
{variants}
claims:
  - {{id: heavier, text: A heavier box loss helps., plus: w3, minus: w2, metric: ap, kind: superiority}}
scope: seeds
"""
SETS = ("data.num_train=1000", "data.num_val=200", "evaluation.training_subset=50", "training.epochs=2")
BATCH = 8  # of the laptop profile
CALIBRATION_STEPS = 40
WITHOUT_MIRROR = (
    "import sys; from workbench import cli, mlflow_mirror as m; m.Mirror.start = lambda self: None; "
    "m.Mirror.finish = lambda self: True; sys.exit(cli.main(sys.argv[2:]))"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a trial, training and scoring")
    parser.add_argument("--without-mirror", action="store_true", help="once more with MLflow switched off")
    parser.add_argument("--laptop", type=Path, metavar="PLAN", help="the folder of a plan that was run")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--out", type=Path, help="where --growth writes its plot")
    options = parser.parse_args()
    if options.growth:
        print(growth(options.out))
    elif options.laptop:
        runs = options.laptop.parents[3]
        print(_time(json.loads((options.laptop / "last_run.json").read_text(encoding="utf-8"))))
        store = Store(runs, create=False)
        ref = next(ref for ref in store.studies() if ref.plan_hash == options.laptop.name)
        print(f"\n{_per_trial(store, store.results(ref))}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            _short_trials(Path(folder), options)


def _short_trials(folder: Path, options: argparse.Namespace) -> None:
    study = folder / "overhead.yaml"
    seeds = 5
    variants = [f"  w{2 + number}: {{why: more, set: {{loss.weight_giou: {2 + number}.0}}}}" for number in range(4)]
    variants[0] = "  w2: {}"
    study.write_text(STUDY.format(variants="\n".join(variants[: options.trials // seeds])), encoding="utf-8")
    pictures = BATCH * _steps(study, folder, options.seconds) // 2  # an epoch, of two
    for number, mirror in enumerate([True, False] if options.without_mirror else [True]):
        runs = folder / f"runs_{number}"
        (runs / "cache").parent.mkdir()
        (runs / "cache").symlink_to(folder / "calibration" / "cache")  # pictures are drawn already
        start = ("-m", "workbench") if mirror else ("-c", WITHOUT_MIRROR, "workbench run")
        command = [sys.executable, *start, "run", str(study), "--seeds", str(seeds), "--variants", "all"]
        found = measured([*command, *_options(pictures), "--runs", str(runs)], env=dict(os.environ))
        if found.code:
            sys.exit(found.err)
        store = Store(runs)
        (ref,) = store.studies()
        spent = json.loads((ref.path / "last_run.json").read_text(encoding="utf-8"))
        spent["start"] += found.wall - spent["wall"]  # imports of the command, and its end
        spent["wall"] = found.wall
        print(f"\n{'With' if mirror else 'Without'} the mirror of MLflow:\n\n{_time(spent)}")
        if mirror:
            print(f"\n{_per_trial(store, store.results(ref))}\n\n{_processes(found, spent)}")


def _steps(study: Path, folder: Path, seconds: float) -> int:
    """Return how many steps make a trial of about `seconds`."""
    runs = folder / "calibration"
    command = [sys.executable, "-m", "workbench", "run", str(study), "--executor", "inline", "--seeds", "1"]
    command += [*_options(BATCH * CALIBRATION_STEPS // 2), "--runs", str(runs), "--variants", "w2"]
    found = measured(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.code:
        sys.exit(found.err)
    store = Store(runs)
    (ref,) = store.studies()
    (record,) = store.results(ref).records.values()
    scoring = _own(store, record.trial_id) - record.seconds
    return max(2, round((seconds - scoring) / (record.seconds / record.step)))


def _options(pictures: int) -> list[str]:
    sets = [*SETS, f"training.epoch_pictures={pictures}"]
    return ["--profile", "laptop", *(part for item in sets for part in ("--set", item))]


def _own(store: Store, trial_id: str) -> float:
    return own_seconds(store.events(trial_id)) + store.scoring_seconds(trial_id, since=0.0)


def _time(spent: dict[str, Any]) -> str:
    own, slots, wall = spent["own"], spent["slots"], spent["wall"]
    rest = wall - spent["start"] - own / slots
    cpu, mirror = os.cpu_count() or 1, spent["mirror_cpu_seconds"]
    rows = [
        ("wall", f"{wall:.1f}", ""),
        ("until the first trial trained, once", f"{spent['start']:.1f}", ""),
        (f"training and scoring of {spent['trials']} trials, {slots} at once", f"{own / slots:.1f}", ""),
        ("the rest", f"{rest:.1f}", f"{rest / wall:.1%}"),
        ("CPU of the mirror, once, to import MLflow and open its database", f"{mirror['connect']:.2f}", ""),
        ("CPU of the mirror, to send", f"{mirror['send']:.2f}", f"{mirror['send'] / wall / cpu:.2%} of all cores"),
    ]
    return table(("a run", "s", "share"), rows)


def _per_trial(store: Store, results: StudyResults) -> str:
    times = trial_times(store, [trial.trial_id for trial in results.asked_for()])
    columns = {name: [asdict(item)[name] for item in times] for name in asdict(times[0])}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    total = sum(fmean(values) for values in known.values())
    rows = [
        (name.replace("_", " "), f"{fmean(values):.3f}", f"{max(values):.3f}", f"{fmean(values) / total:.1%}")
        for name, values in known.items()
    ]
    return table((f"a trial of {len(times)}, in order", "mean s", "most s", "share"), rows)


def _processes(found: ProcessTimes, spent: dict[str, Any]) -> str:
    cores = os.cpu_count() or 1
    rows = [
        (kind, f"{found.first[kind]:.1f}", f"{cpu:.1f}", f"{cpu / spent['wall'] / cores:.1%}")
        for kind, cpu in found.cpu.most_common()
    ]
    return table(("processes", "first seen at s", "CPU s", "of all cores"), rows)


if __name__ == "__main__":
    main()
