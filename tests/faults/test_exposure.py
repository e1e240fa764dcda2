"""What this machine gives away by itself: nothing unpickles what others wrote, and everything listens to loopback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import streamlit
from strangers import HEAD, TINY
from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).parent.parent.parent

UNSAFE = re.compile(
    r"pickle\.loads?\(|read_pickle|allow_pickle|joblib|weights_only=False|yaml\.(unsafe_|full_)?load\(|(?<![\w.])(eval|exec)\("
)


def test_nothing_reads_pickles_of_others():
    """Three places unpickle at all, each what this program has just sent itself; all else reads data only."""
    files = (path for package in ("core", "workbench", "dashboard") for path in (ROOT / package).rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix() for path in files if UNSAFE.search(path.read_text("utf-8"))}
    assert found == {"core/data/loading.py", "workbench/ranks.py", "workbench/template.py"}


def test_the_dashboard_listens_to_this_machine_alone():
    """Its settings, which streamlit reads in the repository's root, bind it to loopback."""
    settings = (ROOT / ".streamlit" / "config.toml").read_text()
    assert 'address = "127.0.0.1"' in settings


@pytest.mark.parametrize("address", [None, "127.0.0.1", "0.0.0.0"])
def test_the_dashboard_says_when_it_was_started_without_its_settings(tmp_path, monkeypatch, address):
    """In another folder streamlit does not read them, and listens to every network; who asks for that knows it."""
    get_option = streamlit.get_option
    monkeypatch.setattr(streamlit, "get_option", lambda key: address if key == "server.address" else get_option(key))
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    page = AppTest.from_file(str(ROOT / "dashboard" / "app.py"), default_timeout=60).run()
    assert any("Other machines can reach this page" in item.value for item in page.warning) == (address is None)


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # as in /proc/net/tcp


@pytest.mark.ci
def test_ray_listens_to_this_machine_alone():
    """While a study runs on this machine none of Ray's processes listens where another machine could reach it."""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("needs /proc/net/tcp, which tells who listens")
    command = [sys.executable, str(Path(__file__).with_name("listeners.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    found = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    assert {"gcs_server", "raylet"} <= {name for _, name in found}, done.stderr
    assert {address.partition(":")[0] for address, _ in found} <= LOOPBACK, found


@pytest.mark.ci
def test_rays_token_is_in_no_record_and_no_log(tmp_path):
    """A study under Ray with token authentication leaves the token nowhere in the runs folder, nor on the screen."""
    token = "f00d" * 16
    path = tmp_path / "study.yaml"
    path.write_text(HEAD + "variants: {v0: {}, v1: {set: {loss.weight_giou: 4.0}}}\n")
    sets = [word for item in TINY for word in ("--set", item)]
    command = [sys.executable, "-m", "workbench", "run", str(path), "--profile", "smoke", "--seeds", "1", *sets]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    runs = tmp_path / "runs"
    done = subprocess.run(
        [*command, "--runs", str(runs), "--tracking-uri", "http://127.0.0.1:9"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    files = [file for file in runs.rglob("*") if file.is_file()]
    assert any(file.name == "ray.log" for file in files)
    assert [file for file in files if token.encode() in file.read_bytes()] == []
