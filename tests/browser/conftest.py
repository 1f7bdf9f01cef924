"""A headless browser, where there is one; in CI a missing one is a failure and no skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # 64 MB in a container
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


def missing() -> str | None:
    """What of a browser lacks, or None."""
    if not any(shutil.which(name) for name in CHROMIUM):
        return "no Chromium is installed (apt-get install chromium chromium-driver)"
    if shutil.which("chromedriver") is None:
        return "no chromedriver is installed (apt-get install chromium-driver)"
    return None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A selenium driver of a headless Chromium that has no network and an empty profile."""
    reason = missing()
    if reason is not None:
        assert not os.environ.get("EFFIC_REQUIRE_BROWSER"), reason
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def look(browser: Any) -> Iterator[Any]:
    """``look(path)`` opens a page and waits until it has drawn itself; the logs begin there."""
    browser.get_log("browser")
    browser.get_log("performance")

    def look(path: Path) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        browser.get(path.as_uri())
        WebDriverWait(browser, 60).until(
            lambda d: d.execute_script("return document.documentElement.dataset.ready") == "yes"
        )
        return browser

    yield look
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
