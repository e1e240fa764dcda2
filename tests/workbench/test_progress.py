"""The live table, in a terminal and in a log file."""

import io
import threading

import pytest

from workbench.progress import Progress, duration, left_altogether
from workbench.trial import execute


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Say so."""
        return True


def progress(store, plan, stream):
    """Watch all trials of a plan."""
    return Progress(store, plan.trials, concurrency=2, stream=stream)


def test_a_log_file_gets_a_line_for_each_change(store, toy_plan, toy_trainer):
    """State changes are told once, with the score of what finished; without any, lines are rare."""
    stream = io.StringIO()
    watched = progress(store, toy_plan, stream)
    watched.update()
    spec = toy_plan.specs[toy_plan.trials[0].trial_id]
    seen = []

    def look(step):
        if step == 4:
            watched.update()
            watched.update()
            seen.append(stream.getvalue())

    execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer(before_step=look))
    watched.update(last=True)
    assert seen[0].count("plain seed 0: running") == 1
    assert "0 of 4 trials done, 1 running" in seen[0]
    assert "plain/0 50%" in seen[0]
    assert "plain seed 0: finished, AP 25.0" in stream.getvalue()
    assert "1 of 4 trials done" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_failure_is_told_with_its_reason(store, toy_plan, toy_trainer):
    """The first line of the error is in the log at once, not only at the end."""

    def fail(_step):
        raise ValueError("a shape is wrong\nand more")

    stream = io.StringIO()
    watched = progress(store, toy_plan, stream)
    execute(
        toy_plan.specs[toy_plan.trials[1].trial_id],
        store.root,
        should_stop=lambda: False,
        trainer=toy_trainer(before_step=fail),
    )
    watched.update()
    assert "sharp seed 0: failed: a shape is wrong\n" in stream.getvalue()
    assert "1 failed" in stream.getvalue()


def test_a_terminal_is_redrawn_in_place(store, toy_plan, toy_trainer, monkeypatch):
    """Each drawing erases the one before, what runs stands first, and a line can be said above the table."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    watched = progress(store, toy_plan, stream)
    screens = []

    def look(step):
        if step == 4:
            stream.seek(0)
            stream.truncate()
            watched.update()
            screens.append(stream.getvalue())

    watched.update()
    last = toy_plan.specs[toy_plan.trials[-1].trial_id]
    execute(last, store.root, should_stop=lambda: False, trainer=toy_trainer(before_step=look))
    (screen,) = screens
    assert screen.startswith("\x1b[6F\x1b[J")  # a heading, four trials, a summary
    heading, first, *_ = screen.removeprefix("\x1b[6F\x1b[J").splitlines()
    assert heading.split() == ["variant", "seed", "state", "progress", "best", "AP", "pictures/s", "left"]
    assert first.split() == ["sharp", "1", "running", "██████······", "50%", "2.0", "50", "0:06"]
    watched.say("Stopping.")
    assert stream.getvalue().endswith("\x1b[6F\x1b[JStopping.\n")


def test_a_signal_in_the_midst_of_a_line_has_its_own_line(store, toy_plan):
    """A handler runs in the thread that it interrupts, and must not wait for that thread to end its line."""

    class Interrupted(io.StringIO):
        def write(self, text):
            if text == "first\n":
                watched.say("from the handler")
            return super().write(text)

    stream = Interrupted()
    watched = progress(store, toy_plan, stream)
    speaker = threading.Thread(target=watched.say, args=("first",), daemon=True)
    speaker.start()
    speaker.join(5)
    assert not speaker.is_alive()
    assert stream.getvalue() == "from the handler\nfirst\n"


def test_only_what_runs_is_read_for_each_drawing(store, toy_plan, toy_trainer, monkeypatch):
    """A terminal is drawn every second, and a study may have hundreds of trials that have ended."""
    monkeypatch.setenv("TERM", "xterm")
    first, second = (toy_plan.specs[trial.trial_id] for trial in toy_plan.trials[:2])
    execute(first, store.root, should_stop=lambda: False, trainer=toy_trainer())
    watched, read = progress(store, toy_plan, Terminal()), []
    monkeypatch.setattr("workbench.progress.last_speed", read.append)

    def look(step):
        if step == 4:
            watched.update()

    execute(second, store.root, should_stop=lambda: False, trainer=toy_trainer(before_step=look))
    assert len(read) == 1


def test_the_time_left_counts_all_that_is_to_come(fake_results):
    """Trials of known length, shared by two workers: what is running counts by its rest."""
    results = fake_results({"a": [0.3] * 2, "b": [0.3] * 2}, looks=((2, 0.05),), states={("b", 1): "running"})
    records = list(results.records.values())
    assert left_altogether(records, 2) == pytest.approx(44.0)  # half of the 88 s that a finished one took
    pending = fake_results({"a": [0.3], "b": [0.3]}, looks=((3, 0.05),))
    assert left_altogether(list(pending.records.values()), 2) == pytest.approx(4 * 88 / 2)
    nothing = fake_results({"a": [], "b": []}, looks=((2, 0.05),))
    assert left_altogether(list(nothing.records.values()), 2) is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (11400, "3:10:00")])
def test_durations_read_like_a_clock(seconds, text):
    """Minutes and seconds, with hours where there are any."""
    assert duration(seconds) == text
