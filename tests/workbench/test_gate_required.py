"""What `run` asks for before a dear study: a passed gate that matches, or to be gone around knowingly."""

import json

import pytest
from costly import costing, passed, recorded, with_band

from workbench import gate, report
from workbench.budget import Budget
from workbench.costs import Machine
from workbench.errors import WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan
from workbench.stopping import StopRequest
from workbench.study_file import Selection, load_study


@pytest.fixture
def plan(asked):
    """Return the plan of the stub study."""
    return make_plan(load_study(asked.study, Selection(profile="tiny", data=asked.data)))


@pytest.fixture
def dear(plan, store, tmp_path):
    """Return a budget of trials that take `hours` GPU-hours together, or an unknown number."""

    def make(hours):
        if hours is not None:
            costing(store, plan, 3600 * hours / len(plan.trials), device="cuda")
        stop = StopRequest(tmp_path / "stop", announce=print)
        machine = Machine(device="cuda", at_once=1, gpus=1.0)
        return Budget(plan, store, machine=machine, gpu_hours=None, stop=stop, say=print)

    return make


def required(budget, **options):
    """Ask for a gate; return what was said."""
    said = []
    gate.require(budget, Options(**options), say=said.append)
    return said


def test_a_study_of_few_gpu_hours_needs_no_gate(dear):
    """Up to the limit nothing is asked for."""
    assert required(dear(gate.GPU_HOURS)) == []


def test_a_study_without_gpus_needs_no_gate(dear, monkeypatch):
    """On a CPU nothing is asked for and nothing is probed."""
    budget = dear(None)
    budget.machine = Machine(device="cpu", at_once=1)
    assert required(budget) == []


def test_a_dear_study_is_refused_without_a_gate(dear, asked, store, few_steps):
    """The message has the hours, the command and the way around; a gate that matches lets it pass."""
    with pytest.raises(WorkbenchError) as refused:
        required(dear(101))
    assert str(refused.value) == (
        "no gate of profile tiny is on record, and 101 GPU-hours are expected; above 100 a study needs one: python -m "
        "workbench doctor --profile tiny --checkpoint FILE --data DIR (docs/budget.md); or go on knowingly: "
        "--without-gate"
    )
    assert refused.value.exit_code == 2
    recorded(asked, store)
    assert passed(asked, store).passed
    assert required(dear(101)) == []


def test_a_gate_of_other_code_or_pictures_or_one_not_passed_does_not_match(asked, store, few_steps, plan):
    """What a gate is of must be what is run."""
    recorded(asked, store)
    passed(asked, store)
    path = store.root / "gates" / "tiny.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    for change, said in (
        ({"identity": {**kept["identity"], "code_hash": "0123"}}, "by other detector code (0123)"),
        ({"identity": {**kept["identity"], "numerics": 0}}, "by other detector code"),
        ({"identity": {**kept["identity"], "data_fingerprint": "x"}}, "on other pictures"),
        ({"identity": None}, "is damaged"),
        ({"passed": False, "checks": [{"name": "loss", "passed": False, "text": "high"}]}, "not passed (loss: high)"),
    ):
        path.write_text(json.dumps({**kept, **change}))
        assert said in gate.missing("tiny", plan.specs, store)


def test_going_around_the_gate_is_kept_and_reported(dear, store, plan):
    """The study's folder and its report say that it was run without, and why that mattered."""
    said = required(dear(250), without_gate=True)
    reason = "no gate of profile tiny is on record, and 250 GPU-hours are expected"
    assert said[-1] == f"Warning: {reason}; going on without a gate, which the report will say"
    required(dear(250), without_gate=True)
    kept = json.loads((store.study_dir(plan) / "without_gate.json").read_text())
    assert [item["reason"] for item in kept["reasons"]] == [reason]
    facts = list(report.contents(store.results_for(plan)).facts)
    assert any(fact.startswith("Run without a gate since ") and reason in fact for fact in facts)


def test_an_unknown_cost_is_probed_before_it_is_judged(dear, monkeypatch, plan):
    """Nothing on record and GPUs: a probe decides; where it cannot be made here, the run is refused."""
    budget = dear(None)
    with pytest.raises(WorkbenchError, match="--probe: there is no GPU here"):
        required(budget)
    monkeypatch.setattr("workbench.probe.probe", lambda *_, **__: dear(7))
    assert required(budget) == ["Nothing is on record of what a trial costs:"]


@pytest.mark.parametrize(("executor", "where"), [("ray", "head:6379"), ("inline", None)])
def test_an_unknown_cost_is_probed_where_the_trials_will_run(dear, monkeypatch, executor, where):
    """With the address of a cluster its nodes are measured: the driver's own machine may be a head without GPUs."""
    asked = []
    monkeypatch.setattr("workbench.probe.probe", lambda *_, address, **__: asked.append(address) or dear(7))
    required(dear(None), executor=executor, address="head:6379")
    assert asked == [where]


def test_a_dear_study_says_that_its_baseline_is_not_watched(dear, asked, store, few_steps):
    """Without a band of its first epoch nobody notices a baseline that goes wrong."""
    with_band(store, gate.training(asked, "deformable"))
    passed(asked, store)
    assert required(dear(101)) == [
        "The baseline's first epoch is not watched: no band of it is stored (docs/budget.md)"
    ]


def test_a_gate_matches_a_search_on_the_same_pictures(asked, store, few_steps):
    """A search reads no val pictures, which the gate does: the same folder is the same folder; another one is not."""
    recorded(asked, store)
    passed(asked, store)
    text = asked.study.read_text().partition("claims:")[0] + "scope: seeds\n"
    search = "search: {space: {training.lr: {values: [0.001, 0.002]}}, configurations: 2}\n"
    asked.study.write_text(text + search)
    plan = make_plan(load_study(asked.study, Selection(profile="tiny", data=asked.data)))
    assert {spec.config.data.split for spec in plan.specs.values()} == {"tune"}
    assert gate.missing("tiny", plan.specs, store) is None
    for path in asked.data.rglob("instances_val*"):
        path.write_text(path.read_text() + " ")
    assert gate.missing("tiny", plan.specs, store) == "the gate of profile tiny was passed on other pictures"
