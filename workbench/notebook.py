"""A study's records for notebooks: `workbench.load("refinement_detach").to_pandas()`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import StudyFileError
from workbench.plan import make_plan
from workbench.store import Store, StudyResults
from workbench.study_file import Selection, load_study

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class LoadedStudy:
    """A study at one scale, with what is known of it so far. `results` has the plan, the records and the verdicts."""

    results: StudyResults

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row for each trial and kind of parameters: variant, seed, state, seconds, the COCO numbers as fractions.

        A trial that is not finished has one row, whose numbers are missing.
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


def load(study: str | Path, *, runs: str | Path = "runs", **selection: Any) -> LoadedStudy:
    """Return a study by its name (`studies/NAME.yaml` here) or the path of its file, with its records in `runs`.

    `selection` are the command line's options as in `Selection`: profile, data, variants, seeds, sets, budget.

    Raises:
        WorkbenchError: there is no such study, its file is wrong, or the records cannot be read.
    """
    found = [path for path in (Path(study), Path("studies") / f"{study}.yaml") if path.is_file()]
    if not found:
        raise StudyFileError(f"{study}: no such study; looked for that file and for studies/{study}.yaml")
    plan = make_plan(load_study(found[0], Selection(**selection)))
    return LoadedStudy(Store(Path(runs), create=False).results_for(plan))
