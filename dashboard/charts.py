"""Data frames to plotly figures. Pure: no streamlit, no files, no statistics; effects and AP arrive in points.

Text colour and fonts come from the page's theme, so a figure is legible in light and in dark. Names are escaped, since
plotly reads some HTML, links included.
"""

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

NEUTRAL = "#8a94a0"
BAND = "rgba(138, 148, 160, 0.22)"
FAINT = "rgba(138, 148, 160, 0.35)"

_ROW_HEIGHT = 58
_CLASS_HEIGHT = 34


def interval_strip(
    dots: Sequence[float], *, effect: float | None, low: float | None, high: float | None, margin: float, colour: str
) -> go.Figure:
    """Draw one claim: its interval and the dot of every seed, over the band of differences too small to matter.

    All numbers are AP points. Without an interval (fewer than two pairs) only the dots are drawn.
    """
    figure = go.Figure()
    _ground(figure, margin)
    if effect is not None and low is not None and high is not None:
        _interval(figure, y=1.0, effect=effect, low=low, high=high, colour=colour, name="mean and interval")
    figure.add_scatter(
        x=list(dots),
        y=[0.35] * len(dots),
        mode="markers",
        marker={"color": colour, "size": 7, "opacity": 0.65},
        hovertemplate="one seed: %{x:+.2f} points<extra></extra>",
    )
    reach = max([margin, *(abs(value) for value in (*dots, low or 0.0, high or 0.0))]) * 1.12
    figure.update_xaxes(range=[-reach, reach], zeroline=False, showgrid=False, nticks=7, tickformat="~g")
    figure.update_yaxes(visible=False, range=[0, 1.5])
    return _framed(figure, height=96, margin={"l": 4, "r": 4, "t": 4, "b": 22})


