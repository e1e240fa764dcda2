"""What a plan needs and what it can show, before it runs: the output of `python -m workbench plan`."""

import json
from dataclasses import asdict
from statistics import stdev
from typing import Any

from workbench import stats
from workbench.costs import Machine, machine_for
from workbench.differences import differences
from workbench.estimate import DONE, estimate
from workbench.evidence import gather
from workbench.labels import POINTS, duration, size
from workbench.records import StudyResults
from workbench.search import outcomes, own_variants
from workbench.study import FEWEST_SEEDS, Look


def describe(results: StudyResults, *, explain: bool = False, machine: Machine | None = None) -> dict[str, Any]:
    """Return the plan as JSON values; effects are fractions, or multiples of the unknown sd where `sd` is null.

    `explain` adds `settings`: each variant's keys with value and the layer that set it. `machine`: where the trials
    will run; this one by default.
    """
    plan, study = results.plan, results.plan.study
    baseline = study.variants[0]
    expected = estimate(results, machine or machine_for(plan))
    described: dict[str, Any] = {
        "study": study.name,
        "profile": study.profile,
        "plan_hash": plan.plan_hash,
        "question": study.question,
        "baseline": study.baseline,
        "variants": [
            {"name": variant.name, "why": variant.why, "differences": differences(baseline.config, variant.config)}
            for variant in own_variants(plan)
        ],
        "looks": [_look(results, look) for look in study.looks],
        "trials": [
            {
                "trial_id": trial.trial_id,
                "variant": trial.variant,
                "seed": trial.seed,
                "state": results.records[trial.trial_id].state,
            }
            for trial in plan.trials
        ],
        "cost": asdict(expected),
        "warnings": list(plan.warnings),
    }
    if study.search is not None:
        described |= _of_search(results)
    if explain:
        described["settings"] = {
            name: {key: {"value": value, "set_by": where} for key, (value, where) in keys.items()}
            for name, keys in study.layers.items()
        }
    return described


def _of_search(results: StudyResults) -> dict[str, Any]:
    """Return what differs for a search: no look at claims, and trials that are not known before they are suggested."""
    search = results.plan.study.search
    assert search is not None  # the caller has looked
    found = outcomes(results)
    return {
        "looks": [],
        "search": {
            **asdict(search),
            "over": {name: outcome.over for name, outcome in found.items()},
            "complete": all(outcome.over == search.configurations for outcome in found.values()),
        },
    }


def _done(results: StudyResults, trial_id: str) -> bool:
    return results.records[trial_id].state in DONE


def _look(results: StudyResults, look: Look) -> dict[str, Any]:
    trials = {trial.trial_id for trial in results.plan.at_look(look)}
    return {
        "seeds": look.seeds,
        "alpha": look.alpha,
        "trials": len(trials),
        "finished": sum(_done(results, trial_id) for trial_id in trials),
        "reachable": _reachable(results, look),
    }


def _reachable(results: StudyResults, look: Look) -> dict[str, Any] | None:
    """Return what a look can show with 80 % probability, in sd of a paired difference and for each claim in fractions.

    None where no verdict can be given.
    """
    study = results.plan.study
    if not study.gives_verdicts or look.seeds < FEWEST_SEEDS:
        return None
    reach = stats.reachable(look.seeds, 1.0, look.alpha)
    claims: list[dict[str, Any]] = []
    for claim in (claim for claim in study.claims if not claim.missing):
        found = list(gather(results, claim, study.looks[-1]).differences.values())
        sd = stdev(found) if len(found) > 1 else None
        in_fractions = {
            "sd": sd,
            "effect": None if sd is None else sd * reach.effect,
            "equivalence_margin": None if sd is None else sd * reach.equivalence_margin,
        }
        claims += [{"claim": claim.id, "margin": claim.margin, "pairs": len(found), **in_fractions}]
    return {"effect_in_sd": reach.effect, "equivalence_margin_in_sd": reach.equivalence_margin, "claims": claims}


