"""Every toggle alone: generated from the configuration, so a new field is tested before anybody thinks of it.

A toggle changes what is computed, or is named here with the reason why it cannot; whatever it shares with the base
starts from the same weights and sees the same pictures; every parameter learns, or is named with the reason.
"""

import re
from functools import cache

import pytest
import torch
from toggles import BASES, alternatives, fields, get, is_operational, name_of, observe, put, refusal, toggles

# Fields whose other values need files or time that this test has not; each has tests of its own.
ELSEWHERE = {
    r"data=coco": "needs a folder: test_coco_folder.py",
    r".*\.compile=True": "compiles for a minute: test_training_at_scale.py",
    r".*\.data_workers=.*": "starts processes: test_training_at_scale.py",
}
# (base, toggle) that change nothing, and why.
INERT = {
    (r"deformable|detr.*|tokens", r".*box_temperature=.*"): "no box becomes a query position",
    (r"deformable|detr.*", r".*anchor_size=.*"): "the references are no boxes",
    (r".*", r".*refinement\.boxes=recomputed"): "the answer to the remark of the notes: the same boxes and gradients",
    (r"deformable.*|dino|anchors|tokens", r".*encoder_supervision\.classification=focal"): "as the decoder's is",
    (r"detr_supervised", r".*encoder_supervision\.classification=cross_entropy"): "as the decoder's is",
    (r"detr.*", r".*decoder\.norm=both"): "without refinement nothing is carried on",
    (r"tokens", r"model\.(decoder\.(attention|self_attention|weights).*|heads=separate)"): "there is no decoder",
    (r"tokens", r"loss\.auxiliary=False"): "there is no earlier decoder layer",
    (r".*", r"loss\.matcher\.cost_\w+=.*"): "may leave the matching of a few boxes as it is",
    (r"faster_rcnn", r"loss\..*"): "has a loss of its own",
    (r".*", r"training\.accumulate=2"): "the parts of a batch add up to the whole",
    (r".*", r"training\.epochs=2"): "a longer training begins alike",
    (r".*", r"training\.schedule\.at=.*"): "the second of two steps comes after both",
    (r".*", r"evaluation\.nms_iou=.*"): "six queries hardly overlap: test_score.py",
    (r".*", r"evaluation\.batch_size=.*"): "only padding makes pictures scored together differ",
    (r".*", r"evaluation\.parameters=.*"): "see test_raw_and_averaged_weights_differ",
}
# Operational fields that do change results in the last digits.
ROUNDING = {r"training\.threads=.*": "more threads add in another order, which the provenance tells"}
# Parameters without a gradient, and why.
UNREACHED = {
    (r"detr.*", r".*"): (
        r"model\.decoder\.layers\.0\.(self_attention\.(in_proj|out_proj)\.?_?weight|norm_self\.weight)",
        "with zero content all values of the first self-attention are equal: nothing is passed on (notes, section 5)",
    ),
    (r".*", r"model\.queries\.content=zeros"): (
        r"model\.decoder\.layers\.0\.(self_attention\.(in_proj|out_proj)\.?_?weight|norm_self\.weight)",
        "the same",
    ),
    (r"deformable_two_stage|anchors|dino", r"loss\.auxiliary=False"): (
        r"model\.decoder\.box_head\.mlps\.[01]\..*|model\.class_heads\.[01]\..*",
        "detached boxes of earlier layers have no loss",
    ),
}
# Parameters that a toggle starts elsewhere on purpose.
STARTS_ELSEWHERE = {
    r"model\.neck_norm=.*": r"model\.neck\.projections\..*",
    r"model\.head_init=.*": r".*(class_head|last).*",
    r"model\.queries(\.reference)?=.*": r"model\.decoder\.box_head\.mlps\.\d\.last\.bias",
    r"model\.refinement\.residual_base=.*": r"model\.decoder\.box_head\.mlps\.\d\.last\.bias",
    r"model\.queries\.anchor_size=.*": r".*anchors\..*",
    r"model\.encoder_supervision\.anchor_scale=.*": r".*anchor_logits",
    r"model\.(encoder_supervision\.)?.*classification=.*|loss\.classification=.*": r".*class_head.*",
}


def _matches(table, *texts):
    """Return the entry whose patterns all match, or None."""
    for key, entry in table.items():
        patterns = (key,) if isinstance(key, str) else key
        if all(re.fullmatch(pattern, text) for pattern, text in zip(patterns, texts, strict=True)):
            return entry
    return None


def _cases():
    """Yield every legal toggle of every base; those of data, training and scoring once."""
    for base, config in BASES.items():
        for change in toggles(config):
            name = name_of(change)
            if _matches(ELSEWHERE, name) or refusal(config, change):
                continue
            if change[0][0] in ("data", "training", "evaluation") and base != "anchors":
                continue
            yield pytest.param(base, change, id=f"{base}-{name}")


