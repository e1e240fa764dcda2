"""Whom a study file, or a record, makes this machine talk to: nobody, or the MLflow server that it names.

Both may be a stranger's. So the server is told before anything is sent, it can only be a server, and what
proves who the user is goes there only when the user has named the same address.
"""

import os

from workbench import tracking
from workbench.errors import WorkbenchError
from workbench.study import Study

_VARIABLE = "MLFLOW_TRACKING_URI"


def server(address: str) -> str:
    """Return the address of a server that a study file or profile may name.

    Raises:
        ValueError: it is none, or holds what does not belong into a file; the address is not repeated in the message.
    """
    if not tracking.is_remote(address):
        raise ValueError("names no server; a file may name an MLflow server alone, as http://HOST:PORT")
    if problem := tracking.problem_with(address):
        raise ValueError(problem)
    return address


def named_by_file(study: Study) -> str | None:
    """Return the server that the study's file or profile names; None where there is none or the user named it."""
    uri = study.tracking_uri
    if uri is None or "--tracking-uri" in study.selection or {"@", "?"} & set(uri) or uri == os.environ.get(_VARIABLE):
        return None  # an address with a user or a query is left out of the selection's words, and never from a file
    return uri


def refuse_credentials(study: Study) -> None:
    """Refuse to prove who the user is to a server that only the study's file names.

    Raises:
        WorkbenchError: the file names a server, and MLflow's credentials are set.
    """
    if (uri := named_by_file(study)) is not None:
        _refuse_credentials(f"{study.path}: its tracking_uri {uri}", uri)


def refuse_credentials_of_records(uri: str) -> None:
    """Refuse to prove who the user is to a server that only records name, which may be a stranger's.

    Raises:
        WorkbenchError: they name a server, and MLflow's credentials are set.
    """
    if tracking.is_remote(uri) and uri != os.environ.get(_VARIABLE):
        _refuse_credentials(f"{uri}, which its records name,", uri)


def _refuse_credentials(server_in_words: str, uri: str) -> None:
    if found := tracking.credentials():
        raise WorkbenchError(
            f"{server_in_words} would be sent {' and '.join(found)} of the environment or of "
            f"{tracking.CREDENTIALS_FILE}: where you trust it with them, say so with --tracking-uri {uri}; else unset "
            "them"
        )
