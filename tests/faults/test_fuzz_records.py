"""A thousand runs folders that something has been at.

None raises anything but an error for users, none hangs, and a trial is called finished only while its result and its
scores are those that were written.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toys import Poison, ToyTrainer, toy_plan

from workbench import disk, durable, report, status
from workbench.driving import Run
from workbench.errors import WorkbenchError
from workbench.options import Options
from workbench.store import Store
from workbench.study import Plan
from workbench.trial import complete, execute
from workbench.verdict import judge

CASES, CHUNKS = 1000, 10
LONGEST_SECONDS = 20  # of one case; each takes some hundredths
LONG_AGO = 1_700_000_000

WRONG: tuple[Any, ...] = (
    None,
    "x",
    [],
    {},
    [[1]],
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "\ud800",
    2**70,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Return a plan and its runs folder: two trials finished, one failed, one interrupted; all files an hour old."""
    place = tmp_path_factory.mktemp("base")
    plan, store = toy_plan(place), Store(place / "runs")
    ref = store.register(plan, source="")
    store.start_look(ref, 1)
    first, second, third, fourth = plan.specs.values()
    for spec in (first, second):
        execute(spec, store.root, should_stop=lambda: False, trainer=ToyTrainer())
    execute(third, store.root, should_stop=lambda: False, trainer=ToyTrainer(poisons=(Poison(kind="raise", step=6),)))
    steps = iter([False] * 4 + [True] * 9)
    execute(fourth, store.root, should_stop=lambda: next(steps), trainer=ToyTrainer(seconds=0.25))
    store.save_verdicts(ref, judge(store.results(ref)))
    states = [store.state(trial_id) for trial_id in plan.specs]
    assert states == ["finished", "finished", "failed", "interrupted"]
    return plan, store.root


