"""Tells somebody that a run has ended: `run --on-end COMMAND_OR_URL`.

Only the command line names it, never a study file, since those come from strangers. A command gets the news as JSON on
its standard input and in WORKBENCH_* variables, a URL gets the JSON by POST. What becomes of it changes no exit code.
"""

import http.client
import json
import os
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workbench.errors import LIMIT_REACHED, WorkbenchError
from workbench.records import StudyResults

OPTION = "--on-end"
URL_SECONDS, COMMAND_SECONDS = 10.0, 60.0
FORMAT = 1


def checked(target: str) -> str:
    """Return what is to be called.

    Raises:
        WorkbenchError: it is neither a URL with a host nor a command.
    """
    if _is_url(target):
        try:
            host = urlsplit(target).hostname
        except ValueError:
            host = None
        if not host:
            raise WorkbenchError(f"{OPTION}: {_shown(target)} names no host; write https://HOST/PATH, or a command")
        return target
    try:
        words = shlex.split(target)
    except ValueError as error:
        raise WorkbenchError(f"{OPTION}: cannot be read as a command ({error}); close its quotes") from error
    if not words:
        raise WorkbenchError(f"{OPTION}: is empty; write a command, or a URL that begins with https://")
    return target


def news(results: StudyResults, *, exit_code: int, report: Path) -> dict[str, Any]:
    """Return what is told: plain values, without anything secret."""
    study = results.plan.study
    return {
        "format": FORMAT,
        "event": _event(exit_code),
        "study": study.name,
        "profile": study.profile,
        "plan_hash": results.plan.plan_hash,
        "exit_code": exit_code,
        "states": dict(Counter(results.records[trial.trial_id].state for trial in results.asked_for())),
        "verdicts": [
            {"claim": item.claim, "verdict": item.verdict, "effect": item.effect, "low": item.low, "high": item.high}
            for item in results.verdicts
        ],
        "report": str(report) if report.exists() else None,
    }


def call(target: str, told: dict[str, Any]) -> str | None:
    """Tell it; return one line on what went wrong, None when it was taken."""
    payload = json.dumps(told).encode()
    problem = _post(target, payload) if _is_url(target) else _run(target, payload, told)
    name = _shown(target) if _is_url(target) else shlex.split(target)[0]
    return problem and f"The hook {name} failed: {problem}. The exit code stays {told['exit_code']}."


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line that may be printed: the path of a hook's URL is as good as a password."""
    shown = list(words)
    for number, word in enumerate(shown):
        if word == OPTION and number + 1 < len(shown):
            shown[number + 1] = _shown(shown[number + 1])
        elif word.startswith(f"{OPTION}="):
            shown[number] = f"{OPTION}={_shown(word.partition('=')[2])}"
    return shown


def _event(exit_code: int) -> str:
    if exit_code > 128 or exit_code == LIMIT_REACHED:
        return "interrupted"
    return "failed" if exit_code else "done"


def _is_url(target: str) -> bool:
    return target.lower().startswith(("http://", "https://"))


def _shown(target: str) -> str:
    """Name a hook without what may be secret in it: of a URL its host alone."""
    if not _is_url(target):
        return target
    try:
        parts = urlsplit(target)
        return f"{parts.scheme}://{parts.hostname or ''}/..."
    except ValueError:
        return "URL"


def _post(url: str, payload: bytes) -> str | None:
    request = urllib.request.Request(
        url, data=payload, headers={"Content-Type": "application/json", "User-Agent": "detr-ablation-workbench"}
    )
    try:
        with urllib.request.urlopen(request, timeout=URL_SECONDS) as answer:
            if answer.url == request.full_url:
                return None
            # Sent elsewhere, a POST arrives as a GET without its body, and looks as if it had been taken.
            return "it redirects; name the address that takes the news itself"
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # no answer, or none of HTTP
        return f"it could not be reached ({getattr(error, 'reason', error)})"


def _run(command: str, payload: bytes, told: dict[str, Any]) -> str | None:
    names = ("event", "study", "profile", "exit_code", "report")
    variables = {f"WORKBENCH_{name.upper()}": str(told[name] if told[name] is not None else "") for name in names}
    words = shlex.split(command)
    # Files and no pipes: what the hook leaves unread, or leaves running behind it, then holds nobody up.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(payload)
        given.seek(0)
        try:
            process = subprocess.Popen(
                words,
                stdin=given,
                stdout=subprocess.DEVNULL,  # standard output is for results
                stderr=said,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"it could not be started ({getattr(error, 'strerror', None) or error})"
        try:
            code = process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took more than {COMMAND_SECONDS:g} s and was ended"
        if not code:
            return None
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    return f"it ended with {code}{f' ({lines[-1][:200]})' if lines else ''}"
