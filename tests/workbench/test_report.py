"""What a report says, and how it looks in each format."""

import re
from dataclasses import replace

import pytest

from workbench import report, report_formats
from workbench.palette import VERDICT_COLOURS, variant_colours
from workbench.verdict import judge

APS = {
    "detached": (0.300, 0.312, 0.295, 0.308, 0.301),
    "kept": (0.351, 0.360, 0.347, 0.358, 0.350),
    "no_help": (0.301, 0.310, 0.297, 0.308, 0.300),
    "noisy": (0.315, 0.290, 0.330, 0.280, 0.325),
}


@pytest.fixture(name="results")
def _results(fake_results):
    """A judged study with a supported, an equivalent and an undecided claim."""
    results = fake_results(APS)
    return replace(results, verdicts=judge(results))


def rows_of(text, claim):
    """The first line of the text report that begins with a claim's id."""
    return next(line for line in text.splitlines() if line.startswith(claim))


def test_text_fits_a_hundred_columns_and_agrees_with_the_verdicts(results):
    """The terminal table has a row for each claim with word, effect and interval in points."""
    text = report.render(results, format="text")
    assert max(len(line) for line in text.splitlines() if "python -m" not in line) <= 100
    for verdict in results.verdicts:
        row = rows_of(text, verdict.claim)
        interval = f"{100 * verdict.effect:+.2f} [{100 * verdict.low:+.2f}, {100 * verdict.high:+.2f}]"
        assert row.split()[1] == verdict.verdict
        assert interval in row
        assert row.split()[-3:] == ["%", "2", "5"]


def test_text_draws_every_seed(results):
    """Each strip shows the seeds as dots, unless two fall into the same column."""
    kept = next(verdict for verdict in results.verdicts if verdict.claim == "noisy_better")
    drawn = report_formats.strip(kept, 0.06)
    assert drawn.count("●") == 5
    assert drawn.startswith("-6.0 ")


def test_text_gives_the_command_that_goes_on(results):
    """An undecided claim ends with the exact line that runs the next look; a decided one has none."""
    text = report.render(results, format="text")
    command = "python -m workbench run studies/refinement_detach.yaml --profile laptop --until-decided"
    assert text.count(command) == 1
    assert text.index("UNDECIDED  noisy_better") < text.index(command)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_survives_a_plain_terminal(results, encoding):
    """Where the encoding has no dots and lines, ASCII takes their place and nothing is lost."""
    plain = report_formats.printable(report.render(results, format="text"), encoding)
    plain.encode(encoding)
    assert "o" in plain.split("UNDECIDED")[1].splitlines()[1]
    assert "?" not in plain.replace("detach?", "")


def test_missing_variant_gets_its_command(fake_results):
    """A claim whose variants were not selected says which option runs them."""
    results = fake_results(APS)
    first, *others = results.plan.study.claims
    study = replace(results.plan.study, claims=(replace(first, missing=("kept",)), *others))
    results = replace(results, plan=replace(results.plan, study=study))
    text = report.render(replace(results, verdicts=judge(results)), format="text")
    assert "--variants all\n" in text


def test_scores_are_means_and_standard_deviations_in_points(results):
    """The table of scores has a row for each variant, overall and by size, and one by class."""
    text = report.render(results, format="text")
    scores = text.split("Scores by size")[1]
    assert re.search(r"detached\s+5\s+30\.3 ± 0\.7\s+51\.5 ± 1\.1\s+12\.1 ± 0\.3", scores)
    assert re.search(r"AP by class\nVariant\s+disc\s+ring\n", scores)


def test_facts_count_cost_and_failures(fake_results):
    """Worker time and outcomes count every trial that was tried, failed ones too."""
    results = fake_results(APS, states={("kept", 1): "failed"})
    text = report.render(replace(results, verdicts=judge(results)), format="text")
    assert "Cost: 28 min 14 s of worker time in 20 trials (19 finished, 1 failed)." in text
    assert "Left out of the data: nothing." in text


def test_left_out_boxes_are_named(results):
    """What the data lost is reported with its examples."""
    records = dict(results.records)
    record = records["kept-0"]
    lost = {"val.degenerate_boxes": 2, "val.degenerate_boxes.examples": ["annotation 17", "annotation 40"]}
    records["kept-0"] = replace(record, result={**record.result, "data_report": lost})
    text = report.render(replace(results, records=records), format="text")
    (line,) = (line for line in text.splitlines() if line.startswith("Left out of the data: "))
    assert "val: degenerate boxes: 2" in line
    assert "annotation 17" in line


def test_markdown_has_its_figures_beside_it(results, tmp_path):
    """The report is written with two PNG files that it refers to, and stresses supported claims only."""
    text = report.render(results, format="md", out=tmp_path / "deep" / "report.md")
    assert (tmp_path / "deep" / "report.md").read_text(encoding="utf-8") == text
    links = re.findall(r"!\[.+\]\((.+)\)", text)
    assert links == ["report_forest.png", "report_curves.png"]
    for link in links:
        assert (tmp_path / "deep" / link).read_bytes().startswith(b"\x89PNG")
    bold = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(bold) == 1
    assert "kept\\_better" in bold[0]
    assert "1,000 pictures of the val split; averaged weights of the last checkpoint" in text


def test_markdown_without_a_place_has_no_figures(results):
    """Printed Markdown does not refer to files that do not exist."""
    assert "![" not in report.render(results, format="md")


