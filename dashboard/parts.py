"""What the pages share: guards that explain and stop, the study picker, and badges. Draws only."""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import plotly.graph_objects as go
import streamlit as st

from dashboard import load

REFRESH_SECONDS = 5
PATIENCE_SECONDS = 60
_LAST_SIGN = "last sign of a running trial"
_MARKS = re.compile(r"[\\`*_\[\]<$~]|^[#>+-]")
FIRST_STUDY = "python -m workbench run studies/refinement_detach.yaml"

# Word, icon and colour together: the colour alone would not reach everybody. Undecided and equivalent are no failures.
VERDICTS: dict[str, tuple[str, Literal["green", "orange", "blue", "gray"]]] = {
    "supported": (":material/check_circle:", "green"),
    "refuted": (":material/cancel:", "orange"),
    "equivalent": (":material/drag_handle:", "blue"),
    "undecided": (":material/help:", "gray"),
}
STATES = {
    "pending": ":material/schedule:",
    "running": ":material/play_circle:",
    "finished": ":material/check:",
    "failed": ":material/error:",
    "diverged": ":material/trending_up:",
    "interrupted": ":material/pause_circle:",
}


def plain(text: str) -> str:
    """Return Markdown that shows a text as it was written: records may be a stranger's, and name pictures elsewhere."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def runs_folder() -> Path:
    """Return the runs folder that this dashboard was started for, and say so when an argument was not understood."""
    folder, unknown = load.runs_folder(sys.argv[1:], os.environ)
    if unknown:
        st.warning(f"Not understood and left out: `{' '.join(unknown)}`. The one option is `-- --runs DIR`.")
    return folder


def entries_or_stop() -> tuple[load.StudyEntry, ...]:
    """Return the studies of the runs folder; without any, say what to do and end the page."""
    folder = runs_folder()
    try:
        entries = load.entries(folder)
    except load.StoreError as error:
        _nothing_yet(folder, f"There is nothing to read: {error}")
    if not entries:
        _nothing_yet(folder, f"No study has been run in `{folder}` yet.")
    return entries


def _nothing_yet(folder: Path, what: str) -> NoReturn:
    st.info(what, icon=":material/science:")
    st.markdown("Run a first study; this page shows it as soon as it has started:")
    st.code(FIRST_STUDY if folder == Path("runs") else f"{FIRST_STUDY} --runs {folder}", language=None)
    st.caption(
        "Records elsewhere? Start the dashboard with their folder: `streamlit run dashboard/app.py -- --runs DIR`."
    )
    st.stop()


def study_picker(entries: tuple[load.StudyEntry, ...]) -> None:
    """Let the user choose a study; the choice stands in the URL, and without one it is the newest."""
    st.selectbox(
        "Study / profile / plan",
        [entry.key for entry in entries],
        index=None,
        key="study",
        bind="query-params",
        placeholder=f"newest: {entries[0].key}",
    )


def chosen(entries: tuple[load.StudyEntry, ...]) -> load.StudyResults:
    """Return the study that the picker says; end the page if its record cannot be read."""
    entry = next((entry for entry in entries if entry.key == st.session_state.get("study")), entries[0])
    if entry.results is None:
        unreadable(entry)
        st.stop()
    return entry.results


def unreadable(entry: load.StudyEntry) -> None:
    """Show a record that cannot be read as what it is."""
    st.error(f"**{plain(entry.key)}** cannot be read. {plain(entry.problem or '')}", icon=":material/error:")


def verdict_badge(verdict: load.Verdict | None) -> None:
    """Show a verdict as word, icon and colour."""
    if verdict is None:
        st.badge("no verdict yet", icon=":material/hourglass_empty:", color="gray")
        return
    icon, colour = VERDICTS[verdict.verdict]
    st.badge(f"{verdict.verdict} (strong)" if verdict.strong else verdict.verdict, icon=icon, color=colour)


def progress_bar(progress: load.Progress) -> None:
    """Show how far a study is, and how many of its trials are in which state."""
    states = " · ".join(f"{STATES[state]} {count} {state}" for state, count in progress.states.items())
    text = f"{progress.planned} trials: {states}"
    if progress.over < progress.planned:
        st.progress(progress.fraction, text=text)
    else:
        st.markdown(text)


def next_step(results: load.StudyResults) -> None:
    """Show what the study waits for, with the line to copy."""
    step = load.next_run(results)
    if step:
        st.markdown(step[0])
        st.code(step[1], language=None, wrap_lines=True)


def chart(figure: go.Figure, *, key: str, alt: str, still: bool = False) -> None:
    """Draw a figure without the buttons nobody needs; `still` ones answer to the pointer only by their hover text."""
    buttons = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
    st.plotly_chart(
        figure, key=key, alt=alt, config={"displayModeBar": False, "scrollZoom": False} if still else buttons
    )


def refreshed(draw: Callable[[], bool], *, running: bool) -> None:
    """Draw a part of the page, again every few seconds while something runs; `draw` says whether anything still does.

    The timer stops a minute after the last sign, since a driver takes some seconds between two trials.
    """

    def once() -> None:
        if draw():
            st.session_state[_LAST_SIGN] = time.monotonic()
        elif ticking and time.monotonic() - st.session_state[_LAST_SIGN] > PATIENCE_SECONDS:
            st.rerun()  # without the timer

    if running:
        st.session_state[_LAST_SIGN] = time.monotonic()
    ticking = time.monotonic() - st.session_state.get(_LAST_SIGN, -math.inf) <= PATIENCE_SECONDS
    st.fragment(once, run_every=REFRESH_SECONDS if ticking else None)()
