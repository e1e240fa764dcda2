"""What a trial's record says of the attempts that made its weights."""

import json

import pytest

from workbench import lineage, provenance
from workbench.trial import execute


@pytest.fixture
def spec(toy_plan):
    """Return a trial."""
    return toy_plan.specs[toy_plan.trials[0].trial_id]


def test_code_that_is_edited_before_a_resume_is_marked(monkeypatch, spec, store, toy_trainer):
    """A trial that began with one code and went on with another says both, in their order."""
    monkeypatch.setattr(provenance, "code_hash", lambda: "before")
    assert execute(spec, store.root, should_stop=_at_first_step(), trainer=toy_trainer()) == "interrupted"
    monkeypatch.setattr(provenance, "code_hash", lambda: "after")
    assert execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer()) == "finished"
    found = store.result(spec.trial_id)["provenance"]
    assert found["code_hash"] == "after"
    assert found["mixed"] == {"code_hash": ["before", "after"]}


def test_an_attempt_that_left_nothing_is_no_mix(monkeypatch, spec, store, toy_trainer):
    """Code that failed before its first checkpoint, and was then repaired, has no part in the weights."""

    def fail(_step):
        raise ValueError("a mistake")

    monkeypatch.setattr(provenance, "code_hash", lambda: "mistaken")
    assert execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer(before_step=fail)) == "failed"
    monkeypatch.setattr(provenance, "code_hash", lambda: "repaired")
    assert execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer()) == "finished"
    assert "mixed" not in store.result(spec.trial_id)["provenance"]
    assert lineage.contributing(store.trial_dir(spec.trial_id)) == [2]


def test_a_resume_with_the_same_code_is_no_mix(spec, store, toy_trainer):
    """An interruption alone leaves no mark."""
    assert execute(spec, store.root, should_stop=_at_first_step(), trainer=toy_trainer()) == "interrupted"
    assert execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer()) == "finished"
    assert lineage.contributing(store.trial_dir(spec.trial_id)) == [1, 2]
    assert "mixed" not in store.result(spec.trial_id)["provenance"]


def test_each_attempt_keeps_what_it_depends_on(spec, store, toy_trainer):
    """The facts lie in the trial's folder, the texts that trials share once beside all trials."""
    execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer())
    facts = json.loads((store.trial_dir(spec.trial_id) / "provenance" / "0001.json").read_text())
    assert facts["format"] == 1
    assert (facts["device"], facts["precision"]) == ("cpu", spec.config.training.precision)
    kept = {path.name for path in store.code_dir.iterdir()}
    assert {name for name in (facts["diff"], facts["packages"]) if name} == kept


def test_secrets_in_an_error_are_not_recorded(monkeypatch, spec, store, toy_trainer):
    """The message and the traceback of what a trial raised hold neither passwords nor tokens of the environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345")

    def fail(_step):
        raise OSError("https://me:hunter2@host/x: refused hf_abcdefgh12345")

    execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer(before_step=fail))
    error = (store.trial_dir(spec.trial_id) / "error.json").read_text()
    assert "https://***@host/x: refused ***" in error
    assert "hunter2" not in error
    assert "hf_abcdefgh12345" not in error


def _at_first_step():
    """Return a question that is answered with no once, before the trial begins."""
    asked = iter((False,))
    return lambda: next(asked, True)
