"""A small client for a Chromium without a screen: pages are opened, keys pressed, what the page says read.

Chromium is spoken to through two pipes (`--remote-debugging-pipe`), with JSON messages that end in a zero byte, in its
DevTools protocol; so nothing needs to be installed but Chromium itself.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["Browser", "Page", "find_chromium", "open_browser"]

PATIENCE_S: Final = 60.0
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_KEYS: Final = {
    "Tab": 9,
    "Enter": 13,
    " ": 32,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def find_chromium() -> str | None:
    """Return the program, under one of its names, or None if it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """A running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int) -> None:
        self._process = process
        self._to, self._from = to_browser, from_browser
        self._last_id = 0
        self._pending = b""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """Send a command; return its result. Events that come meanwhile are kept in `events`."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("Chromium does not answer" if not ready else "Chromium has ended")
            self._pending += data
        message, self._pending = self._pending.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def page(self, url: str, *, width: int = 1200, height: int = 1400, dark: bool = False) -> Page:
        """Open a page of that size and wait until it has loaded."""
        context = self.send("Target.createBrowserContext", disposeOnDetach=True)["browserContextId"]  # nothing stored
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """An open page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser = browser
        self.session = session
        self._target = target

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this page."""
        return self.browser.send(method, self.session, **params)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """Return what an expression in JavaScript gives."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE_S
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {condition}")
            time.sleep(0.02)

    def text(self, element: str) -> str:
        """Return the text of the element with that id."""
        found: str = self.run(f"document.getElementById({json.dumps(element)}).textContent")
        return found

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, as somebody at a keyboard does."""
        for key in keys:
            code = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _KEYS[key]}
            typed = {"Enter": "\r", " ": " "}.get(key)
            down = {"type": "keyDown", "text": typed} if typed else {"type": "rawKeyDown"}
            self.send("Input.dispatchKeyEvent", **down, **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def focus(self, element: str) -> None:
        """Move the focus to the element with that id."""
        self.run(f"document.getElementById({json.dumps(element)}).focus()")

    @property
    def focused(self) -> str:
        """The id of the element that has the focus."""
        found: str = self.run("document.activeElement.id")
        return found

    def middle(self, selector: str) -> tuple[float, float]:
        """Scroll to the first element that a CSS selector finds; return where its middle is."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        return x, y

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that a CSS selector finds."""
        x, y = self.middle(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Return what went wrong so far: exceptions, errors and warnings in the console, what could not be loaded."""
        out = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                out.append(json.dumps(params["exceptionDetails"]))
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in {"error", "assert", "warning"}:
                out.append(json.dumps(params["args"]))
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
                out.append(json.dumps(params["entry"]))
        return out

    def requests(self) -> list[str]:
        """Return what the page asked for so far."""
        events = (e for e in self.browser.events if e.get("sessionId") == self.session)
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """Close the page."""
        self.browser.send("Target.closeTarget", targetId=self._target)


@contextlib.contextmanager
def open_browser(program: str, folder: Path) -> Iterator[Browser]:
    """Run Chromium with a profile of its own in `folder`, and end it."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; a shell puts them there.
    wired = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
    command = ["bash", "-c", wired, program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, pass_fds=(to_read, from_write), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    os.close(to_read)
    os.close(from_write)
    try:
        browser = Browser(process, to_write, from_read)
        yield browser
        with contextlib.suppress(RuntimeError, OSError):
            browser.send("Browser.close")
    finally:
        os.close(to_write)
        os.close(from_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
