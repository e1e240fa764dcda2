"""Files that survive a kill."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from core.events import Diverged, StepsTaken, TrainingStarted
from workbench import durable
from workbench.errors import StoreError


def steps(step):
    """Progress at a step."""
    return StepsTaken(
        step=step,
        epoch=0.1,
        losses={"total": 1.0},
        grad_norm=1.0,
        learning_rate=1e-3,
        pictures_per_s=9.0,
        seconds=float(step),
    )


def started(step):
    """The beginning of an attempt at a step."""
    return TrainingStarted(
        step=step, total_steps=9, total_epochs=1, num_parameters=1, threads=1, device="cpu", process_id=1
    )


def write(path, *events, attempt=1):
    """Append events as an attempt does."""
    writer = durable.EventWriter(path, attempt=attempt)
    for event in events:
        writer.append(event)
    writer.close()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """A file is the old one or the new one, never a part."""
    path = tmp_path / "a.json"
    durable.write_json(path, {"value": 1})

    def fail(temporary):
        temporary.write_text('{"format": 1, "val')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        durable.write_with(path, fail)
    assert durable.read_json(path) == {"format": 1, "value": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_every_truncation_of_a_json_file_is_noticed(tmp_path):
    """A file cut at any byte reads as absent, not as something else."""
    path = tmp_path / "a.json"
    durable.write_json(path, {"outcome": "finished", "nested": {"value": 1.5}})
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert durable.read_json(path) is None


def test_a_file_of_a_later_format_is_refused(tmp_path):
    """A record of a later version is neither misread nor taken for damaged."""
    path = tmp_path / "a.json"
    path.write_text('{"format": 2}')
    with pytest.raises(StoreError, match="format 2 was written by a later version"):
        durable.read_json(path)


def test_only_one_of_many_creates_a_file(tmp_path):
    """Creation is a claim: one caller wins, and the content is the winner's."""
    path = tmp_path / "claim.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: durable.create_json(path, {"number": number}), range(40)))
    assert sum(won) == 1
    assert durable.read_json(path) == {"format": 1, "number": won.index(True)}


def test_events_are_read_as_they_come(tmp_path):
    """A reader returns each whole line once and waits for the rest of a half-written one."""
    path = tmp_path / "events.jsonl"
    reader = durable.EventReader(path)
    assert reader.poll() == []
    write(path, started(0), steps(1))
    assert [item.event for item in reader.poll()] == [started(0), steps(1)]
    whole = path.read_bytes()
    write(path, steps(2))
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:20])
    assert reader.poll() == []
    path.write_bytes(whole + line)
    assert [item.event for item in reader.poll()] == [steps(2)]
    assert reader.damaged == 0


def test_a_line_cut_by_a_kill_does_not_swallow_the_next_attempt(tmp_path):
    """A new writer closes the broken line, which readers skip and count."""
    path = tmp_path / "events.jsonl"
    write(path, started(0), steps(1))
    path.write_bytes(path.read_bytes()[:-10])
    write(path, started(0), steps(1), attempt=2)
    reader = durable.EventReader(path)
    reader.poll()
    assert [(item.attempt, item.event) for item in reader.events] == [(1, started(0)), (2, started(0)), (2, steps(1))]
    assert reader.damaged == 1


@pytest.mark.parametrize("garbage", [b"\x00\xff\xfe", b"[1]", b'{"kind": "steps_taken"}', b"null", b'{"kind": 3'])
def test_a_damaged_line_is_skipped_and_counted(tmp_path, garbage):
    """Whatever stands in one line, the others are read."""
    path = tmp_path / "events.jsonl"
    write(path, started(0))
    path.write_bytes(path.read_bytes() + garbage + b"\n")
    write(path, Diverged(step=3, reason="nan"))
    reader = durable.EventReader(path)
    assert [item.event for item in reader.poll()] == [started(0), Diverged(step=3, reason="nan")]
    assert reader.damaged == 1


def test_steps_beyond_the_checkpoint_of_a_resume_do_not_count(tmp_path):
    """What happens again after a resume is kept once, as it happened the last time."""
    path = tmp_path / "events.jsonl"
    write(path, started(0), steps(1), steps(2), steps(3))
    write(path, started(2), steps(4), attempt=2)
    reader = durable.EventReader(path)
    assert len(reader.poll()) == 6
    assert [item.event.step for item in reader.events] == [0, 1, 2, 2, 4]
