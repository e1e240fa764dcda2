"""Rebuilding records from MLflow: equal to the originals, never over what differs, and nothing on a stranger's word."""

import io
import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from dashboard import load
from workbench import durable
from workbench.errors import WorkbenchError
from workbench.fetch import fetch
from workbench.mlflow_mirror import default_uri, sync
from workbench.mlflow_mirror.download import Remote
from workbench.placing import MARK
from workbench.record_files import Entry, allowed, manifest, read_manifest
from workbench.report import render
from workbench.store import Store
from workbench.trial import execute
from workbench.verdict import judge

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def origin(store, toy_plan, toy_trainer, empty_database):
    """Return a store with a study that has run, with a failure and a divergence in it, and its MLflow."""
    return mirrored(store, toy_plan, toy_trainer, empty_database)


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


def mirrored(store, toy_plan, toy_trainer, empty_database):
    """Run the toy study and send it to the store's embedded MLflow."""
    store.mlflow_database.write_bytes(empty_database.read_bytes())
    ref = store.register(toy_plan, source=toy_plan.study.path.read_text())
    store.start_look(ref, 1)
    trainers = (toy_trainer(), toy_trainer(outcome="diverged"), toy_trainer(before_step=_fail), toy_trainer())
    for spec, trainer in zip(toy_plan.specs.values(), trainers, strict=True):
        execute(spec, store.root, should_stop=lambda: False, trainer=trainer)
    store.save_verdicts(ref, judge(store.results(ref)))
    store.save_last_run(ref, {"seconds": 3.0})
    assert sync(store, err=io.StringIO()) == 0
    return store


def fetched(origin, folder, **options):
    """Fetch the toy study from a store's embedded MLflow; return the code, the new store and what was said."""
    target, out, err = Store(folder), io.StringIO(), io.StringIO()
    uri = options.pop("tracking_uri", default_uri(origin))
    code = fetch(target, tracking_uri=uri, study="toy", out=out, err=err, **options)
    return code, target, out.getvalue() + err.getvalue()


def results_of(store):
    """Return a store's only study."""
    (ref,) = store.studies()
    return store.results(ref)


def files_of(store):
    """Return the text of every file of a store's records, but where they came from."""
    paths = [
        path for path in store.root.rglob("*") if path.is_file() and path.relative_to(store.root).parts[0][0] != "."
    ]
    return {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in paths
        if path.relative_to(store.root).parts[0] in ("trials", "studies")
        and path.name not in ("fetched.json", "mlflow.json", "report.md", "driver.lock")
        and "checkpoints" not in path.parts
        and path.suffix != ".beat"  # a sign of life
        and not (path.parts[-6:-5] == ("studies",) and path.parent.name == "attempts")  # drivers of one machine
        and path.suffix != ".png"
    }


def assert_equal(origin, copy):
    """Records, report and what the dashboard draws are those of the original."""
    here, there = results_of(origin), results_of(copy)
    same_folder = replace(there, runs=here.runs, mlflow=here.mlflow)  # a report ends with lines that name the folder
    assert same_folder == here
    assert render(same_folder, format="text") == render(here, format="text")
    assert render(same_folder, format="html") == render(here, format="html")
    ours, theirs = (load.trials(store.root, of).drop(columns="mlflow") for store, of in ((origin, here), (copy, there)))
    pd.testing.assert_frame_equal(ours, theirs)
    assert load.claim_cards(there) == load.claim_cards(here)
    assert load.progress(there) == load.progress(here)
    assert [replace(item, folder=None) for item in load.failures(copy.root, there)] == [
        replace(item, folder=None) for item in load.failures(origin.root, here)
    ]


