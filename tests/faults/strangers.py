"""Studies as strangers write them, and code that leaves a trace where it runs."""

import os

from mutants import PROFILE, STUDY

from workbench.plan import make_plan
from workbench.study_file import Selection, load_study

HEAD = "version: 1\nstudy: a\nquestion: q\nbaseline: v0\nscope: seeds\n"
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")


class Payload:
    """Makes a file when it is unpickled, as any code could."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


def study_of(folder, text, profile=PROFILE):
    """Write a study, with its profile tiny beside it."""
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    (folder / "profiles" / "tiny.yaml").write_text(profile)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def tiny_plan(folder, text=STUDY):
    """Return the plan of a study at the profile tiny."""
    return make_plan(load_study(study_of(folder, text), Selection(profile="tiny")))
