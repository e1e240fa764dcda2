"""Forks of a template: fresh processes at once, whatever became of the ones before."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest

from workbench import template
from workbench.store import Store
from workbench.template import Lost, Template
from workbench.trial import execute

pytestmark = pytest.mark.skipif(not template.AVAILABLE, reason="needs Linux, where forking after imports is safe")

PATIENCE = 30  # seconds, on a busy machine


@pytest.fixture
def light(tmp_path):
    """Return a template that has imported next to nothing."""
    found = Template(log=tmp_path / "log", modules=("json",))
    yield found
    found.close()


def tell(path):
    """Write what a process is, and what others may have left in it."""
    left = (os.environ.get("LEFT"), Path.cwd().name, getattr(sys, "left", None), signal.getsignal(signal.SIGTERM))
    filters = [item for item in warnings.filters if item[2] is UserWarning]
    path.write_text(f"{os.getpid()} {os.getppid()}\n{left} {'left' in sys.path} {filters} {sorted(sys.modules)}")


def leave_a_mess(folder):
    """Change what a process keeps between calls."""
    os.environ["LEFT"] = "1"
    os.chdir(folder)
    sys.left = "here"
    sys.path.append("left")
    warnings.simplefilter("error", UserWarning)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.modules["json"] = None
    sys.modules["left"] = sys


def fail():
    """Raise as a trial whose records cannot be written does."""
    raise OSError("no space")


def kill():
    """Die as the kernel lets processes die."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait(path):
    """Say who waits, for ever."""
    path.write_text(str(os.getpid()))
    time.sleep(1000)


def test_each_work_has_a_process_of_its_own_and_finds_nothing_of_others(light, tmp_path):
    """Two works run in two forks of one template; what a third leaves behind, the second does not see."""
    light.run(partial(tell, tmp_path / "one"))
    light.run(partial(leave_a_mess, tmp_path))
    light.run(partial(tell, tmp_path / "two"))
    (who, left), (other, same) = ((tmp_path / name).read_text().split("\n") for name in ("one", "two"))
    assert left == same
    assert who.split()[0] != other.split()[0]
    assert who.split()[1] == other.split()[1] != str(os.getpid())


@pytest.mark.parametrize(("work", "fate"), [(fail, "ended with code 100"), (kill, "killed by signal 9")])
def test_a_work_that_fails_is_told_and_harms_no_other(light, tmp_path, work, fate):
    """What a work raises, and a kill, come back as its fate, with the traceback in the log; the next one runs."""
    with pytest.raises(Lost, match=fate):
        light.run(work)
    light.run(partial(tell, tmp_path / "next"))
    assert (tmp_path / "next").exists()
    assert ("OSError: no space" in (tmp_path / "log").read_text()) == (work is fail)


def test_a_dead_template_is_told(light):
    """A template that is killed, as when memory runs out, is an error and no endless wait."""
    os.kill(light._process.pid, signal.SIGKILL)
    with pytest.raises(Lost, match=r"template of trials died with code -9"):
        light.run(fail)


@pytest.mark.parametrize("who", ["owner", "template"])
def test_no_work_outlives_those_who_asked(tmp_path, who):
    """When the process that asks is killed, or the template, the fork at work is gone too."""
    script = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from test_template import wait\n"
        "from workbench.template import Template\n"
        "found = Template(log=Path(sys.argv[1] + '.log'), modules=('json',)); print(found._process.pid, flush=True)\n"
        "found.run(partial(wait, Path(sys.argv[1])))\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "pid")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    pids = {"owner": owner.pid, "template": int(owner.stdout.readline())}
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    fork = int((tmp_path / "pid").read_text())
    os.kill(pids[who], signal.SIGKILL)
    owner.communicate(timeout=PATIENCE)
    until(lambda: not alive(fork) and not alive(pids["template"]))


def environment():
    """Return one in which this file can be imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def observe(spec, path):
    """Run a trial; write how many threads the template has, and what of our code the trial had to import."""
    before = set(sys.modules)
    execute(spec, path / "runs", should_stop=partial(bool, 0))
    fresh = sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("core", "workbench"))
    threads = list(Path(f"/proc/{os.getppid()}/task").iterdir())
    (path / "seen").write_text(json.dumps([len(threads), fresh]))


@pytest.mark.ci
def test_the_template_has_one_thread_and_all_our_code(toy_plan, tmp_path):
    """Threads would be missing in a fork; code imported later might be other than the template's hash of it says."""
    found = Template(log=tmp_path / "log")
    spec = next(iter(toy_plan.specs.values()))
    found.run(partial(observe, spec, tmp_path))
    found.close()
    assert json.loads((tmp_path / "seen").read_text()) == [1, []]
    assert Store(tmp_path / "runs").state(spec.trial_id) == "finished"


def until(condition):
    """Wait for something that takes a moment."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def alive(pid):
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
