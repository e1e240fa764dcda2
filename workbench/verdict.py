"""The verdict on a claim. The rule, its reasons and its measured error rates are in `docs/statistics.md`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workbench import stats
from workbench.evidence import Evidence, gather
from workbench.labels import POINTS
from workbench.records import StudyResults, Verdict, Word
from workbench.study import FEWEST_SEEDS, Claim, Look

LEARNED_AP = 0.1  # a baseline below has learned too little for its variants to mean anything


def judge(results: StudyResults, *, seeds: int | None = None) -> tuple[Verdict, ...]:
    """Judge every claim at the latest look whose trials are complete; a claim decided at an earlier look stays decided.

    `seeds` is the number that was asked for on the command line: looks beyond it are not considered, and if it is below
    the first look there are numbers but no verdict.
    """
    study = results.plan.study
    looks = [look for look in study.looks[: max(1, results.looks_started)] if seeds is None or look.seeds <= seeds]
    if not looks:  # fewer seeds than the first look: an unplanned one, which decides nothing
        looks = [Look(seeds=seeds or 0, alpha=study.looks[0].alpha)]
    verdicts: dict[str, Verdict] = {}
    for look in looks:
        evidence = {claim.id: gather(results, claim, look) for claim in study.claims}
        alphas = _alphas(study.claims, evidence, look)
        for claim in study.claims:
            verdict = _judge_at(results, claim, evidence[claim.id], look=look, alphas=alphas[claim.id])
            verdicts[claim.id] = _succeed(verdicts.get(claim.id), verdict, evidence[claim.id])
    return tuple(verdicts.values())


def decide(kind: str, interval: stats.Interval, margin: float) -> Word:
    """Apply the rule: where the intervals lie relative to the claimed region and to the margin."""
    if interval.p_value is None:
        return "undecided"
    if -margin < interval.inner_low and interval.inner_high < margin:
        return "supported" if kind == "equivalence" else "equivalent"
    if kind == "equivalence":
        return "refuted" if interval.low > margin or interval.high < -margin else "undecided"
    if interval.low > 0:
        return "supported"
    return "refuted" if interval.high < 0 else "undecided"


@dataclass(frozen=True, slots=True)
class _Alphas:
    """The levels of one claim at one look: for its direction and for its equivalence. They differ inside a family."""

    direction: float
    equivalence: float
    note: str | None = None


def _alphas(claims: tuple[Claim, ...], evidence: dict[str, Evidence], look: Look) -> dict[str, _Alphas]:
    """Return each claim's levels: the look's alpha, shared by Holm's rule among the claims that name the same family.

    Holm tests the smallest p of K at alpha/K, the next at alpha/(K-1) and so on until one is not rejected; the rest
    stay at that level. Equivalence is tested at alpha/K. A claim without numbers counts as p = 1.
    """
    alphas = {claim.id: _Alphas(look.alpha, look.alpha) for claim in claims}
    for family in {claim.family for claim in claims if claim.family is not None}:
        members = [claim.id for claim in claims if claim.family == family]
        p_values = {member: _p_value(evidence[member], look.alpha) for member in members}
        adjusted = dict(zip(members, stats.holm([p_values[member] for member in members]), strict=True))
        rejected = sum(p <= look.alpha for p in adjusted.values())
        for rank, member in enumerate(sorted(members, key=lambda member: p_values[member])):
            alphas[member] = _Alphas(
                look.alpha / (len(members) - min(rank, rejected, len(members) - 1)),
                look.alpha / len(members),
                f"one of {len(members)} claims of the family {family}: p after Holm {adjusted[member]:.3g}",
            )
    return alphas


def _p_value(evidence: Evidence, alpha: float) -> float:
    differences = list(evidence.differences.values())
    interval = stats.paired_interval(differences, alpha=alpha) if len(differences) >= 2 else None
    return 1.0 if interval is None or interval.p_value is None else interval.p_value


def _succeed(earlier: Verdict | None, verdict: Verdict, evidence: Evidence) -> Verdict:
    """Return the verdict that stands after a further look."""
    if earlier is None:
        return verdict
    if earlier.verdict != "undecided":
        note = f"decided at the look of {earlier.look_seeds} seeds, which stands; later seeds do not reopen it"
        return earlier if note in earlier.notes else replace(earlier, notes=(*earlier.notes, note))
    if not evidence.complete:
        progress = f"{evidence.finished} of {evidence.planned} trials finished"
        return replace(
            earlier, notes=(*earlier.notes, f"the look of {verdict.look_seeds} seeds is under way: {progress}")
        )
    return verdict


def _judge_at(results: StudyResults, claim: Claim, evidence: Evidence, *, look: Look, alphas: _Alphas) -> Verdict:
    """Judge one claim at one look."""
    interval = _interval(list(evidence.differences.values()), alphas)
    blocked = _why_blocked(results, claim, evidence, look)
    word: Word = "undecided" if blocked or interval is None else decide(claim.kind, interval, claim.margin)
    looked_before = results.looked_before.get(claim.id, ())
    needed, more_seeds = None, False
    if blocked:
        reason = blocked
    elif interval is None or interval.p_value is None:
        reason = "the difference is the same in every seed: check that the variants differ in what the metric sees"
    elif word == "undecided":
        needed, more_seeds, reason = _for_want_of_seeds(results, claim, interval, look)
    else:
        reason = _decided_because(claim, word, interval, evidence)
    return Verdict(
        claim=claim.id,
        text=claim.text,
        kind=claim.kind,
        verdict=word,
        reason=reason,
        effect=interval and interval.estimate,
        low=interval and interval.low,
        high=interval and interval.high,
        inner_low=interval and interval.inner_low,
        inner_high=interval and interval.inner_high,
        margin=claim.margin,
        alpha=alphas.direction,
        look_seeds=look.seeds,
        n_pairs=len(evidence.terms),
        sd=interval and interval.sd,
        correlation=evidence.correlation,
        p_value=interval and interval.p_value,
        strong=word == "supported"
        and claim.kind == "superiority"
        and interval is not None
        and interval.low > claim.margin,
        seeds_needed=needed,
        still_rising=evidence.still_rising,
        post_hoc=claim.id in results.post_hoc,
        differences=evidence.differences,
        notes=_notes(claim, evidence, alphas, looked_before),
        more_seeds=more_seeds,
        looked_before=looked_before,
    )


def _interval(differences: list[float], alphas: _Alphas) -> stats.Interval | None:
    if len(differences) < 2:
        return None
    direction = stats.paired_interval(differences, alpha=alphas.direction)
    inner = stats.paired_interval(differences, alpha=alphas.equivalence)
    return replace(direction, inner_low=inner.inner_low, inner_high=inner.inner_high)


def _why_blocked(results: StudyResults, claim: Claim, evidence: Evidence, look: Look) -> str | None:
    """Return why this evidence may not decide the claim whatever its numbers are, with what to do; None if it may."""
    study = results.plan.study
    planned = len(study.seeds[: look.seeds])
    if claim.missing:
        return f"this selection does not run {_and(claim.missing)}: add --variants all"
    if not study.gives_verdicts:
        return f"profile {study.profile} tests the plumbing and never gives a verdict: choose another --profile"
    if planned < FEWEST_SEEDS:
        return f"{planned} seeds give numbers but no verdict, which takes at least {FEWEST_SEEDS}: leave out --seeds"
    if look not in study.looks:
        return f"{planned} seeds are fewer than the first look of {study.looks[0].seeds}: leave out --seeds"
    if evidence.failed:
        return f"{_and(evidence.failed)} failed: read the error with `status`, then give the same command again"
    if not evidence.complete:
        return f"{evidence.finished} of {evidence.planned} trials finished: the same command goes on"
    return _why_unfit(evidence, planned)


def _why_unfit(evidence: Evidence, planned: int) -> str | None:
    """Return why complete trials cannot decide a claim."""
    if evidence.diverged:
        return f"{_and(evidence.diverged)} diverged, an outcome that the claim did not foresee: look at the losses"
    if len(evidence.terms) < FEWEST_SEEDS:
        return f"only {len(evidence.terms)} of {planned} seeds have a score to compare; a verdict takes {FEWEST_SEEDS}"
    if evidence.baseline_ap is None or evidence.baseline_ap < LEARNED_AP:
        reached = "no AP" if evidence.baseline_ap is None else f"AP {POINTS * evidence.baseline_ap:.1f}"
        return f"the baseline has not learned: {reached} is below {POINTS * LEARNED_AP:.0f}; train longer"
    return None


def _decided_because(claim: Claim, word: Word, interval: stats.Interval, evidence: Evidence) -> str:
    """Return in words which side of 0 and of the margin the interval lies on."""
    margin = f"{POINTS * claim.margin:g} points"
    if -claim.margin < interval.inner_low and interval.inner_high < claim.margin:
        sign = "positive" if interval.low > 0 else "negative" if interval.high < 0 else ""
        return f"any difference is smaller than {margin}" + (f": statistically {sign}, practically nil" if sign else "")
    if claim.kind == "equivalence":
        return f"the whole interval lies more than {margin} from 0"
    above = word == "supported"
    where = f"the whole interval lies {'above' if above else 'below'} 0"
    if interval.low > claim.margin or interval.high < -claim.margin:
        where += f", and beyond the margin of {margin}"
    if not evidence.still_rising:
        return where
    learns = "learns faster, not shown to be better" if above else "learns slower, not shown to be worse"
    return f"{learns}: {where}, but {_and(evidence.still_rising)} still rose when training ended"


def _for_want_of_seeds(
    results: StudyResults, claim: Claim, interval: stats.Interval, look: Look
) -> tuple[int | None, bool, str]:
    """Return the seeds that would probably decide the claim, if more than there are; whether to go on; and why."""
    later = [planned for planned in results.plan.study.looks if planned.seeds > look.seeds]
    needed = stats.seeds_needed(
        interval.sd,
        claim.margin,
        (later[0] if later else look).alpha,
        pilot=interval.n,
        equivalence=claim.kind == "equivalence",
    )
    span = f"{POINTS * interval.low:+.1f} to {POINTS * interval.high:+.1f} points are all possible"
    go_on = f"--until-decided goes on to {later[0].seeds}" if later else "plan a later look"
    if needed is None:
        return (
            None,
            False,
            f"{span}; more than {stats.MOST_SEEDS} seeds are needed: widen the margin or score more pictures",
        )
    if needed <= interval.n:
        where = "close to the margin" if claim.kind == "equivalence" else "between 0 and the margin"
        sufficed = f"{needed} seeds should have sufficed, so the difference probably lies {where}"
        return None, bool(later), f"{span}; {sufficed}: {go_on}"
    return needed, bool(later), f"{span}; about {needed} seeds are needed: {go_on}"


def _notes(claim: Claim, evidence: Evidence, alphas: _Alphas, looked_before: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a reader must know besides the reason."""
    found: list[str] = []
    if looked_before:
        found.append(
            f"looked at before with other looks: {'; '.join(looked_before)}. Each set of looks spends the whole alpha, "
            "so these statistics are too sure of themselves"
        )
    left_out = (*evidence.failed, *evidence.diverged)
    if left_out:
        found.append(f"pairs left out: {_and(left_out)} gave no result")
    if evidence.unscored:
        metrics = _and(tuple(dict.fromkeys(term.metric for term in claim.terms)))
        found.append(f"pairs left out: {_and(evidence.unscored)} without {metrics}")
    if evidence.mixed:
        found.append(f"mixed provenance: the trials differ in {_and(evidence.mixed)}")
    if evidence.changed_within:
        found.append(f"mixed provenance: {_and(evidence.changed_within)} did not end as it began")
    if evidence.unlike_pairs:
        found.append(
            f"unlike pairs: on GPUs the trials of {_and(evidence.unlike_pairs)} differ in more than the variants do"
        )
    if alphas.note:
        found.append(alphas.note)
    p_value = stats.sign_flip_p(list(evidence.differences.values()))
    if p_value is not None:
        found.append(f"exact sign-flip test: p = {p_value:.3g} (a check on the t interval, not part of the rule)")
    return tuple(found)


def _and(names: tuple[str, ...]) -> str:
    """Join names as in a sentence."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
