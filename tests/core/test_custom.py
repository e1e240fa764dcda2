"""A user's own part: found, built with what its place gives, told when it cannot be, and never mixed with another."""

import sys
import traceback

import pytest
import torch
from torch import nn

from core.config import Custom, ExperimentConfig
from core.custom import CustomProblem, build_custom, given_as_text
from core.detector import build_detector

PART = """\
from dataclasses import dataclass

@dataclass
class Part:
    dim: int
    width: int = 3

class Any:
    def __init__(self, **values):
        self.values = values

def failing(dim):
    raise KeyError(f"no {dim}")
"""
COUNTING = """\
calls = []

class Part:
    width = {width}

    def __init__(self):
        calls.append(1)
        self.calls = len(calls)
"""


class Net(nn.Module):
    """A detector of one's own, as far as building it goes."""

    def __init__(self, *, num_classes, seed, width=2):
        super().__init__()
        self.linear, self.seed = nn.Linear(width, num_classes), seed


@pytest.fixture
def mine(tmp_path):
    """Give the module `mine` as text for the length of a test."""
    with given_as_text({"mine": PART}, folder=tmp_path / "code"):
        yield


def test_part_gets_the_values_of_its_place_and_its_args(mine):
    """Both are keywords of the class; a class that takes anything is given everything."""
    assert vars(build_custom(Custom(target="mine:Part", args={"width": 7}), dim=4)) == {"dim": 4, "width": 7}
    assert build_custom(Custom(target="mine:Any", args={"a": [1]}), dim=4).values == {"dim": 4, "a": [1]}
    assert build_custom(Custom(target="collections:Counter"), a=2) == {"a": 2}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            Custom(target="no_such.module:Part"),
            r"no_such\.module:Part cannot be found \(no module no_such; looked in .*/",
        ),
        (
            Custom(target="mine:Prt"),
            r"mine:Prt cannot be found \(mine has no class Prt; did you mean Part\?\): name an",
        ),
        (Custom(target="mine:PART"), r"mine has no class PART; it has: dataclass, Part, Any, failing\)"),
        (
            Custom(target="mine:Part", args={"widht": 7}),
            r"cannot be built with dim, widht: it takes no 'widht'; its signature is \(dim: int, width: int = 3\)",
        ),
        (Custom(target="mine:Part", args={"dim": 7}), "args may not set dim, which its place decides"),
    ],
)
def test_part_that_cannot_be_built_is_told(part, message, mine):
    """Module, class and arguments are told with what was found, where it was looked for, and what is allowed."""
    with pytest.raises(CustomProblem, match=message):
        build_custom(part, dim=4)


def test_value_that_a_part_does_not_get_is_told(mine):
    """A class that needs what its place does not give is told by name."""
    with pytest.raises(CustomProblem, match=r"cannot be built with nothing: it needs 'dim'; its signature"):
        build_custom(Custom(target="mine:Part"))


def test_error_of_the_part_itself_keeps_its_traceback(mine, tmp_path):
    """What the user's code raises comes through as it is, with its lines."""
    with pytest.raises(KeyError, match="no 4") as error:
        build_custom(Custom(target="mine:failing"), dim=4)
    text = "".join(traceback.format_exception(error.value))
    assert f'File "{tmp_path / "code" / "mine.py"}", line 13, in failing\n    raise KeyError(f"no {{dim}}")' in text


def test_texts_of_one_name_do_not_mix(tmp_path):
    """Within a block a name means the block's text, whatever ran in this process before; nothing of it stays."""
    before = set(sys.modules)
    for width in (1, 2, 1):
        text = COUNTING.format(width=width)
        with given_as_text({"json": text}, folder=tmp_path):
            part = build_custom(Custom(target="json:Part"))
            assert (part.width, part.calls) == (width, 1)
    assert build_custom(Custom(target="json:JSONDecoder")).decode("1") == 1
    assert {name for name in set(sys.modules) - before if name.startswith("json_")} == set()


def test_module_that_lacks_a_library_says_so(tmp_path, monkeypatch):
    """A file that imports what is not installed here is told by the name of the library, given as text or imported."""
    text = "import no_such_library\nclass Part: ...\n"
    lacks = "imports no_such_library, which is not installed here"
    with pytest.raises(CustomProblem, match=f"^lacking {lacks}"), given_as_text({"lacking": text}, folder=tmp_path):
        pass
    (tmp_path / "lacking_file.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CustomProblem, match=f"^lacking_file {lacks}"):
        build_custom(Custom(target="lacking_file:Part"))


def test_whole_detector_of_ones_own():
    """`model: {kind: custom}` is built with the number of classes and the seed, and its weights depend on the seed."""
    config = ExperimentConfig.model_validate(
        {"model": {"kind": "custom", "target": f"{__name__}:Net", "args": {"width": 3}}}
    )
    first, again, other = (build_detector(config, num_classes=5, seed=seed) for seed in (1, 1, 2))
    assert (first.seed, first.linear.weight.shape) == (1, (5, 3))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