def test_html_is_one_self_contained_escaped_page(results):
    """The page has its figures inside, loads nothing, and shows the text of a study as text."""
    study = replace(results.plan.study, question="Is a<b & c>d?")
    page = report.render(replace(results, plan=replace(results.plan, study=study)), format="html")
    assert page.count("<svg") == 2
    assert "Is a&lt;b &amp; c&gt;d?" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:", ""))
    assert "prefers-color-scheme: dark" in page
    assert VERDICT_COLOURS["supported"] in page


def test_the_same_results_give_the_same_page(results):
    """Figures carry no date or random id, so a report changes only when its results do."""
    assert report.render(results, format="html") == report.render(results, format="html")


def test_latex_is_escaped_booktabs(results):
    """Names with underscores and percent signs survive, and each row has as many cells as the table has columns."""
    text = report.render(results, format="latex")
    assert r"\textbf{kept\_better}" in text
    assert r"97 \%" in text
    columns = len(re.search(r"\\begin{tabular}{(\w+)}", text)[1])
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 3
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {columns}


def test_a_study_that_has_not_begun_still_reports(fake_results, tmp_path):
    """Before the first trial there are claims without numbers and no figures, in every format."""
    results = fake_results({"detached": (), "kept": ()})
    results = replace(results, verdicts=judge(results))
    assert "0 of 10 trials finished" in report.render(results, format="text")
    for kind in ("md", "html", "latex"):
        assert report.render(results, format=kind, out=tmp_path / kind)
    assert not list(tmp_path.glob("*.png"))


def test_post_hoc_claims_are_marked_everywhere(fake_results):
    """A claim written down after its trials carries the mark in the table and in its lines."""
    results = fake_results(APS, post_hoc=("kept_better",))
    results = replace(results, verdicts=judge(results))
    for kind in ("text", "md", "html", "latex"):
        assert "(post hoc)" in report.render(results, format=kind)
    assert "Post hoc: this claim was written down after" in report.render(results, format="text")


def test_claims_looked_at_before_are_marked_everywhere(fake_results):
    """A claim that spent its alpha before says so in every format, and with what was seen where notes are shown."""
    before = ("5 seeds at alpha 0.05 (undecided)", "6 seeds at alpha 0.05 (undecided)")
    results = fake_results(APS, looked_before={"kept_better": before})
    results = replace(results, verdicts=judge(results))
    for kind in ("text", "md", "html", "latex"):
        page = " ".join(report.render(results, format=kind).replace("\\", "").split())
        assert "looked at before with other looks, so too sure: kept_better." in page
        assert kind == "latex" or f"Note: looked at before with other looks: {'; '.join(before)}." in page


def test_colours_are_told_apart_and_fixed_by_place():
    """Variants keep their colours whichever others are drawn after them."""
    names = [f"v{index}" for index in range(7)]
    assert len(set(variant_colours(names).values())) == 7
    assert variant_colours(names[:3]) == {name: variant_colours(names)[name] for name in names[:3]}


@pytest.mark.parametrize(("seconds", "said"), [(45.2, "45 s"), (750, "12 min 30 s"), (11100, "3 h 05 min")])
def test_durations_read_as_people_say_them(seconds, said):
    """Seconds matter below an hour only."""
    assert report.duration(seconds) == said


def test_times_of_packed_trials_are_no_times_of_a_variant(fake_results):
    """Where trials shared a GPU the report says that times compare nothing; other trials get no such line."""
    results = fake_results({"detached": [0.3] * 5, "kept": [0.31] * 5})
    assert "shared a GPU" not in report.render(results, format="text")
    for share in (1.0, None):
        results.records["kept-0"].result["provenance"]["gpu_share"] = share
        assert "shared a GPU" not in report.render(results, format="text")
    for trial in ("kept-0", "kept-1"):
        results.records[trial].result["provenance"]["gpu_share"] = 0.5
    assert "Times: 2 trials shared a GPU with others, so no time here" in report.render(results, format="text")


def test_report_names_the_changes_and_both_codes_of_a_trial(fake_results):
    """Local changes are named by the file that keeps them, and a trial of two codes by both."""
    results = fake_results({"detached": [0.3] * 5, "kept": [0.31] * 5})
    provenance = results.records["kept-0"].result["provenance"]
    provenance |= {"git_revision": "f" * 40, "git_dirty": True, "diff": "ab12.diff"}
    provenance["mixed"] = {"code_hash": ["0ld", "c0de"]}
    text = " ".join(report.render(results, format="text").split())
    assert "revision ffffffffffff with local changes (code/ab12.diff), core code 0ld then c0de" in text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) & \"'"


def test_nothing_in_a_record_is_markup(fake_results):
    """Names, texts and errors of a stranger's study stand in the pages as text: no tag of theirs is left a tag."""
    results = fake_results({"detached": [0.3, 0.31, 0.32, 0.33, 0.34], HOSTILE: [0.31, 0.33, 0.34, 0.36, 0.34]})
    study = replace(results.plan.study, name=HOSTILE, question=HOSTILE, profile=HOSTILE)
    claims = tuple(replace(claim, id=HOSTILE, text=HOSTILE) for claim in study.claims)
    results = replace(results, plan=replace(results.plan, study=replace(study, claims=claims)))
    results.records["detached-0"].result["provenance"] |= {
        "gpu": HOSTILE,
        "git_revision": HOSTILE,
        "code_hash": HOSTILE,
    }
    results = replace(results, verdicts=judge(results))
    page, plain = report.render(results, format="html"), report.render(results, format="md")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in plain
    assert "<img" not in plain
    assert "](javascript" not in plain
