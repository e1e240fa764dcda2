"""A process of its own for each work: no number can depend on what ran before, and it can be killed.

A template has imported what a trial needs and computes nothing; each trial is a fork of it. So a trial pays neither the
start of Python nor the seconds that torch takes, and every fork begins as the template is, whatever other forks did,
failed at or imported. Where forking is not safe, each work gets a new Python.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from workbench import code_state, provenance

AVAILABLE = sys.platform == "linux"
"""Elsewhere forking after imports is not safe (macOS) or not there (Windows)."""

MODULES = ("torch", "core.training", "core.data.splits", "core.evaluation.score", "workbench.trial")
"""Imported by the template. None of them starts a thread, which no fork would have; pyarrow does."""

WATCH_SECONDS = 5.0
_RAISED = 100  # exit code of a fork whose work raised; what was raised is in the log
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG: man prctl
_LENGTH, _CODE = struct.Struct("<I"), struct.Struct("<i")


def _nothing() -> None:
    """Watch nothing."""


class Lost(RuntimeError):  # noqa: N818 - a fate, told to whoever asked for the work
    """A fork, or the template itself, died before its work was done."""


class Template:
    """The template, as a process of its own that ends with this one; what works print goes to the end of `log`."""

    def __init__(self, *, log: Path, modules: Sequence[str] = MODULES) -> None:
        theirs, self._requests = os.pipe()
        self._answers, answer = os.pipe()
        command = f"from workbench.template import serve; serve({theirs}, {answer}, {tuple(modules)})"
        with log.open("ab") as output:
            self._process = _start(command, (theirs, answer), output)
        os.close(theirs)
        os.close(answer)

    def run(self, work: Callable[[], Any], *, watch: Callable[[], None] = _nothing) -> None:
        """Call `work`, which must be picklable and leave its results in files, in a fork; return when that has ended.

        `watch` is called every few seconds meanwhile.

        Raises:
            Lost: the fork was killed, or `work` raised.
        """
        content = pickle.dumps(work)
        with contextlib.suppress(BrokenPipeError):  # it is dead, and then the answers end as well
            _write(self._requests, _LENGTH.pack(len(content)) + content)
        while not select.select([self._answers], [], [], WATCH_SECONDS)[0]:
            watch()
        answer = _read(self._answers, _CODE.size)
        if answer is None:
            raise Lost(f"the template of trials died with code {self._process.wait()}")
        _raise_unless_well(*_CODE.unpack(answer))

    def alive(self) -> bool:
        """Tell whether the template can fork another time."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the template, and a fork that is still at work."""
        os.close(self._requests)
        os.close(self._answers)
        self._process.wait()


class Fresh:
    """A new Python for each work, where nothing may be forked; same use as a `Template`."""

    def __init__(self, *, log: Path) -> None:
        self._log = log

    def run(self, work: Callable[[], Any], *, watch: Callable[[], None] = _nothing) -> None:
        """Call `work` in a new process; return when that has ended. See `Template.run`."""
        theirs, ours = os.pipe()
        command = f"from workbench.template import work_once; raise SystemExit(work_once({theirs}))"
        with self._log.open("ab") as output:
            process = _start(command, (theirs,), output)
        os.close(theirs)
        try:
            content = pickle.dumps(work)
            with contextlib.suppress(BrokenPipeError):  # it died at once, which its code tells
                _write(ours, _LENGTH.pack(len(content)) + content)
            while True:
                try:
                    code = process.wait(WATCH_SECONDS)
                except subprocess.TimeoutExpired:
                    watch()
                else:
                    return _raise_unless_well(code)
        finally:
            os.close(ours)  # by which a process that is still at work knows that nobody waits for it
            process.wait()

    def alive(self) -> bool:
        """Tell that another work may come."""
        return True

    def close(self) -> None:
        """Nothing is left between works."""


class Here:
    """No process but the caller's, for work that needs what the caller is connected to; same use as a `Template`."""

    def run(self, work: Callable[[], Any], *, watch: Callable[[], None] = _nothing) -> None:  # noqa: ARG002
        """Call `work`."""
        work()

    def alive(self) -> bool:
        """Tell that another work may come."""
        return True

    def close(self) -> None:
        """Nothing was started."""


def _raise_unless_well(code: int) -> None:
    if code:
        fate = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise Lost(f"the process of the trial {fate}")


def _start(command: str, handles: tuple[int, ...], output: BinaryIO) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", command],
        pass_fds=handles,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # Ctrl-C in a terminal is for the driver, which asks for a stop in good order
    )


def work_once(requests: int) -> int:
    """Be the process of one work: do it, and die when whoever asked for it is gone."""
    length = _read(requests, _LENGTH.size)
    content = _read(requests, *_LENGTH.unpack(length)) if length else None
    if content is None:
        return _RAISED
    threading.Thread(target=_die_with, args=(requests,), daemon=True).start()
    return _called(content)


def _die_with(requests: int) -> None:
    os.read(requests, 1)  # nothing more is sent, so this is the end of the pipe
    os._exit(_RAISED)


def serve(requests: int, answers: int, modules: Sequence[str]) -> None:
    """Be the template: fork for each request until whoever sends them is gone."""
    for name in modules:
        importlib.import_module(name)
    provenance.code_hash()  # of the code loaded now; the files may change while the template lives
    provenance.git()
    code_state.current()
    gc.collect()
    gc.freeze()  # or the first collection of every fork would copy all that was imported
    ended, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(tell)
    while length := _read(requests, _LENGTH.size):
        content = _read(requests, *_LENGTH.unpack(length))
        if content is None:
            return
        child = os.fork()
        if child == 0:
            for handle in (requests, answers, ended, tell):
                os.close(handle)
            os._exit(_work(content))
        code = _wait(child, ended, requests)
        if code is None:
            return
        _write(answers, _CODE.pack(code))


def _wait(child: int, ended: int, requests: int) -> int | None:
    """Return how a fork ended; when whoever asked for its work is gone, kill it and return None."""
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            os.read(ended, 1024)
            reaped, status = os.waitpid(child, os.WNOHANG)
            if reaped == child:
                return os.waitstatus_to_exitcode(status)
        elif requests in ready:  # nothing is sent while a fork works, so this is the end of the pipe
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None


def _work(content: bytes) -> int:  # in a fork
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    return _called(content)


def _called(content: bytes) -> int:
    try:
        pickle.loads(content)()
    except BaseException:  # noqa: BLE001 - a fork must not go on as a second template
        traceback.print_exc()
        return _RAISED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _read(handle: int, size: int) -> bytes | None:
    """Read `size` bytes, or return None where the pipe ends before."""
    content = b""
    while len(content) < size:
        part = os.read(handle, size - len(content))
        if not part:
            return None
        content += part
    return content


def _write(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]
