"""Headless Chromium through chromedriver and the WebDriver protocol, with nothing but the standard library."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
KEYS = {"tab": "\ue004", "enter": "\ue007", "space": " ", "right": "\ue014", "left": "\ue012", "end": "\ue010"}


class Browser:
    """One tab."""

    def __init__(self, session: str):
        self._session = session

    def send(self, method: str, path: str, **body) -> object:
        return _request(method, f"{self._session}{path}", body if method == "POST" else None)

    def open(self, url: str) -> None:
        self.send("POST", "/url", url=url)

    def run(self, script: str, *args) -> object:
        """Runs a function body in the page; what it returns or resolves to comes back."""
        return self.send("POST", "/execute/sync", script=script, args=args)

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def devtools(self, cmd: str, **params) -> object:
        return self.send("POST", "/goog/cdp/execute", cmd=cmd, params=params)

    def emulate(self, width: int, height: int, **features: str) -> None:
        """Sets the size of the window and CSS media features (prefers_color_scheme="dark")."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=media)

    def log(self, kind: str) -> list[dict]:
        """What was logged since the last call: "browser" (console) or "performance" (network and more)."""
        return self.send("POST", "/se/log", type=kind)

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("GET", "/screenshot")))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a browser with an empty profile, and ends it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    driver, binary = shutil.which("chromedriver"), next(filter(None, map(shutil.which, names)), None)
    if driver is None or binary is None:
        raise FileNotFoundError("these tests need a browser: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(f"{profile}/log", "w+") as log:
        process = subprocess.Popen([driver, "--port=0"], stdout=log, stderr=subprocess.STDOUT)
        try:
            server = f"http://127.0.0.1:{_port(Path(log.name))}"
            options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}/data"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            session = _request("POST", f"{server}/session", {"capabilities": {"alwaysMatch": wanted}})
            browser = Browser(f"{server}/session/{session['sessionId']}")
            yield browser
            browser.send("DELETE", "")
        finally:
            process.terminate()
            process.wait()


def _port(log: Path) -> int:
    for _ in range(300):
        _, found, port = log.read_text().partition("started successfully on port ")
        if found and "." in port:
            return int(port.split(".")[0])
        time.sleep(0.1)
    raise TimeoutError(f"chromedriver did not start: {log.read_text()}")


def _request(method: str, url: str, body: dict | None) -> object:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)["value"]["message"]) from error
