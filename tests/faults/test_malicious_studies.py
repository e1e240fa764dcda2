"""Studies of strangers that mean harm: none runs code, lasts, leads elsewhere or has credentials sent to its server."""

import json
import os
import socket

import pytest
from mutants import PROFILE, STUDY
from strangers import HEAD, study_of, tiny_plan

from workbench import cli, contacts
from workbench.errors import StudyFileError, WorkbenchError
from workbench.plan import make_plan
from workbench.study_file import Selection, load_study
from workbench.terminal import STEERING

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
    "search": HEAD
    + "variants:\n  v0: {}\n"
    + "".join(f"  v{i}: {{set: {{loss.weight_giou: {i}.5}}}}\n" for i in range(1, 100))
    + "search:\n  configurations: 10\n  space:\n"
    + "".join(
        f"    {key}: {{values: [{', '.join(f'.{value}' for value in range(101, 201))}]}}\n"
        for key in ("training.lr", "training.weight_decay", "loss.weight_l1", "training.lr_backbone")
    ),
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


@pytest.mark.parametrize("named", ["/dev/zero", "pipe", ".", "x" * 300])
def test_settings_of_a_search_are_read_from_a_file_alone(tmp_path, named):
    """A device or a pipe in the place of tuned settings, which might never end, is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    path = study_of(
        tmp_path, HEAD + f"variants: {{v0: {{}}, v1: {{set: {{loss.weight_giou: 4.0}}}}}}\ntuned: {named}\n"
    )
    with pytest.raises(StudyFileError, match=r"tuned: .* cannot be read"):
        load_study(path, Selection(profile="tiny"))


def test_settings_of_a_search_are_not_read_without_end(tmp_path):
    """Of a file that is larger than any of settings no more is read than tells so."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StudyFileError, match="characters; allowed"):
        load_study(study_of(tmp_path, HEAD + "variants: {v0: {}}\ntuned: large\n"), Selection(profile="tiny"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HEAD + "variants: {v0: !<tag:%1b]0;owned%07%1b[31mred> {}}\n", r"the tag tag:\x1b]0;owned\x07\x1b[31mred is"),
        (HEAD + 'variants: {v0: {}}\nwhy: "\\x9b31m"\n', r"the character '\x9b' is not allowed"),
        (HEAD + "variants: {v0: {}}\nwhy: a\u202egnp.exe\n", r"the character '\u202e' is not allowed"),
    ],
)
def test_a_message_steers_no_terminal(tmp_path, capsys, text, shown):
    """What a file holds comes to the screen as text: no escape sequence, no turned direction of writing."""
    assert cli.main(["check", str(study_of(tmp_path, text)), "--profile", "tiny"]) == 2
    said = capsys.readouterr().err
    assert shown in said
    assert not STEERING.search(said)


@pytest.mark.parametrize("name", ["a,b", "a\nb", " a", "", "all"])
def test_variants_have_names_that_can_be_selected(tmp_path, name):
    """A name that `--variants` could not say, or that breaks a table, is refused at its key."""
    text = HEAD + f"variants: {{v0: {{}}, {json.dumps(name)}: {{}}}}\n"
    with pytest.raises(StudyFileError, match="the name of a variant is on one line, without commas"):
        load_study(study_of(tmp_path, text), Selection(profile="tiny"))


def test_what_a_quota_takes_from_other_studies_is_told_before(tmp_path):
    """A study that has checkpoints of others removed says so in its plan, and so before it runs."""
    assert any("of other studies go, too" in line for line in tiny_plan(tmp_path, STUDY).warnings)
    without = tiny_plan(tmp_path, STUDY.replace(", quota: 2GB", ""))
    assert not any("of other studies" in line for line in without.warnings)


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
