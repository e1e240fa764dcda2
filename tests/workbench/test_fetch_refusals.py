"""What `fetch` refuses: nothing is taken on a stranger's word, and the rest comes all the same."""

import json
import shutil

import pytest
from mirroring import fetched, mirrored, results_of

from workbench import durable
from workbench.errors import WorkbenchError
from workbench.mlflow_mirror import default_uri
from workbench.mlflow_mirror.download import Remote
from workbench.placing import MARK
from workbench.record_files import Entry, allowed, manifest, read_manifest
from workbench.store import Store

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def lasting_origin(tmp_path_factory, plan_in, toy_trainer, empty_database):
    """Return one for all tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("origin")
    return mirrored(Store(folder / "runs"), plan_in(folder), toy_trainer, empty_database)


@pytest.fixture
def server(lasting_origin, tmp_path):
    """Return it too, to do with its MLflow's files as one likes: they are restored."""
    shutil.copytree(lasting_origin.mlflow_artifacts, tmp_path / "kept")
    yield lasting_origin
    shutil.rmtree(lasting_origin.mlflow_artifacts)
    shutil.move(tmp_path / "kept", lasting_origin.mlflow_artifacts)


def _spoil_json(path):
    path.write_text("[" * 100_000)


def _spoil_name(path):
    plain = json.loads(path.read_text())
    plain["files"]["../../escaped.json"] = plain["files"].pop("spec.json")
    path.write_text(json.dumps(plain))


def _spoil_size(path):
    plain = json.loads(path.read_text())
    plain["files"]["events.jsonl"]["bytes"] = 10
    path.write_text(json.dumps(plain))


def _rewritten(name, text):
    """Replace a file and describe it rightly in the manifest, as a server that lies would."""

    def spoil(path):
        plain = json.loads(path.read_text())
        target = path.parent / name
        target.write_text(text)
        entry = Entry.of(target)
        plain["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
        path.write_text(json.dumps(plain))

    return spoil


@pytest.mark.ci
@pytest.mark.parametrize(
    "spoils",
    [
        {
            "not JSON": _spoil_json,
            "no file of a trial": _spoil_name,
            "larger than it may be": _spoil_size,
        },
        {
            "not the file that its manifest": lambda path: (path.parent / "result.json").write_text("{}"),
            "has no spec.json": lambda path: (path.parent / "spec.json").unlink(),
            "error.json is damaged": _rewritten("error.json", "[" * 100_000),
        },
        {
            "neither finished nor diverged": _rewritten("result.json", '{"format": 1, "trial_id": "other"}'),
            "is of trial 'other'": _rewritten("spec.json", '{"format": 1, "trial_id": "other", "seed": 0}'),
            "later version": _rewritten("spec.json", '{"format": 9}'),
        },
    ],
)
def test_trials_that_a_server_has_spoilt_are_refused(server, tmp_path, spoils):
    """Whatever is wrong with a trial, it is told and left out; the others come, and nothing lies elsewhere."""
    folders = {
        trial.trial_id: path
        for trial in results_of(server).plan.trials
        for path in server.mlflow_artifacts.rglob("manifest.json")
        if (path.parent / "spec.json").exists() and trial.trial_id in (path.parent / "spec.json").read_text()
    }
    spoilt = dict(zip(folders, spoils, strict=False))
    for trial_id, words in spoilt.items():
        spoils[words](folders[trial_id])
    code, copy, told = fetched(server, tmp_path / "deep" / "copy")
    assert code == 1
    for trial_id, words in spoilt.items():
        (line,) = [line for line in told.splitlines() if line.startswith(trial_id)]
        assert words in line
    assert "1 trials fetched, 3 refused" in told
    states = {trial_id: record.state for trial_id, record in results_of(copy).records.items()}
    assert [states[trial_id] for trial_id in spoilt] == ["pending"] * 3
    assert sum(copy.trial_dir(trial_id).exists() for trial_id in states) == 1
    assert [item.name for item in copy.root.iterdir() if item.name.startswith(".")] == []
    assert list(tmp_path.rglob("escaped.json")) == []


@pytest.mark.ci
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "has no manifest.json of it"),
        (_rewritten("plan.json", '{"format": 1}'), "cannot be read"),
        (_rewritten("plan.json", "{"), "plan.json is damaged"),
        (_rewritten("registered.json", '{"format": 1, "registered_at": "../.."}'), "ValueError"),
    ],
)
def test_a_plan_that_a_server_has_spoilt_is_refused(server, tmp_path, spoil, words):
    """Without a plan that can be read no study appears."""
    (path,) = [path for path in server.mlflow_artifacts.rglob("manifest.json") if (path.parent / "plan.json").exists()]
    spoil(path)
    code, copy, told = fetched(server, tmp_path / "copy")
    assert code == 1
    assert words in told
    assert copy.studies() == ()


