"""A trial on several GPUs of one machine: processes that train it together, started and watched by the trial's own.

The trial's process keeps the record, as always: it holds the claim on the trial, writes the events that process 0 tells
of, and scores when the training is done. The processes compute. When one of them dies or raises, all are ended at once,
and the trial ends as that one did; none is left to wait for another that is gone.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from socket import socketpair
from typing import TYPE_CHECKING, Any

from core.config import EvaluationConfig, ExperimentConfig
from core.custom import given_as_text, given_texts
from core.events import Event
from workbench.placement import Demand
from workbench.trainers import CoreTrainer, Trainer

if TYPE_CHECKING:
    from core.data.splits import DataSplits
    from core.evaluation.score import Evaluation
    from core.training import TrainResult

COLLECTIVE_SECONDS = 3600.0
"""How long a process waits for the others: longer than any scoring between epochs, which only the first one does."""

_LOOK_SECONDS = 1.0
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class WorkerLost(RuntimeError):  # noqa: N818 - a fate, not an error of this program
    """One of the processes that train a trial together died without a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What processes that train a trial together are told: the arguments of `core.training.train`, plain."""

    config: ExperimentConfig
    seed: int
    checkpoints: Path
    root: Path | None
    cache: Path
    code: Mapping[str, str]  # text of custom parts, by module
    device: str  # cpu, or cuda: one GPU a process
    trainer: Trainer | None  # the detector's code; None: `core`

    def carry_out(
        self, *, rank: int, size: int, gpu: int, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> "TrainResult":
        """Train in this process, a member of torch's default process group."""
        from core.distributed import World  # torch takes seconds

        trainer = self.trainer or CoreTrainer(self.device if self.device == "cpu" else f"cuda:{gpu}")
        with given_as_text(self.code, folder=self.checkpoints.parent / "code"):
            return trainer.train(
                self.config,
                seed=self.seed,
                data=trainer.open_data(self.config, root=self.root, cache=self.cache),
                checkpoints=self.checkpoints,
                on_event=on_event,
                should_stop=should_stop,
                world=World(rank=rank, size=size),  # pyright: ignore[reportCallIssue] - of those who can share a trial
            )


