"""Deformable attention on a CPU: our PyTorch form, Hugging Face's and our compiled form, side by side.

    python benchmarks/attention.py [--shapes small_enc coco_enc] [--rounds 9] [--threads 2]

Three tables: the operation alone, from locations and weights; a `DeformableAttention` (linear layers, offsets and
softmax included) in our PyTorch form and our compiled one; and the compiled form with several threads (wall time). The
PyTorch form and Hugging Face's are one algorithm, the published one. Locations lie 2.5 cells
(standard deviation) around the query's own cell in an encoder, and around random points in a decoder. CPU time on one
thread; the memory is what one call allocates beyond its inputs, at its peak, gradients included.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from measure import Times, interleaved, ratio, spread, table
from shapes import ATTENTION, AttentionShape
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from core.model import sampling
from core.model.attention import DeformableAttention
from core.types import Memory

FORMS = ("PyTorch form", "Hugging Face", "compiled")
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of the last table")
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "FORM"), help=argparse.SUPPRESS)  # asked of ourselves
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak_of(ATTENTION[options.peak[0]], options.peak[1]))
        return
    if sampling._kernel() is None:
        sys.exit("There is nothing to compare: the compiled form is not to be had here.")
    print_operation(options.shapes, options.rounds)
    print_module(options.shapes, options.rounds)
    print_threads(options.shapes, options.rounds, options.threads)


def print_operation(names: Sequence[str], rounds: int) -> None:
    """Print forward, forward and backward, and memory of the operation alone."""
    rows = []
    for name in names:
        shape = ATTENTION[name]
        for what, training in (("forward", False), ("forward + backward", True)):
            runs = {form: operation_runner(shape, form, training=training) for form in FORMS}
            ours, theirs, compiled = measured(shape, runs, rounds).values()
            memory = [f"{peak_in_a_process(name, form) / 2**20:.1f}" for form in FORMS] if training else []
            rows.append([
                name, what, spread(ours.cpu), spread(theirs.cpu), spread(compiled.cpu, digits=2),
                ratio(ours, compiled), ratio(theirs, compiled), " / ".join(memory),
            ])  # fmt: skip
    header = ["shape", "pass", *(f"{form} ms" for form in FORMS), *(f"ratio to {form}" for form in FORMS[:2])]
    print(table([*header, "memory MiB"], rows) + "\n", flush=True)


def print_module(names: Sequence[str], rounds: int) -> None:
    """Print forward and backward of a whole attention module, in both of our forms."""
    rows = []
    for name in names:
        shape = ATTENTION[name]
        for what, training in (("forward", False), ("forward + backward", True)):
            run = module_runner(shape, training=training)
            slow, fast = measured(shape, {form: with_kernel(form, run) for form in ("torch", "cpp")}, rounds).values()
            rows.append([name, what, spread(slow.cpu), spread(fast.cpu, digits=2), ratio(slow, fast)])
    print(table(["module of shape", "pass", "PyTorch form ms", "compiled ms", "ratio"], rows) + "\n", flush=True)


def print_threads(names: Sequence[str], rounds: int, threads: int) -> None:
    """Print the wall time of the compiled form with one thread and with several, turn and turn about."""
    rows = []
    for name in names:
        run = repeated(ATTENTION[name], operation_runner(ATTENTION[name], "compiled", training=True))
        walls: dict[int, list[float]] = {1: [], threads: []}
        for _ in range(rounds):
            for count, found in walls.items():
                torch.set_num_threads(count)
                run()  # threads start
                began = time.perf_counter()
                run()
                found.append((time.perf_counter() - began) / repeats(ATTENTION[name]))
        torch.set_num_threads(1)
        alone, together = (Times(cpu=tuple(found), wall=tuple(found)) for found in walls.values())
        rows.append([name, spread(alone.wall, digits=2), spread(together.wall, digits=2), ratio(alone, together)])
    header = ["forward + backward, wall time", "1 thread ms", f"{threads} threads ms", "ratio"]
    print(table(header, rows), flush=True)


def measured(shape: AttentionShape, runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Times]:
    """Return the times of one run each, from rounds that last long enough to be measured."""
    times = interleaved({name: repeated(shape, run) for name, run in runs.items()}, rounds=rounds)
    count = repeats(shape)
    return {
        name: Times(cpu=tuple(x / count for x in one.cpu), wall=tuple(x / count for x in one.wall))
        for name, one in times.items()
    }


def repeats(shape: AttentionShape) -> int:
    """Return how often a round runs a small shape."""
    return 1 + 400_000 // (shape.batch * shape.num_queries * shape.heads * len(shape.levels) * shape.points)


def repeated(shape: AttentionShape, run: Callable[[], None]) -> Callable[[], None]:
    """Run as often as `repeats` says."""

    def several() -> None:
        for _ in range(repeats(shape)):
            run()

    return several


def forms(shape: AttentionShape) -> dict[str, Form]:
    """Return the three forms, as functions of values, locations and weights."""
    sizes = torch.tensor(shape.levels)
    theirs = MultiScaleDeformableAttention()
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    levels = list(shape.levels)
    return {
        "PyTorch form": lambda value, at, weights: sampling.sample_and_sum_in_torch(value, shape.levels, at, weights),
        "Hugging Face": lambda value, at, weights: theirs(value, sizes, levels, starts, at, weights, 64),
        "compiled": lambda value, at, weights: sampling.sample_and_sum(value, shape.levels, at, weights),
    }


def operation_inputs(shape: AttentionShape) -> list[Tensor]:
    """Return values, locations and weights."""
    generator = torch.Generator().manual_seed(0)
    levels = len(shape.levels)
    size = (shape.batch, shape.num_queries, shape.heads, levels, shape.points)
    cells = torch.tensor([[width, height] for height, width in shape.levels], dtype=torch.float32)
    offsets = 2.5 * torch.randn(*size, 2, generator=generator) / cells[:, None]
    value = torch.randn(shape.batch, shape.tokens, shape.heads, shape.head_dim, generator=generator)
    weights = torch.randn(size, generator=generator).flatten(-2).softmax(-1).view(size)
    return [value, references(shape, generator)[:, :, None, None, None] + offsets, weights]


def references(shape: AttentionShape, generator: torch.Generator) -> Tensor:
    """Return (B, Q, 2): the centres of the memory's cells for an encoder, random points for a decoder."""
    if shape.queries is not None:
        return torch.rand(shape.batch, shape.queries, 2, generator=generator)
    rows = []
    for height, width in shape.levels:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        rows.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(rows).expand(shape.batch, -1, -1)


