"""The runs folder: what is kept of studies and trials, and what is read back."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from workbench import attempts, durable, trial_files
from workbench.errors import BusyError, StoreError
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute
from workbench.verdict import judge

HOLD = """
import sys
from pathlib import Path
from workbench.store import Store
store = Store(Path(sys.argv[1]))
with store.lock(store.studies()[0]):
    print("held", flush=True)
    sys.stdin.read()
"""


def run_all(plan, store, trainer):
    """Run every trial of a plan with one toy trainer."""
    for spec in plan.specs.values():
        execute(spec, store.root, should_stop=lambda: False, trainer=trainer)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    """A runs folder that cannot be is told with its path and flag, for readers as for writers."""
    (tmp_path / "runs").touch()
    with pytest.raises(StoreError, match=r"--runs .*runs: .*runs is a file"):
        Store(tmp_path / "runs")
    with pytest.raises(StoreError, match="is a file"):
        Store(tmp_path / "runs" / "deeper", create=False)


def test_reading_creates_nothing(tmp_path, toy_plan):
    """A plan that was never registered has pending trials, and asking leaves no trace."""
    store = Store(tmp_path / "runs", create=False)
    results = store.results_for(toy_plan)
    assert {record.state for record in results.records.values()} == {"pending"}
    assert (results.verdicts, results.looks_started, results.post_hoc, results.mlflow) == ((), 0, frozenset(), None)
    assert store.studies() == ()
    assert not (tmp_path / "runs").exists()


def test_a_plan_is_registered_once(store, toy_plan):
    """The first registration stays: its time, its plan and the text of the study file."""
    ref = store.register(toy_plan, source="first")
    assert store.register(toy_plan, source="second") == ref
    assert (ref.path / "study.yaml").read_text() == "first"
    assert store.studies() == (ref,)
    assert store.results(ref).plan == toy_plan


def test_a_damaged_plan_is_told_and_written_anew(store, toy_plan):
    """A truncated plan.json stops readers with its path; running the study repairs it."""
    ref = store.register(toy_plan, source="")
    (ref.path / "plan.json").write_text('{"format": 1, "pl')
    with pytest.raises(StoreError, match=r"plan.json is damaged: remove it and run the study again"):
        store.results(ref)
    assert store.results(store.register(toy_plan, source="")).plan == toy_plan


def test_a_plan_with_a_key_of_another_version_is_written_anew(store, toy_plan):
    """A plan whose configuration has a key that this version lacks is told, and registering the plan again mends it."""
    ref = store.register(toy_plan, source="version: 1\n")
    path = ref.path / "plan.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    for variant in plain["study"]["variants"]:
        variant["config"]["training"]["warp_speed"] = 9
    durable.write_json(path, {key: value for key, value in plain.items() if key not in ("format", "sha256")})
    with pytest.raises(StoreError, match=r"training\.warp_speed: Extra inputs are not permitted"):
        store.results(ref)
    again = store.register(toy_plan, source="version: 1\n")
    assert again.registered_at == ref.registered_at
    assert store.results(again).plan == toy_plan


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("plan.json", '{"format": 9}', r"plan.json: format 9 was written by a later version"),
        ("plan.json", '{"format": 1, "study": []}', r"holds no plan \("),
        ("plan.json", "{", r"plan.json is damaged"),
        ("registered.json", '{"format": 9}', r"registered.json: format 9 was written by a later version"),
        ("registered.json", '{"format": 1}', r"holds no plan \(KeyError\('registered_at'\)\): remove it"),
    ],
)
def test_one_bad_plan_leaves_the_others_readable(store, toy_plan, name, content, problem):
    """A plan that is damaged or from a later version is told with its path, beside plans that are read as ever."""
    ref = store.register(toy_plan, source="")
    bad = store.register(replace(toy_plan, plan_hash="bad"), source="")
    (bad.path / name).write_text(content)
    results = store.results(ref)
    assert (results.plan, results.post_hoc) == (toy_plan, frozenset())
    (told,) = results.unreadable
    assert str(bad.path) in told
    assert store.studies() == (ref, replace(bad, registered_at=""))
    with pytest.raises(StoreError, match=problem):
        store.results(store.studies()[1])


def test_a_kill_while_a_plan_is_registered_is_no_damage(store, toy_plan):
    """A plan.json whose registration was never written is not a plan yet, and no problem either."""
    ref = store.register(toy_plan, source="")
    half = store.register(replace(toy_plan, plan_hash="half"), source="")
    (half.path / "registered.json").unlink()
    assert store.studies() == (ref,)
    assert store.results(ref).unreadable == ()


def test_verdicts_are_read_back_as_they_were(store, toy_plan, toy_trainer):
    """Verdicts survive the file, and the file does not change when they do not."""
    ref = store.register(toy_plan, source="")
    run_all(toy_plan, store, toy_trainer())
    store.start_look(ref, 1)
    verdicts = judge(store.results(ref))
    store.save_verdicts(ref, verdicts)
    before = (ref.path / "verdicts.json").stat()
    store.save_verdicts(ref, verdicts)
    assert (ref.path / "verdicts.json").stat().st_ino == before.st_ino
    results = store.results(ref)
    assert results.verdicts == verdicts
    assert results.looks_started == 1
    store.start_look(ref, 1)
    assert store.results(ref).looks_started == 1


def test_another_study_shares_the_trials(store, toy_study, toy_plan, toy_trainer):
    """A trial is computed once, whatever study asks for it."""
    run_all(toy_plan, store, toy_trainer())
    toy_study.write_text(toy_study.read_text().replace("study: toy", "study: other"))
    other = make_plan(load_study(toy_study, Selection(profile="smoke", sets=_sets(toy_plan))))
    assert other.specs.keys() == toy_plan.specs.keys()
    assert {record.state for record in store.results_for(other).records.values()} == {"finished"}


def test_a_claim_written_after_its_trials_is_post_hoc(store, toy_plan, toy_trainer):
    """A claim with a new margin, registered when its trials had finished, is marked; its wording may change freely."""
    store.register(toy_plan, source="")
    run_all(toy_plan, store, toy_trainer())
    assert store.results_for(toy_plan).post_hoc == frozenset()
    (claim,) = toy_plan.study.claims
    for plan_hash, edited, expected in (
        ("reworded", replace(claim, text="Sharp wins."), frozenset()),
        ("moved", replace(claim, margin=claim.margin / 2), frozenset({claim.id})),
    ):
        plan = replace(toy_plan, study=replace(toy_plan.study, claims=(edited,)), plan_hash=plan_hash)
        store.register(plan, source="")
        assert store.results_for(plan).post_hoc == expected


def test_a_claim_written_before_its_trials_is_not_post_hoc_in_a_larger_plan(store, toy_study, toy_plan, toy_trainer):
    """Asking for more seeds later does not make the claim late: it stood before the first trial."""
    store.register(toy_plan, source="")
    run_all(toy_plan, store, toy_trainer())
    larger = make_plan(load_study(toy_study, Selection(profile="smoke", seeds=3, sets=_sets(toy_plan))))
    store.register(larger, source="")
    assert larger.plan_hash != toy_plan.plan_hash
    assert store.results_for(larger).post_hoc == frozenset()


def _judge_all(store, plan, trainer):
    """Register a plan, run and judge its first look, and return the one verdict."""
    ref = store.register(plan, source="")
    run_all(plan, store, trainer)
    store.start_look(ref, 1)
    verdicts = judge(store.results(ref))
    store.save_verdicts(ref, verdicts)
    (verdict,) = store.results(ref).verdicts
    return verdict


@pytest.fixture
def with_seeds(toy_study):
    """Return a maker of plans of the toy study with one look of so many seeds."""

    def plan(seeds, *sets):
        return make_plan(load_study(toy_study, Selection(profile="laptop", seeds=seeds, sets=sets)))

    return plan


def test_trying_one_number_of_seeds_after_another_is_marked(store, with_seeds, toy_trainer):
    """Each further set of looks names the earlier ones with their verdicts; the first stays unmarked, also later."""
    verdicts = [_judge_all(store, with_seeds(seeds), toy_trainer()) for seeds in (5, 6, 7)]
    assert [verdict.looked_before for verdict in verdicts] == [
        (),
        ("5 seeds at alpha 0.05 (undecided)",),
        ("5 seeds at alpha 0.05 (undecided)", "6 seeds at alpha 0.05 (undecided)"),
    ]
    assert verdicts[1].notes[0].startswith("looked at before with other looks: 5 seeds at alpha 0.05 (undecided). ")
    assert _judge_all(store, with_seeds(5), toy_trainer()).looked_before == ()


def test_only_looks_that_could_have_decided_the_claim_count(store, with_seeds, toy_trainer):
    """Too few seeds, a plan never judged, another margin and other trials are no earlier looks at the claim."""
    _judge_all(store, with_seeds(2), toy_trainer())
    store.register(with_seeds(8), source="")
    _judge_all(store, with_seeds(7, "data.num_train=17"), toy_trainer())
    plan = with_seeds(5)
    (claim,) = plan.study.claims
    moved = replace(plan.study, claims=(replace(claim, margin=claim.margin / 2),))
    _judge_all(store, replace(plan, study=moved, plan_hash="moved"), toy_trainer())
    assert _judge_all(store, with_seeds(6), toy_trainer()).looked_before == ()


def test_one_driver_at_a_time(store, toy_plan):
    """A second driver is told who runs the study and since when; a kill -9 of the first lets it in."""
    ref = store.register(toy_plan, source="")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"toy \(smoke\) is being run by process {holder.pid} on .* since 20"
        with pytest.raises(BusyError, match=message), store.lock(ref):
            pass
        holder.kill()
        holder.wait()
        with store.lock(ref):
            pass


@pytest.mark.parametrize("outcome", ["finished", "diverged"])
def test_progress_says_nothing_more_of_a_trial_that_ended(store, toy_plan, toy_trainer, outcome):
    """The record without the lines of progress, which are most of them, is the record with them."""
    spec = next(iter(toy_plan.specs.values()))
    trainer = toy_trainer(steps=5, outcome=outcome)  # the last step ends no epoch
    assert execute(spec, store.root, should_stop=lambda: False, trainer=trainer) == outcome
    everything = store.events(spec.trial_id)
    assert len(store.events(spec.trial_id, steps=False)) < len(everything) - 3
    record = store.record(spec.trial_id)
    assert record == trial_files.read(store.trial_dir(spec.trial_id), lambda **_: everything)
    assert record.step == 5


def test_a_record_of_a_later_version_is_not_guessed_at(store, toy_plan, monkeypatch):
    """A result that a later version wrote is an error with its path, not an unfinished trial to run again."""
    trial = next(iter(toy_plan.specs))
    with monkeypatch.context() as later:
        later.setattr(durable, "FORMAT", 9)
        durable.write_json(store.trial_dir(trial) / "result.json", {})
    with pytest.raises(StoreError, match=r"result.json: format 9"):
        store.record(trial)


def _sets(plan):
    """The `--set` options that give another study the configs of this plan."""
    config = plan.study.variants[0].config
    data, subset = config.data, config.evaluation.training_subset
    return (
        f"training.epochs={config.training.epochs}",
        f"data.side={data.side}",
        f"data.num_train={data.num_train}",
        f"data.num_val={data.num_val}",
        f"evaluation.training_subset={subset}",
    )


def test_a_settled_trial_is_read_again_only_when_it_changes(store, toy_plan, toy_trainer):
    """What nobody works on costs a look at its files; another attempt, or a result set aside, is seen at once."""
    trial_id = toy_plan.trials[0].trial_id
    run_all(toy_plan, store, toy_trainer())
    long_ago = time.time() - 60
    for path in (store.trial_dir(trial_id), *store.trial_dir(trial_id).rglob("*")):
        os.utime(path, (long_ago, long_ago))
    known = store.record(trial_id)
    assert store.record(trial_id) is known
    attempts.begin(store.trial_dir(trial_id), driver=None)
    assert (known.attempts, store.record(trial_id).attempts) == (1, 2)
    (store.trial_dir(trial_id) / "result.json").unlink()
    assert store.record(trial_id).result is None


def _old(folder):
    long_ago = time.time() - 60
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (long_ago, long_ago))


def test_events_of_finished_trials_are_read_once_and_for_all(store, toy_plan, toy_trainer, monkeypatch):
    """Another process opens one small file for each trial that has ended, and gets the same record."""
    run_all(toy_plan, store, toy_trainer())
    _old(store.root / "trials")
    before = [store.record(trial_id) for trial_id in toy_plan.specs]
    opened = []
    read = type(store.root).open

    def count(self, *arguments, **options):
        opened.append(self)
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(store.root), "open", count)
    again = Store(store.root, create=False)
    assert [again.record(trial_id) for trial_id in toy_plan.specs] == before
    assert [path.parent.name for path in opened] == ["trials"] * len(toy_plan.specs)  # index/trials


@pytest.mark.parametrize("damage", ["truncated", "of a later format", "of another record", "of other files"])
def test_an_index_that_does_not_fit_is_made_again(store, toy_plan, toy_trainer, damage):
    """The index only saves time: whatever it says, the files of the trial are what counts."""
    run_all(toy_plan, store, toy_trainer())
    _old(store.root / "trials")
    trial_id = next(iter(toy_plan.specs))
    known = store.record(trial_id)
    path = store.index_dir / "trials" / f"{trial_id}.json"
    plain = durable.read_json(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "of a later format":
        path.write_text('{"format": 2}')
    elif damage == "of another record":
        durable.write_json(path, {**plain, "record": {"trial_id": 7}})
    else:
        durable.write_json(path, {**plain, "stamps": [], "record": {**plain["record"], "attempts": 99}})
    assert Store(store.root).record(trial_id) == known
    assert durable.read_json(path) == plain


def test_a_copy_of_the_runs_folder_keeps_its_index(store, toy_plan, toy_trainer, tmp_path):
    """Where a copy keeps the times of files, as rsync -a does, events need not be read again."""
    run_all(toy_plan, store, toy_trainer())
    _old(store.root / "trials")
    trial_id = next(iter(toy_plan.specs))
    known = store.record(trial_id)
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    events = copy / "trials" / trial_id / "events.jsonl"
    events.write_bytes(bytes(events.stat().st_size))  # which shows that nobody reads them
    _old(copy / "trials")
    for path in (store.root / "trials" / trial_id).rglob("*"):
        status = path.stat()
        os.utime(copy / path.relative_to(store.root), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Store(copy).record(trial_id) == known
