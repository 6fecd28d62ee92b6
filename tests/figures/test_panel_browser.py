"""Notebook 06 in a real browser: JupyterLab runs it, and its panel answers to the mouse and the keyboard.

Needs playwright (the extra `browser`) and a Chromium of the system. `--screenshots FOLDER` keeps what was seen.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

ROOT = Path(__file__).parents[2]
PICTURE = ".widget-image"
SETTINGS = {  # every cell stays in the page, seen or not; nothing is asked of the network
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
ERRORS = ", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("error", "stderr"))
DIGEST = """async image => {
  const bytes = await (await fetch(image.src)).arrayBuffer();
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return Array.from(new Uint8Array(digest), x => x.toString(16).padStart(2, "0")).join("");
}"""


@pytest.fixture
def address(tmp_path):
    """Of a JupyterLab server with its own settings, over a copy of the notebook without outputs."""
    notebook = json.loads((ROOT / "notebooks" / "06_ablations.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "06_ablations.ipynb").write_text(json.dumps(notebook), "utf-8")
    (tmp_path / "data").symlink_to(ROOT / "data")
    for path, settings in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), "utf-8")
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / "jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JAX_PLATFORMS": "cpu", "RATTN_NOTEBOOK_FAST": "1"}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=panel", "--ServerApp.port_retries=0"]
    log = tmp_path / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env=os.environ | own, start_new_session=True
        )
    try:
        yield _wait_for_address(server, log) + "/lab/tree/06_ablations.ipynb?token=panel"
    finally:
        server.send_signal(signal.SIGTERM)  # ends its kernels too
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for_address(server: subprocess.Popen, log: Path) -> str:
    for _ in range(300):
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token", log.read_text("utf-8", "replace")):
            return found[1]
        assert server.poll() is None, log.read_text("utf-8", "replace")
        time.sleep(0.2)
    raise AssertionError("JupyterLab did not start in a minute:\n" + log.read_text("utf-8", "replace"))


@pytest.fixture
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def run_all(page) -> None:
    """Run every cell, and wait until all have run or one has raised."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """errors => {
          const prompts = Array.from(document.querySelectorAll(".jp-CodeCell .jp-InputPrompt"), x => x.textContent);
          const ran = prompts.length > 5 && prompts.every(text => /\\[\\d+\\]/.test(text));
          return ran || document.querySelector(errors) !== null;
        }""",
        arg=ERRORS,
        timeout=120_000,
    )


def errors(page) -> list[str]:
    return page.locator(f"{ERRORS}, .panel-error").all_inner_texts()


def digest_after(page, before: str) -> str:
    """The picture's, once it is another than `before`."""
    for _ in range(150):
        if (now := page.locator(PICTURE).first.evaluate(DIGEST)) != before:
            return now
        page.wait_for_timeout(200)
    raise AssertionError("the picture did not change in 30 s")


def test_the_panel_answers(address, page, request):
    page.goto(address)
    page.locator(".jp-NotebookPanel").wait_for()
    page.get_by_text("Python 3 (ipykernel)").first.wait_for()
    assert page.locator(PICTURE).count() == 0
    run_all(page)
    assert errors(page) == []
    panel = page.locator(".widget-vbox", has=page.locator(PICTURE)).first
    panel.scroll_into_view_if_needed()
    assert page.locator(PICTURE).count() == 2, "two views of the panel"
    after_run = digest_after(page, "")

    maps = panel.locator("select")
    assert "sharper" in maps.inner_text(), "the user's own map has joined"
    maps.select_option("relu")
    with_relu = digest_after(page, after_run)

    readout = panel.locator(".widget-slider", has_text="window").locator(".widget-readout")
    assert readout.inner_text() == "16"
    panel.locator(".widget-slider", has_text="window").locator(".noUi-handle").press("ArrowRight")
    with_window = digest_after(page, with_relu)
    assert readout.inner_text() == "17"
    assert page.locator(PICTURE).nth(1).evaluate(DIGEST) == with_window, "both views show the same picture"

    maps.select_option("softmax")
    digest_after(page, with_window)
    assert errors(page) == []
    width = page.locator(PICTURE).first.evaluate("image => image.naturalWidth")
    assert width > 800
    if folder := request.config.getoption("--screenshots"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / "page.png")
        panel.screenshot(path=Path(folder) / "panel.png")
