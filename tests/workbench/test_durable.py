"""Files that survive a kill."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


@pytest.mark.parametrize("write", [durable.write_json, durable.write_derived, durable.create_json])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
    """A file is the old one or the new one, never a part, and a part takes no room on a disk that is full."""
    path = tmp_path / "a.json"
    durable.write_json(path, {"value": 1})

    def fail(self, *_):
        with self.open("r+b") as file:
            file.write(b'{"format": 1, "val')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "_write_and_sync", fail)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        write(path, {"value": 2})
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


def test_every_flipped_bit_of_a_json_file_is_noticed(tmp_path):
    """Whatever bit is another, in a number, a name or the checksum itself, the content is not believed as it is."""
    path = tmp_path / "a.json"
    durable.write_json(path, {"outcome": "finished", "seconds": 12.5})
    whole, plain = path.read_bytes(), durable.read_json(path)
    assert plain == {"format": 1, "outcome": "finished", "seconds": 12.5}
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = durable.read_json(path)
            # Only a checksum under another name goes unnoticed, and then all else is as it was.
            assert found is None or {key: found[key] for key in plain} == plain


def test_a_file_without_a_checksum_is_believed(tmp_path):
    """Files of earlier versions have none."""
    path = tmp_path / "a.json"
    path.write_text('{"format": 1, "value": 1}')
    assert durable.read_json(path) == {"format": 1, "value": 1}


def test_what_was_read_may_be_written_again(tmp_path):
    """The format and an old checksum in what is written are replaced by the file's own."""
    path = tmp_path / "a.json"
    durable.write_json(path, {"format": 7, "sha256": "old", "value": 1})
    assert durable.read_json(path) == {"format": 1, "value": 1}


def test_what_cannot_be_opened_is_an_error_and_not_absent(tmp_path, monkeypatch):
    """A finished trial whose result cannot be read just now must not be taken for one that never ran."""
    path = tmp_path / "a.json"
    durable.write_json(path, {})

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(StoreError, match=r"a.json: cannot be read \(Permission denied\)"):
        durable.read_json(path)


def test_damaged_files_are_set_aside_by_number(tmp_path):
    """Nothing that was found damaged replaces another, and a folder in a file's place is moved as well."""
    path = tmp_path / "a.json"
    assert not durable.damaged(path)
    path.write_text("{")
    assert durable.damaged(path)
    assert durable.set_aside(path).name == "a.json.damaged"
    path.mkdir()
    assert durable.damaged(path)
    assert durable.set_aside(path).name == "a.json.damaged-2"
    durable.write_json(path, {})
    assert not durable.damaged(path)


def test_a_flipped_bit_in_an_event_is_noticed(tmp_path):
    """A line that is not as it was written is counted and left out, whichever digit of it is another."""
    path = tmp_path / "events.jsonl"
    write(path, started(0), steps(5))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    assert b'"step":5' in whole
    path.write_bytes(whole.replace(b'"step":5', b'"step":7'))
    reader = durable.EventReader(path)
    assert len(reader.poll()) == 1
    assert reader.damaged == 1
    path.write_bytes(whole[:second] + whole[second:].replace(b',"crc":', b',"was":'))
    assert len(durable.EventReader(path).poll()) == 2  # as lines of before they had one


def test_an_event_of_a_later_format_is_refused_each_time(tmp_path):
    """A reader says so whenever it is asked, and takes nothing of that line."""
    path = tmp_path / "events.jsonl"
    write(path, started(0))
    with path.open("a") as file:
        file.write('{"format":2,"kind":"training_started"}\n')
    reader = durable.EventReader(path)
    for _ in range(2):
        with pytest.raises(StoreError, match="an event of format 2 was written by a later version"):
            reader.poll()


@pytest.mark.parametrize("value", [-1, "x", None, 10**400, float("nan")])
def test_an_event_that_cannot_be_is_left_out(tmp_path, value):
    """A step or a time that is none counts as damage, also in a line of before checksums."""
    path = tmp_path / "events.jsonl"
    write(path, steps(5))
    plain = json.loads(path.read_text())
    del plain["crc"]
    for key in ("step", "seconds"):
        path.write_text(json.dumps({**plain, key: value}) + "\n")
        reader = durable.EventReader(path)
        assert reader.poll() == []
        assert reader.damaged == 1


@pytest.mark.parametrize("signed", [True, False])
def test_a_file_of_a_later_format_is_refused(tmp_path, monkeypatch, signed):
    """A record of a later version is neither misread nor taken for damaged."""
    path = tmp_path / "a.json"
    path.write_text('{"format": 2}')
    if signed:
        with monkeypatch.context() as later:
            later.setattr(durable, "FORMAT", 2)
            durable.write_json(path, {})
    with pytest.raises(StoreError, match="format 2 was written by a later version"):
        durable.read_json(path)


def test_only_one_of_many_creates_a_file(tmp_path):
    """Creation is a claim: one caller wins, and the content is the winner's."""
    path = tmp_path / "claim.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: durable.create_json(path, {"number": number}), range(40)))
    assert sum(won) == 1
    assert durable.read_json(path) == {"format": 1, "number": won.index(True)}


def test_a_link_whose_answer_was_lost_was_made(tmp_path, monkeypatch):
    """NFS sends a request again when no answer comes, and then finds the file that the first one has made."""
    link = Path.hardlink_to

    def link_and_lose_the_answer(path, target):
        link(path, target)
        raise FileExistsError(path)

    monkeypatch.setattr(Path, "hardlink_to", link_and_lose_the_answer)
    assert durable.create_json(tmp_path / "claim.json", {"number": 1})
    assert not durable.create_json(tmp_path / "claim.json", {"number": 2})  # here the link fails indeed
    assert durable.read_json(tmp_path / "claim.json") == {"format": 1, "number": 1}
    assert len(list(tmp_path.iterdir())) == 1


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


def test_progress_may_be_passed_over(tmp_path):
    """A reader of all but progress gets the rest as ever, resumes included."""
    path = tmp_path / "events.jsonl"
    write(path, started(0), steps(1), Diverged(step=3, reason="nan"))
    write(path, started(2), steps(3), attempt=2)
    reader = durable.EventReader(path, steps=False)
    reader.poll()
    assert [item.event for item in reader.events] == [started(0), started(2)]


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
