"""What a record must look like to be believed: types, and numbers that can be.

A checksum says that a file is as it was written; these checks say that what was written is what is looked for there,
also in files of before checksums. What fails them counts as damaged, never as something else.
"""

import math
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from core.events import Amount, Count
from core.metrics import Metrics
from workbench.durable import check_time
from workbench.records import Verdict

DEEPEST = 50  # nested mappings and lists
Plain = dict[str, Any]
Time = Annotated[str, AfterValidator(check_time)]
_Model = TypeVar("_Model")


class _Result(TypedDict):
    trial_id: str
    outcome: Literal["finished", "diverged"]
    seconds: Amount
    total_seconds: Amount
    finished_at: Time
    reason: NotRequired[str | None]
    step: NotRequired[Count]
    weights_hash: NotRequired[str]
    checkpoint: NotRequired[str | None]
    data_report: NotRequired[Plain]
    provenance: NotRequired["_Provenance"]
    damaged: NotRequired[list[str]]


class _Provenance(TypedDict):
    code_hash: str
    torch: str
    threads: Count
    device: str
    cpu: NotRequired[str | None]
    gpus: NotRequired[list[str] | None]
    git_revision: NotRequired[str | None]
    git_dirty: NotRequired[bool | None]


class _Error(TypedDict):
    message: str
    type: NotRequired[str]
    step: NotRequired[Count]
    attempt: NotRequired[Count]
    traceback: NotRequired[str]


class _Evaluation(TypedDict):
    metrics: Metrics
    weights_hash: NotRequired[str]
    seconds: NotRequired[Amount]


class _Process(TypedDict):
    host: str
    boot: str
    pid: Count
    started: Count | None


class _Attempt(TypedDict):
    worker: _Process
    driver: _Process | None
    began_at: Time
    outcome: Literal["finished", "diverged", "interrupted", "failed"] | None
    seconds: Amount
    cpu_seconds: Amount
    failure: NotRequired[str | None]
    gpus: NotRequired[Amount]


class _Look(TypedDict):
    started_at: str


class _Looks(TypedDict):
    looks: list[_Look]


class _Mirror(TypedDict):
    tracking_uri: str
    experiment_id: str | None
    parent_run_id: str | None
    runs: dict[str, str]


class _Verdicts(TypedDict):
    verdicts: list[Verdict]


_RESULT, _ERROR, _EVALUATION = TypeAdapter(_Result), TypeAdapter(_Error), TypeAdapter(_Evaluation)
_ATTEMPT, _LOOKS, _VERDICTS = TypeAdapter(_Attempt), TypeAdapter(_Looks), TypeAdapter(_Verdicts)
_MIRROR = TypeAdapter(_Mirror)


def result(plain: Plain | None, trial_id: str) -> Plain | None:
    """Return a result.json that is this trial's; None for any other content."""
    found = _valid(_RESULT, plain)
    return plain if found is not None and found["trial_id"] == trial_id else None


def error(plain: Plain | None) -> Plain | None:
    """Return an error.json; None for any other content."""
    return plain if _valid(_ERROR, plain) is not None else None


def evaluation(plain: Plain | None, eval_id: str) -> Plain | None:
    """Return the metrics.json of an evaluation; None for any other content."""
    if plain is None or _valid(_EVALUATION, plain) is None or plain.get("eval_id") != eval_id:
        return None
    found = Metrics.from_json(plain["metrics"])
    scores = [*found.numbers().values(), *(value for named in found.per_class.values() for value in named.values())]
    counts = (found.num_pictures, found.num_boxes)
    good = all(type(count) is int and count >= 0 for count in counts) and all(
        score is None or (type(score) in (int, float) and 0 <= score <= 1) for score in scores
    )
    return plain if good else None


def scoring_seconds(plain: Plain | None) -> float:
    """Return how long an evaluation took, by its metrics.json; 0 where that is not believed."""
    found = (plain or {}).get("seconds")
    return float(found) if isinstance(found, int | float) and _can_be(found) and found >= 0 else 0.0


def attempt(plain: Plain | None) -> Plain | None:
    """Return the file of an attempt; None for any other content."""
    return plain if _valid(_ATTEMPT, plain) is not None else None


def looks(plain: Plain | None) -> list[Plain]:
    """Return the looks that a looks.json says were started: none where it is not there or not believed."""
    found = _valid(_LOOKS, plain)
    return [] if found is None else [{**look} for look in found["looks"]]


def mirror(plain: Plain | None) -> Plain | None:
    """Return where an mlflow.json says that a study is in MLflow; None for any other content."""
    own = {key: plain[key] for key in _Mirror.__annotations__ if key in plain} if plain else None
    return own if _valid(_MIRROR, own) is not None else None  # what else is in it is the mirror's own affair


def verdicts(plain: Plain | None) -> tuple[Verdict, ...]:
    """Return the verdicts in a verdicts.json: none where it is not there or not believed."""
    found = _valid(_VERDICTS, plain)
    return () if found is None else tuple(found["verdicts"])


def _valid(model: TypeAdapter[_Model], plain: Plain | None) -> _Model | None:
    if plain is None or not _can_be(plain):
        return None
    try:
        return model.validate_python(plain)
    except (ValidationError, OverflowError):
        return None


def _can_be(value: Any, depth: int = 0) -> bool:
    """Tell whether JSON values are nested no deeper than ours, and all numbers finite and such as a float can count."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return depth < DEEPEST and all(_can_be(inner, depth + 1) for inner in values)
    return not isinstance(value, int | float) or (abs(value) <= 2**53 and math.isfinite(value))