def forest(
    differences: pd.DataFrame,
    dots: pd.DataFrame,
    *,
    baseline: str,
    margin: float | None,
    colours: Mapping[str, str],
    unit: str,
) -> go.Figure:
    """Draw the paired difference of each variant to the baseline, in the order given.

    `differences` has variant, effect, low, high, n (effect, low and high NaN where they cannot be had); `dots` has
    variant, seed, difference. `unit` ends the axis title, as in "AP points".
    """
    variants = list(differences["variant"])
    rows = {variant: float(len(variants) - position) for position, variant in enumerate(variants)}
    figure = go.Figure()
    _ground(figure, margin)
    for variant, effect, low, high, _ in differences.itertuples(index=False, name=None):
        colour = colours[variant]
        _interval(figure, y=rows[variant], effect=effect, low=low, high=high, colour=colour, name=escape(variant))
        own = dots[dots["variant"] == variant]
        figure.add_scatter(
            x=own["difference"],
            y=[rows[variant] - 0.28] * len(own),
            customdata=own[["seed"]],
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.6},
            hovertemplate=f"{escape(variant)}, seed %{{customdata[0]}}: %{{x:+.2f}}<extra></extra>",
        )
    counts = dict(zip(differences["variant"], differences["n"], strict=True))
    figure.update_yaxes(
        tickvals=[rows[variant] for variant in variants],
        ticktext=[f"{escape(variant)}  (n={counts[variant]})" for variant in variants],
        range=[0.45, len(variants) + 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(title=f"variant minus {escape(baseline)}, {unit}", tickformat="~g", zeroline=False)
    return _framed(figure, height=_ROW_HEIGHT * len(variants) + 90, margin={"l": 8, "r": 12, "t": 8, "b": 48})


def curves(
    bands: pd.DataFrame,
    lines: pd.DataFrame,
    *,
    x_title: str,
    y_title: str,
    colours: Mapping[str, str],
    show_seeds: bool,
) -> go.Figure:
    """Draw each variant's mean over seeds with its interval, and every seed as a thin line when asked.

    `bands` has variant, x, mean, low, high, n; `lines` has variant, seed, x, value.
    """
    figure = go.Figure()
    for variant, band in bands.groupby("variant", sort=False):
        colour = colours[str(variant)]
        known = band.dropna(subset=["low", "high"])
        figure.add_scatter(
            x=[*known["x"], *known["x"][::-1]],
            y=[*known["high"], *known["low"][::-1]],
            fill="toself",
            fillcolor=_translucent(colour, 0.16),
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=str(variant),
            showlegend=False,
        )
        figure.add_scatter(
            x=band["x"],
            y=band["mean"],
            customdata=band[["n", "low", "high"]],
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            marker={"size": 6},
            name=escape(str(variant)),
            legendgroup=str(variant),
            hovertemplate="%{y:.1f} [%{customdata[1]:.1f}, %{customdata[2]:.1f}], n=%{customdata[0]}",
        )
    if show_seeds:
        for variant, own in lines.groupby("variant", sort=False):  # one trace: a browser takes long over a thousand
            points: list[tuple[object, ...]] = []
            for seed, line in own.groupby("seed", sort=False):
                points += [*zip(line["x"], line["value"], [seed] * len(line), strict=True), (None, None, seed)]
            x, y, seeds = zip(*points, strict=True)
            figure.add_scatter(
                x=x,
                y=y,
                customdata=[[seed] for seed in seeds],
                mode="lines",
                line={"color": colours[str(variant)], "width": 1},
                opacity=0.55,
                legendgroup=str(variant),
                showlegend=False,
                hovertemplate=f"{escape(str(variant))}, seed %{{customdata[0]}}: %{{y:.1f}}<extra></extra>",
            )
    figure.update_xaxes(
        title=x_title, rangemode="tozero", showgrid=False, tickformat="~g", dtick=_whole_ticks(bands["x"])
    )
    top = 1.15 * max(bands["mean"].max(), lines["value"].max())  # a wide band of two seeds may leave the picture
    figure.update_yaxes(title=y_title, range=[0, top or 1], gridcolor=FAINT)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="closest")
    return _framed(figure, height=400, margin={"l": 8, "r": 12, "t": 36, "b": 48}, legend=True)


def per_class(frame: pd.DataFrame, *, x_title: str, colours: Mapping[str, str]) -> go.Figure:
    """Draw each class's mean over seeds with one standard deviation, variants side by side in one row a class.

    `frame` has variant, class, mean, sd, n; classes from the top in the order given.
    """
    classes = list(dict.fromkeys(frame["class"]))
    variants = list(dict.fromkeys(frame["variant"]))
    figure = go.Figure()
    for position, (variant, own) in enumerate(frame.groupby("variant", sort=False)):
        offset = 0.5 * (position - (len(variants) - 1) / 2) / max(len(variants), 1)
        colour = colours[str(variant)]
        figure.add_scatter(
            x=own["mean"],
            y=[len(classes) - classes.index(name) - offset for name in own["class"]],
            customdata=own.assign(**{"class": own["class"].map(escape)})[["class", "sd", "n"]],
            error_x={"array": own["sd"], "color": colour, "thickness": 1.5, "width": 0},
            mode="markers",
            marker={"color": colour, "size": 8},
            name=escape(str(variant)),
            hovertemplate="%{customdata[0]}: %{x:.1f} ± %{customdata[1]:.1f}, n=%{customdata[2]}",
        )
    figure.update_yaxes(
        tickvals=[len(classes) - index for index in range(len(classes))],
        ticktext=[escape(name) for name in classes],
        range=[0.4, len(classes) + 0.6],
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(title=x_title, rangemode="tozero", gridcolor=FAINT)
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    return _framed(
        figure, height=_CLASS_HEIGHT * len(classes) + 110, margin={"l": 8, "r": 12, "t": 36, "b": 48}, legend=True
    )


def _ground(figure: go.Figure, margin: float | None) -> None:
    """Draw what every difference is seen against: the band of those too small to matter, and 0."""
    if margin is not None:
        figure.add_vrect(x0=-margin, x1=margin, fillcolor=BAND, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1, "dash": "dot"}, layer="below")


def _interval(figure: go.Figure, *, y: float, effect: float, low: float, high: float, colour: str, name: str) -> None:
    figure.add_scatter(
        x=[low, high], y=[y, y], mode="lines", line={"color": colour, "width": 3}, hoverinfo="skip", showlegend=False
    )
    figure.add_scatter(
        x=[effect],
        y=[y],
        customdata=[[low, high]],
        mode="markers",
        marker={"color": colour, "size": 12, "symbol": "diamond"},
        hovertemplate=f"{name}: %{{x:+.2f}} [%{{customdata[0]:+.2f}}, %{{customdata[1]:+.2f}}]<extra></extra>",
    )


def _framed(figure: go.Figure, *, height: int, margin: dict[str, int], legend: bool = False) -> go.Figure:
    return figure.update_layout(
        height=height,
        margin=margin,
        showlegend=legend,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )


def _whole_ticks(values: pd.Series) -> float | None:
    """Return a tick distance of 1 for a few whole numbers, such as epochs; None leaves it to plotly."""
    return 1.0 if bool((values % 1 == 0).all()) and values.max() <= 20 else None


def _translucent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"
