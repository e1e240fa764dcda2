"""A training step and inference, here and in Hugging Face transformers, with the peak memory of both.

    python benchmarks/train_step.py [--cases small standard detr] [--rounds 7]

Needs the `dev` extra and no network. Every candidate is a process of its own with one thread; a round runs one step of
each, in turn, and CPU time counts. `benchmarks/detectors.py` says what is alike. First both take a step without
dropout, whose losses must agree; where they do not, the table says so. The memory is the largest while training, less
what the process held before it built the model.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Times, ratio, spread, table
from shapes import DETECTORS, PLAIN_DETR

CASES = {**{name: (shape, False) for name, shape in DETECTORS.items()}, "detr": (PLAIN_DETR, True)}
WHO = ("transformers", "ours")
PRECISIONS = ("fp32", "bf16")
SAME_LOSS = 1e-3  # of the loss


class Candidate:
    """A process that takes steps when it is told to."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__)), "--candidate", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """Ask for `train` or `infer` ([CPU seconds, wall seconds]), `loss` of a first step, or `memory` (bytes)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a candidate ended with exit code {self._process.wait()}: see above")
        return json.loads(answer)

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


@contextmanager
def candidates(case: str, precision: str, dropout: float) -> Iterator[dict[str, Candidate]]:
    """Run both within the block."""
    running = {who: Candidate(who, case, precision, str(dropout)) for who in WHO}
    try:
        yield running
    finally:
        for one in running.values():
            one.close()


def compare(case: str, precision: str, rounds: int) -> list[list[str]]:
    """Return the rows of training and inference."""
    with candidates(case, precision, 0.0) as running:
        losses = {who: one.ask("loss") for who, one in running.items()}
    agree = abs(losses["ours"] / losses["transformers"] - 1) < SAME_LOSS
    first = f"{losses['transformers']:.4f} / {losses['ours']:.4f}{'' if agree else ' (differ)'}"
    with candidates(case, precision, 0.1) as running:
        rows: list[list[str]] = []
        memory: dict[str, str] = {}
        for what in ("train", "infer"):
            times = _rounds(running, what, rounds)
            if what == "train":
                memory = {who: f"{one.ask('memory') / 1e6:.0f}" for who, one in running.items()}
            rows.append(
                [
                    case,
                    what,
                    precision,
                    *(spread(times[who].cpu) for who in WHO),
                    ratio(times["transformers"], times["ours"]),
                    " / ".join(memory.values()) if what == "train" else "",
                    first if what == "train" else "",
                ]
            )
    return rows


def _rounds(running: dict[str, Candidate], what: str, rounds: int) -> dict[str, Times]:
    taken: dict[str, list[tuple[float, float]]] = {who: [] for who in running}
    for number in range(rounds + 2):
        for who, one in running.items():
            seconds = one.ask(what)
            if number >= 2:
                taken[who].append(tuple(seconds))
    return {who: Times(*(tuple(kind) for kind in zip(*pairs, strict=True))) for who, pairs in taken.items()}


def serve(who: str, case: str, precision: Any, dropout: str) -> None:
    """Be a candidate: answer one line for every line read."""
    import detectors
    import torch

    from core.memory import peak_memory_bytes, reset_peak_memory

    torch.set_num_threads(1)
    shape, plain = CASES[case]
    build = detectors.ours if who == "ours" else detectors.theirs
    detectors.preload()
    reset_peak_memory(detectors.CPU)
    before = peak_memory_bytes(detectors.CPU)
    steps = build(shape, plain=plain, precision=precision, dropout=float(dropout))
    reset_peak_memory(detectors.CPU)
    answers = {
        "loss": steps.train,
        "memory": lambda: peak_memory_bytes(detectors.CPU) - before,
        "train": lambda: _timed(steps.train),
        "infer": lambda: _timed(steps.infer),
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def _timed(run: Any) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    if arguments[:1] == ["--candidate"]:
        serve(*arguments[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args(arguments)
    rows = [
        row
        for case in chosen.cases
        for precision in chosen.precisions
        for row in compare(case, precision, chosen.rounds)
    ]
    header = ["shape", "", "precision", "transformers, CPU ms", "here, CPU ms", "faster", "memory MB", "first loss"]
    print(table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
