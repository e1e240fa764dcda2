"""Where a study stands: trials, metrics, verdicts, and what to do next. Reads records only, in under a second."""

from typing import Any

from workbench import commands
from workbench.labels import POINTS
from workbench.records import StudyResults, TrialRecord
from workbench.study import Parameters, PlannedTrial


def describe(results: StudyResults) -> dict[str, Any]:
    """Return the document that `status --json` prints; scripts may rely on it."""
    study = results.plan.study
    claimed = study.claims[0].terms[0].parameters if study.claims else "averaged"
    return {
        "study": study.name,
        "profile": study.profile,
        "baseline": study.baseline,
        "looks_started": results.looks_started,
        "looks": [look.seeds for look in study.looks],
        "trials": [_trial(trial, results.records[trial.trial_id], claimed) for trial in _shown(results)],
        "verdicts": [
            {
                "claim": verdict.claim,
                "verdict": verdict.verdict,
                "effect": verdict.effect,
                "low": verdict.low,
                "high": verdict.high,
                "n_pairs": verdict.n_pairs,
                "reason": verdict.reason,
            }
            for verdict in results.verdicts
        ],
        "next": _next_step(results),
    }


def as_text(described: dict[str, Any]) -> str:
    """Lay out what `describe` returned for a terminal: AP in points."""
    looks = (
        f"look {described['looks_started']} of {len(described['looks'])}" if described["looks_started"] else "not run"
    )
    lines = [f"{described['study']} ({described['profile']}), {looks}", ""]
    rows = [("variant", "seed", "state", "attempts", "seconds", "AP", "trial")]
    rows += [_row(trial) for trial in described["trials"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 2, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [
        f"{trial['variant']} seed {trial['seed']} failed: {trial['error'].splitlines()[0]}"
        for trial in described["trials"]
        if trial["error"]
    ]
    lines += ["", *(_verdict_line(verdict) for verdict in described["verdicts"]), f"Next: {described['next']}"]
    return "\n".join(lines) + "\n"


def _shown(results: StudyResults) -> tuple[PlannedTrial, ...]:
    """Return the trials of the looks started, or of the first look, and others that happen to be known."""
    asked = {trial.trial_id for trial in results.asked_for()}
    return tuple(
        trial
        for trial in results.plan.trials
        if trial.trial_id in asked or results.records[trial.trial_id].state != "pending"
    )


def _trial(trial: PlannedTrial, record: TrialRecord, claimed: Parameters) -> dict[str, Any]:
    scored = {
        parameters: record.metrics[eval_id].numbers()
        for parameters, eval_id in trial.evaluations.items()
        if eval_id in record.metrics
    }
    return {
        "trial_id": trial.trial_id,
        "variant": trial.variant,
        "seed": trial.seed,
        "context": None,
        "state": record.state,
        "attempts": record.attempts,
        "seconds": record.total_seconds,
        "step": record.step,
        "total_steps": record.total_steps,
        "metrics": scored.get(claimed, {}),  # of the weights that the claims are about
        "metrics_by_parameters": scored,
        "error": record.error["message"] if record.state == "failed" and record.error else None,
        "reason": record.stopped["reason"] if record.stopped else None,
    }


def _next_step(results: StudyResults) -> str:
    step = commands.next_run(results)
    if step:
        return " ".join(step)
    if any(results.records[trial.trial_id].state == "running" for trial in results.asked_for()):
        return f"wait, or watch it in the dashboard: {commands.dashboard_command(results.runs)}"
    return f"read the report: {commands.command(results, verb='report')}"


def _row(trial: dict[str, Any]) -> tuple[str, ...]:
    ap = trial["metrics"].get("ap")
    done = (
        f" {trial['step'] / trial['total_steps']:.0%}" if trial["state"] == "running" and trial["total_steps"] else ""
    )
    return (
        trial["variant"],
        str(trial["seed"]),
        trial["state"] + done + (f", {trial['reason']}" if trial["reason"] else ""),
        str(trial["attempts"]),
        f"{trial['seconds']:.0f}" if trial["seconds"] else "",
        f"{POINTS * ap:.1f}" if ap is not None else "",
        trial["trial_id"],
    )


def _verdict_line(verdict: dict[str, Any]) -> str:
    numbers = ""
    if verdict["effect"] is not None:
        effect, low, high = (POINTS * verdict[key] for key in ("effect", "low", "high"))
        numbers = f" {effect:+.1f} [{low:+.1f}, {high:+.1f}] points, n {verdict['n_pairs']};"
    return f"{verdict['verdict'].upper()}  {verdict['claim']}:{numbers} {verdict['reason']}"