def operation_runner(shape: AttentionShape, form: str, *, training: bool) -> Callable[[], None]:
    """Return what runs a form once."""
    call = forms(shape)[form]
    leaves = [tensor.requires_grad_(training) for tensor in operation_inputs(shape)]
    slope = torch.randn(shape.batch, shape.num_queries, shape.heads * shape.head_dim)

    def run() -> None:
        out = call(*leaves)
        if training:
            torch.autograd.grad(out, leaves, slope)

    return run


def module_runner(shape: AttentionShape, *, training: bool) -> Callable[[], None]:
    """Return what runs an attention module once: references that are points in an encoder, boxes in a decoder."""
    dim = shape.heads * shape.head_dim
    generator = torch.Generator().manual_seed(0)
    module = DeformableAttention(dim=dim, num_heads=shape.heads, num_levels=len(shape.levels), num_points=shape.points)
    module.reset_parameters()
    with torch.no_grad():
        module.sampling_offsets.weight.normal_(std=2.5 / dim**0.5, generator=generator)
    memory = Memory(
        tokens=torch.randn(shape.batch, shape.tokens, dim, generator=generator, requires_grad=training),
        position=torch.zeros(1, 1, dim),
        padding_mask=torch.zeros(shape.batch, shape.tokens, dtype=torch.bool),
        spatial_shapes=shape.levels,
        valid_ratios=torch.ones(shape.batch, len(shape.levels), 2),
        layers=(),
    )
    content = torch.randn(shape.batch, shape.num_queries, dim, generator=generator, requires_grad=training)
    reference = references(shape, generator)
    if shape.queries is not None:
        reference = torch.cat([reference, torch.full_like(reference, 0.3)], -1)
    slope = torch.randn(content.shape, generator=generator)

    def run() -> None:
        with torch.set_grad_enabled(training):
            out = module(content, torch.zeros_like(content), reference, memory)
        if training:
            out.backward(slope)

    return run


def with_kernel(name: str, run: Callable[[], None]) -> Callable[[], None]:
    """Run as WORKBENCH_KERNEL=`name` would; choosing takes a millisecond, so it is done before the clock runs."""
    kernel = sampling._kernel() if name == "cpp" else None

    def chosen() -> None:
        before, sampling._kernel = sampling._kernel, lambda: kernel
        try:
            run()
        finally:
            sampling._kernel = before

    return chosen


def peak_in_a_process(name: str, form: str) -> float:
    """Return `peak_of` a process of its own, in bytes: the median of three."""
    command = [sys.executable, __file__, "--peak", name, form]
    runs = [subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True) for _ in range(3)]
    return median(float(run.stdout) for run in runs)


def peak_of(shape: AttentionShape, form: str) -> int:
    """Return by how many bytes the resident memory grows in one forward and backward pass (Linux)."""
    small = AttentionShape(batch=1, levels=((2, 2),), heads=1, head_dim=shape.head_dim, points=1)
    operation_runner(small, form, training=True)()  # loads what is to be loaded
    run = operation_runner(shape, form, training=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmHWM")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
