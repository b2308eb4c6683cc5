"""A headless Chromium for tests: Debian's packages `chromium` and `chromium-driver`, driven by Selenium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"  # MLflow's chat, open at the first visit
PATIENCE_S = 120.0  # a machine that is busy with other tests


def missing() -> str | None:
    """What keeps a browser from being had here; None when there is one."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return "no browser here: Debian's packages chromium and chromium-driver (make browser)"
    return None


class Page:
    """A tab: opens addresses, runs scripts, and keeps what the console said."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load an address anew; the console starts empty."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self.driver.execute_script(script, *arguments)

    def until(self, what: str, ready: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """The first true value of `ready`; fails with the page's text when there is none in time."""
        deadline = time.monotonic() + patience_s
        while not (found := ready()):
            if time.monotonic() > deadline:
                pytest.fail(f"not in {patience_s:.0f} s: {what}; the page says:\n{self.text()[:3000]}")
            time.sleep(0.3)
        return found

    def text(self) -> str:
        """What the page shows as text."""
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def errors(self) -> list[str]:
        """What the console has of errors since the address was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def tell(self, command: str, **arguments: Any) -> Any:
        """A command of Chromium's DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, arguments)

    def size(self, width: int, height: int) -> None:
        """The window's inner size, in CSS pixels."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def picture(self, name: str) -> None:
        """Keep a screenshot as PPC_SCREENSHOTS/NAME.png, where that folder is named (make screenshots)."""
        if folder := os.environ.get("PPC_SCREENSHOTS"):
            self.run(f'document.querySelector("{ASSISTANT}")?.click()')
            time.sleep(2.0)  # charts take the room
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile; skips where there is none."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PATIENCE_S)
        driver.set_script_timeout(PATIENCE_S)
        page = Page(driver)
        page.size(1600, 1000)
        yield page
    finally:
        driver.quit()