@pytest.mark.ci
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_damage_is_taken_for_a_result(base: tuple[Plan, Path], tmp_path: Path, chunk: int) -> None:
    """Whatever befell the files of a runs folder, readers and the decision what to run say the truth or an error."""
    plan, written = base
    for case in range(chunk, CASES, CHUNKS):
        chance = random.Random(case)
        runs = tmp_path / str(case)
        shutil.copytree(written, runs)
        _make_old(runs)
        if chance.random() < 0.5:
            Store(runs, create=False).results_for(plan)  # with an index
        done = [_mutate(runs, chance) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
        unreadable = chance.choice(_files(runs)) if chance.random() < 0.05 else None
        with _watched(f"case {case}: {done}, {unreadable}"), _refusing(unreadable):
            _check(plan, runs, written)
        shutil.rmtree(runs)


def test_the_check_notices_a_result_that_is_believed_though_it_is_damaged(
    base: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without checksums, a digit that became another passes for the result, and the check says so."""
    plan, written = base
    shutil.copytree(written, tmp_path / "runs")
    path = next(iter(sorted((tmp_path / "runs" / "trials").glob("*/result.json"))))
    path.write_bytes(path.read_bytes().replace(b'"seconds": 12.0', b'"seconds": 92.0'))
    _check(plan, tmp_path / "runs", written)
    monkeypatch.setattr(durable, "_holds", lambda _content: True)
    with pytest.raises(AssertionError, match="is damaged and counts"):
        _check(plan, tmp_path / "runs", written)


def _check(plan: Plan, runs: Path, written: Path) -> None:
    """Read as every reader does, and compare what counts as finished with what was written."""
    for read in (_as_status, _as_status_of_all, _as_report, _as_run):
        try:
            store = Store(runs)
            read(store, plan)
        except WorkbenchError:
            continue
    store = Store(runs)
    for trial_id, spec in plan.specs.items():
        try:
            record = store.record(trial_id)
        except WorkbenchError:
            continue
        folder = Path("trials") / trial_id
        if record.state in ("finished", "diverged"):
            assert _same(runs, written, folder / "result.json"), f"{folder}/result.json is damaged and counts"
        if complete(record, spec):
            for eval_id in spec.evaluations:
                name = folder / "evaluations" / eval_id / "metrics.json"
                assert _same(runs, written, name), f"{name} is damaged and counts"


def _as_status(store: Store, plan: Plan) -> None:
    described = status.describe(store.results_for(plan))
    json.dumps(described)
    status.as_text(described)


def _as_status_of_all(store: Store, _plan: Plan) -> None:
    for ref in store.studies():
        status.as_text(status.describe(store.results(ref)))


def _as_report(store: Store, plan: Plan) -> None:
    report.render(store.results_for(plan), format="text")


def _as_run(store: Store, plan: Plan) -> None:
    """Decide as `run` does, up to the first trial."""
    with disk.in_words(store.root):
        ref = store.register(plan, source="")
    run = Run(plan, store, ref, wishes=ref.path / "wish", options=Options(executor="inline"), err=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with run.err, disk.in_words(store.root):
        store.results_for(plan)
        store.start_look(ref, 1)
        run.house.prepare(plan, run._candidates(plan.trials), at_once=1)
        run._elsewhere(plan.trials)
        run.judge()


# What befalls files


def _mutate(runs: Path, chance: random.Random) -> str:
    path = chance.choice(_files(runs))
    how = chance.choice(_MUTATIONS)
    how(path, chance, runs)
    return f"{how.__name__} {path.relative_to(runs)}"


def _truncated(path: Path, chance: random.Random, _runs: Path) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def _flipped(path: Path, chance: random.Random, _runs: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3))):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _emptied(path: Path, _chance: random.Random, _runs: Path) -> None:
    os.truncate(path, 0)


def _zeroed(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def _deleted(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.unlink()


def _folder_deleted(path: Path, _chance: random.Random, _runs: Path) -> None:
    shutil.rmtree(path.parent)


def _made_a_folder(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.unlink()
    path.mkdir()


def _made_a_link_to_nothing(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def _folder_made_a_file(path: Path, _chance: random.Random, _runs: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.touch()


def _swapped(path: Path, chance: random.Random, runs: Path) -> None:
    other = chance.choice([item for item in _files(runs) if item.name == path.name] or [path])
    _exchange(path, other)


def _swapped_with_another_kind(path: Path, chance: random.Random, runs: Path) -> None:
    _exchange(path, chance.choice(_files(runs)))


def _exchange(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _of_another_format(path: Path, chance: random.Random, _runs: Path) -> None:
    number = chance.choice((0, 2, 99, -1, 10**30, '"1"', "true", "null", "1.0"))
    path.write_bytes(path.read_bytes().replace(b'"format": 1', f'"format": {number}'.encode(), 1))


def _with_a_wrong_value(path: Path, chance: random.Random, _runs: Path) -> None:
    """Put what cannot be somewhere into the file, with a checksum that says it was meant."""
    try:
        plain = json.loads(path.read_bytes())
        place, key = chance.choice(list(_places(plain)))
    except (ValueError, IndexError, TypeError, RecursionError):
        return
    value = chance.choice(WRONG)
    if path.name in ("result.json", "metrics.json") and type(value) is type(place[key]):
        value = [[]]  # another text or flag could have been written
    place[key] = value
    if isinstance(plain, dict):
        path.write_bytes(durable._signed(plain, 1) if chance.random() < 0.7 else json.dumps(plain).encode())


def _with_a_key_less(path: Path, chance: random.Random, _runs: Path) -> None:
    try:
        plain = json.loads(path.read_bytes())
        place, key = chance.choice(list(_places(plain)))
    except (ValueError, IndexError, TypeError, RecursionError):
        return
    del place[key]
    if isinstance(plain, dict):
        path.write_bytes(durable._signed(plain, 1))


def _nested_deeply(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.write_bytes(b'{"format": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def _doubled(path: Path, _chance: random.Random, _runs: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


_MUTATIONS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    _truncated,
    _flipped,
    _flipped,
    _emptied,
    _zeroed,
    _deleted,
    _folder_deleted,
    _made_a_folder,
    _made_a_link_to_nothing,
    _folder_made_a_file,
    _swapped,
    _swapped_with_another_kind,
    _of_another_format,
    _with_a_wrong_value,
    _with_a_wrong_value,
    _with_a_wrong_value,
    _with_a_key_less,
    _nested_deeply,
    _doubled,
)


def _files(runs: Path) -> list[Path]:
    return sorted(path for path in runs.rglob("*") if path.is_file() and path.suffix not in (".parquet", ".log"))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in JSON values, as what holds it and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _same(runs: Path, written: Path, name: Path) -> bool:
    """Tell whether a file says what was written, checksum and keys that nobody reads aside."""
    path, original = runs / name, json.loads((written / name).read_bytes()) if (written / name).exists() else None
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path's own way may be refused
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return False
    read = ("trial_id", "outcome", "seconds", "total_seconds", "finished_at", "weights_hash", "metrics", "eval_id")
    return original is not None and all(found.get(key) == original.get(key) for key in read if key in found)


def _make_old(runs: Path) -> None:
    for path in (runs, *runs.rglob("*")):
        os.utime(path, (LONG_AGO, LONG_AGO))


@contextmanager
def _watched(case: str) -> Iterator[None]:
    """Fail with the case's name when it raises, or takes longer than any may."""

    def ring(_number: int, _frame: object) -> None:
        raise TimeoutError(f"{case} hangs")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@contextmanager
def _refusing(path: Path | None) -> Iterator[None]:
    """Have the file system refuse to open one file; permissions would not stop the superuser."""
    with pytest.MonkeyPatch.context() as patch:
        opened = Path.open

        def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return opened(self, *arguments, **options)

        patch.setattr(Path, "open", refuse)
        yield
