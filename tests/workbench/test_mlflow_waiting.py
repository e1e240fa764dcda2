"""How long a run waits for MLflow, and what it says: the copy is never in the way."""

import io
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from mirroring import api_of, curve, run, runs_of, sender_of
from mlflow_server import locks_waited_for

from workbench.commands import mlflow_command
from workbench.mlflow_mirror import Mirror, default_uri, sync
from workbench.mlflow_mirror.sender import Sender
from workbench.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that MLflow imports


@pytest.mark.ci
def test_a_locked_database_delays_the_copy_only(store, toy_plan, toy_trainer, client, ref):
    """While somebody holds the database the mirror says so once and keeps everything; `sync` makes up for it."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    holder = sqlite3.connect(store.mlflow_database)
    holder.execute("BEGIN EXCLUSIVE")
    warnings = []
    with locks_waited_for(300):
        assert not Mirror(store, ref, toy_plan, tracking_uri=None, warn=warnings.append).finish()
    holder.close()
    assert warnings[0].startswith("MLflow cannot be reached")
    assert "python -m workbench sync" in warnings[1]
    assert sync(store, err=io.StringIO()) == 0
    assert runs_of(client, "trial")[spec.trial_id].info.status == "FINISHED"


@pytest.mark.ci
def test_a_place_for_files_that_is_away_delays_the_files_only(store, toy_plan, toy_trainer, client, ref):
    """Curves and statuses go on while an object store is down or its key has expired; the files come later."""
    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    asked = []

    def lose(_run, path, *_):
        asked.append(path)
        raise ConnectionError("the key has expired")

    keep, api.log_file = api.log_file, lose
    with pytest.raises(ConnectionError, match="the key has expired"):
        sender.send(api, last=False)
    children = runs_of(client, "trial")
    assert [len(curve(client, item, "final_averaged/ap")) for item in children.values()] == [1] * 4
    assert {item.info.status for item in children.values()} == {"FINISHED"}
    assert len(asked) == 2  # once for the trials, once for the plan
    assert not sender.up_to_date()
    api.log_file = keep
    sender.send(api, last=True)
    assert sender.up_to_date()
    names = {item.path for item in client.list_artifacts(children.popitem()[1].info.run_id)}
    assert {"manifest.json", "events.jsonl"} <= names


@pytest.mark.slow
def test_drivers_that_make_the_database_at_once_make_one(tmp_path):
    """Two processes that open a database that is not there: neither fails, and both use the same."""
    code = (
        "import sys; from pathlib import Path; from workbench.mlflow_mirror.api import connect\n"
        "api = connect(sys.argv[1], artifacts=Path(sys.argv[2]))\n"
        "print(api.experiment('toy/smoke'))"
    )
    arguments = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new/mlflow.db", str(tmp_path / "artifacts")]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


def test_a_run_does_not_wait_for_a_server_that_never_answers(store, toy_plan, toy_trainer, ref, monkeypatch):
    """A server that takes the connection and says nothing: the command ends after the silence it allows, not later."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        monkeypatch.setattr("workbench.mlflow_mirror.mirror.SILENCE_SECONDS", 0.5)
        run(next(iter(toy_plan.specs.values())), store, toy_trainer())
        warnings = []
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        mirror = Mirror(store, ref, toy_plan, tracking_uri=uri, warn=warnings.append)
        began = time.monotonic()
        assert not mirror.finish()
        assert time.monotonic() - began < 15
        assert warnings == ["MLflow has not everything yet: `python -m workbench sync` brings it up to date."]


def test_a_stopped_run_waits_less(store, toy_plan, ref, monkeypatch):
    """After SIGTERM a batch system kills soon: the limit holds even while MLflow takes what it is sent."""
    api = SimpleNamespace(heard=0.0)

    def send(_self, _api, **_):
        for _ in range(400):
            time.sleep(0.05)
            api.heard = time.monotonic()

    monkeypatch.setattr("workbench.mlflow_mirror.mirror.connect", lambda *_, **__: api)
    monkeypatch.setattr(Sender, "send", send)
    began = time.monotonic()
    assert not Mirror(store, ref, toy_plan, tracking_uri=None, warn=lambda _: None).finish(limit=0.5)
    assert time.monotonic() - began < 10


def test_the_printed_line_is_absolute_and_quoted(tmp_path):
    """The line works from any directory; a server that shows its pages already needs none."""
    store = Store(tmp_path / "my runs")
    line = mlflow_command(default_uri(store))
    assert line is not None
    assert line.endswith(f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/my runs/mlflow.db' --port 5000")
    assert mlflow_command("http://mlflow.example:5000") is None


@pytest.mark.ci
@pytest.mark.parametrize("code", [1000, 1004], ids=["INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"])
def test_what_mlflow_refuses_of_one_trial_does_not_stop_the_others(store, toy_plan, toy_trainer, client, ref, code):
    """A parameter changed by hand and the like: told as a refusal, the other trials are all there."""
    from mlflow.exceptions import MlflowException

    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    bad = next(iter(toy_plan.specs))
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    log = api.log

    def refuse(run_id, *, points=(), **rest):
        if points and client.get_run(run_id).data.tags.get("trial_id") == bad:
            raise MlflowException("too bad", error_code=code)
        log(run_id, points=points, **rest)

    api.log = refuse
    with pytest.raises(MlflowException, match="too bad"):
        sender.send(api, last=True)
    statuses = {trial_id: item.info.status for trial_id, item in runs_of(client, "trial").items()}
    assert statuses == {trial_id: "RUNNING" if trial_id == bad else "FINISHED" for trial_id in toy_plan.specs}
    assert runs_of(client, "plan")["plan"].info.status == "FINISHED"
