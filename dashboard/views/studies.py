"""Studies: what did we learn? One card a claim, verdict first."""

import streamlit as st

from dashboard import charts, load, parts


def draw_claim(card: load.ClaimCard, key: str) -> None:
    """Show one claim: verdict, statement, effect with interval, the dots of the seeds, and why."""
    verdict = card.verdict
    parts.verdict_badge(verdict)
    st.markdown(f"**{parts.plain(card.text)}**")
    if verdict is None:
        st.caption(f"margin ±{card.margin:g} AP points · the verdict comes when a planned look is complete")
        return
    if card.effect is not None and card.low is not None and card.high is not None:
        st.markdown(f"### {card.effect:+.2f} AP points")
        interval = f"{card.level:.4g} % interval {card.low:+.2f} to {card.high:+.2f}"
        st.caption(f"{interval} · n={verdict.n_pairs} of {verdict.look_seeds} paired seeds · margin ±{card.margin:g}")
    else:
        st.caption(f"n={verdict.n_pairs} of {verdict.look_seeds} paired seeds · margin ±{card.margin:g} AP points")
    if card.dots:
        figure = charts.interval_strip(
            card.dots,
            effect=card.effect,
            low=card.low,
            high=card.high,
            margin=card.margin,
            colour=load.verdict_colour(verdict),
        )
        parts.chart(figure, key=key, alt=f"Paired difference with its interval and every seed: {card.text}", still=True)
    st.markdown(f"Why: {parts.plain(verdict.reason)}.")
    for note in verdict.notes:
        st.caption(parts.plain(note))
    if verdict.post_hoc:
        st.caption(":material/edit: post hoc: written down after a trial of it had finished")


def draw_study(entry: load.StudyEntry) -> None:
    """Show one study plan: how far it is, its claims, and what to do next."""
    results = entry.results
    if results is None:
        parts.unreadable(entry)
        return
    study = results.plan.study
    st.subheader(parts.plain(study.question), anchor=False)
    st.caption(
        f"{parts.plain(study.name)} · profile **{parts.plain(study.profile)}** · {load.registered(entry.ref)} · "
        f"plan {parts.plain(entry.ref.plan_hash[:8])}"
    )
    parts.progress_bar(load.progress(results))
    if study.gives_verdicts:
        grid = st.grid(3, min_column_width=330, border=True)
        cards = load.claim_cards(results)
        for card in cards:
            with grid.cell():
                draw_claim(card, key=f"{entry.key}/{card.claim}")
        legend = "Diamond and line: mean and interval; dots: every seed; grey: the margin. "
        st.caption(f"{legend if any(card.dots for card in cards) else ''}{load.scope_line(results)}.")
    parts.next_step(results)
    with st.container(horizontal=True):
        here = {"study": entry.key}
        st.page_link("views/compare.py", label="Compare variants", icon=":material/compare_arrows:", query_params=here)
        st.page_link("views/runs.py", label="See its trials", icon=":material/monitor_heart:", query_params=here)


def draw() -> bool:
    """Draw every study, newest first, and return whether one runs."""
    entries = parts.entries_or_stop()
    for place, entry in enumerate(entries):
        if place:
            st.divider()
        draw_study(entry)
    return any(entry.running for entry in entries)


parts.refreshed(draw, running=any(entry.running for entry in parts.entries_or_stop()))
