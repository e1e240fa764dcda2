"""How the CPU time of a training step grows with the picture's side, the queries and the levels.

    python benchmarks/growth.py [--rounds 5] [--out docs/images]

Deformable DETR on a ResNet-18 (the `small` shape with one picture a step), forward and backward on one thread, one
thing changed at a time. `time ~ size ^ e`: e is the slope through the last three sizes on logarithmic axes, where
constant costs weigh least. It is compared with what the operations say: cells, and so all but the decoder, grow with
the side squared; attention among queries with their square, all else of the decoder in proportion; tokens hardly with
the levels, since each has a quarter of the cells of the one before. With --out, a plot of each is written there.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from detectors import batch_of, config_of
from measure import Times, interleaved, spread, table
from shapes import DETECTORS, DetectorShape

from core.config import ExperimentConfig
from core.detector import build_detector
from core.distributed import ALONE, step_loss
from core.memory import keep_freed_memory
from core.seeding import torch_stream

BASE = replace(DETECTORS["small"], batch=1)
SLACK = 0.15  # of an exponent, for what the clock adds


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One thing that grows: its sizes, the detector at each, and the exponent that nothing should pass."""

    name: str
    sizes: tuple[int, ...]
    config: Callable[[int], tuple[ExperimentConfig, DetectorShape]]
    most: float
    expected: str


def _configured(shape: DetectorShape, levels: int = 4) -> tuple[ExperimentConfig, DetectorShape]:
    config = config_of(shape, plain=False, precision="fp32", dropout=0.0)
    strides = {1: (32,), 2: (16, 32)}.get(levels, (8, 16, 32))
    model = {**config.model.model_dump(), "strides": strides, "extra_levels": max(0, levels - 3)}
    return ExperimentConfig.model_validate({**config.model_dump(), "model": model}), shape


AXES = (
    Axis(
        name="picture side, px",
        sizes=(128, 192, 256, 384, 512, 640),
        config=lambda side: _configured(replace(BASE, height=side, width=side)),
        most=2.0,
        expected="2: with the number of cells",
    ),
    Axis(
        name="queries",
        sizes=(30, 60, 100, 300, 600, 900),
        config=lambda queries: _configured(replace(BASE, height=256, width=256, queries=queries)),
        most=2.0,
        expected="below 1 while encoder and backbone weigh more, never above 2",
    ),
    Axis(
        name="levels",
        sizes=(1, 2, 3, 4, 5),
        config=lambda levels: _configured(replace(BASE, height=256, width=256), levels),
        most=1.0,
        expected="jumps where a finer map joins (2, 3), nearly 0 beyond",
    ),
)


def stepped(config: ExperimentConfig, shape: DetectorShape) -> Callable[[], None]:
    """Return a function that computes the gradient of a step."""
    detector = build_detector(config, num_classes=91, seed=0)
    loss = step_loss(detector, ALONE)
    batch = batch_of(shape).to(torch.device("cpu"))

    def step() -> None:
        detector.zero_grad(set_to_none=True)
        total, _ = loss(batch, torch_stream(0, "benchmark"))
        total.backward()

    return step


def slope(sizes: tuple[int, ...], times: list[Times]) -> float:
    """Return the exponent of the line through the last three sizes."""
    middles = [median(each.cpu) for each in times]
    return float(np.polyfit(np.log(sizes[-3:]), np.log(middles[-3:]), 1)[0])


def plot(axis: Axis, times: list[Times], folder: Path) -> Path:
    """Write the plot of an axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, area = plt.subplots(figsize=(5, 3.5), layout="constrained")
    middles = [1e3 * median(each.cpu) for each in times]
    reach = [[1e3 * (median(each.cpu) - min(each.cpu)) for each in times]]
    reach.append([1e3 * (max(each.cpu) - median(each.cpu)) for each in times])
    area.errorbar(axis.sizes, middles, yerr=reach, marker="o", capsize=3)
    area.set(xscale="log", yscale="log", xlabel=axis.name, ylabel="CPU ms, forward + backward")
    area.set_xticks(axis.sizes, [str(size) for size in axis.sizes])
    area.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    area.yaxis.set_major_formatter(ScalarFormatter())
    area.minorticks_off()
    area.set_title(f"time ~ size ^ {slope(axis.sizes, times):.2f} at the end")
    area.grid(alpha=0.3)
    path = folder / f"growth_{axis.name.split(',')[0].replace(' ', '_')}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    """Measure, print, and plot if so asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for axis in AXES:
        steps = {str(size): stepped(*axis.config(size)) for size in axis.sizes}
        found = interleaved(steps, rounds=chosen.rounds)
        times = [found[str(size)] for size in axis.sizes]
        print(table([axis.name, *steps], [["CPU ms", *(spread(each.cpu) for each in times)]]))
        exponent = slope(axis.sizes, times)
        verdict = "as expected" if exponent < axis.most + SLACK else f"MORE than {axis.most:g}"
        print(f"\nTime grows with the power {exponent:.2f} at the end: {verdict} ({axis.expected}).\n")
        if chosen.out is not None:
            chosen.out.mkdir(parents=True, exist_ok=True)
            print(f"{plot(axis, times, chosen.out)}\n")


if __name__ == "__main__":
    main()
