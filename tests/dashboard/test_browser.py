"""The dashboard in a real browser: what it draws, what it asks of the network, and that its links bring a view back."""

import os
import re
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from workbench import durable
from workbench.store import Store

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
MILLISECONDS = 60_000  # a first page on one busy core
# No sandbox: containers run as root. The others keep Chromium itself off the network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def chromium():
    """Return an installed Chromium or Chrome; without one the test fails, unless the environment lets it skip."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return found
    missing = "no Chromium on PATH: install it (Debian, Ubuntu: apt-get install chromium) or name one in CHROMIUM"
    if os.environ.get("BROWSER_OPTIONAL"):
        pytest.skip(missing)
    return pytest.fail(f"{missing}; BROWSER_OPTIONAL=1 skips this test")


@pytest.fixture(scope="module")
def browser(chromium):
    """Return a headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve():
    """Return a starter of the dashboard on a runs folder, as its users start it, which returns the address."""
    servers = []

    @cache
    def start(folder: Path) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", "dashboard/app.py", f"--server.port={port}"]
        server = subprocess.Popen(
            [*command, "--", "--runs", str(folder)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        servers.append(server)
        said = []
        for line in server.stdout:  # it says its address once it listens
            said.append(line)
            if "URL:" in line:
                return f"http://127.0.0.1:{port}"
        return pytest.fail(f"the server ended: {''.join(said)}")

    yield start
    for server in servers:
        server.terminate()
        server.communicate(timeout=MILLISECONDS / 1000)


@pytest.fixture
def page(browser, request):
    """Return a page of a fresh visitor that fails the test for any trouble on its console or request to elsewhere.

    A page opened by its own address makes Streamlit look for its server under that path first; these two questions,
    answered 404, are the only trouble allowed.
    """
    scheme = getattr(request, "param", "light")
    context = browser.new_context(viewport={"width": 1440, "height": 2400}, color_scheme=scheme)
    context.set_default_timeout(MILLISECONDS)
    page = context.new_page()
    trouble = []
    page.on("console", lambda message: trouble.append(f"{message.text} {message.location['url']}"))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda asked: trouble.append(asked.url) if not is_local(asked.url) else None)
    yield page
    context.close()
    probes = re.compile(r"404 \(Not Found\) http://127\.0\.0\.1:\d+/\w+/_stcore/(health|host-config)$")
    assert [text for text in trouble if not probes.search(text)] == []


def is_local(url: str) -> bool:
    """Tell whether a request stays on this machine."""
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


def choose(page: Page, title: str) -> None:
    """Go to a page by the navigation."""
    page.get_by_test_id("stSidebarNav").get_by_text(title, exact=True).click()


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_pages_draw_a_finished_study(page, serve, finished_runs):
    """Every page draws all it has, in light and in dark, without a word on the console and without the network."""
    page.goto(serve(finished_runs))
    expect(page.get_by_role("heading", name="What did we learn?")).to_be_visible(timeout=MILLISECONDS)
    expect(page.locator(".js-plotly-plot")).to_have_count(2, timeout=MILLISECONDS)
    expect(page.get_by_text("supported (strong)")).to_be_visible()
    choose(page, "Compare")
    expect(page.get_by_role("heading", name="Which variants differ?")).to_be_visible(timeout=MILLISECONDS)
    expect(page.locator(".js-plotly-plot")).to_have_count(3, timeout=MILLISECONDS)
    expect(page.get_by_test_id("stDataFrame")).to_have_count(2, timeout=MILLISECONDS)
    expect(page.locator(".js-plotly-plot").first).to_contain_text("kept (n=5)")
    choose(page, "Runs")
    expect(page.get_by_role("heading", name="What is running?")).to_be_visible(timeout=MILLISECONDS)
    expect(page.get_by_test_id("stDataFrame")).to_have_count(1, timeout=MILLISECONDS)


def test_link_brings_a_view_back(page, serve, finished_runs):
    """What is chosen stands in the address, and the address alone brings it back to somebody else."""
    page.goto(serve(finished_runs))
    page.get_by_role("link", name="Compare variants").click()
    page.get_by_test_id("stButtonGroup").get_by_text("AP50", exact=True).click()
    page.get_by_text("Show every seed").click()
    page.wait_for_url(re.compile(r"compare\?(?=.*study=refinement_detach)(?=.*metric=AP50)(?=.*seeds=true)"))
    page.goto(page.url)
    expect(page.get_by_text("no margin is declared for AP50")).to_be_visible(timeout=MILLISECONDS)
    traces = page.locator(".js-plotly-plot").nth(1).locator(".scatterlayer .trace")
    expect(traces).to_have_count(3 * 3)  # a band, a mean and the seeds of each variant
    choose(page, "Runs")
    page.wait_for_url(re.compile(r"runs\?study=refinement_detach"))


def test_running_study_moves_by_itself(page, serve, tmp_path, fake_results, write_runs):
    """While a trial trains, the page shows its next epoch without being touched."""
    results = fake_results({"a": [0.3], "b": []}, states={("b", 0): "running"}, looks=((1, 0.05),))
    write_runs(tmp_path, results)
    page.goto(serve(tmp_path))
    choose(page, "Runs")
    bar = page.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", "75", timeout=MILLISECONDS)
    events = durable.EventWriter(Store(tmp_path).trial_dir("b-0") / "events.jsonl", attempt=1)
    events.append(results.records["a-0"].epochs[2])
    events.close()
    expect(bar).to_have_attribute("aria-valuenow", "87", timeout=MILLISECONDS)


def test_server_listens_on_loopback_only(serve, tmp_path):
    """The settings beside the dashboard bind it to 127.0.0.1: no other address of this machine answers."""
    port = int(serve(tmp_path).rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
