"""The start page in a living JupyterLab: it runs from top to bottom, and its sliders redraw their pictures."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from unittest import mock

import pytest
import torch

import browser
from conftest import ROOT, until
from get_nb.lab.explore import explore
from get_nb.lab.figures import show_images


def test_a_picture_under_a_slider_is_drawn_as_the_page_runs():
    "JupyterLab moves sliders in another thread, where torch records gradients again."
    seen = []

    def draw(n=1):
        seen.append(torch.is_grad_enabled())
        return show_images(torch.zeros(1, 1, 1, 8, 8, requires_grad=True))

    with mock.patch("ipywidgets.interactive") as interactive, torch.no_grad():
        interactive.return_value._repr_mimebundle_.return_value = {"application/vnd.jupyter.widget-view+json": {}}
        explore(draw, n=(0, 3))
        redraw = interactive.call_args.args[0]
        thread = threading.Thread(target=redraw, kwargs=dict(n=2))
        thread.start()
        thread.join()
    assert seen == [False]


NOTEBOOK = "window.page = [...jupyterapp.shell.widgets('main')].find(w => w.content && w.content.widgets)"
READY = f"jupyterapp && ({NOTEBOOK}) && page.sessionContext.session && page.sessionContext.session.kernel.status"
ERRORS = "[...document.querySelectorAll('[data-mime-type*=error], [data-mime-type*=stderr]')].map(x => x.textContent)"
KEYS = [dict(key=f"Arrow{k}", code=f"Arrow{k}", windowsVirtualKeyCode=v) for k, v in (("Left", 37), ("Right", 39))]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if not browser.CHROMIUM:
        pytest.skip("chromium is not installed")
    pytest.importorskip("jupyterlab")
    place = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "nbs/start.ipynb", place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser", "--allow-root"]
    home = dict(HOME=str(place), PYTHONPATH=str(ROOT), JUPYTER_PREFER_ENV_PATH="1", OMP_NUM_THREADS="1")
    surroundings = {k: v for k, v in os.environ.items() if k != "GET_NB_PROGRESS"} | home
    command = [sys.executable, "-m", "jupyter", "lab", *options]
    log = open(place / "log", "w", encoding="utf-8")
    server = subprocess.Popen(command, cwd=place, env=surroundings, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}/lab/tree/start.ipynb?reset"
        until(lambda: answers(address), pause=0.5)
        with browser.Browser() as tab:
            tab.ask("Emulation.setDeviceMetricsOverride", width=1280, height=1600, deviceScaleFactor=1, mobile=False)
            tab.ask("Page.navigate", url=address)
            until(lambda: tab.evaluate(f"window.jupyterapp && ({READY})") == "idle", pause=0.5)
            tab.evaluate("jupyterapp.shell.activateById(page.id)")
            tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            yield tab
    finally:
        server.terminate()
        server.wait()
        log.close()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_the_start_page_runs_in_jupyterlab_and_every_slider_draws_a_new_picture(page):
    assert page.evaluate(ERRORS) == []
    sources = page.evaluate("JSON.stringify(page.content.widgets.map(c => c.model.sharedModel.source))")
    explorers = [i for i, s in enumerate(json.loads(sources)) if s.startswith("explore(")]
    assert len(explorers) == 5
    for cell in explorers:
        page.evaluate(
            f"window.output = page.content.widgets[{cell}].outputArea.node; page.content.scrollToItem({cell})"
        )
        for i in range(until(lambda: page.evaluate("output.querySelectorAll('.noUi-handle').length"))):
            page.evaluate(f"window.handle = output.querySelectorAll('.noUi-handle')[{i}]; handle.focus()")
            until(lambda: page.evaluate("window.before = (output.querySelector('img') || {}).src"), pause=0.5)
            lowest = page.evaluate("handle.getAttribute('aria-valuenow') === handle.getAttribute('aria-valuemin')")
            for kind in ("keyDown", "keyUp"):
                page.ask("Input.dispatchKeyEvent", type=kind, **KEYS[lowest])
            until(
                lambda: page.evaluate("![undefined, before].includes((output.querySelector('img') || {}).src)"),
                pause=0.5,
            )
            assert page.evaluate(ERRORS) == []
