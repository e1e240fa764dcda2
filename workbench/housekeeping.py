"""What a driver does about the disk: before its trials start, while they run and when some have ended."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from workbench import disk, retention
from workbench.labels import size
from workbench.store import Store
from workbench.study import Plan, PlannedTrial


class Housekeeping:
    """Keeps a driver's trials within the free space and the study's quota. `say` is told what happens, in lines."""

    def __init__(self, store: Store, plan: Plan, *, say: Callable[[str], None]) -> None:
        self._store, self._plan, self._say = store, plan, say
        self._quota = plan.study.execution.quota_bytes
        self._told_over = self._told_error = False

    def prepare(self, plan: Plan, outstanding: Sequence[PlannedTrial], *, at_once: int) -> None:
        """Say which finished trials must be trained again, and refuse to start what there is no room for.

        `plan` is that of now: of a search, it grows.

        Raises:
            WorkbenchError: the trials do not fit.
        """
        self._plan = plan
        self.keep_quota()
        names = list(dict.fromkeys(trial.trial_id for trial in outstanding))
        for name in retention.without_checkpoint(self._store.root, map(self._store.record, names)):
            self._say(
                f"{name} is finished, another evaluation of it is asked for, and its checkpoint is gone: it is trained "
                "again from the beginning"
            )
        disk.check_room(
            self._store.root,
            [self._store.record(trial_id) for trial_id in self._plan.specs],
            [self._plan.specs[name] for name in names],
            at_once=at_once,
            quota_bytes=self._quota,
        )

    def watching(self, on_low: Callable[[str], None]) -> AbstractContextManager[None]:
        """Keep the quota within the block, and call `on_low`, once and in another thread, when the disk fills."""
        return disk.watched(self._store.root, on_low=on_low, also=self.keep_quota, on_error=self._tell_once)

    def _tell_once(self, error: Exception) -> None:
        if not self._told_error:
            self._told_error = True
            self._say(f"Warning: the disk cannot be watched ({type(error).__name__}: {error}); it is tried again")

    def keep_quota(self) -> None:
        """Make room where the quota is passed, and say what went."""
        if self._quota is None:
            return
        kept = retention.keep_within(self._store.root, self._quota, plan=self._plan)
        if kept.trials:
            self._say(f"Quota {size(self._quota)}: removed {size(kept.freed)} of {kept.trials} old trials")
        if kept.over and not self._told_over:
            self._told_over = True
            self._say(
                f"Quota {size(self._quota)}: passed by {size(kept.over)} of trials that are at work or "
                "still to be scored, which lose nothing"
            )
