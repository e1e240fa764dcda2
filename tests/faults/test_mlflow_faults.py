"""Faults of MLflow: away, killed, locked. Training must not notice, and nothing may be lost or there twice."""

import io
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from faults import Fault, Seen, cases
from mlflow_server import locks_waited_for, shared_server
from toys import ToyTrainer, toy_plan

from core.events import StepsTaken
from dashboard import load
from workbench import mirror_content
from workbench.fetch import fetch
from workbench.mirror_content import Feed
from workbench.mlflow_mirror import default_uri, mirror, sync
from workbench.mlflow_mirror.api import Api, answered, connect
from workbench.options import Options
from workbench.report import render
from workbench.runner import run_study
from workbench.store import Store
from workbench.study import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

POINTS = (
    "SELECT tags.value, metrics.key, metrics.value, metrics.timestamp, metrics.step FROM metrics "
    "JOIN tags ON tags.run_uuid = metrics.run_uuid AND tags.key = 'trial_id' "
    "JOIN tags AS studies ON studies.run_uuid = metrics.run_uuid AND studies.key = 'study' WHERE studies.value = '{}'"
)
RUNS = "SELECT run_uuid, status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'study' AND tags.value = '{}'"


@dataclass(kw_only=True)
class DirectTrainer(ToyTrainer):
    """Logs to MLflow from the training loop, as most code does."""

    uri: str

    def train(self, config: Any, *, on_event: Callable[[Any], None], **rest: Any) -> Any:
        """Train, and log each event where it happens."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        run = None

        def log(happened: Any) -> None:
            nonlocal run
            run = run or client.create_run(client.create_experiment(f"direct {time.time()}")).info.run_id
            client.log_metric(run, "step", happened.step)
            on_event(happened)

        return super().train(config, on_event=log, **rest)


def _run(plan: Plan, store: Store, trainer: ToyTrainer, uri: str) -> tuple[int, list[str]]:
    err = io.StringIO()
    options = Options(executor="inline", trainer=trainer, tracking_uri=uri)
    code = run_study(plan, store, options, out=io.StringIO(), err=err)
    return code, [line for line in err.getvalue().splitlines() if line.startswith("MLflow ") and "reached" in line]


def _longest_step(store: Store, trial_ids: Iterable[str]) -> float:
    """Return the longest time between two steps of a trial, in seconds."""
    longest = 0.0
    for trial_id in trial_ids:
        stamped = [item for item in store.events(trial_id) if isinstance(item.event, StepsTaken)]
        times = [datetime.fromisoformat(item.time).timestamp() for item in stamped]
        longest = max([longest, *(after - before for before, after in pairwise(times))])
    return round(longest, 2)


def _missing_and_surplus(plan: Plan, store: Store, rows: list[tuple[Any, ...]]) -> tuple[int, int]:
    """Return how many points of the records MLflow has not, and how many it has too many."""
    expected: Counter[tuple[Any, ...]] = Counter()
    for trial in plan.trials:
        feed = Feed(store, trial.trial_id)
        points, _ = feed.points([0, 0])
        points += feed.final_points(trial, store.record(trial.trial_id))
        expected.update((trial.trial_id, name, value, time, step) for name, value, time, step in points)
    found = Counter(rows)
    assert sum(expected.values()) > 300
    return sum((expected - found).values()), sum((found - expected).values())


def _equal_when_fetched(store: Store, folder: Path, uri: str, study: str) -> bool:
    """Fetch into an empty folder, and compare results, report and what the dashboard draws."""
    copy = Store(folder)
    assert fetch(copy, tracking_uri=uri, study=study, out=io.StringIO(), err=io.StringIO()) == 0
    (ref,), (copied,) = store.studies(), copy.studies()
    here, there = store.results(ref), copy.results(copied)
    there = replace(there, runs=here.runs, mlflow=here.mlflow)
    return (
        there == here
        and render(there, format="text") == render(here, format="text")
        and load.claim_cards(there) == load.claim_cards(here)
        and _table(copy, there) == _table(store, here)
    )


def _table(store: Store, results: Any) -> str:
    trials: pd.DataFrame = load.trials(store.root, results)
    return trials.to_csv()


@dataclass(kw_only=True)
class Outage:
    """MLflow is away from a step of the second trial to the beginning of the last, and its rounds fail meanwhile.

    Nothing is left to chance: the first trial is all there and the second has begun to arrive before, and points are
    seen to have been tried in vain before it comes back. With the protection off a call that fails looks as if it had
    been made.
    """

    arrived: Callable[[], set[str]]  # the trials of which MLflow has points
    strike: Callable[[], object]
    mend: Callable[[], object]
    away: bool = False
    in_vain: int = 0  # points

    @contextmanager
    def failing(self, *, protected: bool) -> Iterator[None]:
        """Count the points that a call could not send; and send often."""
        log = Api.log

        def counted(api: Api, run: str, *, points: Any = (), **rest: Any) -> None:
            away = self.away
            try:
                log(api, run, points=points, **rest)
            except Exception as error:
                if answered(error):
                    raise
                self.in_vain += away * len(points)
                if protected or not points:
                    raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mirror, "SEND_SECONDS", 0.3)
            patch.setattr(Api, "log", counted)
            yield

    def before(self, trial: int, step: int) -> None:
        """Do what is due before a step of a trial; the first of both is 1."""
        if (trial, step) == (2, 8):
            _wait_for(lambda: len(self.arrived()) == 2)
            self.strike()
            self.away = True
        elif (trial, step) == (4, 1):
            _wait_for(lambda: self.in_vain > 0)
            self.mend()
            self.away = False


@dataclass(kw_only=True)
class OutageTrainer(ToyTrainer):
    """Tells the outage of each step before it is taken; of the first before the training begins."""

    outage: Outage
    trials: int = 0

    def train(self, config: Any, *, on_event: Callable[[Any], None], **rest: Any) -> Any:
        """Train."""
        self.trials += 1
        self.outage.before(self.trials, 1)

        def tell(happened: Any) -> None:
            on_event(happened)
            if isinstance(happened, StepsTaken):
                self.outage.before(self.trials, happened.step + 1)

        return super().train(config, on_event=tell, **rest)


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _away_throughout(place: Path, *, protected: bool) -> Seen:
    """No server while the study runs; then it starts, and `sync` is called twice."""
    server = shared_server()
    server.kill()
    name = "away" if protected else "awaydirect"
    plan, store = toy_plan(place, name=name), Store(place / "runs")
    steps = {"steps": 24, "every": 8, "seconds": 0.02}
    trainer = ToyTrainer(**steps) if protected else DirectTrainer(uri=server.uri, **steps)
    began = time.monotonic()
    code, warnings = _run(plan, store, trainer, server.uri)
    seen = {
        "exit": code,
        "warnings": len(warnings),
        "longest_step": _longest_step(store, plan.specs),
        "seconds": round(time.monotonic() - began, 1),
    }
    if not protected:
        return seen
    server.start()
    runs = []
    for _ in range(2):
        assert sync(store, err=io.StringIO()) == 0
        runs.append((sorted(server.rows(RUNS.format(name))), len(server.rows(POINTS.format(name)))))
    missing, surplus = _missing_and_surplus(plan, store, server.rows(POINTS.format(name)))
    return seen | {
        "runs": dict(Counter(status for _, status in runs[0][0])),
        "same_runs": runs[0] == runs[1],
        "missing": missing,
        "surplus": surplus,
        "fetched_equal": _equal_when_fetched(store, place / "copy", server.uri, name),
    }


def _verify_away(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["warnings"] == 1
    assert seen["longest_step"] < 5.0  # a call to MLflow blocks for 20 s and more
    assert seen["seconds"] < 60
    assert seen["runs"] == {"FINISHED": 5}
    assert seen["same_runs"]
    assert (seen["missing"], seen["surplus"]) == (0, 0)
    assert seen["fetched_equal"]


def _copied_through(outage: Outage, plan: Plan, store: Store, uri: str, *, seconds: float, protected: bool) -> Seen:
    """Run a study through an outage, then `sync`; `seconds` is how long a step takes."""
    with outage.failing(protected=protected):
        trainer = OutageTrainer(steps=24, every=8, seconds=seconds, outage=outage)
        code, warnings = _run(plan, store, trainer, uri)
        synced = sync(store, err=io.StringIO())
    return {
        "exit": code,
        "warnings": len(warnings),
        "tried_in_vain": outage.in_vain,
        "longest_step": _longest_step(store, [plan.trials[2].trial_id]),  # trained while MLflow was away
        "synced": synced,
    }


def _killed_and_restarted(place: Path, *, protected: bool) -> Seen:
    """The server is killed while a trial trains, and started again while the study goes on."""
    server = shared_server()
    server.start()
    name = "killed" if protected else "killedforgetful"
    plan, store = toy_plan(place, name=name), Store(place / "runs")
    points = POINTS.format(name)
    outage = Outage(arrived=lambda: {row[0] for row in server.rows(points)}, strike=server.kill, mend=server.start)
    seen = _copied_through(outage, plan, store, server.uri, seconds=0.03, protected=protected)
    missing, surplus = _missing_and_surplus(plan, store, server.rows(points))
    runs = dict(Counter(status for _, status in server.rows(RUNS.format(name))))
    return seen | {"runs": runs, "missing": missing, "surplus": surplus}


def _verify_copy(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["warnings"] == 1
    assert seen["longest_step"] < 5.0  # a call to MLflow blocks for 20 s and more
    assert seen["synced"] == 0
    assert seen["tried_in_vain"] > 0
    assert seen["runs"] == {"FINISHED": 5}
    assert (seen["missing"], seen["surplus"]) == (0, 0)


def _locked_for(seconds: float, *, busy_timeout: int) -> Callable[..., Seen]:
    """Somebody holds the embedded database; `busy_timeout` is MLflow's own in milliseconds, 20,000 as it is.

    The control holds it only until a call has failed.
    """

    def scenario(place: Path, *, protected: bool) -> Seen:
        plan, store = toy_plan(place), Store(place / "runs")
        _open(default_uri(store), store)
        with closing(sqlite3.connect(store.mlflow_database, timeout=30, isolation_level=None)) as holder:
            until = 0.0

            def hold() -> None:
                nonlocal until
                holder.execute("BEGIN EXCLUSIVE")
                until = time.monotonic() + (seconds if protected else 0.0)

            def let_go() -> None:
                _wait_for(lambda: time.monotonic() > until)
                holder.execute("ROLLBACK")

            outage = Outage(arrived=lambda: {row[0] for row in _rows(store, POINTS)}, strike=hold, mend=let_go)
            with locks_waited_for(busy_timeout):
                seen = _copied_through(outage, plan, store, default_uri(store), seconds=0.03, protected=protected)
        missing, surplus = _missing_and_surplus(plan, store, _rows(store, POINTS))
        runs = dict(Counter(status for _, status in _rows(store, RUNS)))
        return seen | {"runs": runs, "missing": missing, "surplus": surplus}

    return scenario


def _rows(store: Store, query: str, study: str = "toy") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store.mlflow_database, timeout=60)) as database:
        return database.execute(query.format(study)).fetchall()


def _open(uri: str, store: Store) -> None:
    """Load MLflow and make the embedded database: the study is not to be over before that is done."""
    connect(uri, artifacts=store.mlflow_artifacts)


def _memory_lost(place: Path, *, protected: bool) -> Seen:
    """All is sent; then what is known of that is lost in every way, and all is sent again, to a file and a server."""
    server = shared_server()
    server.start()
    name = "lost" if protected else "lostnow"
    plan, store = toy_plan(place, name=name), Store(place / "runs")
    _open(default_uri(store), store)
    points: dict[str, list[int]] = {"embedded": [], "server": []}
    with pytest.MonkeyPatch.context() as patch:
        if not protected:  # points carry the time at which they are sent, as MLflow's own calls do
            patch.setattr(mirror_content, "milliseconds", lambda _: time.time_ns() // 1_000_000)
        code, _ = _run(plan, store, ToyTrainer(steps=24, every=8), default_uri(store))
        (known,) = store.root.glob("studies/*/*/*/mlflow.json")
        early = known.read_text().replace(": [24, 24]", ": [8, 8]")  # as before the last rounds, which a kill can lose
        lose: list[Callable[[], object]] = [
            lambda: None,
            known.unlink,
            lambda: known.write_text(known.read_text()[:100]),
            lambda: known.write_text('{"format": 1, "tracking_uri": 3, "runs": 5}'),
            lambda: known.write_text(early),
        ]
        for how in lose:
            how()
            for place_name, uri in (("server", server.uri), ("embedded", default_uri(store))):
                assert sync(store, tracking_uri=uri, err=io.StringIO()) == 0
                rows = _rows(store, POINTS, name) if place_name == "embedded" else server.rows(POINTS.format(name))
                points[place_name].append(len(rows))
    runs = {"embedded": len(_rows(store, RUNS, name)), "server": len(server.rows(RUNS.format(name)))}
    return {"exit": code, "points": points, "runs": runs}


def _verify_memory_lost(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert len({*seen["points"]["embedded"], *seen["points"]["server"]}) == 1
    assert seen["points"]["server"][0] > 300
    assert seen["runs"] == {"embedded": 5, "server": 5}


test_fault, test_control = cases(
    Fault(
        number="F14",
        title="MLflow down for a whole study",
        expected="training never waits, one warning; sync twice gives the same runs once; fetched records are equal",
        scenario=_away_throughout,
        verify=_verify_away,
    ),
    Fault(
        number="F15",
        title="MLflow killed and restarted",
        expected="training never waits, one warning, no point lost or twice",
        scenario=_killed_and_restarted,
        verify=_verify_copy,
    ),
    Fault(
        number="F15b",
        title="what MLflow has is forgotten",
        expected="sent again, to a file and a server, five times: no run and no point is there twice",
        scenario=_memory_lost,
        verify=_verify_memory_lost,
    ),
    Fault(
        number="F16",
        title="SQLite locked beyond MLflow's patience",
        expected="training never waits, one warning, no point lost or twice",
        scenario=_locked_for(3.0, busy_timeout=300),
        verify=_verify_copy,
    ),
    Fault(
        number="F16b",
        title="SQLite locked for 40 s",
        expected="training never waits, one warning, no point lost or twice",
        scenario=_locked_for(40.0, busy_timeout=20_000),
        verify=_verify_copy,
        marks=(pytest.mark.slow,),
    ),
)
