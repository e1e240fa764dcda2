"""Pictures and records of strangers that mean harm: nothing is read or written elsewhere, and texts stay texts."""

import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from mutants import STUDY
from strangers import HEAD, study_of, tiny_plan

from dashboard import charts, load, parts
from workbench import cli, commands, contacts, durable, report
from workbench.errors import DataError, StoreError, WorkbenchError
from workbench.mlflow_mirror import sync
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.terminal import STEERING as STEERING_CHARACTERS
from workbench.trial import execute
from workbench.verdict import judge

ROOT = Path(__file__).parent.parent.parent


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


def test_a_small_file_does_not_become_a_huge_picture(tmp_path):
    """A picture of more pixels than anybody trains with counts as unreadable, and no memory is taken for it."""
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_of_zeros(width=16_384, height=16_384))
    assert path.stat().st_size < 1 << 20
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from core.data.decoding import decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert decode(Path(sys.argv[1])) is None\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert int(done.stdout) < 100, done.stderr


def _png_of_zeros(*, width, height):
    """Return a PNG file, one bit a pixel."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + width // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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

    screen = StringIO()
    assert sync(store, tracking_uri="http://127.0.0.1:9", err=screen) == 1
    assert "a plan with a name that is none" in screen.getvalue()


@pytest.mark.parametrize("place", ["events.jsonl", "checkpoints", "provenance/0001.json", "."])
def test_nothing_is_written_through_a_link_in_a_trial(tmp_path, place):
    """A link in a trial's folder, or in the folder's place, is refused before a line of the trial is written."""
    plan, store = tiny_plan(tmp_path), Store(tmp_path / "runs")
    outside = tmp_path / "outside"
    outside.mkdir()
    spec = plan.specs[plan.trials[0].trial_id]
    link = store.trial_dir(spec.trial_id) / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "file" if link.suffix else outside)
    with pytest.raises(StoreError, match=r"is a link to .*outside"):
        store.register(plan, source="")
    with pytest.raises(StoreError, match=r"is a link to .*outside"):
        execute(spec, store.root, should_stop=lambda: False)
    assert list(outside.iterdir()) == []


def test_a_report_is_not_written_through_a_link(tmp_path, capsys):
    """The question of a stranger's study does not become a line of a file that a link in its records leads to."""
    path = study_of(tmp_path, STUDY)
    keys = tmp_path / "authorized_keys"
    keys.write_text("mine\n")
    folder = Store(tmp_path / "runs").study_dir(tiny_plan(tmp_path))
    folder.mkdir(parents=True)
    (folder / "report.md").symlink_to(keys)
    runs = ["--runs", str(tmp_path / "runs"), "--executor", "inline"]
    assert cli.main(["run", str(path), "--profile", "tiny", *runs]) == 2
    assert "report.md: is a link to" in capsys.readouterr().err
    assert keys.read_text() == "mine\n"


@pytest.mark.parametrize("option", ["--on-end", "--allow-code", "--on-end=touch x", "--runs", "x"])
def test_lines_to_copy_hold_no_option_of_a_stranger(tmp_path, option):
    """A record whose selection would make the line that repeats it run a command cannot be read."""
    plain = plan_to_json(tiny_plan(tmp_path))
    plain["study"]["selection"] += [option, "touch x"]
    with pytest.raises(StoreError, match="one that chooses nothing of a study"):
        plan_from_json(plain)


def test_a_study_file_that_is_called_like_an_option_is_still_a_file(tmp_path):
    """The line that repeats a study names its file, whatever that is called."""
    plan, store = tiny_plan(tmp_path), Store(tmp_path / "runs")
    plain = plan_to_json(plan)
    plain["study"]["path"] = "--on-end=touch x"
    results = store.results_for(plan_from_json(plain))
    assert "run './--on-end=touch x' " in commands.command(results)


STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\ud800"


def test_texts_of_records_steer_no_terminal(tmp_path, capsys):
    """What a stranger wrote into a plan comes out of status and report as escapes, on every stream."""
    plan, store = tiny_plan(tmp_path), Store(tmp_path / "runs")
    folder = store.register(plan, source="").path
    named = json.loads(json.dumps(plan_to_json(plan)).replace('"sharp"', json.dumps(STEERING)))
    durable.write_json(folder / "plan.json", named)
    runs = ["--runs", str(store.root)]
    assert cli.main(["status", *runs]) == 0
    named["study"]["scope"] = "x"  # which no plan is: the message tells the place with the value
    named["trials"][0]["trial_id"] = STEERING
    durable.write_json(folder / "plan.json", named)
    assert cli.main(["status", *runs]) == 0
    said = "".join(capsys.readouterr())
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\ud800" in said
    assert not STEERING_CHARACTERS.search(said)


def test_texts_make_neither_markup_nor_links_in_a_report(fake_results):
    """Markdown, HTML and LaTeX show the question and the claims of a stranger as they are written."""
    results = fake_results({"base": [0.3] * 5, "a": [0.4] * 5})
    evil = "[x](http://evil) ![p][y] [y]: http://evil/p.png <script>alert(1)</script>\n\n# *Big* `a` ~~b~~ \x1b[2J"
    study = replace(results.plan.study, question=evil)
    claim = replace(study.claims[0], text=evil)
    results = replace(results, plan=replace(results.plan, study=replace(study, claims=(claim,))))
    results = replace(results, verdicts=judge(results))
    as_markdown = report.render(results, format="md")
    assert "](" not in as_markdown
    assert "]:" not in as_markdown
    assert "\n# *" not in as_markdown
    assert "<script" not in as_markdown
    for format_ in ("md", "html", "latex", "text"):
        text = report.render(results, format=format_)
        assert not STEERING_CHARACTERS.search(text), format_
        assert "<script>" not in text or format_ in ("latex", "text")


