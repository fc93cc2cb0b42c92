"""Headless Chromium driven over its DevTools pipe: no port, no driver, no network.

The protocol's messages are JSON objects, each ended by a zero byte, on the browser's file descriptors 3 and 4.
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
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 60.0


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless browser. Use as a context manager."""

    def __init__(self, profile: Path) -> None:
        program = find_chromium()
        assert program is not None, "ask find_chromium first"
        from_us, self._to_browser = os.pipe()
        self._from_browser, to_us = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
        flags += " --remote-debugging-pipe --disable-background-networking --proxy-server=127.0.0.1:9"
        command = f"exec {program} {flags} --user-data-dir={profile} about:blank 3<&{from_us} 4>&{to_us}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.send("Network.emulateNetworkConditions", offline)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._send("Browser.close", {})
        self._process.wait(timeout=WAIT_S)
        os.close(self._to_browser)
        os.close(self._from_browser)

    def open(self, page: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Load a local file at a window size and a colour scheme, and wait until it has loaded."""
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", {"features": [feature]})
        self.send("Page.navigate", {"url": page.resolve().as_uri()})
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def run(self, script: str) -> Any:
        """The value of an expression in the page; an exception in it fails the test."""
        answer = self.send("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            )

    def hover(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def complaints(self) -> list[str]:
        """What the console, the log and uncaught exceptions have said since the page was opened."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        said = [event for event in self.events if event["method"] in kinds]
        said += [
            event
            for event in self.events
            if event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning")
        ]
        return [json.dumps(event["params"]) for event in said]

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        answer = self.send(
            "Page.captureScreenshot", {"captureBeyondViewport": whole, **(self._clip() if whole else {})}
        )
        file.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.printToPDF", {"printBackground": True})["data"]))

    def _clip(self) -> dict[str, Any]:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def send(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._send(method, params or {}, self._session)

    def _send(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), on_message=lambda m: answers.append(m) if m.get("id") == number else None)
        assert "error" not in answers[0], f"{method}: {answers[0]['error']}"
        return answers[0]["result"]

    def _until(self, done: Any, on_message: Any = lambda message: None) -> None:
        end = time.monotonic() + WAIT_S
        while not done():
            for message in self._read(end):
                if "method" in message:
                    self.events.append(message)
                on_message(message)

    def _read(self, end: float) -> list[dict[str, Any]]:
        ready, _, _ = select.select([self._from_browser], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"the browser has not answered for {WAIT_S:g} s"
        self._buffer += os.read(self._from_browser, 1 << 20)
        *whole, self._buffer = self._buffer.split(b"\0")
        return [json.loads(message) for message in whole]


KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Home": 36, "End": 35, "Escape": 27}
