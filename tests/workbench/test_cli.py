"""The command line: exit codes, streams, JSON, and how little it loads."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench import cli
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.study_schema import schema_text

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "studies" / "refinement_detach.yaml"
HEAVY = ("torch", "ray", "mlflow", "pandas", "scipy", "numpy", "streamlit")


def run(*arguments, cwd=ROOT, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "workbench", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", str(STUDY)]])
def test_help_and_check_answer_at_once(arguments):
    """They load neither the detector's libraries nor those of records and statistics."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))\n"
        "from workbench.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr.strip() == ""
    assert time.perf_counter() - began < 5  # a second on an idle machine


def test_check_reads_every_profile(capsys):
    """A valid study is one line on stdout that names the profiles it was read at."""
    assert cli.main(["check", str(STUDY)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{STUDY}: valid (coco, coco12, coco_mini, laptop, pictures, smoke)\n"
    assert captured.err == ""


@pytest.mark.parametrize("words", [["--variants", ","], ["--gpus", "0"], ["--gpus", "nan"], ["--gpus", "two"]])
def test_what_an_option_cannot_be_is_told_with_what_it_can(words, capsys):
    """A list of no names would else choose nothing in particular, and no GPUs cost nothing."""
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", str(STUDY), *words])
    assert left.value.code == 2
    assert f"argument {words[0]}: found {words[1]!r}; allowed: " in capsys.readouterr().err


def test_check_tells_the_problems_of_all_files(tmp_path, capsys):
    """Problems of every file and profile are told once each on stderr, with exit code 2; valid files are named too."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(STUDY.read_text().replace("metric: ap", "metric: app").replace("minus: detached", "minus: detach"))
    assert cli.main(["check", str(bad), str(STUDY), str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{STUDY}: valid")
    lines = captured.err.splitlines()
    assert len(lines) == 3 + 2 + 1  # metrics, variants, the missing file
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("command", ["run", "plan", "status", "report"])
def test_bad_input_ends_with_2_and_starts_nothing(command, tmp_path, monkeypatch, capsys):
    """Every command about a study refuses a wrong selection before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, str(STUDY), "--set", "model.heds=shared"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "--set model.heds=shared: model.heds: unknown key; did you mean model.heads?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "plan", "status", "report"])
def test_file_where_the_runs_folder_should_be(command, tmp_path, capsys):
    """A file in place of the runs folder is bad input that names the flag."""
    (tmp_path / "runs").write_text("")
    assert cli.main([command, str(STUDY), "--runs", str(tmp_path / "runs")]) == 2
    assert "--runs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_missing_data_folder_names_path_and_flag(command, tmp_path, capsys):
    """A folder of pictures that does not exist ends with 2, its path and --data."""
    assert cli.main([command, str(STUDY), "--data", str(tmp_path / "none"), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert "--data" in error


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("spoil", "where", "what"),
    [
        (lambda folder: (folder / "annotations" / "instances_val.json").unlink(), "instances_val.json", "no such file"),
        (lambda folder: _rewrite(folder, lambda _: "{"), "instances_val.json", "is not JSON"),
        (lambda folder: _rewrite(folder, lambda _: "[]"), "instances_val.json", "holds a list"),
        (lambda folder: _rewrite(folder, _without("categories")), "instances_val.json", "has no list 'categories'"),
        (lambda folder: _rewrite(folder, _without("images")), "instances_val.json", "has no list 'images'"),
        (lambda folder: _rewrite(folder, _with(categories=[])), "instances_val.json", "names no class"),
        (lambda folder: _rewrite(folder, _with(categories=[{"id": 1, "name": "ring"}])), "coco", "'disc' in train"),
    ],
)
def test_unusable_pictures_name_path_and_flag(command, spoil, where, what, coco_folder, tmp_path, capsys):
    """Whatever is wrong with a folder is one line with its path and --data, exit code 2, and nothing is begun."""
    spoil(coco_folder)
    assert cli.main([command, str(STUDY), "--data", str(coco_folder), "--runs", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(str(coco_folder))
    assert where in line.split(": ")[0]
    assert what in line
    assert "--data" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda folder: shutil.rmtree(folder / "val"), "no such folder, nor val2017"),
        (lambda folder: (folder / "val" / "1.jpg").unlink(), "holds none of the 1 pictures"),
    ],
)
def test_missing_pictures_stop_run_and_not_plan(spoil, what, coco_folder, tmp_path, capsys):
    """`plan` works with annotations alone and warns of the pictures; `run` and `check` end with 2, path and flag."""
    spoil(coco_folder)
    arguments = [str(STUDY), "--data", str(coco_folder)]
    assert cli.main(["plan", *arguments, "--runs", str(tmp_path / "runs")]) == 0
    captured = capsys.readouterr()
    assert "look 1: 5 seeds" in captured.out
    assert f"Warning: {coco_folder / 'val'}: {what}" in captured.err
    for command in (["run", *arguments, "--runs", str(tmp_path / "runs")], ["check", *arguments]):
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{coco_folder / 'val'}: {what}")
        assert "--data" in line
    assert not (tmp_path / "runs").exists()


def _rewrite(folder, change):
    """Replace the text of the annotations of the val split."""
    path = folder / "annotations" / "instances_val.json"
    path.write_text(change(path.read_text()))


def _without(key):
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key})


