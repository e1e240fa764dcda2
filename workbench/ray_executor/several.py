"""A trial over several nodes, by Ray Train: its processes in workers of Train, its record in the slot that waits.

As on one machine (`workbench.ranks`), the trial's process holds the claim and writes the events; process 0 tells it of
them through an actor. It holds next to nothing of the cluster itself: Train places the workers, and as many trials run
at once as find room for all of theirs (`workbench.placement`), so none waits for room that another one's supervisor
takes. A dead worker or node ends the attempt as `worker_lost`, and the next one goes on from the newest checkpoint.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import NodeDiedError, WorkerCrashedError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.config import EvaluationConfig, ExperimentConfig
from core.custom import given_as_text, given_texts
from core.events import Event
from workbench.execution import Job
from workbench.placement import Demand
from workbench.ranks import COLLECTIVE_SECONDS, Order, Together, WorkerLost, portable, trainer_on_one_machine
from workbench.ray_executor.orphans import end_with_raylet
from workbench.trainers import Trainer

if TYPE_CHECKING:
    from core.evaluation.score import Evaluation
    from core.training import TrainResult

SUPERVISOR = {"cpu": 0.01}
"""What the slot of such a trial holds; `workbench.placement` keeps more than this free for it."""

_LOOK_SECONDS = 0.5
_PULSE_SECONDS = 5.0
_TELLING_SECONDS = 10.0


_GONE = (WorkerCrashedError, NodeDiedError)


def _nothing() -> None:
    """What nobody asks to be told."""


def _first_line(error: BaseException) -> str:
    """Return what of an error's text is not Ray's advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def trainer_for(demand: Demand, job: Job) -> Trainer | None:
    """Return the trainer that takes what a trial demands, of one node or of several."""
    if demand.nodes > 1:
        return AcrossNodes(demand, storage=job.folder / "ray" / "train", trainer=job.trainer)
    return trainer_on_one_machine(demand, job.trainer)


