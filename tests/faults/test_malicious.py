"""Files of strangers that mean harm: each is refused in words, and what it wanted to happen has not happened."""

import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mutants import PROFILE, STUDY

from core.checkpoint_files import sidecar_of
from workbench import cli, contacts
from workbench.errors import DataError, StoreError, StudyFileError, WorkbenchError
from workbench.mlflow_mirror import sync
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute

ROOT = Path(__file__).parent.parent.parent
HEAD = "version: 1\nstudy: a\nquestion: q\nbaseline: v0\nscope: seeds\n"
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")


class Payload:
    """Makes a file when it is unpickled, as any code could."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


@pytest.fixture
def proof(tmp_path):
    """Return the folder that only a payload makes; it is not there at the end."""
    folder = tmp_path / "the payload ran"
    yield folder
    assert not folder.exists()


def study_of(folder, text, profile=PROFILE):
    """Write a study, with its profile tiny beside it."""
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    (folder / "profiles" / "tiny.yaml").write_text(profile)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def tiny_plan(folder, text=STUDY):
    """Return the plan of a study at the profile tiny."""
    return make_plan(load_study(study_of(folder, text), Selection(profile="tiny")))


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_the_payload_does_run_where_nothing_guards(tmp_path):
    """Else the tests below would prove nothing."""
    folder = tmp_path / "proof"
    path = tmp_path / "file.pt"
    torch.save({"model": Payload(folder)}, path)
    torch.load(path, weights_only=False)
    assert folder.is_dir()


_FORMS = {
    "archive": (torch.save, "holds a posix.mkdir, which reading would run as code"),
    "older form": (
        partial(torch.save, _use_new_zipfile_serialization=False),
        "holds a posix.mkdir, which reading would run as code",
    ),
    "bare pickle": (
        lambda state, path: path.write_bytes(pickle.dumps(state)),
        "cannot be read as a torch checkpoint: it is none",
    ),
}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("ours", [False, True])
def test_evaluate_refuses_a_malicious_checkpoint(tmp_path, proof, capsys, form, ours):
    """In any form, dressed as ours or as an official file: exit code 2 and one line that does not say to trust it."""
    path = tmp_path / "step_000000001.pt"
    save, told = _FORMS[form]
    save({"format": 1, "raw": Payload(proof), "config": {}} if ours else {"model": Payload(proof)}, path)
    assert cli.main(["evaluate", "--checkpoint", str(path), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == 1
    assert "weights_only" not in said


def test_a_trial_does_not_go_on_from_a_malicious_checkpoint(tmp_path, proof):
    """A checkpoint in a runs folder whose checksum holds is still only read as tensors: the trial fails and says so."""
    path = tmp_path / "toy.yaml"
    path.write_text(HEAD + "variants: {v0: {}, v1: {set: {loss.weight_giou: 4.0}}}\n")
    plan = make_plan(load_study(path, Selection(profile="smoke", seeds=1, sets=TINY)))
    store = Store(tmp_path / "runs")
    spec = plan.specs[plan.trials[0].trial_id]
    checkpoint = store.trial_dir(spec.trial_id) / "checkpoints" / "step_000000001.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"format": 1, "step": 1, "raw": Payload(proof)}, checkpoint)
    sidecar_of(checkpoint).write_text(hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    assert execute(spec, store.root, should_stop=lambda: False) == "failed"
    error = store.record(spec.trial_id).error
    assert "posix.mkdir, which reading would run as code" in error["message"]


@pytest.mark.parametrize(
    "backbone",
    [
        "{kind: resnet, depth: 18, frozen_stages: 0, weights: FILE}",
        "{kind: timm, name: resnet18, frozen_stages: 0, weights: FILE}",
    ],
    ids=["torchvision", "timm"],
)
def test_malicious_pretrained_weights_are_not_run(tmp_path, proof, backbone):
    """Weights that a study names are read as tensors alone, by our own reader and by timm's."""
    weights = tmp_path / "weights.pt"
    torch.save({"conv1.weight": Payload(proof)}, weights)
    path = tmp_path / "weights.yaml"
    named = backbone.replace("FILE", str(weights))
    path.write_text(HEAD + f"variants: {{v0: {{set: {{model.backbone: {named}, model.extra_levels: 0}}}}}}\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text(PROFILE)
    plan = make_plan(load_study(path, Selection(profile="tiny", seeds=1)))
    store = Store(tmp_path / "runs")
    (spec,) = plan.specs.values()
    assert execute(spec, store.root, should_stop=lambda: False) == "failed"
    error = store.record(spec.trial_id).error
    assert error["class"] == "bad_config", error
    assert str(weights) in error["message"]
    assert "posix.mkdir, which reading would run as code" in error["message"]


# -------------------------------------------------------------------------------------------------------- studies

_BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "alias of itself": "&a [*a]",
    "brackets": "[" * 90_000,
    "mappings": "{a: " * 20_000,
    "indentation": "".join(f"{' ' * depth}a:\n" for depth in range(400)),
    "keys": HEAD + "variants: {v0: {}}\nset:\n" + "".join(f"  k{i}: 1\n" for i in range(8000)),
    "keys, spread": HEAD + "variants:\n" + "".join(f"  v{i}: {{set: {{k: 1}}}}\n" for i in range(900)),
    "long key": HEAD + "variants: {v0: {}}\n? " + "x" * 90_000 + "\n: 1\n",
    "long value": HEAD.replace("v0", "x" * 90_000) + "variants: {v0: {}}\n",
    "long list": HEAD + "variants: {v0: {}}\nset: {model.strides: [" + ", ".join(["8"] * 18_000) + "]}\n",
    "variants": HEAD + "variants:\n" + "".join(f"  v{i}: {{}}\n" for i in range(950)),
    "claims": HEAD
    + "variants: {v0: {}}\nclaims:\n"
    + "".join(f"  - {{id: c{i}, text: t, plus: x{i}, minus: v0, metric: app, kind: k}}\n" for i in range(900)),
    "profiles": HEAD + "variants: {v0: {}}\nprofiles:\n" + "".join(f"  p{i}: {{}}\n" for i in range(900)),
    "trials": HEAD
    + "variants:\n"
    + "".join(f"  v{i}: {{set: {{training.weight_decay: {i}.0e-6}}}}\n" for i in range(50))
    + "profiles: {tiny: {looks: {seeds: [1000], alpha: [.05]}}}\n",
    "digits": HEAD + f"variants: {{v0: {{set: {{training.lr: {'9' * 90_000}}}}}}}\n",
    "a tag": HEAD + "variants: !!python/object/apply:os.mkdir ['x']\n",
    "size": "#" * 500_000,
}


