"""YAML 1.2's core schema, places, and files made to hurt."""

import pytest

from workbench.problems import Place, Problems
from workbench.yaml12 import DEEPEST, LARGEST_FILE, read_file, read_text


def read(text):
    """Return the value of a text without problems."""
    problems = Problems()
    value = read_text(text, "x.yaml", problems).value
    assert problems.lines() == []
    return value


def problems_of(text):
    """Return the problem lines of a text."""
    problems = Problems()
    read_text(text, "x.yaml", problems)
    return problems.lines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ('"1e-4"', "1e-4"),
        ("'true'", "true"),
        ("2026-11-22", "2026-11-22"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("|\n  7\n", "7\n"),
    ],
)
def test_scalar_means_what_yaml_1_2_says(text, value):
    """A scalar has the value and the type of YAML 1.2's core schema; quoting makes it text."""
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "y", "n", "Off", "NO"])
def test_words_of_yaml_1_1_are_text(word):
    """Off, on, yes and no are text, as a value and as a key: a variant may be called off."""
    assert read(f"{word}: {word}") == {word: word}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 010", "x.yaml:1:4: a: a leading zero is read in two ways; write 10, or 0o for base 8"),
        ("a: .inf", "x.yaml:1:4: a: found .inf; allowed: a finite number"),
        ("a: .nan", "x.yaml:1:4: a: found .nan; allowed: a finite number"),
        ("a: 1e999", "x.yaml:1:4: a: found 1e999; allowed: a finite number"),
        (f"a: {'9' * 19}", "x.yaml:1:4: a: a number of more than 18 digits"),
        ("a: !!python/name:os.system x", "x.yaml:1:4: a: the tag tag:yaml.org,2002:python/name:os.system is not read"),
        ("1: a", "x.yaml:1:1: a key must be text: quote it"),
        ("? [a]\n: b", "x.yaml:1:3: a key must be text"),
        ("<<: {a: b}", "x.yaml:1:1: a key must be text: quote it; there are no merge keys (<<)"),
        ('a: "\\uD800"', "x.yaml:1:4: a: the character '\\ud800' is not allowed"),
        ('a: "\\0"', "x.yaml:1:4: a: the character '\\x00' is not allowed"),
        ("a: [1,", "x.yaml:1:7: is not YAML"),
        ("a:\n\tb: 1", "found character '\\t' that cannot start any token; indent with spaces"),
        ('a: "\\UFFFFFFFF"', "x.yaml: is not YAML"),
        ("a: \x01", "x.yaml: is not YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: *b", "found undefined alias"),
        ("", "x.yaml: is empty"),
        ("# nothing\n", "x.yaml: is empty"),
        ("a" * (LARGEST_FILE + 1), f"x.yaml: has {LARGEST_FILE + 1} characters; allowed: {LARGEST_FILE}"),
        ("[" * (DEEPEST + 1), f"nested deeper than {DEEPEST} levels"),
        ("&a [*a]", "levels"),
    ],
)
def test_refused_text_is_told_with_place_and_reason(text, message):
    """What cannot be read, or can be read in two ways, is one problem that says where and what to write."""
    (line,) = problems_of(text)
    assert message in line


def test_key_given_twice_names_both_lines():
    """The second of two equal keys is an error that names the line of the first, also when that was refused."""
    assert problems_of("a:\n  b: 1\n  c: 2\n  b: 3\n") == ["x.yaml:4:3: a.b: given twice; the first is on line 2"]
    assert len(problems_of("b: 010\nb: 1\n")) == 2


def test_all_problems_of_a_file_are_told():
    """One refused value does not hide the next."""
    assert len(problems_of("a: 010\nb: [.inf, 1]\nc: {d: 1, d: 2}\n1: x\n")) == 4


def test_aliases_that_expand_without_end_are_stopped():
    """A few lines of nested aliases that stand for millions of values are refused at once."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    (line,) = problems_of(text)
    assert "aliases expand to more than 20000 values" in line


def test_small_aliases_are_expanded():
    """An anchor and its alias hold the same value, each with a place of its own path."""
    assert read("a: &x {b: [1, 2]}\nc: *x") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_places_of_keys_and_values():
    """The document knows where each key and each value begins, and falls back to what is around an unknown path."""
    document = read_text("a:\n  - b: 1\n  - c:  2\n", "x.yaml", Problems())
    assert document.place(("a", 1, "c")) == Place("x.yaml", 3, 5)
    assert document.value_place(("a", 1, "c")) == Place("x.yaml", 3, 9)
    assert document.place(("a", 1, "nothing")) == Place("x.yaml", 3, 5)
    assert document.at(("a", 1, "c")) == 2
    assert document.at(("a", 5, "c")) is None


def test_file_that_cannot_be_read(tmp_path):
    """A missing file, a folder and bytes that are not UTF-8 are problems, not tracebacks."""
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    problems = Problems()
    for path in (tmp_path / "none.yaml", tmp_path, latin):
        assert read_file(path, problems).value is None
    assert problems.lines() == [
        f"{tmp_path}: cannot be read: Is a directory",
        f"{latin}:2:1: is not UTF-8 text",
        f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory",
    ]


def test_byte_order_mark_is_skipped(tmp_path):
    """A file saved by an editor of Windows reads as any other."""
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: off\r\n")
    assert read_file(path, Problems()).value == {"a": 1, "b": "off"}
