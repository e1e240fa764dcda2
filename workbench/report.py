"""A study's results for people: what was claimed, what the evidence says of it, what it cost. Screens show points.

`contents` gathers everything once as tables and paragraphs; the writers of `report_formats` only lay it out.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from core.metrics import Metrics
from workbench import commands, expenses, report_formats, search_report, tuned
from workbench.labels import METRICS, POINTS, duration
from workbench.records import StudyResults, TrialRecord, Verdict
from workbench.report_contents import ClaimLines, Contents, Table
from workbench.study import Claim, Parameters

Format = Literal["text", "md", "html", "latex", "tuned"]
MOST_CLASSES = 12  # more would bury the rest of the report
_COLUMNS = {name: label for name, label in METRICS.items() if name != "ap75"}


def render(results: StudyResults, *, format: Format, out: Path | None = None) -> str:  # noqa: A002 - the option's name
    """Return the report of a study with the verdicts in `results`; with `out`, also write it there.

    Markdown has its figures as PNG files beside `out`, and none without it; HTML carries them inside; LaTeX is the
    table of differences alone, for a paper; text is for a terminal of 100 columns; tuned is the file of a search's best
    settings.

    Raises:
        WorkbenchError: tuned settings of a study that has none yet.
    """
    found = contents(results)
    match format:
        case "tuned":
            text = tuned.render(results, out=out, command=commands.command(results, verb="report"))
        case "text":
            text = report_formats.text(found)
        case "md":
            text = report_formats.markdown(found, out)
        case "html":
            text = report_formats.html(found)
        case "latex":
            text = report_formats.latex(found)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    return text


def contents(results: StudyResults) -> Contents:
    """Gather what the report says from the records and the stored verdicts."""
    study = results.plan.study
    if study.search is not None:
        return search_report.contents(results, cost=_facts(results))
    claims = {claim.id: claim for claim in study.claims}
    verdicts = results.verdicts
    return Contents(
        title=f"{study.name} · {study.profile}",
        question=" ".join(study.question.split()),
        claims=_claims_table(results, claims),
        lines=tuple(
            ClaimLines(claim=v.claim, text=v.text, verdict=v, details=tuple(_details(results, v))) for v in verdicts
        ),
        scores=tuple(_score_tables(results)),
        facts=tuple(_facts(results)),
        results=results,
        verdicts=verdicts,
    )


def contrast(claim: Claim) -> str:
    """Return a claim's terms as a sum in words: kept - detached."""
    parts: list[str] = []
    for term in claim.terms:
        sign = "-" if term.weight < 0 else "+"
        weight = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} "
        parts += [f"{sign} {weight}{term.variant}"]
    return " ".join(parts).removeprefix("+ ")


# ------------------------------------------------------------------------------------------------------- claims


def _claims_table(results: StudyResults, claims: dict[str, Claim]) -> Table:
    rows = tuple(
        (
            v.claim + (" (post hoc)" if v.post_hoc else ""),
            contrast(claims[v.claim]),
            v.verdict + (" (strong)" if v.strong else ""),
            _interval(v),
            f"{100 * (1 - v.alpha):.4g} %",
            f"{POINTS * v.margin:g}",
            str(v.n_pairs),
        )
        for v in results.verdicts
    )
    return Table(
        title="Claims",
        header=("Claim", "Variant", "Verdict", "Difference [interval]", "Level", "Margin", "n"),
        rows=rows,
        caption=_caption(results),
        bold=frozenset(index for index, v in enumerate(results.verdicts) if v.verdict == "supported"),
        left=3,
    )


def _interval(verdict: Verdict) -> str:
    if verdict.effect is None or verdict.low is None or verdict.high is None:
        return "-"
    return f"{POINTS * verdict.effect:+.2f} [{POINTS * verdict.low:+.2f}, {POINTS * verdict.high:+.2f}]"


def _caption(results: StudyResults) -> str:
    """Return what the numbers are: metric, pictures, checkpoint, seeds, interval, margin, looks, scope."""
    study = results.plan.study
    terms = [term for claim in study.claims for term in claim.terms]
    metrics = " and ".join(dict.fromkeys(METRICS.get(term.metric, term.metric) for term in terms))
    weights = " and ".join(dict.fromkeys(term.parameters for term in terms))
    splits = " and ".join(sorted({variant.config.data.split for variant in study.variants}))
    pictures = " or ".join(
        f"{count:,}"
        for count in sorted({m.num_pictures for record in results.records.values() for m in record.metrics.values()})
    )
    looks = ", ".join(f"{look.seeds} seeds at alpha {look.alpha:g}" for look in study.looks)
    sentences = [
        f"Differences in points of COCO {metrics} on {pictures or 'no'} pictures of the {splits} split",
        f"{weights} weights of the last checkpoint, never the best",
        "mean over seeds paired across variants, with two-sided t intervals of that mean",
        "margin: the smallest difference that matters, fixed before the runs",
        f"looks: {looks}",
        f"scope: {study.scope}, on these pictures",
    ]
    again = [verdict.claim for verdict in results.verdicts if verdict.looked_before]
    sentences += [f"looked at before with other looks, so too sure: {', '.join(again)}"] if again else []
    return "; ".join(sentences) + "."