@pytest.mark.parametrize("bomb", _BOMBS)
def test_a_bomb_is_refused_at_once(tmp_path, bomb):
    """Files that expand, nest or repeat without end cost less than two seconds of CPU time, and a short message."""
    path = study_of(tmp_path, _BOMBS[bomb])
    began = os.times()
    with pytest.raises(StudyFileError) as caught:
        load_study(path, Selection(profile="tiny"))
    ended = os.times()
    assert ended.user + ended.system - began.user - began.system < 2
    assert 0 < len(str(caught.value)) < 40_000


CODE = "import os\nos.mkdir(PROOF)\nclass Mine: ...\n"


def test_code_beside_a_study_is_not_run_without_the_flag(tmp_path, proof, capsys):
    """Commands read a custom part's file and do not run it; run refuses, and names part, file and flag."""
    text = HEAD + 'variants: {v0: {}, v1: {set: {model.box_head: {kind: custom, target: "mine:Mine"}}}}\n'
    path = study_of(tmp_path, text)
    path.with_name("mine.py").write_text(CODE.replace("PROOF", repr(str(proof))))
    options = [str(path), "--profile", "tiny"]
    runs = ["--runs", str(tmp_path / "runs")]
    assert cli.main(["check", *options]) == 0
    for command in ("plan", "status"):
        assert cli.main([command, *options, *runs]) == 0
    capsys.readouterr()
    assert cli.main(["run", *options, *runs, "--executor", "inline"]) == 2
    said = capsys.readouterr().err
    assert "model.box_head: mine:Mine" in said
    assert str(path.with_name("mine.py")) in said
    assert "--allow-code" in said


@pytest.mark.parametrize(
    "code", ["(" * 100_000, "-" * 100_000 + "1", "x = " + "[" * 5_000, "\0", "é".encode("latin-1")]
)
def test_code_that_cannot_be_read_is_told(tmp_path, code):
    """A file that would break Python's own parser breaks nothing else."""
    text = HEAD + 'variants: {v0: {}, v1: {set: {model.box_head: {kind: custom, target: "mine:Mine"}}}}\n'
    path = study_of(tmp_path, text)
    path.with_name("mine.py").write_bytes(code if isinstance(code, bytes) else code.encode())
    with pytest.raises(StudyFileError, match=r"mine\.py"):
        load_study(path, Selection(profile="tiny"))


