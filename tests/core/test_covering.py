"""Toggles in company: every legal pair of values is built, trained for two steps and scored at least once."""

from itertools import combinations

import pytest
import torch
from covering import covering_array, factors
from toggles import BASES, get, observe

NAMES = ("deformable", "deformable_two_stage", "detr", "dino", "anchors", "tokens", "detr_supervised")
ROWS, ILLEGAL = covering_array([BASES[name] for name in NAMES])


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_configuration_trains_and_scores(row):
    """Two steps have finite losses and move the weights, and the scores of the detections are probabilities."""
    seen = observe(ROWS[row])
    assert all(torch.isfinite(torch.tensor(seen.losses)))
    assert any(not torch.equal(seen.start[name], seen.end[name]) for name in seen.parameters)
    scores = seen.detections[0]
    assert len(scores)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert torch.isfinite(seen.detections[2]).all()


def test_rows_hold_every_pair_that_is_not_refused():
    """Recounted from the configurations themselves, each pair of values is in a row or among the refused ones."""
    values = factors(BASES["deformable"])
    paths = list(values)
    held = set()
    for config in ROWS:
        row = {path: str(get(config, path)) for path in paths}
        held |= {(p, row[p], q, row[q]) for p, q in combinations(paths, 2)}
    wanted = {(p, str(a), q, str(b)) for p, q in combinations(paths, 2) for a in values[p] for b in values[q]}
    assert len(wanted - held) <= len(ILLEGAL)
    assert 60 <= len(ROWS) <= 150


def test_refused_pairs_are_few_and_about_what_excludes_what():
    """A pair without a row has a reason: no decoder, no encoder layer, no boxes, no singular scores or no selection."""
    about = ("num_layers", "tokens", "denoising", "reference", "cost", "question", "supervision", "queries", "norm")
    assert len(ILLEGAL) < 150
    assert [pair for pair in ILLEGAL if not any(word in "".join(pair) for word in about)] == []
