"""A page in a real browser (chromium, driven over its DevTools socket): pictures of it, and what it says of itself.

python tests/browser.py FOLDER PAGE...    screenshots of pages of _docs at 1280 and 390 pixels, light and dark
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from websocket import create_connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VIEWS = [(width, colour) for width in (1280, 390) for colour in ("light", "dark")]


class Browser:
    "One headless chromium with one tab; close it with `with`."

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        place = f"--user-data-dir={self.folder.name}"
        self.process = subprocess.Popen(
            [CHROMIUM, *options, place, "--remote-allow-origins=*", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = Path(self.folder.name) / "DevToolsActivePort"
        for _ in range(300):
            if address.is_file() and address.read_text().count("\n"):
                break
            time.sleep(0.1)
        port, path = address.read_text().split()
        self.socket = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=120)
        self.number, self.session = 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method, **params):
        "One command of the DevTools protocol; -> its result."
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, script):
        "The value of a script in the page."
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def show(self, path, width, colour, height=1600):
        "Open a file in a view and wait until it is complete."
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=colour)])
        address = Path(path).resolve().as_uri()
        self.ask("Page.navigate", url=address)
        for _ in range(300):
            if self.evaluate("document.readyState + location.href") == "complete" + address:
                break
            time.sleep(0.1)
        self.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")

    def shot(self, path, top=0):
        "A picture of the page from `top` on."
        self.evaluate(f"document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, {top})")
        time.sleep(0.2)
        Path(path).write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


if __name__ == "__main__":
    folder, *pages = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for page in pages:
            for width, colour in VIEWS:
                browser.show(page, width, colour)
                browser.shot(f"{folder}/{re.sub('[^A-Za-z0-9]+', '-', page)}-{width}-{colour}.png")
