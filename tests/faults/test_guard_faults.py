"""Faults around the code and the machine: code that is edited before a resume, and a machine that lacks something."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from faults import Fault, Seen, cases
from toys import STUDY, TINY, ToyTrainer, toy_plan

from workbench import lineage, provenance
from workbench.options import Options
from workbench.runner import run_study
from workbench.store import Store
from workbench.trial import execute

ROOT = Path(__file__).parent.parent.parent


def _edited(place: Path, *, protected: bool) -> Seen:
    """A trial stops in the middle, its code is edited, and the study goes on."""
    plan, store = toy_plan(place, seeds=1), Store(place / "runs")
    first, contributing, code_hash = plan.trials[0].trial_id, lineage.contributing, provenance.code_hash
    asked = iter((False,))  # no before the trial, yes after its first step
    try:
        provenance.code_hash = lambda: "edited later"
        execute(plan.specs[first], store.root, should_stop=lambda: next(asked, True), trainer=ToyTrainer())
        provenance.code_hash = lambda: "as edited"
        if not protected:
            lineage.contributing = lambda _folder: []  # as if no attempt knew of another
        options = Options(executor="inline", trainer=ToyTrainer(), tracking_uri="http://127.0.0.1:9")
        out = io.StringIO()
        code = run_study(plan, store, options, out=out, err=io.StringIO())
    finally:
        lineage.contributing, provenance.code_hash = contributing, code_hash
    (ref,) = store.studies()
    report = (ref.path / "report.md").read_text()
    return {
        "exit": code,
        "attempts": store.record(first).attempts,
        "in the result": (store.result(first) or {})["provenance"].get("mixed"),
        "in the verdict": "plain seed 0 (code_hash) did not end as it began"
        in str(store.results(ref).verdicts[0].notes),
        "in the report": "core code edited later then as edited" in report,
    }


def _verify_edited(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["attempts"] == 2
    assert seen["in the result"] == {"code_hash": ["edited later", "as edited"]}
    assert seen["in the verdict"]
    assert seen["in the report"]


def _poor(place: Path, *, protected: bool) -> Seen:
    """HOME is no folder, TMPDIR is long, and a proxy takes all there is, as on a locked-down machine without network.

    The control is a machine on which nothing is wrong: there `doctor` must find nothing of it.
    """
    bad_home, long = place / "home", place / ("x" * 60)
    bad_home.write_text("")
    long.mkdir()
    (place / "toy.yaml").write_text(STUDY.format(name="toy"))
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {
        name: value for name, value in environment.items() if not name.startswith(("RAY_", "TMPDIR", "XDG_"))
    }
    environment |= {"OMP_NUM_THREADS": "1"}
    if protected:
        environment |= {"HOME": str(bad_home), "TMPDIR": str(long)}
        environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://192.0.2.1:3128")
    sets = [word for item in TINY for word in ("--set", item)]
    study = ["run", str(place / "toy.yaml"), "--profile", "smoke", "--seeds", "1", "--executor", "inline", *sets]
    doctor, run = (
        subprocess.run(
            [*_without_network(), sys.executable, "-m", "workbench", *words, "--runs", str(place / "runs")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        for words in (["doctor", "--json"], study)
    )
    told = {item["what"]: item["state"] for item in json.loads(doctor.stdout)["checks"]}
    records = Store(place / "runs")
    (ref,) = records.studies()
    return {
        "doctor": {name: told[name] for name in ("home", "temporary files", "proxy")},
        "network": "cut off" if _without_network() else "as it is",
        "exit": run.returncode,
        "traceback": "Traceback" in run.stderr + doctor.stderr,
        "states": {record.state for record in records.results(ref).records.values()},
    }


def _without_network() -> list[str]:
    """Return the words before a command that cut it off from every network, where the system lets us."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        return []
    return [*words, "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"]


def _verify_poor(seen: Seen) -> None:
    assert seen["doctor"] == {"home": "note", "temporary files": "problem", "proxy": "problem"}
    assert seen["exit"] == 0
    assert not seen["traceback"]
    assert seen["states"] == {"finished"}


test_fault, test_control = cases(
    Fault(
        number="F22",
        title="code edited between run and resume",
        expected="the result, the verdict and the report name both codes",
        scenario=_edited,
        verify=_verify_edited,
    ),
    Fault(
        number="F25",
        title="HOME is no folder, long TMPDIR, proxy, no network",
        expected="doctor tells which; run --executor inline works",
        scenario=_poor,
        verify=_verify_poor,
    ),
)
