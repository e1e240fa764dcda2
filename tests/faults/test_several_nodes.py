"""A trial over two nodes by Ray Train, with gloo on CPUs: beside the faults, whose cluster it uses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Nodes, environment
from toys import STUDY, TINY

from core.events import TrainingStarted
from workbench import attempts
from workbench.durable import EventReader

pytestmark = pytest.mark.slow

PATIENCE = 400
OVER_TWO = STUDY.format(name="toy") + "execution: {nodes: 2, retries: 0}\n"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """Return a cluster of two nodes with two cores each."""
    nodes = Nodes((2, 2))
    yield nodes
    nodes.close()


def run(study: Path, runs: Path, *options: str) -> str:
    """Run a tiny study with the real trainer; return what was told."""
    sets = [part for item in TINY for part in ("--set", item)]
    told = ["--seeds", "1", "--runs", str(runs), "--tracking-uri", "http://127.0.0.1:9", *sets, *options]
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "run", str(study), "--profile", "smoke", *told],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_trial_trains_on_two_nodes(two_nodes, tmp_path):
    """One process on each node trains the trial; its record, its losses and its score are those of a single process."""
    (tmp_path / "two.yaml").write_text(OVER_TWO)
    (tmp_path / "one.yaml").write_text(STUDY.format(name="toy"))
    told = run(tmp_path / "two.yaml", tmp_path / "two", "--address", two_nodes.address)
    assert "2 nodes with 4 cores and 0 GPUs can run trials: the same code" in told
    run(tmp_path / "one.yaml", tmp_path / "one", "--executor", "inline")
    folders = sorted((tmp_path / "two" / "trials").iterdir())
    assert [folder.name for folder in folders] == sorted(path.name for path in (tmp_path / "one" / "trials").iterdir())
    for folder in folders:
        other = tmp_path / "one" / "trials" / folder.name
        assert [attempt.outcome for attempt in attempts.read(folder)] == ["finished"]
        results = [json.loads((place / "result.json").read_text()) for place in (folder, other)]
        assert results[0]["step"] == results[1]["step"] > 0
        assert results[0]["provenance"]["world_size"] == 2
        assert results[0]["provenance"]["nodes"] == 2
        assert results[1]["provenance"]["world_size"] == 1
        events = [[item.event for item in EventReader(place / "events.jsonl").poll()] for place in (folder, other)]
        assert sum(isinstance(event, TrainingStarted) for event in events[0]) == 1
        last = [next(event for event in told[::-1] if hasattr(event, "metrics")) for told in events]
        assert last[0].losses["total"] == pytest.approx(last[1].losses["total"], rel=1e-3)
        assert {path.parent.name for path in folder.glob("evaluations/*/metrics.json")}