@pytest.mark.parametrize(
    "target", ["../mine:Mine", "/etc/mine:Mine", "os.path/..:x", "mine:Mine; import os", f"{'a' * 300}:b"]
)
def test_targets_are_names_of_modules(tmp_path, target):
    """A target leads to no file outside the places where modules are looked for."""
    text = HEAD + f'variants: {{v0: {{}}, v1: {{set: {{model.box_head: {{kind: custom, target: "{target}"}}}}}}}}\n'
    with pytest.raises(StudyFileError, match=r"target"):
        load_study(study_of(tmp_path, text), Selection(profile="tiny"))


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "", "/etc/x", "a b", "x" * 61, "a\nb"])
def test_a_study_cannot_name_a_folder_elsewhere(tmp_path, name):
    """Names that become folders of the records are plain words."""
    text = HEAD.replace("study: a", f"study: {json.dumps(name)}") + "variants: {v0: {}}\n"
    with pytest.raises(StudyFileError, match="study: found"):
        load_study(study_of(tmp_path, text), Selection(profile="tiny"))


def test_profiles_are_files_beside_the_study_or_shipped(tmp_path):
    """A profile's name is looked up in a list, never joined to a path."""
    path = study_of(tmp_path, HEAD + "variants: {v0: {}}\n")
    (tmp_path / "other.yaml").write_text(PROFILE)
    with pytest.raises(StudyFileError, match=r"no such profile: '\.\./other'"):
        load_study(path, Selection(profile="../other"))


# ---------------------------------------------------------------------------------------------- whom it contacts


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////tmp/anything.db",
        "file:///etc",
        "databricks",
        "postgresql://me:secret@host/db",
        "http://me:secret@host",
        "https://host/?token=secret",
        "http://",
        "http://host:port",
        "http://[",
        "",
    ],
)
def test_a_study_names_a_server_or_nothing(tmp_path, uri):
    """A file makes no database anywhere and holds no password; the message does not repeat one."""
    text = HEAD + f"variants: {{v0: {{}}}}\nprofiles: {{tiny: {{tracking_uri: {json.dumps(uri)}}}}}\n"
    with pytest.raises(StudyFileError, match="tracking_uri") as caught:
        load_study(study_of(tmp_path, text), Selection(profile="tiny"))
    assert "secret" not in str(caught.value)


SERVED = STUDY.replace("budget: 1h30m", "tracking_uri: http://127.0.0.1:9")


def test_a_server_that_a_file_names_is_told_before_it_is_contacted(tmp_path):
    """Plan and run warn of it; one that the user names needs no warning."""
    plan = tiny_plan(tmp_path, SERVED)
    assert any("run sends its records to http://127.0.0.1:9" in line for line in plan.warnings)
    path = tmp_path / "study.yaml"
    own = make_plan(load_study(path, Selection(profile="tiny", tracking_uri="http://127.0.0.1:9")))
    assert not any("sends its records" in line for line in own.warnings)