def _details(results: StudyResults, verdict: Verdict) -> Iterable[str]:
    """Yield what a reader of one verdict needs besides its numbers."""
    yield f"{verdict.reason[:1].upper()}{verdict.reason[1:]}."
    if verdict.differences:
        dots = "  ".join(f"{seed}: {POINTS * value:+.2f}" for seed, value in verdict.differences.items())
        noise = "" if verdict.sd is None else f"; sd {POINTS * verdict.sd:.2f}"
        pairing = "" if verdict.correlation is None else f"; correlation of the pair {verdict.correlation:.2f}"
        yield f"Seeds: {dots}{noise}{pairing}."
    says_so = verdict.kind == "superiority" and verdict.verdict in ("supported", "refuted")
    if verdict.still_rising and not says_so:
        yield f"Curves that still rose when training ended: {', '.join(verdict.still_rising)}."
    if verdict.post_hoc:
        yield "Post hoc: this claim was written down after trials of it had finished."
    for note in verdict.notes:
        yield f"Note: {note}."
    step = _next_step(results, verdict)
    if step:
        yield f"Next: {step}"


def _next_step(results: StudyResults, verdict: Verdict) -> str | None:
    """Return the command that may decide an undecided claim; None where no command can."""
    study = results.plan.study
    claim = next(claim for claim in study.claims if claim.id == verdict.claim)
    if verdict.verdict != "undecided" or not study.gives_verdicts:
        return None
    if claim.missing:
        return commands.command(results, "--variants", "all")
    over = all(results.records[trial.trial_id].state in ("finished", "diverged") for trial in results.asked_for())
    step = commands.next_run(results)
    return step[1] if step and (not over or commands.wants_seeds(results, verdict)) else None


# ------------------------------------------------------------------------------------------------------- scores


def scored(results: StudyResults) -> dict[str, list[Metrics]]:
    """Return the final metrics of every finished trial, by variant in the study's order."""
    terms = [term for claim in results.plan.study.claims for term in claim.terms]
    parameters: Parameters = terms[0].parameters if terms else "averaged"
    found: dict[str, list[Metrics]] = {variant.name: [] for variant in results.plan.study.variants}
    for trial in results.plan.trials:
        metrics = results.records[trial.trial_id].metrics.get(trial.evaluations.get(parameters, ""))
        if metrics is not None:
            found[trial.variant].append(metrics)
    return found


def _score_tables(results: StudyResults) -> Iterable[Table]:
    by_variant = scored(results)
    if not any(by_variant.values()):
        return
    caption = "Points, mean ± standard deviation over n seeds; - where nothing can be scored."
    yield Table(
        title="Scores by size",
        header=("Variant", "n", *_COLUMNS.values()),
        rows=tuple(
            (name, str(len(of)), *(_mean_sd([getattr(m, metric) for m in of]) for metric in _COLUMNS))
            for name, of in by_variant.items()
        ),
        caption=caption,
    )
    classes = list(dict.fromkeys(name for of in by_variant.values() for metrics in of for name in metrics.per_class))
    if 1 < len(classes) <= MOST_CLASSES:
        yield Table(
            title="AP by class",
            header=("Variant", *classes),
            rows=tuple(
                (name, *(_mean_sd([m.per_class.get(label, {}).get("ap") for m in of]) for label in classes))
                for name, of in by_variant.items()
            ),
            caption=caption,
        )


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [POINTS * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{fmean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")


# -------------------------------------------------------------------------------------------------------- facts


def _facts(results: StudyResults) -> Iterable[str]:
    """Yield cost, data left out, hardware and revision, one line each."""
    records = [record for record in results.records.values() if record.attempts]
    outcomes = ", ".join(f"{count} {state}" for state, count in Counter(record.state for record in records).items())
    cost = duration(sum(record.total_seconds for record in records))
    yield f"Cost: {cost} of worker time in {len(records)} trials" + (f" ({outcomes})." if outcomes else ".")
    yield from expenses.facts(results)
    if packed := sum(_is_packed(record) for record in records):
        yield f"Times: {packed} trials shared a GPU with others, so no time here is that of a variant alone."
    lines = list(dict.fromkeys(line for record in records for line in _left_out(record)))
    yield "Left out of the data: " + ("; ".join(lines) if lines else "nothing") + "."
    found = [f"{record.trial_id} {name}" for record in records for name in (record.result or {}).get("damaged", [])]
    if found:
        yield f"Files found damaged, set aside and made again: {'; '.join(found)}."
    provenances = [record.result["provenance"] for record in records if record.result and "provenance" in record.result]
    for label, told in (("Hardware", _hardware), ("Software", _software)):
        said = dict.fromkeys(told(provenance) for provenance in provenances)
        if said:
            yield f"{label}: {' | '.join(said)}."
    yield f"Plan {results.plan.plan_hash[:12]}. To repeat: {commands.command(results)}"


def _is_packed(record: TrialRecord) -> bool:
    """Tell whether a trial shared its GPU with others, which changes how long it took and nothing else."""
    share = (record.result or {}).get("provenance", {}).get("gpu_share")
    return share is not None and share < 1


def _left_out(record: TrialRecord) -> list[str]:
    report = (record.result or {}).get("data_report", {})
    if not any(key.endswith(".examples") for key in report):
        return []
    from core.data.splits import left_out  # brings torch: only for folders that had something to leave out

    return left_out(report)


def _hardware(provenance: dict[str, Any]) -> str:
    gpus = provenance.get("gpu") or ", ".join(provenance.get("gpus") or [])
    processes = f"processes a trial: {provenance['world_size']}, " if provenance.get("world_size", 1) > 1 else ""
    device = gpus or provenance.get("cpu") or provenance["device"]
    return f"{device}, {processes}threads a trial: {provenance['threads']}"


def _software(provenance: dict[str, Any]) -> str:
    revision = (provenance.get("git_revision") or "unknown")[:12]
    kept = f" (code/{provenance['diff']})" if provenance.get("diff") else ""
    changed = f" with local changes{kept}" if provenance.get("git_dirty") else ""
    code = " then ".join(provenance.get("mixed", {}).get("code_hash", [provenance["code_hash"]]))
    return f"revision {revision}{changed}, core code {code}, torch {provenance['torch']}"
