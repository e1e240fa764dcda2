"""The form of study files: durations, and what the JSON schema tells an editor."""

import pytest

from core.config import ExperimentConfig
from core.parts import dotted_keys
from core.recipes import RECIPES
from workbench.study_schema import ExecutionPart, json_schema, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90), ("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800)]
)
def test_duration(text, seconds):
    """A duration is a number of seconds, or days, hours, minutes and seconds in that order."""
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 m", "m", "30m1h", "-5", "1.5h", None, True, "9" * 12])
def test_no_duration(text):
    """Anything else is refused with an example."""
    with pytest.raises(ValueError, match="allowed: a duration such as 90s, 10m, 1h30m or 2d"):
        seconds_of(text)


def test_schema_completes_every_key_of_set():
    """Each dotted key of the configuration can be completed under `set`, and no other key is allowed there."""
    overrides = json_schema()["$defs"]["Overrides"]
    assert sorted(overrides["properties"]) == sorted(dotted_keys(ExperimentConfig))
    assert overrides["additionalProperties"] is False


def test_schema_knows_the_values_of_a_key():
    """A key has the values of every kind of part that it may stand in."""
    keys = json_schema()["$defs"]["Overrides"]["properties"]
    assert keys["model.heads"]["enum"] == ["shared", "separate"]
    assert [kind["const"] for kind in keys["model.queries.kind"]["anyOf"]] == [
        "learned",
        "selected",
        "tokens",
        "custom",
    ]
    assert keys["training.clip_norm"]["anyOf"][-1] == {"type": "null"}


def test_schema_knows_the_recipes():
    """An editor completes the names of the published recipes."""
    assert json_schema()["properties"]["recipe"]["enum"] == list(RECIPES)


def test_every_reference_of_the_schema_leads_somewhere():
    """An editor can follow all references within the file."""
    schema = json_schema()

    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert {text.removeprefix("#/$defs/") for text in references(schema)} <= set(schema["$defs"])


def test_gpus_are_a_share_of_one_or_a_number_of_them():
    """Half a GPU and four GPUs can be had, one and a half cannot."""
    assert [ExecutionPart(gpus=gpus).gpus for gpus in (0.5, 1, 4)] == [0.5, 1, 4]
    with pytest.raises(ValueError, match=r"1\.5 is neither a share of one GPU nor a number of GPUs"):
        ExecutionPart(gpus=1.5)