class Together:
    """A trainer whose training several processes share; who starts and watches them is for subclasses to say."""

    def __init__(self, demand: Demand, *, trainer: Trainer | None) -> None:
        self._demand, self._trainer = demand, trainer
        self._alone = trainer or CoreTrainer(demand.device)
        self._places: tuple[Path | None, Path] | None = None

    def open_data(self, config: ExperimentConfig, *, root: Path | None, cache: Path) -> "DataSplits":
        """Open the trial's pictures here, for what is left out of them; each process opens its own."""
        self._places = root, cache
        return self._alone.open_data(config, root=root, cache=cache)

    def train(
        self,
        config: ExperimentConfig,
        *,
        seed: int,
        data: "DataSplits",  # noqa: ARG002 - each process opens its own
        checkpoints: Path,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> "TrainResult":
        """Train in processes of its own; see `core.training.train`.

        Raises:
            WorkerLost: one of them, or its machine, died.
            Exception: what one of them raised.
        """
        root, cache = self._opened()
        order = Order(
            config=config,
            seed=seed,
            checkpoints=checkpoints,
            root=root,
            cache=cache,
            code=given_texts(),
            device=self._demand.device,
            trainer=self._trainer,
        )
        return self._carry_out(order, on_event, should_stop)

    def evaluate(self, config: ExperimentConfig, evaluation: EvaluationConfig, **rest: Any) -> "Evaluation":
        """Score in this process; the others have ended and left the GPU."""
        return self._alone.evaluate(config, evaluation, **rest)

    def _opened(self) -> tuple[Path | None, Path]:
        assert self._places is not None  # the pictures are opened first
        return self._places

    def _carry_out(
        self, order: Order, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> "TrainResult":
        raise NotImplementedError


class Ranked(Together):
    """Shared by processes on this machine, each with a GPU where there are any."""

    def _carry_out(
        self, order: Order, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> "TrainResult":
        size = self._demand.processes
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            ranks = [_Rank.start(number, size, Path(folder) / "store", order) for number in range(size)]
            try:
                return _supervise(ranks, on_event, should_stop)
            finally:
                for rank in ranks:
                    rank.end()


class SharedGpu(CoreTrainer):
    """The detector of `core` on a share of a GPU. Ray only counts shares, so the process limits itself."""

    def __init__(self, device: str, *, share: float) -> None:
        super().__init__(device)
        self._share = share

    def train(self, config: ExperimentConfig, **rest: Any) -> "TrainResult":
        """Train within the share of memory; beyond it the trial fails as out of memory."""
        self._limit()
        return super().train(config, **rest)

    def evaluate(self, config: ExperimentConfig, evaluation: EvaluationConfig, **rest: Any) -> "Evaluation":
        """Score within it."""
        self._limit()
        return super().evaluate(config, evaluation, **rest)

    def _limit(self) -> None:
        import torch  # torch takes seconds

        torch.cuda.set_per_process_memory_fraction(self._share)


def trainer_on_one_machine(demand: Demand, trainer: Trainer | None) -> Trainer | None:
    """Return the trainer that takes what a trial demands of one machine; `trainer` itself where it needs no more."""
    if demand.processes > 1:
        return Ranked(demand, trainer=trainer)
    if trainer is None and demand.gpu_share is not None and demand.gpu_share < 1:
        return SharedGpu(demand.device, share=demand.gpu_share)
    return trainer


# In the trial's process


@dataclass(kw_only=True)
class _Rank:
    """One of the processes, seen from the trial's."""

    number: int
    size: int
    process: "subprocess.Popen[bytes]"
    line: Connection
    done: bool = False
    result: "TrainResult | None" = field(default=None)

    @classmethod
    def start(cls, number: int, size: int, store: Path, order: Order) -> "_Rank":
        ours, theirs = socketpair()
        process = subprocess.Popen(
            [sys.executable, "-c", f"from workbench.ranks import serve; serve({theirs.fileno()})"],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={
                # Of one machine: nothing of it needs to be seen from outside.
                "GLOO_SOCKET_IFNAME": _LOOPBACK,
                "NCCL_SOCKET_IFNAME": _LOOPBACK,
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            start_new_session=True,  # Ctrl-C in a terminal is for the driver, which asks for a stop in good order
        )
        theirs.close()
        rank = cls(number=number, size=size, process=process, line=Connection(ours.detach()))
        rank.line.send((number, size, str(store)))
        rank.line.send_bytes(pickle.dumps(order))  # apart, so that a part that cannot be loaded there is an error there
        return rank

    def end(self) -> None:
        """Leave nothing of it."""
        if not self.done:
            self.process.kill()
        self.line.close()
        self.process.wait()

    def lost(self) -> WorkerLost:
        """Return what became of a process that gave no result."""
        code = self.process.wait()
        fate = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return WorkerLost(f"process {self.number} of the {self.size} that train this trial {fate}")


def _supervise(ranks: list[_Rank], on_event: Callable[[Event], None], should_stop: Callable[[], bool]) -> "TrainResult":
    told = False
    while not all(rank.done for rank in ranks):
        lines = {rank.line: rank for rank in ranks if not rank.done}
        for line in wait(list(lines), timeout=_LOOK_SECONDS):
            assert isinstance(line, Connection)
            rank = lines[line]
            try:
                kind, content = line.recv()
            except (EOFError, OSError):
                raise rank.lost() from None
            if kind == "event":
                on_event(content)
            elif kind == "error":
                raise _cause(ranks, content)
            elif kind == "done":
                rank.done, rank.result = True, content
            elif should_stop() and not told:
                told = True
                line.send("stop")  # process 0 is enough: each step they agree
    result = ranks[0].result
    assert result is not None  # process 0 is done
    return result


def _cause(ranks: list[_Rank], raised: BaseException) -> BaseException:
    """Return why the training failed: a process that was killed, of which the others only see a broken connection."""
    give_up = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < give_up:
        for rank in ranks:
            if (rank.process.poll() or 0) < 0:
                return rank.lost()
        time.sleep(_LOOK_SECONDS / 20)
    return raised


# In the processes


def serve(handle: int) -> None:
    """Be one of the processes, told over `handle` what to do."""
    line = Connection(handle)
    rank, size, store = line.recv()
    content = line.recv_bytes()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(line, stop), daemon=True).start()
    try:
        result = _join_and_train(pickle.loads(content), rank, size, store, line, stop)
    except BaseException as error:  # noqa: BLE001 - whatever is raised is told to the trial's process
        line.send(("error", portable(error)))
        os._exit(1)  # the others wait in a collective: there is nothing to take leave of
    line.send(("done", result if rank == 0 else None))


def _join_and_train(
    order: Order, rank: int, size: int, store: str, line: Connection, stop: threading.Event
) -> "TrainResult":
    from torch import cuda, distributed  # torch takes seconds

    on_gpu = order.device != "cpu"
    if on_gpu:
        cuda.set_device(rank)

    def should_stop() -> bool:
        if rank == 0:
            line.send(("step", None))
        return stop.is_set()

    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    result = order.carry_out(
        rank=rank, size=size, gpu=rank, on_event=lambda event: line.send(("event", event)), should_stop=should_stop
    )
    distributed.destroy_process_group()
    return result


def _listen(line: Connection, stop: threading.Event) -> None:
    """Take the word to stop; end this process when the trial's is gone."""
    try:
        while line.recv() == "stop":
            stop.set()
    except (EOFError, OSError):
        os._exit(1)


def portable(error: BaseException) -> BaseException:
    """Return an error that another process can be told: itself with its traceback as a note, or its words."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an error may be of any make
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(trace)
    return copy