def test_credentials_go_to_no_server_that_only_a_file_names(tmp_path, monkeypatch, capsys):
    """Where MLflow's token is set, a server from a file must be confirmed; nothing is started or sent before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        path = study_of(tmp_path, SERVED.replace("http://127.0.0.1:9", uri))
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret-token")
        options = [str(path), "--profile", "tiny", "--runs", str(tmp_path / "runs"), "--executor", "inline"]
        assert cli.main(["run", *options]) == 2
        said = capsys.readouterr().err
        assert f"its tracking_uri {uri} would be sent MLFLOW_TRACKING_TOKEN" in said
        assert "very-secret" not in said
        with pytest.raises(TimeoutError):  # nobody has called
            server.accept()
    study = load_study(path, Selection(profile="tiny"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    contacts.refuse_credentials(study)  # the user's own environment names the same server
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    contacts.refuse_credentials(load_study(path, Selection(profile="tiny", tracking_uri=uri)))
    with pytest.raises(WorkbenchError):
        contacts.refuse_credentials(study)


def test_an_address_with_a_password_is_refused_without_repeating_it(tmp_path):
    """plan.json is copied and shared, so no address that is kept may hold one."""
    path = study_of(tmp_path, STUDY)
    with pytest.raises(StudyFileError, match="--tracking-uri: holds a user, a password or a query") as refused:
        load_study(path, Selection(profile="tiny", tracking_uri="http://me:hunter2@host:5000"))
    assert "hunter2" not in str(refused.value)


# ----------------------------------------------------------------------------------------- data, records, defaults


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg", "..", "a\0b"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_that_lead_out_of_the_folder_are_refused(coco_folder, tmp_path, name, split):
    """Plan, run and evaluate name the file and the entry, before a picture is read."""
    path = coco_folder / "annotations" / f"instances_{split}.json"
    raw = json.loads(path.read_text())
    raw["images"].append({"id": 9, "file_name": name, "width": 4, "height": 4})
    path.write_text(json.dumps(raw))
    study = tmp_path / "study.yaml"
    study.write_text(HEAD + "variants: {v0: {set: {loss.weight_giou: 4.0}}}\n")
    with pytest.raises(DataError, match=r"1 file names lead out of the folder of pictures"):
        make_plan(load_study(study, Selection(profile="pictures", data=coco_folder)))


def test_records_of_strangers_name_no_folder_elsewhere(tmp_path):
    """A plan whose names would lead out of the runs folder is left out, so that sync sends no other file."""
    plain = plan_to_json(tiny_plan(tmp_path))
    trial = plain["trials"][0]["trial_id"]
    text = json.dumps(plain)
    for wrong in ("../../../home", "/etc", "..", ".ssh", "a\\u0000b"):
        with pytest.raises(StoreError, match="a plan with a name that is none"):
            plan_from_json(json.loads(text.replace(trial, wrong)))
    eval_id = next(iter(plain["trials"][0]["evaluations"].values()))
    with pytest.raises(StoreError, match="a plan with a name that is none"):
        plan_from_json(json.loads(text.replace(eval_id, "../../../../.ssh")))
    store = Store(tmp_path / "runs")
    folder = store.root / "studies" / "mutant" / "tiny" / plain["plan_hash"]
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(text.replace(eval_id, "../../../../.ssh"))
    (folder / "registered.json").write_text('{"format": 1, "registered_at": "2026-01-01T00:00:00.000+00:00"}')

    class Screen(list):
        write = list.append

    screen = Screen()
    assert sync(store, tracking_uri="http://127.0.0.1:9", err=screen) == 1
    assert "a plan with a name that is none" in "".join(screen)


UNSAFE = re.compile(
    r"pickle\.loads?\(|read_pickle|allow_pickle|joblib|weights_only=False|yaml\.(unsafe_|full_)?load\(|(?<![\w.])(eval|exec)\("
)


def test_nothing_reads_pickles_of_others():
    """Three places unpickle at all, each what this program has just sent itself; all else reads data only."""
    files = (path for package in ("core", "workbench", "dashboard") for path in (ROOT / package).rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix() for path in files if UNSAFE.search(path.read_text("utf-8"))}
    assert found == {"core/data/loading.py", "workbench/ranks.py", "workbench/template.py"}


def test_the_dashboard_listens_to_this_machine_alone():
    """Its settings, which streamlit reads in the repository's root, bind it to loopback."""
    settings = (ROOT / ".streamlit" / "config.toml").read_text()
    assert 'address = "127.0.0.1"' in settings


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # as in /proc/net/tcp


@pytest.mark.ci
def test_ray_listens_to_this_machine_alone():
    """While a study runs on this machine none of Ray's processes listens where another machine could reach it."""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("needs /proc/net/tcp, which tells who listens")
    command = [sys.executable, str(Path(__file__).with_name("listeners.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    found = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    assert {"gcs_server", "raylet"} <= {name for _, name in found}, done.stderr
    assert {address.partition(":")[0] for address, _ in found} <= LOOPBACK, found


@pytest.mark.ci
def test_rays_token_is_in_no_record_and_no_log(tmp_path):
    """A study under Ray with token authentication leaves the token nowhere in the runs folder, nor on the screen."""
    token = "f00d" * 16
    path = tmp_path / "study.yaml"
    path.write_text(HEAD + "variants: {v0: {}, v1: {set: {loss.weight_giou: 4.0}}}\n")
    sets = [word for item in TINY for word in ("--set", item)]
    command = [sys.executable, "-m", "workbench", "run", str(path), "--profile", "smoke", "--seeds", "1", *sets]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    runs = tmp_path / "runs"
    done = subprocess.run(
        [*command, "--runs", str(runs), "--tracking-uri", "http://127.0.0.1:9"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    files = [file for file in runs.rglob("*") if file.is_file()]
    assert any(file.name == "ray.log" for file in files)
    assert [file for file in files if token.encode() in file.read_bytes()] == []
