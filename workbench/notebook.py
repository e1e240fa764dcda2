"""A study's records for notebooks: `workbench.load("refinement_detach").to_pandas()`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import StudyFileError
from workbench.plan import make_plan
from workbench.records import StudyResults
from workbench.store import Store
from workbench.study_file import Selection, load_study

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class LoadedStudy:
    """A study at one scale, with what is known of it so far. `results` has the plan, the records and the verdicts."""

    results: StudyResults

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row for each trial and kind of parameters: variant, seed, state, seconds and the COCO numbers.

        The numbers are fractions. A trial that is not finished has one row, whose numbers are missing.
        """
        import pandas as pd

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for trial in self.results.plan.trials:
            record = self.results.records[trial.trial_id]
            known = {
                "trial_id": trial.trial_id,
                "variant": trial.variant,
                "seed": trial.seed,
                "state": record.state,
                "seconds": record.seconds,
            }
            scored = {
                parameters: record.metrics[eval_id]
                for parameters, eval_id in trial.evaluations.items()
                if eval_id in record.metrics
            }
            rows += [{**known, "parameters": name, **metrics.numbers()} for name, metrics in scored.items()]
            rows += [] if scored else [{**known, "parameters": None}]
        return rows


def load(
    study: str | Path,
    *,
    runs: str | Path = "runs",
    profile: str | None = None,
    data: str | Path | None = None,
    variants: Sequence[str] | None = None,
    seeds: int | None = None,
    sets: Sequence[str] = (),
) -> LoadedStudy:
    """Return a study by its name (`studies/NAME.yaml` here) or the path of its file, with its records in `runs`.

    The other arguments are the options of `run`; `sets` are KEY=VALUE texts, `variants` may be ["all"].

    Raises:
        WorkbenchError: there is no such study, its file is wrong, or the records cannot be read.
    """
    found = [path for path in (Path(study), Path("studies") / f"{study}.yaml") if path.is_file()]
    if not found:
        raise StudyFileError(f"{study}: no such study; looked for that file and for studies/{study}.yaml")
    selection = Selection(
        profile=profile,
        data=None if data is None else Path(data),
        variants=None if variants is None else tuple(variants),
        seeds=seeds,
        sets=tuple(sets),
    )
    plan = make_plan(load_study(found[0], selection))
    return LoadedStudy(Store(Path(runs), create=False).results_for(plan))
