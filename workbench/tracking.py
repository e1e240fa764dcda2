"""Addresses of MLflow: what may stand in one, since addresses are stored, shown and shared, and what must not.

Who one is goes into MLflow's own environment variables, or its own file, which are never recorded.
"""

import configparser
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from workbench.errors import WorkbenchError

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
CREDENTIALS_FILE = "~/.mlflow/credentials"
_SECRET_WORDS = ("pass", "pwd", "token", "secret", "key")


def problem_with(uri: str) -> str | None:
    """Return what is wrong with an address that may be stored, without the secret in it; None where nothing is."""
    try:
        parts = urlsplit(uri)
        user, password, _ = parts.username, parts.password, parts.port
    except ValueError:
        return "is no address; write http://HOST:PORT, or sqlite:////FOLDER/mlflow.db"
    if is_remote(uri):
        if user is not None or password is not None or parts.query or parts.fragment:
            return (
                "holds a user, a password or a query, and addresses are stored and shown; "
                f"write http://HOST:PORT and set {USER} and {PASSWORD}, or {TOKEN}"
            )
        return None if parts.hostname else "names no host; write http://HOST:PORT"
    named = [name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in _SECRET_WORDS)]
    if password is not None or named:
        return (
            "holds a password, and addresses are stored and shown; leave it to the database's own means "
            "(PGPASSWORD, a password file), or put an MLflow server before the database"
        )
    return None


def checked(uri: str) -> str:
    """Return the address.

    Raises:
        WorkbenchError: something stands in it that must not be stored.
    """
    if problem := problem_with(uri):
        raise WorkbenchError(f"--tracking-uri: {problem}")
    return uri


def is_remote(uri: str) -> bool:
    """Tell whether a server is meant."""
    return uri.startswith(("http://", "https://"))


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite database; None for a server, or another database."""
    return Path(uri.removeprefix("sqlite:///").split("?")[0]) if uri.startswith("sqlite:///") else None


def credentials(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what MLflow tells any server of who one is, by the names that its variables and its file have for it."""
    found = {name: environment.get(name, "") for name in (USER, PASSWORD, TOKEN)}
    with suppress(configparser.Error, OSError, ValueError, RuntimeError):  # no home, or a file that nobody can read
        parser = configparser.ConfigParser()
        parser.read(Path(CREDENTIALS_FILE).expanduser())
        for name in (USER, PASSWORD):
            found[name] = found[name] or parser.get("mlflow", name.lower(), fallback="")
    return {name: value for name, value in found.items() if value}