def _with(**changed):
    return lambda text: json.dumps(json.loads(text) | changed)


def test_plan_is_one_json_document(tmp_path, capsys):
    """`plan --json --explain` prints one document on stdout and its warnings on stderr, and makes no folder."""
    arguments = ["plan", str(STUDY), "--seeds", "2", "--json", "--explain", "--runs", str(tmp_path / "runs")]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    described = json.loads(captured.out)
    assert len(described["trials"]) == 6
    assert {trial["state"] for trial in described["trials"]} == {"pending"}
    assert described["settings"]["kept"]["model.heads"]["value"] == "separate"
    assert len(described["warnings"]) == 2
    assert captured.err.count("Warning: ") == 2
    assert not (tmp_path / "runs").exists()


def test_status_before_anything_ran(tmp_path, capsys):
    """Without a study and without records, status says how to begin, and its JSON is still one document."""
    assert cli.main(["status", "--runs", str(tmp_path / "runs")]) == 0
    assert "Begin: python -m workbench run STUDY" in capsys.readouterr().out
    assert cli.main(["status", "--json", "--runs", str(tmp_path / "runs")]) == 0
    assert json.loads(capsys.readouterr().out) == {"studies": []}


def test_status_of_a_study_has_every_trial(tmp_path, capsys):
    """`status STUDY --json` has the documented keys, for the same selection as run."""
    assert cli.main(["status", str(STUDY), "--profile", "smoke", "--json", "--runs", str(tmp_path / "runs")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["study"], described["profile"], described["baseline"]) == (
        "refinement_detach",
        "smoke",
        "detached",
    )
    assert {"trial_id", "variant", "seed", "state", "attempts", "seconds", "metrics"} <= set(described["trials"][0])


def test_one_bad_plan_does_not_hide_the_others(tmp_path, capsys):
    """`status`, of all or of one study, and `report` tell once on stderr what they cannot read, and show the rest."""
    arguments = [str(STUDY), "--profile", "smoke", "--runs", str(tmp_path / "runs")]
    store = Store(tmp_path / "runs")
    ref = store.register(make_plan(load_study(STUDY, Selection(profile="smoke"))), source="")
    for name, text in (("later", '{"format": 9}'), ("other", '{"format": 1}')):
        bad = ref.path.with_name(name)
        bad.mkdir()
        for file in ("plan.json", "registered.json"):
            (bad / file).write_text(text)
    for command in (["status", "--runs", str(tmp_path / "runs")], ["status", *arguments], ["report", *arguments]):
        assert cli.main(command) == 0
        captured = capsys.readouterr()
        assert "refinement_detach" in captured.out
        assert captured.err.count("Warning: left out of the records: ") == 2
        assert captured.err.count(str(ref.path.with_name("later"))) == 1


def test_schema_is_printed(capsys):
    """`schema` prints what is checked in for editors."""
    assert cli.main(["schema"]) == 0
    assert capsys.readouterr().out == schema_text()


def test_unknown_option_ends_with_2(capsys):
    """A misspelt option is bad input too, and no option may be abbreviated."""
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(STUDY), "--prof", "smoke"])
    assert end.value.code == 2
    assert "unrecognized arguments: --prof" in capsys.readouterr().err


def test_reader_that_goes_away_is_no_traceback():
    """`schema | head -1` ends quietly."""
    command = f"{sys.executable} -m workbench schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "{"
    assert done.returncode in (0, cli.BROKEN_PIPE)  # 0 where the pipe held it all