@pytest.mark.ci
def test_bad_input_of_fetch_is_one_line(lasting_origin, tmp_path):
    """A study, profile or database that is not there, and a name that is none, end with a sentence."""
    with pytest.raises(WorkbenchError, match="has no study toy at profile coco"):
        fetched(lasting_origin, tmp_path / "copy", profile="coco")
    with pytest.raises(WorkbenchError, match="--profile %: letters"):
        fetched(lasting_origin, tmp_path / "copy", profile="%")
    with pytest.raises(WorkbenchError, match="is no file"):
        fetched(lasting_origin, tmp_path / "copy", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(WorkbenchError, match="cannot be read"):
        fetched(lasting_origin, tmp_path / "copy", tracking_uri="http://127.0.0.1:9")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.ci
def test_a_file_that_s3_has_not_is_missing(lasting_origin, tmp_path, monkeypatch):
    """Where artifacts lie in S3 the client asks it itself: a trial without a manifest stops no other."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    missing = RuntimeError("An error occurred (404) when calling the HeadObject operation: Not Found")
    missing.response = {"Error": {"Code": "404"}, "ResponseMetadata": {"HTTPStatusCode": 404}}  # as botocore has it
    download, asked = LocalArtifactRepository._download_file, []

    def lack(self, name, path):
        asked.append(name)
        if name == "manifest.json" and asked.count(name) == 2:  # the first trial's, after the plan's
            raise missing
        return download(self, name, path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", lack)
    code, _, told = fetched(lasting_origin, tmp_path / "copy")
    assert (code, told.strip().partition(": ")[2]) == (0, "3 trials fetched, 1 not finished when they were copied")


@pytest.mark.ci
def test_a_file_that_grows_beyond_its_size_is_cut_off(lasting_origin, tmp_path):
    """A server need not send what it said it would: writing stops at the size of the manifest."""
    remote = Remote(default_uri(lasting_origin))
    (plan,) = remote.plans("toy", "smoke")
    with pytest.raises(ValueError, match="larger than it may be"):
        remote.file(plan.run_id, "plan.json", Entry(bytes=100, sha256="0" * 64), tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size <= 100
    shutil.copyfile(next(lasting_origin.root.rglob("plan.json")), tmp_path / "larger")  # and only then


@pytest.mark.parametrize(
    "name",
    [
        "../spec.json",
        "/etc/passwd",
        "checkpoints/last.pt",
        "evaluations/../spec.json",
        "spec.json\n",
        "x/spec.json",
        "",
    ],
)
def test_only_files_of_a_record_have_a_name(name):
    """Nothing outside a record, and no checkpoint, is ever asked for."""
    assert not allowed("trial", name)
    assert not allowed("study", name)


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        {"format": 1, "kind": "study", "files": {}},
        {"format": 9, "kind": "trial", "files": {}},
        {"format": 1, "kind": "trial", "files": {"spec.json": 3}},
        {"format": 1, "kind": "trial", "files": {"spec.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"format": 1, "kind": "trial", "files": {"spec.json": {"bytes": 1 << 60, "sha256": "0" * 64}}},
        {"format": 1, "kind": "trial", "files": {"spec.json": {"bytes": True, "sha256": "0" * 64}}},
        {"format": 1, "kind": "trial", "files": {"spec.json": {"bytes": 1, "sha256": "x"}}},
        {"format": 1, "kind": "trial", "files": {f"attempts/{n:06d}.json": {} for n in range(2001)}},
    ],
)
def test_a_manifest_is_read_with_suspicion(plain):
    """What is no manifest of a trial, or one of too many or too large files, is an error with a sentence."""
    with pytest.raises(ValueError, match=r"manifest|bytes"):
        read_manifest("trial", plain)


def test_a_manifest_names_what_a_record_consists_of(tmp_path):
    """Files of a record are in it by size and content, anything else in the folder is not."""
    durable.write_json(tmp_path / "spec.json", {})
    durable.write_json(tmp_path / "attempts" / "0001.json", {})
    durable.write_json(tmp_path / MARK, {})
    durable.write_text(tmp_path / "checkpoints" / "last.pt", "large")
    described = manifest("trial", tmp_path)
    assert read_manifest("trial", json.loads(json.dumps(described))) == {
        name: Entry.of(tmp_path / name) for name in ("spec.json", "attempts/0001.json")
    }
