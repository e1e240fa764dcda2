"""What is recorded of messages that others wrote holds no secret."""

import pytest

from workbench.redaction import looks_secret, redact

ENVIRONMENT = {
    "MLFLOW_TRACKING_TOKEN": "tok-1234567890",
    "DB_PASSWORD": "tok-1234567890-long",
    "RAY_AUTH_MODE": "disabled-mode",
    "RAY_AUTH_TOKEN_PATH": "/home/me/token",
    "SHORT_TOKEN": "the",
    "PATH": "/usr/bin:/bin",
    "SMTP_PASS": "smtp-1234567",
    "DEPLOY_KEY": "deploy-1234567",
    "GITHUB_PAT": "pat-1234567890",
    "OLDPWD": "/home/me/project",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "pw-4",
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("cannot reach https://me:pass@host:5000/x", "cannot reach https://***@host:5000/x"),
        ("postgresql://u:p@w@db/x and http://a/b@c", "postgresql://***@db/x and http://a/b@c"),
        ("GET /api?user=me&token=abc&n=1", "GET /api?user=me&token=***&n=1"),
        ("s3?X-Amz-Signature=ab12&X-Amz-Date=1", "s3?X-Amz-Signature=***&X-Amz-Date=1"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("said tok-1234567890 and tok-1234567890-long", "said *** and ***"),
        ("smtp-1234567 deploy-1234567 pat-1234567890 in /home/me/project", "*** *** *** in /home/me/project"),
        ("refused pw-4, sent as Basic bWU6cHctNA==", "refused ***, sent as Basic ***"),
        ("disabled-mode /home/me/token the /usr/bin:/bin", "disabled-mode /home/me/token the /usr/bin:/bin"),
        ("e-mail me@host, see http://host/@me", "e-mail me@host, see http://host/@me"),
    ],
)
def test_secrets_are_hidden_and_all_else_is_kept(text, kept):
    """Users of addresses, secret parts of queries, headers, and secrets of the environment; nothing more."""
    assert redact(text, ENVIRONMENT) == kept


def test_names_that_look_secret():
    """What a variable is called decides; a place where a secret lies is none."""
    assert [name for name in ENVIRONMENT if looks_secret(name)] == [
        "MLFLOW_TRACKING_TOKEN",
        "DB_PASSWORD",
        "SHORT_TOKEN",
        "SMTP_PASS",
        "DEPLOY_KEY",
        "GITHUB_PAT",
        "MLFLOW_TRACKING_PASSWORD",
    ]
