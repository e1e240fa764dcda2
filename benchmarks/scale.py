"""What a cluster costs besides training: one look at many records, signs of life, actors of Ray. See docs/scale.md.

`python benchmarks/scale.py [records] [beats] [actors]`; all of them without an argument.
"""

import io
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import table
from trial_growth import STUDY, NoTrainer

from workbench import durable
from workbench.mlflow_mirror import Mirror
from workbench.plan import make_plan
from workbench.progress import Progress
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute

COUNTS = (500, 2000)
BEATS, ACTORS = 2000, 8


def records() -> str:
    """Return the CPU seconds of one look at many trials, all finished, and the system calls that it makes."""
    rows: dict[str, list[str]] = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in _look(count, Path(folder)).items():
                rows.setdefault(name, []).append(value)
    return table(("", *(f"{count:,} trials" for count in COUNTS)), [(name, *values) for name, values in rows.items()])


def _look(count: int, folder: Path) -> dict[str, str]:
    (folder / "many.yaml").write_text(STUDY, encoding="utf-8")
    plan = make_plan(load_study(folder / "many.yaml", Selection(profile="smoke", seeds=count // 2)))
    store = Store(folder / "runs")
    first, *others = plan.specs
    trainer: Any = NoTrainer()
    execute(plan.specs[first], store.root, should_stop=lambda: False, trainer=trainer)
    for trial_id in others:
        shutil.copytree(store.trial_dir(first), store.trial_dir(trial_id))
        path = store.trial_dir(trial_id) / "result.json"
        durable.write_derived(path, {**(durable.read_json(path) or {}), "trial_id": trial_id})
    states = {store.state(trial_id) for trial_id in plan.specs}
    if states != {"finished"}:
        raise RuntimeError(f"not what was to be measured: {states}")
    store = Store(folder / "runs")
    ref = store.register(plan, source="")
    time.sleep(3)  # until the files are settled
    mirror = Mirror(store, ref, plan, tracking_uri=None, warn=print)
    progress = Progress(store, plan.trials, concurrency=2, stream=io.StringIO())
    found = {"files": f"{sum(len(files) for _, _, files in os.walk(store.root / 'trials')):,}"}
    for name, work in (
        ("first look of a command, s", lambda: Store(folder / "runs").results_for(plan)),
        ("each further look of it, s", lambda: store.results_for(plan)),
        ("a look of the progress lines, s", progress.update),
        ("a look of the mirror, s", mirror._sender.up_to_date),
    ):
        began = time.process_time()
        work()
        found[name] = f"{time.process_time() - began:.3f}"
    found["memory of the process so far, MB"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}"
    return found


def beats() -> str:
    """Return how long a sign of life takes on this disk: a small file opened, written in place and closed."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        paths = [Path(folder, str(number)) for number in range(100)]
        began, cpu = time.perf_counter(), time.process_time()
        for number in range(BEATS):
            handle = os.open(paths[number % 100], os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(handle, f"{number}".ljust(40).encode(), 0)
            os.close(handle)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return table(("a beat", "us"), [("wall", f"{wall / BEATS * 1e6:.0f}"), ("CPU", f"{cpu / BEATS * 1e6:.0f}")])


def actors() -> str:
    """Return how long Ray takes to start actors that import what a slot does, one core for each of two at a time."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 1024**2
    )

    @ray.remote(num_cpus=1)
    class Actor:
        def ready(self) -> int:
            import workbench.trial

            return len(workbench.trial.__name__)

    ray.get(ray.remote(num_cpus=0)(lambda: 0).remote())  # a first process takes longer
    began = time.perf_counter()
    for _ in range(ACTORS // 2):
        two = [Actor.remote() for _ in range(2)]
        ray.get([actor.ready.remote() for actor in two])
        for actor in two:
            ray.kill(actor)
    wall = time.perf_counter() - began
    ray.shutdown()
    return table(("actors", "s each, two at a time"), [(f"{ACTORS}", f"{wall / ACTORS:.2f}")])


if __name__ == "__main__":
    parts = {"records": records, "beats": beats, "actors": actors}
    for name in sys.argv[1:] or parts:
        print(f"{name} (load of this machine: {os.getloadavg()[0]:.1f})\n\n{parts[name]()}\n")
