"""A study and its profile, sound and small, for tests to change; and what is then told of it."""

import pytest

from workbench.errors import StudyFileError
from workbench.study_file import Selection, load_study

HEAD = """\
version: 1
study: trying
question: Does it help?
"""
TAIL = """\
baseline: base
variants:
  base: {}
  other: {set: {loss.auxiliary: false}}
  third: {set: {model.position.level_embed: false}}
claims:
  - {id: better, text: Other is better., plus: other, minus: base, metric: ap, kind: superiority}
scope: seeds
"""
SCALE = """\
looks: {seeds: [5, 10], alpha: [0.03, 0.02]}
margins: {ap: 0.02}
set:
  data: {kind: shapes, side: 64, num_train: 16, num_val: 8}
  model.decoder.num_layers: 2
"""


def mistakes(path, **selection):
    """Return the problem lines of a study, with the folder cut off."""
    with pytest.raises(StudyFileError) as error:
        load_study(path, Selection(**selection))
    return [line.replace(f"{path.parent}/", "") for line in str(error.value).splitlines()]