@cache
def _base(name):
    return observe(BASES[name])


def _modules(state):
    """Group a state dict by module: name -> {parameter: value}."""
    found = {}
    for name, value in state.items():
        module, _, parameter = name.rpartition(".")
        found.setdefault(module, {})[parameter] = value
    return found


CASES = list(_cases())


@pytest.mark.parametrize(("base", "change"), CASES)
def test_a_toggle_does_what_it_says_and_nothing_else(base, change):
    """It changes training or detections, trains every parameter, and shares start and pictures with its base."""
    name, off, on = name_of(change), _base(base), observe(put(BASES[base], change))
    same = on.same_training(off) and on.same_detections(off)
    if is_operational(BASES[base], change[0]):
        assert same or _matches(ROUNDING, name)
    else:
        assert not same or _matches(INERT, base, name)
    assert all(torch.isfinite(torch.tensor(on.losses)))

    allowed = [_matches(UNREACHED, base, ""), _matches(UNREACHED, base, name)]
    pattern = "|".join(entry[0] for entry in allowed if entry) or "none"
    assert [n for n in sorted(on.parameters - on.reached) if not re.fullmatch(pattern, n)] == []

    if change[0][0] != "data" and name.split("=")[0] != "training.batch_size":
        assert all(torch.equal(a, b) for a, b in zip(on.batch, off.batch, strict=True))
    started, elsewhere = _modules(on.start), _matches(STARTS_ELSEWHERE, name) or "nothing"
    for module, parameters in _modules(off.start).items():
        shared = started.get(module, {})
        if {n: v.shape for n, v in shared.items()} != {n: v.shape for n, v in parameters.items()}:
            continue  # another part, or one of another shape, which is drawn as a whole
        moved = [f"{module}.{n}" for n, v in parameters.items() if not torch.equal(v, shared[n])]
        assert [n for n in moved if not re.fullmatch(elsewhere, n)] == []


def test_every_value_is_legal_somewhere():
    """Each choice, kind and switch of the configuration is the value of a base or a legal change of one."""
    every, legal = set(), set()
    for config in BASES.values():
        for path, annotation in fields(config):
            value = get(config, path)
            legal.add(name_of((path, value)))
            for other in alternatives(annotation, value):
                name = name_of((path, other))
                every.add(name)
                if not refusal(config, (path, other)):
                    legal.add(name)
    numbers = {name for name in every if re.search(r"=-?[\d.e-]+$", name)}
    assert every - legal - numbers == set()


def test_every_toggle_changes_something_somewhere():
    """What is without effect at one base is not excused at all of them, but for the few that never change much."""
    effective = {
        ".".join(change[0])
        for base, change in (case.values for case in CASES)
        if not _matches(INERT, base, name_of(change))
    }
    operational = {
        ".".join(path) for config in BASES.values() for path, _ in fields(config) if is_operational(config, path)
    }
    never = {".".join(change[0]) for _, change in (case.values for case in CASES)} - effective - operational
    assert never == {
        "model.refinement.boxes",
        "loss.matcher.cost_class",
        "loss.matcher.cost_l1",
        "loss.matcher.cost_giou",
        "training.accumulate",
        "training.epochs",
        "training.schedule.at",
        "evaluation.nms_iou",
        "evaluation.batch_size",
        "evaluation.parameters",
    }


def test_raw_and_averaged_weights_differ():
    """With an average beside the raw weights, the evaluation chooses which of them detects."""
    base = BASES["anchors"]
    averaged, raw = (observe(put(base, (("evaluation", "parameters"), kind))) for kind in ("averaged", "raw"))
    assert averaged.same_training(raw)
    assert not averaged.same_detections(raw)


REMEDY = re.compile(r"\b(set|choose|name|raise|lower|drop|add|use)\b")


def test_the_validator_decides_every_pair_of_values():
    """Any two changes together are legal, or refused in words that say what to change; never an accident."""
    refused, decided = set(), 0
    for base in ("deformable", "anchors", "detr"):
        config = BASES[base]
        changes = [change for change in toggles(config) if change[0][0] in ("model", "loss", "evaluation")]
        for index, first in enumerate(changes):
            for second in changes[index + 1 :]:
                if first[0] == second[0][: len(first[0])] or second[0] == first[0][: len(second[0])]:
                    continue  # one holds the other
                decided += 1
                message = refusal(config, first, second)
                if message is not None:
                    refused.add(message)
    assert decided > 5000
    assert len(refused) > 10
    assert [message for message in refused for part in message.split("; ") if not REMEDY.search(part)] == []
