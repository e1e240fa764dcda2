"""What a report says of expense: how good the estimate was, the GPU-hours, and a gate that was gone around."""

from collections.abc import Iterator
from pathlib import Path

from workbench import durable, estimate
from workbench.budget import Meter
from workbench.records import StudyResults
from workbench.store import Store

WITHOUT_GATE = "without_gate.json"


def facts(results: StudyResults) -> Iterator[str]:
    """Yield one line each."""
    for line in estimate.errors(results):
        yield f"Estimate of {line}."
    store = Store(results.runs, create=False)
    spent, cap = Meter(store, results.plan).gpu_hours(), results.plan.study.execution.gpu_hours
    if spent:
        limit = f" of {cap:g}" if cap is not None else ""
        yield f"GPU-hours: {spent:.3g}{limit}, all attempts of the study at this profile counted."
    for item in gone_around(store.study_dir(results.plan)):
        yield f"Run without a gate since {item['at'][:10]}: {item['reason']}."


def gone_around(folder: Path) -> list[dict[str, str]]:
    """Return when and why a study was run without a gate, oldest first."""
    found = (durable.read_json(folder / WITHOUT_GATE) or {}).get("reasons")
    try:
        return [{"at": str(item["at"]), "reason": str(item["reason"])} for item in found or ()]
    except durable.UNUSABLE:  # somebody's hand: that it was run without is still to be said
        return [{"at": "unknown", "reason": f"{WITHOUT_GATE} is damaged"}]