class AcrossNodes(Together):
    """Shared by workers of Ray Train on several nodes. It lives in a process that has Ray.

    `storage` is a folder that all nodes share, for Train's own files.
    """

    def __init__(self, demand: Demand, *, storage: Path, trainer: Trainer | None) -> None:
        super().__init__(demand, trainer=trainer)
        self._storage = storage
        self._bundle = {"CPU": demand.threads} | ({"GPU": demand.gpus} if demand.gpus else {})  # of each process
        self._strategy = "PACK" if demand.processes > 1 else "STRICT_SPREAD"

    def evaluate(self, config: ExperimentConfig, evaluation: EvaluationConfig, **rest: Any) -> "Evaluation":
        """Score in a worker that has what a process of the trial has; the others have left."""
        root, cache = self._opened()
        # The slot's own place has no room for it.
        anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType]
        needs = {"num_cpus": self._demand.threads, "num_gpus": self._demand.gpus, "max_retries": 0}
        score: Any = ray.remote(_evaluate).options(scheduling_strategy=anywhere, **needs)
        places = {"root": root, "cache": cache, "code": given_texts()}
        reply = score.remote(self._alone, config, evaluation, places, checkpoint=rest["checkpoint"])
        while not ray.wait([reply], timeout=_PULSE_SECONDS)[0]:
            rest.get("on_batch", _nothing)()  # the work goes on, or else Ray would tell
        try:
            return ray.get(reply)
        except _GONE as error:
            raise WorkerLost(f"the process that scored died: {_first_line(error)}") from error

    def _carry_out(
        self, order: Order, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> "TrainResult":
        if not self._find_room(should_stop):
            return _interrupted()
        post: Any = ray.remote(num_cpus=0)(_Post).remote()
        carrier = _Carrier(post, on_event, should_stop)
        carrier.start()
        try:
            self._fit(order, post, name=f"{order.checkpoints.parent.name}-{time.time_ns()}")
        except Exception as error:
            raise carrier.end(error) from error
        finally:
            carrier.end(None)
            ray.kill(post)
        if carrier.result is None:
            raise WorkerLost("the workers ended without a result")
        return carrier.result

    def _find_room(self, should_stop: Callable[[], bool]) -> bool:
        """Wait until there is room for all processes; return whether there was before a stop. Train hears of none."""
        room = placement_group([self._bundle] * self._demand.world_size, strategy=self._strategy)
        try:
            while not room.wait(_PULSE_SECONDS):
                if should_stop():
                    return False
        finally:
            remove_placement_group(room)
        return True

    def _fit(self, order: Order, post: Any, *, name: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        demand = self._demand
        on_gpu = demand.device != "cpu"
        TorchTrainer(
            _worker,
            train_loop_config={"order": order, "post": post},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(COLLECTIVE_SECONDS)),
            scaling_config=ScalingConfig(
                num_workers=demand.world_size,
                use_gpu=on_gpu,
                resources_per_worker=self._bundle,
                placement_strategy=self._strategy,
            ),
            run_config=RunConfig(  # a new name each time: a trial resumes from its own checkpoints, not from Train's
                name=name,
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        ).fit()


def _interrupted() -> "TrainResult":
    """Return the end of a training that had not begun."""
    from core.training import TrainResult  # torch takes seconds

    return TrainResult(
        outcome="interrupted",
        reason="",
        step=0,
        seconds=0.0,
        weights_hash="",
        peak_memory_bytes=0,
        checkpoint=None,
        num_parameters=0,
    )


# Between the trial's process and its workers


class _Post:
    """An actor through which workers tell the trial's process of events, and it tells them to stop."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, int, Any]] = []
        self._stop = False

    def put(self, kind: str, rank: int, content: Any) -> bool:
        """Keep a message; return whether a stop is asked for."""
        self._kept.append((kind, rank, content))
        return self._stop

    def take(self, *, stop: bool) -> list[tuple[str, int, Any]]:
        """Return the messages since the last call, and pass a stop on."""
        self._stop = self._stop or stop
        taken, self._kept = self._kept, []
        return taken


class _Carrier(threading.Thread):
    """Carries messages in the trial's process while Train has its main thread."""

    def __init__(self, post: Any, on_event: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        super().__init__(name="carrier", daemon=True)
        self._post, self._on_event, self._should_stop = post, on_event, should_stop
        self._ended, self._stopping = threading.Event(), False
        self._raised: dict[int, BaseException] = {}  # by workers, the first one first
        self._own: BaseException | None = None  # that telling of an event raised here
        self.result: TrainResult | None = None

    def run(self) -> None:
        """Carry until the end, and then what is left."""
        while not self._ended.wait(_LOOK_SECONDS):
            self._carry()
        self._carry()

    def end(self, error: BaseException | None) -> BaseException:
        """Carry the last messages; return why the training failed, if `error` says that it did."""
        self._ended.set()
        self.join()
        if self._own is not None:
            raise self._own
        failures: dict[int, Any] = getattr(error, "worker_failures", {})
        silent = sorted(failures.keys() - self._raised.keys())
        if silent:
            return WorkerLost(f"worker {silent[0]} of the trial died: {_first_line(failures[silent[0]])}")
        return next(iter(self._raised.values()), error or WorkerLost("the workers ended"))

    def _carry(self) -> None:
        try:
            for kind, rank, content in ray.get(self._post.take.remote(stop=self._stopping)):
                if kind == "event":
                    self._on_event(content)
                elif kind == "error":
                    self._raised[rank] = content
                elif kind == "done":
                    self.result = content
                elif self._should_stop():
                    self._stopping = True
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, once Train has ended
            self._own, self._stopping = self._own or error, True


# In the workers


def _worker(told: dict[str, Any]) -> None:
    """Be one of the processes: train, and let the first one tell."""
    import torch  # torch takes seconds
    from ray.train import get_context
    from ray.train.torch import get_device

    end_with_raylet()
    order, post = told["order"], told["post"]
    context = get_context()
    rank, device = context.get_world_rank(), get_device()
    if order.device != "cpu":
        torch.cuda.set_device(device)
    line = _Line(post, rank)
    try:
        result = order.carry_out(
            rank=rank,
            size=context.get_world_size(),
            gpu=device.index or 0,
            on_event=line.tell,
            should_stop=line.should_stop,
        )
    except BaseException as error:
        ray.get(post.put.remote("error", rank, portable(error)))
        time.sleep(_TELLING_SECONDS)  # Train ends all at the first error: one that died must be noticed before
        raise
    if rank == 0:
        ray.get(post.put.remote("done", rank, result))


@dataclass
class _Line:
    """What a worker has of the post. A stop is asked for every second, not every step."""

    post: Any
    rank: int
    stopped: bool = False
    next_look: float = 0.0

    def tell(self, event: Event) -> None:
        """Tell of an event, of which only the first process has any."""
        ray.get(self.post.put.remote("event", self.rank, event))

    def should_stop(self) -> bool:
        """Return whether to stop, as the first process hears it."""
        if self.rank == 0 and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + 1.0
            self.stopped = ray.get(self.post.put.remote("step", self.rank, None))
        return self.stopped


def _evaluate(
    trainer: Trainer, config: ExperimentConfig, evaluation: EvaluationConfig, places: dict[str, Any], checkpoint: Path
) -> "Evaluation":
    with given_as_text(places["code"], folder=checkpoint.parent.parent / "code"):
        data = trainer.open_data(config, root=places["root"], cache=places["cache"])
        return trainer.evaluate(config, evaluation, data=data, checkpoint=checkpoint, on_batch=_nothing)
