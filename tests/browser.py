"""Chromium, headless, through its debugging port: what a test needs of a browser, and nothing to install."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--headless=new --no-sandbox --disable-gpu --remote-debugging-port=0 --no-first-run --disable-extensions"


class Page:
    """A page: `errors` and `requests` are what it has logged and asked for so far."""

    def __init__(self, socket, loop):
        self.socket, self.loop, self.ids = socket, loop, itertools.count(1)
        self.errors, self.requests = [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        return self.loop.run_until_complete(self._send(method, params))

    async def _send(self, method, params):
        number = next(self.ids)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            said = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._heard(said.get("method"), said.get("params", {}))

    def _heard(self, method, params):
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(params["args"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(params)

    def js(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        """Until the expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def go(self, url, width=1280, height=800):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)

    def click(self, selector):
        self.wait(f"!!document.querySelector({selector!r})")
        self.js(f"document.querySelector({selector!r}).click()")

    def press(self, label):
        """The button with this label that can be seen."""
        found = (
            f"[...document.querySelectorAll('button')].find(b => b.offsetParent && b.innerText.trim() === {label!r})"
        )
        self.wait(f"!!{found} && !{found}.disabled")
        self.js(f"{found}.click()")

    def tab(self, label):
        found = f"[...document.querySelectorAll('[role=tab]')].filter(b => b.innerText.trim() === {label!r})"
        self.wait(f"{found}.length")
        self.js(f"{found}.forEach(b => b.click())")

    def stroke(self, selector, *points):
        """Draw with the mouse through points, in fractions of an element."""
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.js(f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())")
        box = json.loads(box)
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        for k, (x, y) in enumerate(places):
            kind = "mousePressed" if k == 0 else "mouseMoved"
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def shoot(self, path, whole=False):
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def browser(folder):
    """A page of a Chromium whose profile lies in a folder."""
    from tornado.websocket import websocket_connect

    with open(folder / "chromium.log", "w") as log:
        process = subprocess.Popen([CHROMIUM, *OPTIONS.split(), f"--user-data-dir={folder / 'profile'}"], stderr=log)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        port = folder / "profile" / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not (port.exists() and len(port.read_text().split()) == 2):
            assert time.monotonic() < end, (folder / "chromium.log").read_text()
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/new?about:blank"
        with urllib.request.urlopen(urllib.request.Request(address, method="PUT")) as answer:
            url = json.load(answer)["webSocketDebuggerUrl"]
        socket = loop.run_until_complete(websocket_connect(url, max_message_size=100_000_000))
        yield Page(socket, loop)
        socket.close()
    finally:
        process.kill()
        process.wait()
        asyncio.set_event_loop(None)
        loop.close()
