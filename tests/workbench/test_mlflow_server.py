"""A server that asks who one is: MLflow's own environment variables answer, and nothing of them is ever kept."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow_server import Door, shared_server

from workbench.errors import WorkbenchError
from workbench.fetch import fetch
from workbench.mlflow_mirror import sync
from workbench.options import Options
from workbench.runner import run_study
from workbench.store import Store
from workbench.tracking import PASSWORD, TOKEN, USER

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WORD, TICKET = "pass-w0rd-of-mine", "t1cket-of-mine"
SECRETS = [text.encode() for text in (WORD, TICKET, base64.b64encode(f"me:{WORD}".encode()).decode())]


@pytest.fixture
def door():
    """Return a door before the server of this test run."""
    server = shared_server()
    server.start()
    door = Door(server, user="me", password=WORD, token=TICKET)
    yield door
    door.close()


@pytest.mark.parametrize("given", [{USER: "me", PASSWORD: WORD}, {TOKEN: TICKET}], ids=["password", "token"])
def test_a_server_with_a_door_takes_and_gives_and_nothing_of_the_key_is_kept(
    given, door, store, toy_plan, toy_trainer, tmp_path, monkeypatch
):
    """Run, sync and fetch through it; no file, no line and no run in MLflow holds the password or the token."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    name = f"door-{len(given)}"
    plan = replace(toy_plan, study=replace(toy_plan.study, name=name))
    out, err = io.StringIO(), io.StringIO()
    options = Options(executor="inline", trainer=toy_trainer(), tracking_uri=door.uri)
    assert run_study(plan, store, options, out=out, err=err) == 0
    assert "cannot be reached" not in err.getvalue()
    assert sync(store, tracking_uri=door.uri, err=err) == 0
    copy = Store(tmp_path / "copy")
    assert fetch(copy, tracking_uri=door.uri, study=name, out=out, err=err) == 0
    assert {copy.state(trial_id) for trial_id in plan.specs} == {"finished"}
    assert door.turned_away == 0
    said = (out.getvalue() + err.getvalue()).encode()
    files = [path for folder in (store.root, copy.root, shared_server().folder) for path in folder.rglob("*")]
    kept = [path for path in files if path.is_file()]
    assert len(kept) > 60
    holding = [path for path in kept if any(secret in path.read_bytes() for secret in SECRETS)]
    assert (holding, [secret for secret in SECRETS if secret in said]) == ([], [])


def test_a_closed_door_is_told_without_the_key(door, store, toy_plan, toy_trainer, tmp_path, monkeypatch):
    """A wrong password stops no training; the line about it repeats nothing of it, though the server does."""
    monkeypatch.setenv(USER, "me")
    monkeypatch.setenv(PASSWORD, wrong := "not-the-pass-w0rd")
    err = io.StringIO()
    options = Options(executor="inline", trainer=toy_trainer(), tracking_uri=door.uri)
    assert run_study(toy_plan, store, options, out=io.StringIO(), err=err) == 0
    assert sync(store, tracking_uri=door.uri, err=err) == 1
    with pytest.raises(WorkbenchError) as refused:
        fetch(Store(tmp_path / "copy"), tracking_uri=door.uri, study="toy", out=io.StringIO(), err=err)
    assert door.turned_away > 0
    said = err.getvalue() + str(refused.value)
    assert said.count("401") == 3
    encoded = base64.b64encode(f"me:{wrong}".encode()).decode()
    assert [text for text in (wrong, encoded) if text in said] == []
    assert not [path for path in store.root.rglob("*") if path.is_file() and wrong.encode() in path.read_bytes()]


def test_a_fetched_study_is_known_to_every_command(door, store, toy_plan, toy_trainer, tmp_path, monkeypatch):
    """From another folder, with the command line: fetch, and status shows the study with its verdicts."""
    monkeypatch.setenv(TOKEN, TICKET)
    plan = replace(toy_plan, study=replace(toy_plan.study, name="commanded"))
    options = Options(executor="inline", trainer=toy_trainer(), tracking_uri=door.uri)
    assert run_study(plan, store, options, out=io.StringIO(), err=io.StringIO()) == 0
    assert sync(store, tracking_uri=door.uri, err=io.StringIO()) == 0  # of a run on a busy machine some may be left
    command = [sys.executable, "-m", "workbench"]
    folder = Path(__file__).parent.parent.parent
    runs = ["--runs", str(tmp_path / "copy")]
    got = subprocess.run(
        [*command, "fetch", "--tracking-uri", door.uri, "--study", "commanded", *runs],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (got.returncode, got.stderr) == (0, "")
    assert "4 trials fetched" in got.stdout
    status = subprocess.run([*command, "status", *runs], cwd=folder, capture_output=True, text=True, check=False)
    assert status.returncode == 0
    assert "commanded" in status.stdout
    assert "sharp_better" in status.stdout
