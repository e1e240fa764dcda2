"""Taking secrets out of text before it is kept: passwords in addresses, and what the environment holds of secrets.

For text whose making is not in our hands, such as messages and tracebacks of libraries. The environment itself is
never recorded.
"""

import base64
import os
import re
from collections.abc import Mapping

from workbench.tracking import PASSWORD, TOKEN, USER, credentials

HIDDEN = "***"
SHORTEST_SECRET, SHORTEST_OF_MLFLOW = 8, 4  # characters; hiding shorter ones would blank out common words

_USER = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_IN_QUERY = re.compile(r"(?i)([?&;](?:[\w-]*(?:pass|pwd|token|secret|key|signature|credential)[\w-]*)=)[^&;\s'\"]+")
_HEADER = re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)\s+)[^\s'\",}]+")
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)KEY|_(KEY|PASS|PWD|PAT)($|_)"
)
_OF_A_PLACE = re.compile(r"_(PATH|FILE|DIR|MODE|URL|URI)$")  # which says where a secret is, or how it is used


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without the passwords of addresses, secret parts of queries, and secrets of the environment."""
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<1>{HIDDEN}", text)
    for secret in sorted(_secrets(environment), key=len, reverse=True):  # the longest first: one may hold another
        text = text.replace(secret, HIDDEN)
    return text


def looks_secret(name: str) -> bool:
    """Tell whether an environment variable of this name probably holds a secret."""
    return bool(_SECRET_NAME.search(name.upper())) and not _OF_A_PLACE.search(name.upper())


def _secrets(environment: Mapping[str, str]) -> set[str]:
    found = {value for name, value in environment.items() if len(value) >= SHORTEST_SECRET and looks_secret(name)}
    known = credentials(environment)
    password = known.get(PASSWORD, "")
    of_mlflow = {known.get(TOKEN, ""), password}
    if password:  # in the form in which it is sent
        of_mlflow.add(base64.b64encode(f"{known.get(USER, '')}:{password}".encode()).decode())
    return found | {value for value in of_mlflow if len(value) >= SHORTEST_OF_MLFLOW}
