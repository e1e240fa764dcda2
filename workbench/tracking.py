"""Addresses of MLflow: what may stand in one, since addresses are stored, shown and shared, and what must not.

Who one is goes into MLflow's own environment variables, which are never recorded.
"""

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from workbench.errors import WorkbenchError

CREDENTIALS = USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
_SECRET_WORDS = ("pass", "pwd", "token", "secret", "key")


def problem_with(uri: str) -> str | None:
    """Return what is wrong with an address that may be stored, without the secret in it; None where nothing is."""
    try:
        parts = urlsplit(uri)
        user, password = parts.username, parts.password
    except ValueError:
        return "is no address; write http://HOST:PORT, or sqlite:////FOLDER/mlflow.db"
    if is_remote(uri):
        if user is not None or password is not None or parts.query:
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
