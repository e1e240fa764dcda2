"""What all tests share: one thread a process, and small fixtures."""

import json
import os

# Before any test imports torch: the test processes share the cores, and a trial sets its own number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import fields
from pathlib import Path

import pytest

from core.config import ExperimentConfig
from core.events import EpochFinished
from core.metrics import Metrics
from workbench.records import StudyResults, TrialRecord
from workbench.study import Claim, Look, Plan, PlannedTrial, Study, Term, TrialSpec, Variant


def _metrics(ap: float) -> Metrics:
    """COCO numbers that fit a mean AP: larger boxes and looser thresholds score better."""
    factors = {"ap": 1.0, "ap50": 1.7, "ap75": 0.9, "ap_small": 0.4, "ap_medium": 1.1, "ap_large": 1.3}
    numbers = {item.name: None for item in fields(Metrics) if item.name.startswith(("ap", "ar"))}
    numbers |= {name: min(1.0, ap * factor) for name, factor in factors.items()}
    classes = {"disc": {"ap": ap * 1.1, "ap50": min(1.0, ap * 1.8)}, "ring": {"ap": ap * 0.9, "ap50": ap * 1.6}}
    return Metrics(**numbers, per_class=classes, num_pictures=1000, num_boxes=3200)


def _epochs(final: float, *, count: int, last_gain: float, step: int) -> tuple[EpochFinished, ...]:
    """A learning curve that ends at `final`; each epoch gains half of what the one before gained."""
    return tuple(
        EpochFinished(
            step=step * epoch,
            epoch=epoch,
            losses={"class": 1.0 / epoch, "l1": 0.5 / epoch},
            grad_norm=0.1,
            learning_rate=1e-3,
            pictures_per_s=90.0,
            peak_memory_bytes=2**29,
            seconds=20.0 * epoch,
            metrics={"averaged": _metrics(max(0.0, final - last_gain * (2 ** (count - epoch) - 1)))},
        )
        for epoch in range(1, count + 1)
    )


def _record(trial_id: str, ap: float, state: str, *, epochs: int, last_gain: float, code_hash: str) -> TrialRecord:
    """A trial's record in any state; only a finished one has final metrics."""
    done = {"pending": 0, "running": epochs // 2, "interrupted": epochs // 2, "failed": 1, "diverged": 1}.get(
        state, epochs
    )
    provenance = {"code_hash": code_hash, "torch": "2.14.1", "threads": 1, "kernel": "torch", "device": "cpu"}
    return TrialRecord(
        trial_id=trial_id,
        state=state,
        attempts=0 if state == "pending" else 1,
        seconds=20.0 * done,
        total_seconds=22.0 * done,
        step=190 * done,
        total_steps=190 * epochs,
        epochs=_epochs(ap, count=epochs, last_gain=last_gain, step=190)[:done],
        metrics={"eval-averaged": _metrics(ap)} if state == "finished" else {},
        result={"provenance": provenance} if state == "finished" else None,
        error={"type": "ValueError", "message": "a picture cannot be read"} if state == "failed" else None,
    )


@pytest.fixture(scope="session")
def fake_results():
    """Return a maker of StudyResults from the AP of each seed: `fake_results({"detached": [.31, ...], "kept": [...]})`.

    The first variant is the baseline. By default each other variant is claimed to beat it, and every trial is finished;
    `states` sets others by (variant, seed), and seeds without a number are pending. `last_gain`: AP gained in the last
    epoch, by variant. Fractions throughout.
    """

    def make(
        ap,
        *,
        claims=None,
        margin=0.02,
        looks=((5, 0.03), (10, 0.02)),
        looks_started=1,
        states=None,
        last_gain=None,
        gives_verdicts=True,
        post_hoc=(),
        looked_before=None,
        code_hash=None,
        epochs=4,
    ):
        states, last_gain, code_hash = states or {}, last_gain or {}, code_hash or {}
        overrides = {name: {"training.lr": 2e-4 * 2**index} if index else {} for index, name in enumerate(ap)}
        variants = tuple(
            Variant(
                name=name,
                why=f"why {name}",
                overrides=keys,
                config=ExperimentConfig.model_validate(
                    {"data": {"kind": "shapes"}, "training": {k.split(".")[1]: v for k, v in keys.items()}}
                ),
            )
            for name, keys in overrides.items()
        )
        baseline, *others = ap
        claims = claims or tuple(
            Claim(
                id=f"{name}_better",
                text=f"{name} is better than {baseline}.",
                kind="superiority",
                terms=(
                    Term(variant=name, metric="ap", weight=1.0, parameters="averaged"),
                    Term(variant=baseline, metric="ap", weight=-1.0, parameters="averaged"),
                ),
                margin=margin,
            )
            for name in others
        )
        seeds = tuple(range(looks[-1][0]))
        study = Study(
            name="refinement_detach",
            question="Is it better not to detach?",
            path=Path("studies/refinement_detach.yaml"),
            selection=("--profile", "laptop"),
            profile="laptop",
            gives_verdicts=gives_verdicts,
            baseline=baseline,
            variants=variants,
            claims=claims,
            looks=tuple(Look(seeds=count, alpha=alpha) for count, alpha in looks),
            seeds=seeds,
            scope="seeds",
            budget_seconds=None,
            tracking_uri=None,
            layers={name: {key: (value, "variant") for key, value in keys.items()} for name, keys in overrides.items()},
        )
        trials = tuple(
            PlannedTrial(
                variant=v.name, seed=seed, trial_id=f"{v.name}-{seed}", evaluations={"averaged": "eval-averaged"}
            )
            for seed in seeds
            for v in variants
        )
        configs = {variant.name: variant.config for variant in variants}
        specs = {
            trial.trial_id: TrialSpec(
                trial_id=trial.trial_id,
                config=configs[trial.variant],
                seed=trial.seed,
                data_root="",
                data_fingerprint="shapes-2",
                evaluations={"eval-averaged": configs[trial.variant].evaluation},
            )
            for trial in trials
        }
        records = {}
        for trial in trials:
            known = trial.seed < len(ap[trial.variant])
            state = states.get((trial.variant, trial.seed), "finished" if known else "pending")
            records[trial.trial_id] = _record(
                trial.trial_id,
                ap[trial.variant][trial.seed] if known else 0.0,
                state,
                epochs=epochs,
                last_gain=last_gain.get(trial.variant, 0.002),
                code_hash=code_hash.get(trial.variant, "c0de"),
            )
        return StudyResults(
            plan=Plan(study=study, plan_hash="0123456789ab", trials=trials, specs=specs, warnings=()),
            runs=Path("runs"),
            records=records,
            verdicts=(),
            looks_started=looks_started,
            post_hoc=frozenset(post_hoc),
            looked_before=looked_before or {},
            unreadable=(),
            mlflow=None,
        )

    return make


@pytest.fixture
def coco_folder(tmp_path):
    """Return a folder in COCO format whose picture is an empty file: enough to check and plan with."""
    folder = tmp_path / "coco"
    annotations = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 16, 12], "area": 192, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "disc"}],
    }
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / split / "1.jpg").touch()
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(annotations))
    return folder
