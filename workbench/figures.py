"""The pictures of a report, by matplotlib: a forest plot of the claims and the learning curves. AP in points."""

import io
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench import stats
from workbench.labels import POINTS
from workbench.palette import VERDICT_COLOURS, variant_colours
from workbench.records import StudyResults, Verdict
from workbench.study import Term

ALT = {
    "forest": "Paired difference of every claim with its interval, the dot of each seed and the margin",
    "curves": "Learning curves of every variant: the mean over seeds, its interval and each seed",
}
_INK = "#1b1f24"  # in SVG it becomes the text colour of the page
_SOFT = "#8a94a0"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "detr-ablation-workbench",  # the same figure is the same file
}
_CURVE_ALPHA = 0.05  # curves show a plain 95 % band; only verdicts spend alpha


def of_report(results: StudyResults) -> dict[str, Figure]:
    """Return the figures that there is something to draw for, by name."""
    figures: dict[str, Figure] = {}
    with mpl.rc_context(_STYLE):
        if any(verdict.differences for verdict in results.verdicts):
            figures["forest"] = forest(results.verdicts)
        searches = results.plan.study.search is not None  # whose curves are too many to tell apart
        if not searches and any(record.epochs for record in results.records.values()):
            figures["curves"] = learning_curves(results)
    return figures


def save(figure: Figure, path: Path) -> None:
    """Write a PNG on white, sharp enough for print."""
    with mpl.rc_context(_STYLE):
        figure.savefig(path, dpi=180, facecolor="white", metadata={"Software": None})


def svg(figure: Figure) -> str:
    """Return an SVG element on a transparent ground, its text in the colour of the page around it."""
    stream = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def forest(verdicts: tuple[Verdict, ...]) -> Figure:
    """Draw each claim as a row: interval, seeds, margin band, and the verdict's word at the right."""
    figure = Figure(figsize=(8.2, 1.1 + 0.72 * len(verdicts)), layout="constrained")
    axes = figure.add_subplot()
    for row, verdict in enumerate(verdicts):
        _forest_row(axes, -row, verdict)
    axes.axvline(0, color=_INK, linewidth=0.9)
    axes.set_yticks([-row for row in range(len(verdicts))], [verdict.claim for verdict in verdicts])
    axes.set_ylim(-len(verdicts) + 0.45, 0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.06)
    axes.set_xlabel(
        "difference in AP points: mean over seeds, its interval, and every seed; shaded: smaller than matters"
    )
    return figure


def _forest_row(axes: Axes, y: float, verdict: Verdict) -> None:
    colour = VERDICT_COLOURS[verdict.verdict]
    margin = POINTS * verdict.margin
    axes.fill_betweenx([y - 0.42, y + 0.42], -margin, margin, color=_SOFT, alpha=0.16, linewidth=0)
    dots = [POINTS * value for value in verdict.differences.values()]
    axes.scatter(dots, [y - 0.2] * len(dots), s=22, color=colour, alpha=0.55, linewidth=0, zorder=3)
    said = verdict.verdict + (" (post hoc)" if verdict.post_hoc else "")
    if verdict.effect is not None and verdict.low is not None and verdict.high is not None:
        axes.plot([POINTS * verdict.low, POINTS * verdict.high], [y + 0.08] * 2, color=colour, linewidth=2.2, zorder=3)
        axes.plot(POINTS * verdict.effect, y + 0.08, "o", color=colour, markersize=8, zorder=4)
        said = f"{POINTS * verdict.effect:+.1f}  {said}"
    axes.annotate(
        said,
        (1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        color=colour,
        fontweight="bold" if verdict.verdict == "supported" else "normal",
    )


def learning_curves(results: StudyResults) -> Figure:
    """Draw AP on the validation subset against epochs: a line for each variant, its band, and a thin line a seed."""
    study = results.plan.study
    colours = variant_colours([variant.name for variant in study.variants])
    term = next((term for claim in study.claims for term in claim.terms), None)
    figure = Figure(figsize=(8.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    ends: dict[str, tuple[float, float]] = {}
    for name, colour in colours.items():
        curves = [
            curve
            for trial in results.plan.trials
            if trial.variant == name and (curve := _curve(results, trial.trial_id, term))
        ]
        if curves:
            ends[name] = _draw_variant(axes, curves, colour)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _label_ends(axes, ends, colours)
    axes.set_xlabel("epoch")
    axes.set_ylabel("AP on the validation subset, points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_SOFT, alpha=0.25, linewidth=0.7)
    axes.set_title("mean over seeds with its 95 % interval; thin: each seed", fontsize=9, loc="left")
    return figure


def _curve(results: StudyResults, trial_id: str, term: Term | None) -> dict[int, float]:
    """Return AP in points by epoch."""
    found: dict[int, float] = {}
    for event in results.records[trial_id].epochs:
        metrics = event.metrics.get(term.parameters if term else "averaged")
        value = getattr(metrics, term.metric if term else "ap") if metrics else None
        if value is not None:
            found[event.epoch] = POINTS * value
    return found


def _draw_variant(axes: Axes, curves: list[dict[int, float]], colour: str) -> tuple[float, float]:
    """Draw one variant and return where its mean line ends."""
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.7, alpha=0.35)
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)) or set(max(curves, key=len)))
    at = {epoch: [curve[epoch] for curve in curves if epoch in curve] for epoch in epochs}
    means = [fmean(values) for values in at.values()]
    axes.plot(epochs, means, color=colour, linewidth=2.2)
    if min(len(values) for values in at.values()) >= 2:
        bands = [stats.paired_interval(values, alpha=_CURVE_ALPHA) for values in at.values()]
        axes.fill_between(
            epochs, [b.low for b in bands], [b.high for b in bands], color=colour, alpha=0.13, linewidth=0
        )
    return float(epochs[-1]), means[-1]


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """Write each variant's name where its line ends, moved apart where lines end together."""
    low, high = axes.get_ylim()
    step, last = (high - low) * 0.06, -math.inf
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        last = max(y, last + step)
        axes.annotate(
            name,
            (x, last),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colours[name],
            annotation_clip=False,
        )