def as_text(described: dict[str, Any]) -> str:
    """Return a description for a terminal; AP and effects in points."""
    lines = [
        f"{described['study']} · profile {described['profile']} · plan {described['plan_hash']}",
        described["question"],
        "",
    ]
    costs = described["cost"]["looks"]
    for number, (look, cost) in enumerate(zip(described["looks"], costs, strict=False), start=1):  # a search has none
        counts = f"{look['trials']} trials, {look['finished']} of them finished"
        lines.append(f"look {number}: {look['seeds']} seeds, alpha {look['alpha']:g}: {counts}{_look_cost(cost)}")
    if "search" in described:
        search = described["search"]
        over = ", ".join(f"{count} of {name}" for name, count in search["over"].items())
        lines.append(
            f"search ({search['method']}, {search['scheduler']}): {search['configurations']} configurations for each "
            f"variant by {search['metric']}; over: {over}"
            + ("; the search is complete" if search["complete"] else _look_cost(costs[0]))
            + (" if none were ended early" if search["scheduler"] == "asha" and costs[0]["seconds"] else "")
        )
    lines += [*_costs(described["cost"]), "", *_variants(described), ""]
    for number, look in enumerate(described["looks"], start=1):
        if look["reachable"]:
            lines += [*_reach(number, look["reachable"]), ""]
    if "settings" in described:
        lines += _settings(described)
    return "\n".join(lines).rstrip() + "\n"


def _look_cost(cost: dict[str, Any]) -> str:
    if not cost["to_run"]:
        return "; complete"
    if cost["seconds"] is None:
        return ""
    disk = "" if cost["disk_bytes"] is None else f", {size(cost['disk_bytes'])} of disk"
    return (
        f"; {cost['to_run']} to run in {_range(cost['seconds'], cost['low'], cost['high'])}, "
        f"{cost['gpu_hours']:.3g} GPU-hours{disk}"
    )


def _costs(cost: dict[str, Any]) -> list[str]:
    """Return what a trial of each variant costs and where that is known from."""
    machine = cost["machine"]
    where = "a GPU" if machine["gpus"] == 1 else f"{machine['gpus']:g} GPUs" if machine["gpus"] else "the CPU"
    lines = [f"this machine cannot run it: {machine['note']}"] if machine["note"] else []
    if cost["costs"] is None:
        return [*lines, f"time, memory and disk on {where}: not known; add --probe to measure a few steps"]
    lines.append(f"a trial on {where}, {machine['at_once']} at once:")
    width = max(map(len, cost["costs"]))
    for name, each in cost["costs"].items():
        parts = [_range(each["seconds"], each["low"], each["high"])]
        if each["memory_bytes"] is not None:
            kind = "memory" if machine["device"] == "cpu" else "GPU memory"
            parts.append(f"{size(each['memory_bytes'])} of {kind}")
        if each["disk_bytes"] is not None:
            parts.append(f"{size(each['disk_bytes'])} of disk")
        lines.append(f"  {name:{width}}  {', '.join(parts)}; from {each['source']}")
    return lines


def _range(seconds: float, low: float, high: float) -> str:
    spread = f" ({duration(low)} to {duration(high)})" if duration(low) != duration(high) else ""
    return f"{duration(seconds)}{spread}"


def _variants(described: dict[str, Any]) -> list[str]:
    width = max(len(variant["name"]) for variant in described["variants"])
    lines: list[str] = []
    for variant in described["variants"]:
        rows = [f"{key}: {_plain(ours)} -> {_plain(theirs)}" for key, (ours, theirs) in variant["differences"].items()]
        for position, row in enumerate(rows or ["(baseline)"]):
            lines.append(f"  {variant['name'] if position == 0 else '':{width}}  {row}")
    return lines


def _reach(number: int, reach: dict[str, Any]) -> list[str]:
    effect, margin = reach["effect_in_sd"], reach["equivalence_margin_in_sd"]
    lines = [
        f"look {number} can show a difference of {effect:.2f} sd, or equivalence within {margin:.2f} sd, 4 times in 5"
    ]
    for claim in reach["claims"]:
        text = f"  {claim['claim']}: margin {POINTS * claim['margin']:g} points; "
        if claim["sd"] is None:
            text += "sd of a paired difference not known before two pairs have finished"
        else:
            effect, margin = POINTS * claim["effect"], POINTS * claim["equivalence_margin"]
            text += f"a difference of {effect:.2f}, equivalence within {margin:.2f} points "
            text += f"(sd {POINTS * claim['sd']:.2f} from {claim['pairs']} pairs)"
        lines.append(text)
    return lines


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _settings(described: dict[str, Any]) -> list[str]:
    """Return every key of the baseline with the layer that set it, and of the others what is set differently."""
    ours = described["settings"][described["baseline"]]
    lines: list[str] = []
    for name, keys in described["settings"].items():
        told = {key: item for key, item in keys.items() if name == described["baseline"] or item != ours.get(key)}
        width = max((len(key) for key in told), default=0)
        lines.append(f"{name}:" if keys is ours else f"{name}, where it is not as {described['baseline']}:")
        lines += [f"  {key:{width}}  {_plain(item['value']):14}  {item['set_by']}" for key, item in told.items()]
        lines.append("")
    return lines
