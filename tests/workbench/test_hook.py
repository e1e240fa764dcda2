"""Telling somebody that a run has ended: by URL and by command, without secrets, and without a say in the exit code."""

import io
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from workbench import cli, hook
from workbench.errors import WorkbenchError
from workbench.options import Options
from workbench.runner import run_study

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
TOLD = {"event": "done", "study": "toy", "profile": "smoke", "exit_code": 0, "report": None}


@pytest.fixture
def listener():
    """Return a server on this machine that keeps what is posted; `answers` are its next status codes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            server.posted.append((self.path, self.headers["Content-Type"], json.loads(self.rfile.read(length))))
            time.sleep(server.delay)
            self.send_response(server.answer)
            self.send_header("Location", f"{server.url}/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.posted, server.answer, server.delay = [], 200, 0.0
    server.url = f"http://127.0.0.1:{server.server_port}/services/secret"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(plan, store, trainer, **options):
    """Run a plan inline with a toy trainer and without MLflow; return the exit code and what was said."""
    out, err = io.StringIO(), io.StringIO()
    chosen = Options(executor="inline", tracking_uri=NOWHERE, trainer=trainer, **options)
    return run_study(plan, store, chosen, out=out, err=err), err.getvalue()


def test_a_finished_study_is_posted(toy_plan, store, toy_trainer, listener):
    """The URL gets study, exit code, states, verdicts and the report's path as JSON."""
    code, err = run(toy_plan, store, toy_trainer(), on_end=listener.url)
    assert code == 0
    assert "The hook" not in err
    ((path, kind, told),) = listener.posted
    assert (path, kind) == ("/services/secret", "application/json")
    assert {"event": "done", "study": "toy", "profile": "smoke", "exit_code": 0}.items() <= told.items()
    assert told["states"] == {"finished": 4}
    assert [item["claim"] for item in told["verdicts"]] == ["sharp_better"]
    assert told["report"].endswith("report.md")


def test_a_failed_study_is_told_to_a_command(toy_plan, store, toy_trainer, tmp_path):
    """The command gets the JSON on its standard input and the rest in variables; its output stays out of the way."""
    script = tmp_path / "hook script.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "print('not for results')\n"
        "told = {'json': json.load(sys.stdin), 'event': os.environ['WORKBENCH_EVENT'],"
        " 'code': os.environ['WORKBENCH_EXIT_CODE'], 'study': os.environ['WORKBENCH_STUDY']}\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(told))\n"
    )
    target = tmp_path / "told.json"
    trainer = toy_trainer(before_step=_fail)
    code, err = run(toy_plan, store, trainer, on_end=f"{sys.executable} '{script}' {target}")
    assert code == 1
    assert "The hook" not in err
    told = json.loads(target.read_text())
    assert (told["event"], told["code"], told["study"]) == ("failed", "1", "toy")
    assert told["json"]["states"] == {"failed": 4}


def test_an_interrupted_study_is_told(toy_plan, store, toy_trainer, listener):
    """After Ctrl-C the hook hears of it too."""

    def interrupt(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    code, _ = run(toy_plan, store, toy_trainer(before_step=interrupt), on_end=listener.url)
    assert code == 130
    ((_, _, told),) = listener.posted
    assert (told["event"], told["exit_code"]) == ("interrupted", 130)


@pytest.mark.parametrize("answer", [404, 500])
def test_a_hook_that_refuses_is_told_in_one_line(toy_plan, store, toy_trainer, listener, answer):
    """What the hook answers changes no exit code, and its path, as good as a password, is not printed."""
    listener.answer = answer
    code, err = run(toy_plan, store, toy_trainer(), on_end=listener.url)
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("The hook")]
    assert f"answered {answer}" in line
    assert "secret" not in err


def test_a_hook_that_sends_the_news_elsewhere_is_told(listener):
    """A POST that is redirected arrives as a GET without its body, so nobody has been told."""
    listener.answer = 302
    assert "it redirects; name the address" in hook.call(listener.url, TOLD)


def test_a_hook_that_is_slow_or_away_holds_nobody_up(listener, monkeypatch):
    """After a short time the run ends without it."""
    monkeypatch.setattr(hook, "URL_SECONDS", 0.2)
    monkeypatch.setattr(hook, "COMMAND_SECONDS", 0.3)
    listener.delay = 1.0
    began = time.monotonic()
    assert "could not be reached" in hook.call(listener.url, TOLD)
    assert "could not be reached" in hook.call("http://127.0.0.1:9/secret", TOLD)
    assert "was ended" in hook.call("sleep 60", TOLD)
    assert time.monotonic() - began < 15


def test_what_a_hook_leaves_behind_holds_nobody_up():
    """A command may start something that lives on."""
    began = time.monotonic()
    assert hook.call("sh -c 'sleep 20 & exit 0'", TOLD) is None
    assert time.monotonic() - began < 15


def test_a_command_that_fails_is_told_by_its_name_and_last_words():
    """Not by its arguments, in which a password may stand."""
    line = hook.call("sh -c 'echo oh no >&2; exit 3' secret", TOLD)
    assert line == "The hook sh failed: it ended with 3 (oh no). The exit code stays 0."
    assert "could not be started" in hook.call("no-such-command", TOLD)


@pytest.mark.parametrize("target", ["", "  ", "'open", "http://", "https:///path"])
def test_what_is_no_hook_is_refused_before_anything_runs(target, toy_plan, store, toy_trainer):
    """Neither a command nor a URL with a host: bad input, and nothing is written."""
    with pytest.raises(WorkbenchError, match="--on-end"):
        run(toy_plan, store, toy_trainer(), on_end=target)
    assert list(store.root.iterdir()) == []


def test_the_line_that_goes_on_keeps_the_secret():
    """Of a hook's URL only the host is printed again."""
    words = ["run", "x.yaml", "--on-end", "https://hooks.example/T1/secret", "--on-end=https://hooks.example/secret"]
    shown = hook.without_secrets(words)
    assert shown == ["run", "x.yaml", "--on-end", "https://hooks.example/...", "--on-end=https://hooks.example/..."]


def test_only_the_command_line_names_a_hook(tmp_path, toy_study, capsys):
    """A stranger's study file that names one is refused."""
    toy_study.write_text(toy_study.read_text() + "on_end: touch /tmp/mine\n")
    assert cli.main(["run", str(toy_study), "--runs", str(tmp_path / "runs")]) == 2
    assert "on_end" in capsys.readouterr().err


def _fail(step):
    if step == 3:
        raise RuntimeError("injected")


def test_a_limit_of_the_run_is_no_failure(toy_plan, store):
    """A run that its own limit stopped goes on another time: its end is told as an interruption."""
    results = store.results_for(toy_plan)
    events = {
        code: hook.news(results, exit_code=code, report=store.root / "none.md")["event"] for code in (0, 1, 4, 143)
    }
    assert events == {0: "done", 1: "failed", 4: "interrupted", 143: "interrupted"}
