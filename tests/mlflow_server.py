"""A real MLflow server for tests, one for all of a test run since each start takes seconds; and a door before one."""

import atexit
import base64
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

START_SECONDS = 100.0


class Server:
    """`mlflow server` on a port of its own, with a database in `folder`; it can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "mlflow.db"
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                cwd=self.folder,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a process of its own for what nobody here uses
                },
                stdout=subprocess.DEVNULL,
                stderr=(self.folder / "server.log").open("ab"),
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.1)

    def answers(self) -> bool:
        """Tell whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """End it and its workers at once, as a machine that fails does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def rows(self, query: str) -> list[tuple]:
        """Return what its database holds, read past it."""
        with closing(sqlite3.connect(self.database)) as database:
            return database.execute(query).fetchall()


@cache
def shared_server() -> Server:
    """Return the server of this test run, started or not; it ends with the run."""
    folder = tempfile.TemporaryDirectory(prefix="workbench-mlflow-", ignore_cleanup_errors=True)
    server = Server(Path(folder.name))

    def end() -> None:
        server.kill()
        folder.cleanup()

    atexit.register(end)
    return server


@contextmanager
def locks_waited_for(milliseconds: int) -> Iterator[None]:
    """Let SQLite wait so long for a lock, where MLflow says 20 s at the start of every session."""

    def shorten(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", f"busy_timeout = {milliseconds}"), parameters

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", shorten)


class Door:
    """A reverse proxy that asks for a user and password, or a token, as those before real servers do."""

    def __init__(self, server: Server, *, user: str, password: str, token: str) -> None:
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        keys = {f"Basic {basic}", f"Bearer {token}"}
        door = self
        self.turned_away = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are written apart, which costs 40 ms each time else

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                given = self.headers.get("Authorization")
                if given not in keys:
                    door.turned_away += 1
                    self.reply(401, f"Who is {given}?".encode(), {})  # a server may well repeat what it was given
                    return
                kept = {name: value for name, value in self.headers.items() if name not in ("Authorization", "Host")}
                request = urllib.request.Request(
                    f"{server.uri}{self.path}", data=body or None, headers=kept, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        self.reply(answer.status, answer.read(), dict(answer.headers))
                except urllib.error.HTTPError as error:
                    self.reply(error.code, error.read(), dict(error.headers))

            def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() == "content-type":
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815 - the names that http.server calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Let nobody in any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