@pytest.mark.ci
def test_fetched_records_equal_the_originals(lasting_origin, tmp_path):
    """Every file of every record is there byte for byte; results, report and dashboard are equal, and again so."""
    code, copy, told = fetched(lasting_origin, tmp_path / "copy")
    assert code == 0, told
    assert "4 trials fetched" in told
    assert files_of(copy) == files_of(lasting_origin)
    assert_equal(lasting_origin, copy)
    assert next(copy.root.glob("studies/toy/smoke/*/report.md")).read_text().startswith("#")
    code, _, told = fetched(lasting_origin, tmp_path / "copy")
    assert code == 0
    assert "4 already here" in told
    assert_equal(lasting_origin, copy)


@pytest.mark.ci
def test_a_copy_goes_on_in_the_same_runs(origin, tmp_path, toy_plan, toy_trainer, empty_database):
    """`sync` of a fetched copy adds no run and no point; a trial tried again there is the same run, and comes back."""
    from mlflow import MlflowClient

    _, copy, _ = fetched(origin, tmp_path / "copy")
    client = MlflowClient(default_uri(origin))
    before = _runs(client)
    assert sync(copy, tracking_uri=default_uri(origin), err=io.StringIO()) == 0
    assert _runs(client) == before
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    execute(failed, copy.root, should_stop=lambda: False, trainer=toy_trainer())
    assert sync(copy, tracking_uri=default_uri(origin), err=io.StringIO()) == 0
    assert {run for run, _ in _runs(client)} == {run for run, _ in before}
    third = fetched(origin, tmp_path / "third")[1]
    assert third.state(failed.trial_id) == "finished"
    assert third.record(failed.trial_id).error is None
    assert fetched(origin, tmp_path / "third")[0] == 0
    code, _, told = fetched(origin, origin.root)  # never touched by a fetch, and behind: kept as it is
    assert code == 1
    assert "differs from what is here" in told
    assert origin.state(failed.trial_id) == "failed"


@pytest.mark.ci
def test_what_an_earlier_fetch_put_there_is_brought_up_to_date(origin, tmp_path, toy_plan, toy_trainer):
    """After the origin went on, the copy follows, files that are no more included; one that was changed is kept."""
    _, copy, _ = fetched(origin, tmp_path / "copy")
    changed = fetched(origin, tmp_path / "changed")[1]
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    with (changed.trial_dir(failed.trial_id) / "events.jsonl").open("a") as file:
        file.write("{}\n")
    execute(failed, origin.root, should_stop=lambda: False, trainer=toy_trainer())
    assert sync(origin, err=io.StringIO()) == 0
    code, _, told = fetched(origin, tmp_path / "copy")
    assert code == 0, told
    assert "1 brought up to date" in told
    assert_equal(origin, copy)
    assert files_of(copy) == files_of(origin)
    code, _, told = fetched(origin, tmp_path / "changed")
    assert code == 1
    assert f"trial {failed.trial_id}: differs from what is here" in told
    assert changed.state(failed.trial_id) == "failed"


@pytest.mark.ci
def test_a_trial_without_its_checkpoints_starts_over(origin, tmp_path, toy_plan, toy_trainer):
    """A fetched trial that had not finished can be run: from its start, and the records stay readable throughout."""
    _, copy, _ = fetched(origin, tmp_path / "copy")
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    trainer = toy_trainer()
    execute(failed, copy.root, should_stop=lambda: False, trainer=trainer)
    assert trainer.calls[1] == "train from 0"
    assert copy.record(failed.trial_id).attempts == 2
    assert results_of(copy).records[failed.trial_id].state == "finished"


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
def test_a_plan_that_a_server_has_spoilt_is_refused(origin, tmp_path, spoil, words):
    """Without a plan that can be read no study appears."""
    (path,) = [path for path in origin.mlflow_artifacts.rglob("manifest.json") if (path.parent / "plan.json").exists()]
    spoil(path)
    code, copy, told = fetched(origin, tmp_path / "copy")
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


def _runs(client):
    """Return every run with the points that it has."""
    (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
    runs = client.search_runs([experiment.experiment_id])
    return {
        (run.info.run_id, sum(len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics))
        for run in runs
    }


def _fail(step):
    if step == 3:
        raise RuntimeError("injected")