def test_names_with_dollars_and_markup_can_be_drawn(fake_results):
    """A variant called like a formula is drawn under its name, and a report holds it as text."""
    results = fake_results({"base": [0.3] * 5, r"$\frac{1$ <b>": [0.4] * 5})
    results = replace(results, verdicts=judge(results))
    page = report.render(results, format="html")
    assert r"$\frac{1$ &lt;b&gt;" in page
    assert "<b>" not in page


NO_RUNS = {"experiment_id": None, "parent_run_id": None, "runs": {}}


def test_credentials_go_to_no_server_that_only_records_name(tmp_path, monkeypatch):
    """Where MLflow's token is set, `sync` contacts a server of a record only when the user has named it, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        store = Store(tmp_path / "runs")
        folder = store.register(tiny_plan(tmp_path), source="").path
        durable.write_json(folder / "mlflow.json", {"tracking_uri": uri, **NO_RUNS})
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret-token")
        screen = StringIO()
        assert sync(store, err=screen) == 1
        assert f"{uri}, which its records name, would be sent MLFLOW_TRACKING_TOKEN" in screen.getvalue()
        with pytest.raises(TimeoutError):  # nobody has called
            server.accept()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    contacts.refuse_credentials_of_records(uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    contacts.refuse_credentials_of_records("sqlite:////tmp/mlflow.db")
    with pytest.raises(WorkbenchError):
        contacts.refuse_credentials_of_records(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("![p](http://evil/p.png) [a](http://evil)", r"!\[p\](http://evil/p.png) \[a\](http://evil)"),
        ("<img src=x> **big** `code` $x$ ~~no~~ a_b", r"\<img src=x> \*\*big\*\* \`code\` \$x\$ \~\~no\~\~ a\_b"),
        ("# heading\n\n- item", r"\# heading - item"),
        (":red[hot] x.", r":red\[hot\] x."),
    ],
)
def test_texts_on_a_page_of_the_dashboard_are_texts(text, shown):
    """No picture is loaded from elsewhere, and no link, formula or heading is made of what a stranger wrote."""
    assert parts.plain(text) == shown


def test_names_in_a_chart_are_texts():
    """Of a name with markup plotly, which reads some, gets the escaped one everywhere."""
    name = "<a href='http://evil'>x</a>"
    forest = pd.DataFrame({"variant": [name], "effect": [1.0], "low": [0.0], "high": [2.0], "n": [5]})
    dots = pd.DataFrame({"variant": [name], "seed": [0], "difference": [1.0]})
    points = pd.DataFrame({"variant": [name], "x": [1.0], "mean": [1.0], "low": [0.0], "high": [2.0], "n": [5]})
    lines = pd.DataFrame({"variant": [name], "seed": [0], "x": [1.0], "value": [1.0]})
    classes = pd.DataFrame({"variant": [name], "class": [name], "mean": [1.0], "sd": [0.1], "n": [5]})
    colours = {name: "#112233"}
    figures = (
        charts.forest(forest, dots, baseline=name, margin=1.0, colours=colours, unit="AP points"),
        charts.curves(points, lines, x_title="epoch", y_title="AP", colours=colours, show_seeds=True),
        charts.per_class(classes, x_title="AP", colours=colours),
    )
    for figure in figures:
        told = str(figure.update_traces(legendgroup=None))  # which nobody sees
        assert "&lt;a href" in told
        assert "<a href" not in told


@pytest.mark.parametrize(
    "content", [{"x": 1}, {"tracking_uri": 3, **NO_RUNS}, {"tracking_uri": "http://a", "runs": []}]
)
def test_a_memory_of_mlflow_that_is_none_is_not_believed(tmp_path, content):
    """A stranger's mlflow.json without what it should hold breaks no page: nothing was copied, as far as is known."""
    plan, store = tiny_plan(tmp_path), Store(tmp_path / "runs")
    ref = store.register(plan, source="")
    durable.write_json(ref.path / "mlflow.json", content)
    assert load.mlflow_url(store.results(ref)) is None


@pytest.mark.parametrize("depth", [60, 300, 600, 900, 100_000])
def test_records_nested_without_end_are_damaged(tmp_path, depth):
    """Brackets by the hundred end no command: what holds them counts as damaged."""
    plan, store = tiny_plan(tmp_path), Store(tmp_path / "runs")
    folder = store.register(plan, source="").path
    first = plan.trials[0].trial_id
    result = {
        "format": 1,
        "trial_id": first,
        "outcome": "finished",
        "seconds": 1.0,
        "total_seconds": 1.0,
        "finished_at": "2026-01-01T00:00:00+00:00",
        "data_report": {"a": "DEEP"},
    }
    deep = "[" * depth + "]" * depth
    for name in ("result.json", "error.json", "attempts/0001.json"):
        path = store.trial_dir(first) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result).replace('"DEEP"', deep))
    for name in ("verdicts.json", "looks.json", "mlflow.json"):
        (folder / name).write_text(f'{{"format": 1, "{name.partition(".")[0]}": {deep}}}')
    runs = ["--runs", str(store.root)]
    assert cli.main(["status", *runs]) == 0
    assert store.result(first) is None
    plain = json.loads((folder / "plan.json").read_text())
    del plain["sha256"]
    plain["study"]["variants"][1]["overrides"] = {"loss.weight_giou": "DEEP"}
    (folder / "plan.json").write_text(json.dumps(plain).replace('"DEEP"', deep))
    assert cli.main(["status", *runs]) == 0
