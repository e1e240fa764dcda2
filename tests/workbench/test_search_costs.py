"""What a search costs: the estimate of all that it will try, the gate, and the cap, which counts all of them."""

from dataclasses import replace

import pytest
from costly import costing, hold_gpus, run
from rated import SEARCH, SETS, RatedTrainer

from workbench import budget, estimate, forecast, gate
from workbench.budget import Budget, Meter
from workbench.costs import Machine
from workbench.errors import LIMIT_REACHED, WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan
from workbench.stopping import StopRequest
from workbench.study_file import Selection, load_study


@pytest.fixture
def plan(tmp_path):
    """Return the plan of a search: two variants, four configurations each."""
    path = tmp_path / "rates.yaml"
    path.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=4))
    return make_plan(load_study(path, Selection(profile="smoke", sets=SETS)))


@pytest.fixture
def on_gpus(monkeypatch):
    """Let every trial hold GPUs, and every attempt cost one GPU-hour."""
    hold_gpus(monkeypatch)
    monkeypatch.setattr(budget, "gpu_seconds", lambda tried, **_: 3600.0 * len(tried))


def test_the_cap_stops_a_search_whose_cost_is_known(plan, store, on_gpus):
    """Every configuration counts, not the variants' own settings alone; a raised cap goes on to the end."""
    costing(store, plan, 0.01)
    code, _, err = run(plan, store, RatedTrainer(), gpu_hours=3.5)
    assert code == LIMIT_REACHED, err
    assert "4 of 3.5 GPU-hours are spent, all attempts counted" in err
    assert sum(record.attempts for record in store.results_for(plan).records.values()) == 4
    assert run(plan, store, RatedTrainer(), gpu_hours=60.0)[0] == 0


def test_a_meter_counts_configurations_that_were_suggested_later(plan, store, on_gpus):
    """It reads what has become of the search each time, also of one that has been edited since."""
    costing(store, plan, 0.01)
    meter = Meter(store, plan)
    assert meter.gpu_hours() == 0
    run(plan, store, RatedTrainer())
    assert meter.gpu_hours() == 8
    assert Meter(store, replace(plan, plan_hash="edited", trials=(), specs={})).gpu_hours() == 8


def test_a_plan_estimates_all_configurations(plan, store):
    """Eight of 30 s in two slots; once the search is complete nothing is left, and each variant has one line."""
    costing(store, plan, 30.0)
    machine = Machine(device="cpu", at_once=2)
    described = forecast.describe(store.results_for(plan), machine=machine)
    (cost,) = described["cost"]["looks"]
    assert (cost["trials"], cost["reused"], cost["to_run"]) == (8, 0, 8)
    assert cost["seconds"] == pytest.approx(10 + 4 * 30)
    assert "8 to run in 2 min 10 s, 0 GPU-hours" in forecast.as_text(described)
    assert run(plan, store, RatedTrainer())[0] == 0
    described = forecast.describe(store.results_for(plan), machine=machine)
    assert set(described["cost"]["costs"]) == {"plain", "sharp"}
    assert described["cost"]["costs"]["plain"]["source"] == "4 trials of the variant"
    assert described["cost"]["looks"][0]["to_run"] == 0


def test_a_gate_is_asked_for_by_what_all_configurations_cost(plan, store, tmp_path):
    """Two trials of 20 GPU-hours would need none; the eight of the search do."""
    costing(store, plan, 20 * 3600)
    stop = StopRequest(tmp_path / "stop", announce=print)
    machine = Machine(device="cpu", at_once=1, gpus=1.0)
    asked = Budget(plan, store, machine=machine, gpu_hours=None, stop=stop, say=print)
    with pytest.raises(WorkbenchError, match="160 GPU-hours are expected"):
        gate.require(asked, Options(), say=print)


def test_a_complete_search_needs_no_gate(plan, store, monkeypatch):
    """Nothing is left to run, so nothing is asked for, however dear it was."""
    assert run(plan, store, RatedTrainer())[0] == 0
    monkeypatch.setattr(gate, "require", lambda *_, **__: pytest.fail("a gate was asked for"))
    assert run(plan, store, RatedTrainer())[0] == 0


def test_a_search_says_once_what_it_will_cost_and_the_report_how_good_that_was(plan, store):
    """Not again with every configuration that is tried."""
    costing(store, plan, 1.0)
    code, out, err = run(plan, store, RatedTrainer())
    assert code == 0
    assert "Estimate of the search: estimated 18 s for 8 trials" in " ".join(out.split())
    assert err.count("Expected: ") == 1
    assert "for 8 trials, from a probe" in err
    (call,) = estimate.calls(store.study_dir(plan))
    assert (call["to_run"], call["took_seconds"] is None) == (8, False)
