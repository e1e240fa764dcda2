"""Runs: what is running now, and what went wrong? The trials of one study, drawn again while one of them trains."""

import streamlit as st

from dashboard import load, parts

COLUMNS = {
    "variant": "Variant",
    "seed": st.column_config.NumberColumn("Seed", format="%d"),
    "state": "State",
    "progress": st.column_config.ProgressColumn("Progress", format="percent", min_value=0, max_value=1),
    "attempts": st.column_config.NumberColumn("Attempts", format="%d"),
    "best_ap": st.column_config.NumberColumn(
        "Best AP",
        format="%.1f",
        help="In points, of all evaluations so far. Verdicts use the last checkpoint.",
    ),
    "pictures_per_s": st.column_config.NumberColumn("Pictures/s", format="%.0f", help="As last reported."),
    "seconds": st.column_config.NumberColumn("Trained, s", format="%.0f", help="Without evaluation, all attempts."),
    "seconds_left": st.column_config.NumberColumn("Left, s", format="%.0f", help="Training only, at the speed so far."),
    "peak_memory_mib": st.column_config.NumberColumn("Memory, MiB", format="%.0f", help="At its peak."),
    "mlflow": st.column_config.LinkColumn("MLflow", display_text="open"),
    "trial_id": "Trial",
}
MOST_FAILURES = 20  # told in full
MOST_ROWS, HEIGHT_PX = 100, 1500  # a longer table scrolls


def draw_mlflow(results: load.StudyResults) -> None:
    """Say where MLflow shows the same trials, and how to start it."""
    url = load.mlflow_url(results)
    if url is None:
        st.caption("Not mirrored to MLflow yet.")
        return
    st.link_button("Open the study in MLflow", url, icon=":material/open_in_new:")
    command = load.mlflow_command(results)
    if command:
        st.caption("The links answer once MLflow's own pages are up:")
        st.code(command, language=None)


def draw() -> bool:
    """Draw the chosen study's trials and return whether one runs."""
    results = parts.chosen(parts.entries_or_stop())
    progress, folder = load.progress(results), parts.runs_folder()
    parts.progress_bar(progress)
    if progress.over < progress.planned:
        parts.next_step(results)
    failures = load.failures(folder, results)
    for failure in failures[:MOST_FAILURES]:
        tell = st.error if failure.state == "failed" else st.warning
        tell(
            f"**{parts.plain(failure.trial)} {failure.state}** in attempt {failure.attempts}: "
            f"{parts.plain(failure.message)}  \n"
            f"More in `{failure.folder}`.",
            icon=parts.STATES[failure.state],
        )
    if len(failures) > MOST_FAILURES:
        st.caption(f"And {len(failures) - MOST_FAILURES} more, of {len(failures)}; their states are in the table.")
    trials = load.trials(folder, results)
    st.dataframe(
        trials,
        column_config=COLUMNS,
        hide_index=True,
        height="content" if len(trials) <= MOST_ROWS else HEIGHT_PX,
        placeholder="",
        key="trials",
    )
    st.caption(f"One row a trial of the looks started, those that run first. {load.scope_line(results)}.")
    draw_mlflow(results)
    return progress.running


parts.refreshed(draw, running=any(entry.running for entry in parts.entries_or_stop()))
