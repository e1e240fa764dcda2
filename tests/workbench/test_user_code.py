"""Custom parts in a study: found without being run, refused without the flag, hashed, carried along, and trained."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from workbench import cli, commands
from workbench.errors import StudyFileError, WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute
from workbench.user_code import custom_parts

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "box_moves.yaml"
STUDY = """\
version: 1
study: mine
question: Does my head help?
baseline: theirs
variants:
  theirs: {}
  mine: {set: {model.box_head: {kind: custom, target: "heads:Mine"}}}
scope: seeds
"""
CODE = """\
from core.model.refinement import BoxHead
open(__file__ + ".executed", "w").close()

class Mine(BoxHead):
    def apply_to(self, delta, reference):
        return super().apply_to(delta / 2, reference)
"""
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")
SMOKE = Selection(profile="smoke", seeds=1, sets=TINY)


@pytest.fixture
def path(tmp_path):
    """Return the file of a study with a custom part, and write its code beside it."""
    (tmp_path / "study").mkdir()
    path = tmp_path / "study" / "mine.yaml"
    path.write_text(STUDY)
    path.with_name("heads.py").write_text(CODE)
    return path


def executed(folder):
    """Return which copies of the code were executed below a folder."""
    return sorted(found.name for found in folder.rglob("*.executed"))


def planned(path):
    """Return the plan at its smallest scale."""
    return make_plan(load_study(path, SMOKE))


def mine(plan):
    """Return the trial that has the custom part."""
    (spec,) = (spec for spec in plan.specs.values() if spec.code)
    return spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.unlink(),
            "there is no module heads: looked for {folder}/heads.py, then for heads.py on Python's path; name the",
        ),
        (
            lambda path: path.write_text("class Main: ...\n"),
            "{folder}/heads.py defines no Mine; did you mean Main? there",
        ),
        (
            lambda path: path.write_text("class Mine:\n"),
            "{folder}/heads.py:1: is not Python (expected an indented block",
        ),
    ],
)
def test_code_that_is_not_there_is_a_problem_of_the_study(path, change, message):
    """A missing file, a missing class and a file that is not Python are told at the key, before anything runs."""
    change(path.with_name("heads.py"))
    with pytest.raises(StudyFileError) as error:
        load_study(path, SMOKE)
    (line,) = str(error.value).splitlines()
    start = f"{path}:7:47: model.box_head.target: "
    assert line.startswith(start + message.format(folder=path.parent))


def test_class_may_come_from_anywhere_in_the_file(path):
    """A class that the file imports, assigns or defines under a condition is there; a star may hold any."""
    for text in ("from x import Mine", "if True:\n    Mine = 1", "from x import *", "import y as Mine"):
        path.with_name("heads.py").write_text(text)
        load_study(path, SMOKE)


def test_commands_that_only_look_run_no_code(path, tmp_path, capsys):
    """`check`, `plan`, `status` and `report` neither import nor run the file, and `plan` says what would run."""
    runs = ["--runs", str(tmp_path / "runs")]
    assert cli.main(["check", str(path)]) == 0
    for command in ("plan", "status", "report"):
        assert cli.main([command, str(path), *runs]) == 0
    assert executed(tmp_path) == []
    warning = f"model.box_head: heads:Mine (variant mine ({path}:7:47)) runs {path.with_name('heads.py')}"
    assert f"Warning: {warning}: run needs --allow-code" in capsys.readouterr().err


def test_run_refuses_code_without_the_flag(path, tmp_path, capsys):
    """Without --allow-code, exit code 2 with key, target, file and flag; nothing is executed or written."""
    assert cli.main(["run", str(path), "--runs", str(tmp_path / "runs"), "--executor", "inline"]) == 2
    first, remedy = capsys.readouterr().err.splitlines()
    assert first == f"model.box_head: heads:Mine (variant mine ({path}:7:47)) runs {path.with_name('heads.py')}"
    assert remedy.endswith("allow it with run --allow-code")
    assert executed(tmp_path) == []
    assert list((tmp_path / "runs").rglob("*")) == []


def test_trial_refuses_code_that_nobody_allowed(path, store):
    """A worker that is handed a custom part, its text, or both, does nothing unless it is allowed."""
    spec = mine(planned(path))
    config = next(other for other in planned(path).specs.values() if not other.code).config
    for asked, part in (
        (spec, r"model\.box_head: heads:Mine"),
        (replace(spec, code={}), r"model\.box_head: heads:Mine"),
        (replace(spec, config=config), "heads"),
    ):
        with pytest.raises(WorkbenchError, match=f"{part} is code of your own, .* --allow-code"):
            execute(asked, store.root, should_stop=lambda: False)
    assert not store.trial_dir(spec.trial_id).exists()


def test_text_of_the_code_is_part_of_the_trial(path):
    """Another text, even another comment, is another trial; variants without custom parts keep theirs."""
    before = planned(path)
    path.with_name("heads.py").write_text(CODE + "# a comment\n")
    after = planned(path)
    ids = [[trial.trial_id for trial in plan.trials] for plan in (before, after)]
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] != ids[1][1]
    assert mine(after).code == {"heads": CODE + "# a comment\n"}


def test_plan_carries_the_code(path):
    """Through plan.json the text comes back; a plan from before there was any still loads."""
    plan = planned(path)
    plain = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(plain) == plan
    assert sum("code" in spec for spec in plain["specs"].values()) == 1
    for spec in plain["specs"].values():
        spec.pop("code", None)
    assert [spec.code for spec in plan_from_json(plain).specs.values()] == [{}, {}]


def test_repeating_line_has_the_flag(path, store):
    """The line that repeats a study allows its code, and only where there is some."""
    results = store.results(store.register(planned(path), source=""))
    assert commands.command(results).endswith(" --allow-code")
    assert "--allow-code" not in commands.command(results, verb="report")
    path.write_text(STUDY.replace('model.box_head: {kind: custom, target: "heads:Mine"}', "loss.auxiliary: false"))
    assert "--allow-code" not in commands.command(store.results(store.register(planned(path), source="")))


def test_spec_is_all_that_a_worker_needs(path, store):
    """The text runs when its file is gone, as on another machine, and a failure shows its lines."""
    text = CODE.replace("delta / 2", "delta / 0 + nothing")
    path.with_name("heads.py").write_text(text)
    plan = planned(path)
    path.with_name("heads.py").unlink()
    spec = mine(plan)
    assert execute(spec, store.root, should_stop=lambda: False, allow_code=True) == "failed"
    folder = store.trial_dir(spec.trial_id)
    assert json.loads((folder / "spec.json").read_text())["code"] == {"heads": text}
    error = store.record(spec.trial_id).error
    assert (error["class"], error["type"]) == ("error", "NameError")
    assert executed(store.root.parent) == ["heads.py.executed"]
    assert f'File "{folder / "code" / "heads.py"}", line 6, in apply_to' in error["traceback"]
    assert "return super().apply_to(delta / 0 + nothing, reference)" in error["traceback"]


def test_part_that_cannot_be_built_is_bad_configuration(path, store):
    """A part whose arguments do not fit fails its trial as `bad_config`, with what the class takes."""
    path.write_text(STUDY.replace('Mine"', 'Mine", args: {dim: 3}'))
    spec = mine(planned(path))
    assert execute(spec, store.root, should_stop=lambda: False, allow_code=True) == "failed"
    error = store.record(spec.trial_id).error
    assert (error["class"], "args may not set dim" in error["message"]) == ("bad_config", True)


def test_worked_example_trains(tmp_path):
    """The example of docs/your-own-idea.md runs: both variants learn from the same start and end in other weights."""
    plan = make_plan(load_study(EXAMPLE, SMOKE))
    assert [part.key for part in custom_parts(plan.study.variants[1].config)] == ["model.box_head"]
    store, err = Store(tmp_path / "runs"), StringIO()
    options = Options(executor="inline", tracking_uri="http://127.0.0.1:9", allow_code=True)
    code = run_study(plan, store, options, out=StringIO(), err=err)
    assert code == 0, err.getvalue()
    results = [store.result(trial.trial_id) for trial in plan.trials]
    assert results[0]["num_parameters"] == results[1]["num_parameters"]
    assert len({result["weights_hash"] for result in results}) == 2


def test_page_shows_the_example_whole():
    """docs/your-own-idea.md has the two files as they are."""
    page = (ROOT / "docs" / "your-own-idea.md").read_text("utf-8")
    for file in (EXAMPLE, EXAMPLE.with_suffix(".py")):
        assert f"\n{file.read_text('utf-8')}```\n" in page
