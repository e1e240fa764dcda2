"""Compare: which variants differ, and by how much? Differences first, curves below, tables last."""

from collections.abc import Sequence
from typing import TypeVar, get_args

import streamlit as st

from dashboard import charts, load, parts
from dashboard.load import comparison

T = TypeVar("T", bound=str)


def switch(label: str, options: Sequence[T], *, key: str, default: T, explanation: str | None = None) -> T:
    """Show a choice of one whose value stands in the URL."""
    return (
        st.segmented_control(
            label, options, default=default, required=True, key=key, bind="query-params", help=explanation
        )
        or default
    )


def draw_differences(results: load.StudyResults, metric: str, weights: load.Parameters) -> None:
    """Draw the paired differences to the baseline, or say what is missing."""
    label, baseline = load.METRICS[metric], results.plan.study.baseline
    st.subheader(f"Difference to {parts.plain(baseline)}", anchor=False)
    differences, dots = comparison.differences(results, metric, weights)
    if dots.empty:
        st.info(f"No pair of trials has a final {label} with {weights} weights yet.", icon=":material/hourglass_empty:")
        parts.next_step(results)
        return
    margin = comparison.margin(results, metric)
    figure = charts.forest(
        differences, dots, baseline=baseline, margin=margin, colours=load.colours(results), unit=f"{label} points"
    )
    parts.chart(figure, key="forest", alt=f"Paired difference in {label} of each variant to {baseline}")
    band = f"grey: the margin of ±{margin:g} points" if margin is not None else f"no margin is declared for {label}"
    st.caption(
        f"Diamond and line: mean and {comparison.level(results):.4g} % t interval over paired seeds; dots: every seed; "
        f"{band}. {load.scope_line(results)}."
    )
    progress = load.progress(results)
    if progress.over < progress.planned:
        st.caption(":material/hourglass_empty: Trials are still missing: this is a look ahead, no verdict rests on it.")


def draw_curves(results: load.StudyResults, metric: str, weights: load.Parameters) -> None:
    """Draw the learning curves against epochs or training time."""
    label = load.METRICS[metric]
    st.subheader("Learning curves", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        axis: comparison.Axis = switch("Against", get_args(comparison.Axis), key="against", default="epoch")
        show_seeds = st.toggle("Show every seed", key="seeds", bind="query-params")
    bands, lines = comparison.curves(results, metric=metric, parameters=weights, axis=axis)
    if bands.empty:
        st.info(f"No epoch has been scored with {weights} weights yet.", icon=":material/hourglass_empty:")
        return
    figure = charts.curves(
        bands, lines, x_title=axis, y_title=f"{label}, points", colours=load.colours(results), show_seeds=show_seeds
    )
    parts.chart(figure, key="curves", alt=f"Learning curves of {label} by variant")
    st.caption(
        "Line: mean over the seeds that reached the epoch; band: 95 % t interval over seeds; n under the pointer. "
        "Scored on the fixed subset used while training, so the ends differ from the final scores."
    )


def draw_tables(results: load.StudyResults, metric: str, weights: load.Parameters) -> None:
    """Draw the final scores, the classes and the configuration."""
    st.subheader("Final scores", anchor=False)
    st.dataframe(comparison.final_scores(results, weights), hide_index=True, key="finals")
    st.caption(f"Points, mean ± standard deviation over n seeds, {weights} weights. {load.scope_line(results)}.")
    by_class = "ap50" if metric == "ap50" else "ap"
    classes = comparison.per_class(results, weights, by_class)
    if not classes.empty:
        st.subheader("By class", anchor=False)
        unit = f"{load.METRICS[by_class]}, points"
        figure = charts.per_class(classes, x_title=unit, colours=load.colours(results))
        parts.chart(figure, key="classes", alt=f"{load.METRICS[by_class]} of each class by variant")
        st.caption("Mean ± standard deviation over seeds, hardest class first; no claim is judged on it.")
    st.subheader("What differs in the configuration", anchor=False)
    st.dataframe(comparison.config_differences(results), hide_index=True, key="config")
    st.caption("Only the keys in which the variants differ; everything else is equal.")


results = parts.chosen(parts.entries_or_stop())
st.markdown(parts.plain(results.plan.study.question))
with st.container(horizontal=True, gap="medium"):
    names = {label: name for name, label in load.METRICS.items()}
    metric = names[switch("Metric", list(names), key="metric", default="AP")]
    weights = switch(
        "Weights",
        get_args(load.Parameters),
        key="weights",
        default=comparison.default_parameters(results),
        explanation="averaged: the moving average of the weights over training; raw: the weights of the last step",
    )
draw_differences(results, metric, weights)
draw_curves(results, metric, weights)
draw_tables(results, metric, weights)
