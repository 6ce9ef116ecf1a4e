"""Control a headless Chromium over its DevTools pipe, without driver, package or port.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chrome-headless-shell", "google-chrome", "chromium-browser")
REMEDY = "there is no Chromium to open pages in: apt-get install chromium-headless-shell (on Ubuntu: chromium-browser)"
_TIMEOUT_S = 60.0


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser: ``open`` a file, then ``evaluate`` in it. ``complaints`` are console messages, ``asked`` fetched URLs.

    ``binary`` is from ``find_browser``; the profile is in ``folder``.
    """

    def __init__(self, binary: str, folder: Path) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        their_in, self._to = os.pipe()
        self._from, their_out = os.pipe()
        words = [binary, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        # The protocol uses file descriptors 3 and 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "browser", *words],
            pass_fds=(their_in, their_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        self._received = b""
        self._count = 0
        self._loaded = False
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load ``page`` in a window of ``width`` pixels, and wait until it is drawn."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._loaded:
            self._receive(deadline)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression as plain JSON."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, out: Path) -> None:
        """Write the whole page as PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        out.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        try:
            if self._process.poll() is None:
                self._session = None
                self._call("Browser.close")  # ends all of its processes; terminating it may leave some
                self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            some = os.read(self._from, 1 << 20) if ready else b""
            assert some, f"the browser does not answer (exit status {self._process.poll()})"
            self._received += some
        whole, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif event == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"{told['type']}: {told['args']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
