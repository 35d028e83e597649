"""A headless Chromium, by the WebDriver protocol of chromedriver: Debian has both.

    python tests/browser.py FOLDER

saves a screenshot of each guide and tutorial of the site, at both widths.
"""

import base64
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

SITE = pathlib.Path(__file__).parent.parent / "docs/_build/html"
WIDTHS = 400, 1400
FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run
    disable-background-networking disable-component-update disable-sync"""


def installed():
    """Whether there is a browser with its driver."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One page at a time."""

    def __init__(self, address):
        self.address = address

    def call(self, command, **arguments):
        """Send a command of the protocol, and return its value."""
        request = urllib.request.Request(
            f"{self.address}{command}",
            json.dumps(arguments).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url, width=1400, height=900):
        """Load a page in a window of this size."""
        size = {"width": width, "height": height}
        metrics = size | {"deviceScaleFactor": 1, "mobile": False}
        self.chrome("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("/url", url=url)

    def chrome(self, command, **params):
        """Send a command of Chromium's own protocol."""
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def ask(self, expression):
        """Return the value of a JavaScript expression in the page."""
        return self.call("/execute/sync", script=f"return {expression}", args=[])

    def errors(self):
        """Return what the console has had since the last call, without mere logs."""
        entries = self.call("/se/log", type="browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def save(self, path):
        """Write a picture of the whole page, up to 3000 pixels of it."""
        size = json.loads(
            self.ask(
                "JSON.stringify([innerWidth, document.documentElement.scrollHeight])"
            )
        )
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 3000)}
        picture = self.chrome(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip=clip | {"scale": 1},
        )
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def browser():
    """Start a driver and a browser, with a profile of their own, and end them."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True
        )
        try:
            lines = iter(driver.stdout.readline, "")
            found = (re.search(r"successfully on port (\d+)", line) for line in lines)
            address = f"http://127.0.0.1:{next(m for m in found if m)[1]}/session"
            flags = [f"--{flag}" for flag in FLAGS.split()]
            chrome = {
                "binary": shutil.which("chromium"),
                "args": [*flags, f"--user-data-dir={profile}"],
            }
            wanted = {
                "goog:chromeOptions": chrome,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = Browser(address).call("", capabilities={"alwaysMatch": wanted})
            one = Browser(f"{address}/{session['sessionId']}")
            yield one
            urllib.request.urlopen(
                urllib.request.Request(one.address, method="DELETE"), timeout=60
            )
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()


def main(folder):
    """Save pictures."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    with browser() as one:
        for page in [*SITE.glob("*.html"), *SITE.glob("tutorials/*.html")]:
            for width in WIDTHS:
                one.open(page.as_uri(), width)
                one.save(folder / f"{page.stem}-{width}.png")


if __name__ == "__main__":
    main(sys.argv[1])
