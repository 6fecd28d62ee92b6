"""The workbench in a real browser: JupyterLab shows it, and it answers to the mouse and the keyboard.

Needs playwright (the extra `browser`) and a Chromium of the system. `--screenshots FOLDER` keeps what was seen.
"""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rattn_eqx.ablation.rows import read_rows

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

ROOT = Path(__file__).parents[2]
CELL = """from rattn_eqx.figures.workbench import Workbench

workbench = Workbench()
workbench"""
SETTINGS = {  # every cell stays in the page, seen or not; nothing is asked of the network
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
MAPS = """import jax.numpy as jnp


def steep(x):
    return jnp.exp(jnp.minimum(2 * x, 10))


def leaking(x):
    return x - x.max(axis=0, keepdims=True)
"""
ERRORS = ", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("error", "stderr"))
WATCH = """() => {
  const figure = () => document.querySelector(".js-plotly-plot");
  window.picture = () => {
    const parts = Array.from(figure().querySelectorAll(".hm image"), x => x.getAttribute("href").slice(-600));
    const marks = figure().querySelectorAll(".points path, .scatterlayer .lines path, .shapelayer path");
    return parts.concat(Array.from(marks, x => x.getAttribute("d") + x.getAttribute("transform"))).join(" ");
  };
  window.timed = act => new Promise(done => {
    const before = window.picture(), began = performance.now();
    let now = before, changed = began;
    act();
    const look = () => {
      const seen = window.picture(), time = performance.now();
      if (seen !== now) { now = seen; changed = time; }
      const settled = now !== before && time - changed > 200;
      if (settled || time - began > 10000) done(settled ? changed - began : null);
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  });
  window.press = (slider, key) => window.timed(() => {
    slider.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  });
  window.choose = (select, value) => window.timed(() => {
    select.value = value;
    select.dispatchEvent(new Event("change", {bubbles: true}));
  });
}"""


@pytest.fixture
def folder(tmp_path):
    """A notebook of one cell, the shipped model and a file of maps beside it."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    cell = {"cell_type": "code", "source": CELL, "outputs": [], "execution_count": None, "metadata": {}, "id": "only"}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "workbench.ipynb").write_text(json.dumps(notebook), "utf-8")
    (folder / "mine.py").write_text(MAPS, "utf-8")
    (folder / "model").symlink_to(ROOT / "data" / "models" / "rattention_256")
    return folder


@pytest.fixture
def address(tmp_path, folder):
    """Of a JupyterLab server with its own settings."""
    for path, settings in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), "utf-8")
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / "jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JAX_PLATFORMS": "cpu", "RATTN_NOTEBOOK_FAST": "1"}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=bench", "--ServerApp.port_retries=0"]
    log = tmp_path / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env=os.environ | own, start_new_session=True
        )
    try:
        yield _wait_for_address(server, log) + "/lab/tree/workbench.ipynb?token=bench"
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
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(180_000)
        yield page
        browser.close()


@pytest.fixture
def keep(page, request):
    """Keep a picture of the screen under a name, if pictures are asked for."""
    folder = request.config.getoption("--screenshots")

    def take(name: str) -> None:
        if folder:
            page.wait_for_timeout(300)
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png")

    return take


def control(page, text: str):
    """The element to be moved or filled in of the control with this description."""
    row = page.locator(".widget-inline-hbox", has=page.get_by_text(text, exact=True)).first
    return row.locator(".noUi-handle, select, input").first


def said(page) -> str:
    return page.locator(".jp-OutputArea").first.inner_text()


def wait_for(page, text: str, seconds: float = 180) -> None:
    page.get_by_text(text).first.wait_for(timeout=1000 * seconds)


def fill(page, text: str, value: str) -> None:
    field = control(page, text)
    field.fill(value)
    field.press("Enter")
    field.press("Tab")


def open_workbench(page, address) -> None:
    page.goto(address)
    page.locator(".jp-NotebookPanel").wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(f".js-plotly-plot .hm image, {ERRORS}").first.wait_for()
    assert page.locator(ERRORS).all_inner_texts() == []
    page.evaluate(WATCH)
    page.locator(".widget-tab").first.evaluate("tab => tab.scrollIntoView()")


def test_every_change_is_drawn_at_once(address, page, keep):
    open_workbench(page, address)
    keep("begin")
    press = lambda text, key: control(page, text).evaluate("(slider, key) => window.press(slider, key)", key)
    choose = lambda text, value: control(page, text).evaluate("(menu, value) => window.choose(menu, value)", value)
    changes = [("window", "ArrowRight")] * 8 + [("query", "ArrowLeft")] * 8 + [("scale", "ArrowRight")] * 6
    changes += [("φ", name) for name in ("relu", "identity", "exp", "squared_relu", "elu_plus_one", "softmax")]
    changes += [("head size", size) for size in ("16", "8", "64")] + [("as", "arcs")]
    changes += [("query", "ArrowLeft")] * 4 + [("window", "ArrowLeft")] * 4
    assert len(changes) == 40
    took = [press(*change) if change[1].startswith("Arrow") else choose(*change) for change in changes]
    keep("arcs")
    inside(page)
    assert None not in took, [change for change, time in zip(changes, took, strict=True) if time is None]
    seconds = [time / 1000 for time in took]
    slowest = changes[max(range(40), key=took.__getitem__)]
    print(f"40 changes: median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s ({slowest})")
    assert statistics.median(seconds) < 1
    assert page.locator(f"{ERRORS}, .workbench-error").all_inner_texts() == []


def test_a_model_two_heads_maps_of_a_file_and_what_is_exported(address, page, keep, folder):
    open_workbench(page, address)
    fill(page, "source", "model")
    wait_for(page, "layer 0, head 0, the model's own")
    fill(page, "text", "The miller keeps the key.")
    ticks = page.locator(".js-plotly-plot .x5tick text")
    sync_api.expect(ticks).to_have_count(26, timeout=60_000)
    letters = ticks.all_text_contents()
    assert "".join(letters) == "¶The␣miller␣keeps␣the␣key."
    wait_for(page, "The window, 256, is beyond the 26 tokens: the residual branch has no pair.")
    readout = page.locator(".widget-slider", has=page.get_by_text("window", exact=True)).locator(".widget-readout")
    readout.fill("8")
    readout.press("Enter")
    wait_for(page, "In the model, the window of layer 0 is 256.")
    control(page, "head").select_option("2")
    wait_for(page, "layer 0, head 2, the model's own")
    keep("model")

    page.get_by_text("compare", exact=True).click()
    wait_for(page, "B layer 0, head 0, the model's own")
    rows = page.locator(".widget-hbox", has=page.get_by_text("B: φ", exact=True)).last
    rows.locator("select").nth(2).select_option("3")
    wait_for(page, "B layer 0, head 3, the model's own")
    assert page.locator(".js-plotly-plot .hm image").count() == 4
    control(page, "as").select_option("arcs")
    page.locator(".js-plotly-plot .scatterlayer .lines path").first.wait_for(state="attached")
    keep("two_heads")
    inside(page)

    page.get_by_text("Maps", exact=True).click()
    field = page.get_by_placeholder("mine.py:phi")
    field.fill("mine.py:leaking")
    page.get_by_role("button", name="Add", exact=True).click()
    wait_for(page, "must act on the last axis alone")
    keep("refused")
    assert "leaking" not in control(page, "φ").inner_text()
    field.fill("mine.py:steep")
    page.get_by_role("button", name="Add", exact=True).click()
    wait_for(page, "A layer 0, head 2, mine.py:steep")
    assert page.locator(".workbench-error").count() == 0
    keep("map_of_a_file")

    page.get_by_text("Export", exact=True).first.click()
    line = control(page, "as Python").input_value()
    assert line.startswith("Workbench('model', maps={'mine.py:steep': 'mine.py:steep'}, feature_map='mine.py:steep'")
    for name in ("head.png", "head.csv", "head.json"):
        control(page, "file: .png, .csv or .json").fill(name)
        page.get_by_role("button", name="Export", exact=True).click()
        wait_for(page, f"written: {name}")
    keep("export")
    assert (folder / "head.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "head.csv").read_text("utf-8").splitlines()))
    assert {(row["side"], row["map"], row["where"]) for row in rows} == {
        ("A", "mine.py:steep", "layer 0, head 2"), ("B", "the model's own", "layer 0, head 3"),
    }  # fmt: skip
    content = json.loads((folder / "head.json").read_text("utf-8"))
    assert content["settings"]["python"] == line
    assert content["tokens"] == letters
    assert page.locator(ERRORS).all_inner_texts() == []


def test_train_this_map_to_the_end(address, page, keep, folder):
    open_workbench(page, address)
    control(page, "φ").select_option("exp")
    wait_for(page, "φ = exp")
    page.get_by_text("Train this map", exact=True).first.click()
    for text, value in (("steps", "50"), ("results", "mine.jsonl")):
        fill(page, text, value)
    page.get_by_role("button", name="Train this map").click()
    page.get_by_text(re.compile("exp: step (25|50) of 50")).first.wait_for(timeout=300_000)
    page.locator(".js-plotly-plot .scatterlayer .js-line").first.wait_for(state="attached")
    keep("training")
    wait_for(page, "rattn ablate --table --out mine.jsonl", 300)
    keep("trained")
    legend = page.locator(".js-plotly-plot .legendtext").all_text_contents()
    guesses = ["chance: one of the 6 values: 1.79", "copy: one of the sample's values: 1.06"]
    assert legend == ["exp", "softmax", "relu", *guesses]
    inside(page)
    assert [row["name"] for row in read_rows(folder / "mine.jsonl")] == [
        f"quick feature_map={name} steps=50" for name in ("exp", "softmax", "relu")
    ]
    assert page.locator(ERRORS).all_inner_texts() == []


def inside(page) -> None:
    """Controls and picture fit on the screen, beside the file browser."""
    box = page.locator(".jp-OutputArea-output .widget-vbox").first.bounding_box()
    seen = page.locator(".jp-WindowedPanel-outer").first.bounding_box()
    assert box["height"] <= seen["height"], (box, seen)
    assert box["x"] + box["width"] <= seen["x"] + seen["width"], (box, seen)
    figure = page.locator(".js-plotly-plot:visible").first.bounding_box()
    assert figure["x"] + figure["width"] <= box["x"] + box["width"] + 1, (figure, box)
