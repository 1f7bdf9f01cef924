"""Draws the pictures of docs/report.md: ``python docs/make_report_images.py``.

Builds the digits model with several sequences of passes, writes a report on the results, and takes pictures of it
in a headless Chromium (apt-get install chromium chromium-driver; pip install 'effic[dev]').
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from pathlib import Path
from typing import Any

import effic
from effic.guard import Accuracy
from effic.models import digits_path
from effic.passes.presets import preset
from effic.report import report

IMAGES = Path(__file__).resolve().parent / "images"
DATA = Path(digits_path()).with_name("digits_test.npz")
BUILDS = {
    "int8": preset("int8").text,
    "int4": preset("int4").text,
    "all-int8": f"{preset('default').text},quantize-rtn{{bits=8,kinds=[Conv,Gemm],min_size=0}}",
    "all-int4": f"{preset('default').text},quantize-rtn{{bits=4,kinds=[Conv,Gemm],min_size=0,group_size=32}}",
    "all-int2": f"{preset('default').text},quantize-rtn{{bits=2,kinds=[Conv,Gemm],min_size=0,group_size=32}}",
}
SHOWN = "all-int4"
WIDTH, HEIGHT = 1280, 1640


def build(folder: Path) -> Path:
    """Optimize the digits in every way, and write the report."""
    outputs = [folder / f"{name}.onnx" for name in BUILDS]
    for output, passes in zip(outputs, BUILDS.values(), strict=True):
        effic.optimize(digits_path(), passes, output=output)
    outputs.sort(key=lambda path: path.stem != SHOWN)  # the first one is shown in full
    report(
        outputs,
        folder / "report.html",
        reference=digits_path(),
        accuracy=Accuracy("top1", str(DATA)),
    )
    return folder / "report.html"


def browser(profile: Path) -> Any:
    """A headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage"
    for flag in (*flags.split(), f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def main() -> None:
    """Write the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        page = build(Path(name))
        driver = browser(Path(name) / "profile")
        try:
            for theme in ("light", "dark"):
                driver.get(page.as_uri())
                feature = {"name": "prefers-color-scheme", "value": theme}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                driver.set_window_size(WIDTH, HEIGHT)
                for part, heading in (("", "title"), ("-weights", "h-treemap")):
                    top = driver.execute_script(
                        "return document.getElementById(arguments[0]).getBoundingClientRect().top + scrollY",
                        heading,
                    )
                    clip = {"x": 0, "y": max(0, top - 16), "width": WIDTH, "height": HEIGHT, "scale": 0.75}
                    shot = driver.execute_cdp_cmd(
                        "Page.captureScreenshot",
                        {"format": "png", "captureBeyondViewport": True, "clip": clip},
                    )
                    (IMAGES / f"report-{theme}{part}.png").write_bytes(base64.b64decode(shot["data"]))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
