"""Addresses of MLflow, which are stored and shown, hold no secret; and the file systems that databases lie on."""

from dataclasses import replace
from pathlib import Path

import pytest

from workbench import cli, contacts, tracking
from workbench.errors import WorkbenchError
from workbench.filesystem import network_type, type_of
from workbench.mlflow_mirror import Mirror
from workbench.redaction import redact

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that MLflow imports

SECRET = "s3cret-word"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{SECRET}@host:5000",
        f"https://{SECRET}@host",
        f"https://host/?token={SECRET}",
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql+psycopg2://host/db?password={SECRET}",
        f"mysql://host/db?ssl_key={SECRET}",
        f"http://[{SECRET}",
        f"http://host:{SECRET}",
        f"https://host/#{SECRET}",
        "https://",
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(uri, store, toy_plan, toy_study, tmp_path, capsys):
    """On the command line, in a profile and in an old plan: exit code 2, nothing written, the secret not shown."""
    arguments = [str(toy_study), "--runs", str(tmp_path / "none")]
    for command in (
        ["run", *arguments, "--tracking-uri", uri],
        ["sync", "--runs", str(store.root), "--tracking-uri", uri],
        ["fetch", "--runs", str(store.root), "--tracking-uri", uri, "--study", "toy"],
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert "--tracking-uri" in err
        assert SECRET not in err
    toy_study.write_text(toy_study.read_text() + f"profiles: {{laptop: {{tracking_uri: '{uri}'}}}}\n")
    assert cli.main(["run", *arguments]) == 2
    err = capsys.readouterr().err
    assert "tracking_uri" in err
    assert SECRET not in err
    assert not (tmp_path / "none").exists()
    ref = store.register(toy_plan, source="")
    with pytest.raises(WorkbenchError, match="--tracking-uri"):
        Mirror(store, ref, toy_plan, tracking_uri=uri, warn=print)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "https://host/path/",
        "sqlite:////my folder/mlflow.db",
        "postgresql://me@host/db?sslmode=require",
        "file:///folder",
    ],
)
def test_an_address_without_one_is_taken(uri):
    """A user's name alone opens nothing."""
    assert tracking.checked(uri) == uri


def test_answers_are_told_without_what_the_environment_holds(monkeypatch):
    """A server may repeat a header that it does not like."""
    monkeypatch.setenv(tracking.USER, "me")
    monkeypatch.setenv(tracking.PASSWORD, SECRET)
    monkeypatch.setenv(tracking.TOKEN, "token-word")
    told = redact(f"401: Basic bWU6czNjcmV0LXdvcmQ=, {SECRET}, Bearer token-word")
    assert told == "401: Basic ***, ***, Bearer ***"


def test_credentials_in_mlflows_own_file_count_too(toy_plan, tmp_path, monkeypatch):
    """MLflow sends what stands in its file to any server, with no variable set."""
    study = replace(toy_plan.study, tracking_uri="http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    contacts.refuse_credentials(study)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = hunter2\n"
    )
    with pytest.raises(WorkbenchError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
        contacts.refuse_credentials(study)
    assert "~/.mlflow/credentials" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert redact("Who is hunter2?") == "Who is ***?"


def test_a_network_file_system_is_known_by_its_mount(tmp_path):
    """The longest mount point counts, names with spaces too; of two mounts on one point the later covers the other."""
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/x /shared nfs4 rw 0 0\ntmpfs /shared/local tmpfs rw 0 0\n"
        "server:/y /with\\040space lustre rw 0 0\nme@host: /far fuse.sshfs rw 0 0\n"
        "a /twice nfs rw 0 0\nb /twice ext4 rw 0 0\n"
    )
    known = {
        "/home/me/runs": None,
        "/shared/runs/mlflow.db": "nfs4",
        "/sharedother": None,
        "/shared/local/x": None,
        "/with space/runs": "lustre",
        "/far/x": "fuse.sshfs",
        "/twice/x": None,
    }
    assert {path: network_type(Path(path), mounts=mounts) for path in known} == known
    assert type_of(Path("/home"), mounts=mounts) == "ext4"
    assert type_of(Path("/home"), mounts=tmp_path / "none") is None


@pytest.mark.ci
def test_a_database_on_a_network_is_warned_of(store, toy_plan, empty_database, monkeypatch):
    """SQLite's locks cannot be relied on there."""
    store.mlflow_database.write_bytes(empty_database.read_bytes())
    monkeypatch.setattr("workbench.filesystem.network_type", lambda _: "nfs4")
    warnings = []
    ref = store.register(toy_plan, source="")
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=warnings.append).finish()
    (line,) = warnings
    assert "lies on nfs4" in line
    assert "--tracking-uri" in line
