"""The report in a real browser: what it shows, how it is used, and that it asks nobody for anything."""

from __future__ import annotations

import base64
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.models import digits_path
from effic.report import report

if not os.environ.get("EFFIC_REQUIRE_BROWSER"):
    pytest.importorskip("selenium")
    pytest.importorskip("plotly")

DIGITS = Path(digits_path())
HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 2">',
    "<a href='http://example.com/'>'quoted' & <b>bold</b></a>",
    "$${template} %{x} \\u003c \u202eevil\u2028\x07",
    "层.重み/ö weight ${HOME}",
    "n" * 1000,
)


@pytest.fixture(scope="module")
def built(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three builds of the digits, and a report on them all."""
    folder = tmp_path_factory.mktemp("built")
    effic.optimize(str(DIGITS), "fuse-conv-bn,quantize-rtn{bits=8}", output=folder / "int8.onnx")
    effic.optimize(str(DIGITS), "fuse-conv-bn,quantize-rtn{bits=4}", output=folder / "int4.onnx")
    effic.optimize(
        str(DIGITS),
        "fuse-conv-bn,quantize-rtn{bits=8,kinds=[Conv,Gemm],min_size=0}",
        output=folder / "all8.onnx",
    )
    report(
        [folder / "int4.onnx", folder / "int8.onnx", folder / "all8.onnx"],
        folder / "all.html",
        inputs=DIGITS.with_name("digits_test.npz"),
    )
    return folder


@pytest.fixture(scope="module")
def hostile(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a model whose every name is an attempt to break out of the page."""
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    value = ir.val(HOSTILE[0], ir.DataType.FLOAT, [1, 16])
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 20}, name=HOSTILE[0])
    for name in HOSTILE:
        weight = ir.val(
            f"{name} w", const_value=ir.Tensor(generator.normal(size=(16, 16)).astype(np.float32))
        )
        weight.const_value.name = weight.name  # type: ignore[union-attr]
        graph.register_initializer(weight)
        node = ir.node("MatMul", [value, weight], name=f"{name} n")
        node.outputs[0].name = f"{name} out"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 16])
        graph.append(node)
        value = node.outputs[0]
    graph.outputs.append(value)
    model = effic.Model(ir.Model(graph, ir_version=10))
    model.save(folder / "in.onnx")
    effic.optimize(
        folder / "in.onnx", "quantize-rtn{bits=8,min_size=0}", output=folder / "out.onnx", target="portable"
    )
    report([folder / "out.onnx"], folder / "out.html", reference=folder / "in.onnx")
    return folder


def errors(driver: Any) -> list[str]:
    return [row["message"] for row in driver.get_log("browser") if row["level"] in ("SEVERE", "WARNING")]


def requests(driver: Any) -> list[str]:
    """Addresses that the page asked for, itself left out."""
    rows = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    asked = [row["params"]["request"]["url"] for row in rows if row["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(("data:", "blob:")) and not url.endswith(".html")]


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def texts(driver: Any, selector: str) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText.trim())", selector
    )


def measured(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".effic.json").read_text())["measured"]


def column(driver: Any, number: int) -> list[str]:
    return texts(driver, f"#sites-table tbody tr > :nth-child({number})")


def test_it_draws_itself_without_an_error_and_without_the_network(look, built: Path) -> None:
    driver = look(built / "all.html")
    # The scatter, two waterfalls (no time was measured), two treemaps.
    assert len(driver.find_elements("css selector", ".js-plotly-plot .main-svg:first-child")) == 5
    assert texts(driver, "#passes .note") == [
        "No latency was measured. Build with --keep-if-faster, or write the report with --time."
    ]
    driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert errors(driver) == []
    assert requests(driver) == []
    denied = driver.execute_async_script(
        "const done = arguments[0]; fetch('https://example.com/').then(() => done('fetched'), () => done('denied'))"
    )
    assert denied == "denied"
    assert any("Content Security Policy" in message for message in errors(driver))


def test_the_figures_are_those_of_the_record(look, built: Path) -> None:
    driver = look(built / "all.html")
    record = measured(built / "int4.onnx")
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#passes-table tbody tr')].map((row) => [...row.children].map("
        "(cell) => cell.dataset.value ?? cell.innerText))"
    )
    assert len(rows) == len(record["steps"]) == 3
    for row, step in zip(rows, record["steps"], strict=True):
        assert row[0].endswith(step["text"])
        assert int(row[1]) == step["passed"]
        assert int(row[3]) == step["bytes_after"]
        assert int(row[4]) == step["nodes_after"]
        assert float(row[5]) == pytest.approx(step["distance"]["sqnr_db"])
        assert float(row[7]) == pytest.approx(step["seconds"])
    drawn = driver.execute_script("return document.querySelector('#passes .chart').data[0].x")
    steps = record["steps"]
    moved = [step["bytes_after"] - step["bytes_before"] for step in steps]
    assert drawn == [record["before"]["weight_bytes"], *moved, record["after"]["weight_bytes"]]
    remarks = {
        remark["where"]: remark["data"]["sqnr_db"]
        for remark in record["steps"][1]["remarks"]
        if remark["kind"] == "passed"
    }
    shown = driver.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('#sites-table tbody tr')].map((row) => "
        "[row.querySelector('bdi').textContent, row.children[6].dataset.value ?? null]))"
    )
    assert {name: float(shown[name]) for name in remarks} == remarks
    assert set(remarks) == {"fc1.weight", "fc2.weight"}


def test_the_time_of_passes_is_that_of_the_record(look, built: Path, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes((built / "int4.onnx").read_bytes())
    record = json.loads((built / "int4.effic.json").read_text())
    fused, rounded = (step["text"] for step in record["measured"]["steps"][:2])
    timing = {"load_ms": 0, "low_ms": 1, "high_ms": 1, "path": "x", "runs_per_batch": 1}
    record["measured"]["speed"] = {
        "steps": [
            {"text": fused, "speedup": 2.0, "low": 1.9, "high": 2.1, "kept": True},
            {"text": "quantize-rtn on Gemm alone", "speedup": 9.0, "low": 9.0, "high": 9.0, "kept": True},
            {"text": rounded, "speedup": 1.25, "low": 1.2, "high": 1.3, "kept": True},
        ],
        "total": {
            "a": {**timing, "median_ms": 8.0},
            "b": {**timing, "median_ms": 3.3},
            "speedup": 2.5,
            "speedup_low": 2.4,
            "speedup_high": 2.6,
            "threads": 1,
        },
    }
    (tmp_path / "out.effic.json").write_text(json.dumps(record))
    report([tmp_path / "out.onnx"], tmp_path / "out.html")
    driver = look(tmp_path / "out.html")
    drawn = driver.execute_script("return [...document.querySelectorAll('#passes .chart')].at(-1).data[0]")
    assert drawn["measure"] == ["absolute", "relative", "relative", "absolute"]
    assert drawn["x"] == pytest.approx([8.0, -4.0, -0.8, 3.2])
    assert driver.find_elements("css selector", "#passes .note") == []
    assert find(driver, "#card-speed dd").text == "2.50×"
    assert errors(driver) == []


CONTRAST = """
const light = (text) => {
  const parts = text.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (each) => {
  for (let at = each; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
  }
};
const low = [];
for (const each of document.querySelectorAll("main *, header *")) {
  if (each.closest("svg") || each.disabled || !each.offsetParent) continue;
  if (![...each.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
  const pair = [light(getComputedStyle(each).color), light(ground(each))].sort((a, b) => b - a);
  const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (ratio < 4.5) low.push([each.outerHTML.slice(0, 80), ratio]);
}
return low;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(look, built: Path, theme: str) -> None:
    driver = look(built / "all.html")
    feature = {"name": "prefers-color-scheme", "value": theme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert driver.execute_script(CONTRAST) == []
    # The measure itself sees what is wrong.
    driver.execute_script(
        "document.querySelector('#notes').innerHTML = '<p style=\"color:#888;background:#999\">x</p>'"
    )
    assert len(driver.execute_script(CONTRAST)) == 1


def test_another_output_is_chosen(look, built: Path) -> None:
    driver = look(built / "all.html")
    points = driver.execute_script("return document.querySelector('#outputs .chart').data[0]")
    sizes = {(built / name).stat().st_size for name in ("int4.onnx", "int8.onnx", "all8.onnx")}
    assert sizes == set(points["x"])
    find(driver, "#outputs-table tbody tr:last-child button").click()
    assert find(driver, "#output").get_property("value") == "2"
    assert set(column(driver, 4)) == {"rtn"}
    find(driver, "#output").send_keys("int4")
    assert set(column(driver, 4)) == {"rtn", "none"}


def test_the_table_is_sorted_by_mouse_and_by_keyboard(look, built: Path) -> None:
    driver = look(built / "all.html")

    def after() -> list[int]:
        return [
            int(value)
            for value in driver.execute_script(
                "return [...document.querySelectorAll('#sites-table tbody tr > :nth-child(9)')]"
                ".map((cell) => cell.dataset.value)"
            )
        ]

    assert after() == sorted(after(), reverse=True)
    heading = find(driver, "#sites-table thead th:nth-child(9)")
    heading.find_element("css selector", "button").click()
    assert after() == sorted(after())
    assert heading.get_attribute("aria-sort") == "ascending"
    names = find(driver, "#sites-table thead th:nth-child(1) button")
    driver.execute_script("arguments[0].focus()", names)
    names.send_keys("\ue007")
    assert column(driver, 1) == sorted(column(driver, 1))
    assert heading.get_attribute("aria-sort") is None
    names.send_keys(" ")
    assert column(driver, 1) == sorted(column(driver, 1), reverse=True)
    # Weights of which no error is known come last, whichever way the table is sorted.
    for _ in range(2):
        find(driver, "#sites-table thead th:nth-child(7) button").click()
        assert column(driver, 7)[-1] == "–"
        assert column(driver, 7)[0] != "–"


def test_the_table_is_filtered(look, built: Path) -> None:
    driver = look(built / "all.html")
    find(driver, "#filter-text").send_keys("FC weight")
    assert {name.split("\n")[0] for name in column(driver, 1)} == {"fc1.weight", "fc2.weight"}
    assert find(driver, "#sites-status").text == "2 of 10 weights"
    find(driver, "#filter-text").clear()
    find(driver, "#filter-text").send_keys("x\ue003")  # clearing alone tells nobody
    assert len(column(driver, 1)) == 10
    find(driver, "#filter-kind").send_keys("Conv")
    assert set(column(driver, 2)) == {"Conv"}
    find(driver, "#filter-bits").send_keys("4")
    assert column(driver, 1) == []
    assert find(driver, "#sites-status").text == "0 of 10 weights"


def test_a_weight_leads_to_its_neighbourhood(look, built: Path) -> None:
    driver = look(built / "all.html")
    find(driver, "#filter-text").send_keys("fc1")
    find(driver, "#sites-table tbody button.link").click()
    assert "chosen" in (find(driver, "#sites-table tbody tr").get_attribute("class") or "")
    for side, op in (("gone", "Gemm"), ("added", "MatMulNBits")):
        chosen = find(driver, f"[data-side={side}] g.chosen")
        assert (chosen.get_attribute("data-name"), chosen.find_element("css selector", ".op").text) == (
            "/fc1/Gemm",
            op,
        )
    names = driver.execute_script(
        "return [...document.querySelectorAll('[data-side=added] g.node')].map((each) => each.dataset.name)"
    )
    # Two steps each way: pool and flatten before, relu and the last layer after.
    assert set(names) == {"/pool/AveragePool", "/pool/Flatten", "/fc1/Gemm", "/fc1/Relu", "/fc2/Gemm"}
    find(driver, "#graph-steps").send_keys("1")
    assert len(driver.find_elements("css selector", "[data-side=added] g.node")) == 3
    relu = find(driver, "[data-side=added] g.node[data-name='/fc1/Relu']")
    driver.execute_script("arguments[0].focus()", relu)
    relu.send_keys("\ue007")
    assert find(driver, "[data-side=added] g.chosen").get_attribute("data-name") == "/fc1/Relu"
    find(driver, "#graph-search").send_keys("batchnorm block1/0")
    assert texts(driver, ".results button") == ["BatchNormalization /block1/0/bn/BatchNormalization"]
    find(driver, ".results button").click()
    assert "gone" in (find(driver, "[data-side=gone] g.chosen").get_attribute("class") or "")
    assert "There is no node of this name here" in find(driver, "#graph").text


def test_light_and_dark_follow_the_system_and_the_switch(look, built: Path) -> None:
    driver = look(built / "all.html")

    def ground() -> int:
        colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    def ink_of_charts() -> int:
        colour = driver.execute_script("return getComputedStyle(document.querySelector('.ytick text')).fill")
        return sum(int(part) for part in colour[4:-1].split(","))

    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    assert ground() < 150
    assert ink_of_charts() > 600
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{**scheme, "value": "light"}]})
    assert ground() > 600
    assert ink_of_charts() < 150
    switch = find(driver, "#theme")
    switch.click()
    assert (switch.text, ground() > 600) == ("Theme: light", True)
    switch.send_keys("\ue007")
    assert (switch.text, ground() < 150) == ("Theme: dark", True)
    switch.click()
    assert switch.text == "Theme: as the system"


def test_it_prints(look, built: Path) -> None:
    driver = look(built / "all.html")
    find(driver, "#theme").click()
    find(driver, "#theme").click()
    found = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert found.startswith(b"%PDF")
    assert 3 <= found.count(b"/Type /Page\n") <= 12
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert (
        driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert not find(driver, "#theme").is_displayed()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_runs_out_of_a_narrow_screen(browser, look, built: Path, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    driver = look(built / "all.html")
    assert driver.execute_script("return innerWidth") == width
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_all_can_be_reached_by_keyboard_and_has_a_name(look, built: Path) -> None:
    driver = look(built / "all.html")
    body = find(driver, "body")
    body.send_keys("\ue004")
    assert driver.execute_script("return document.activeElement.textContent") == "Skip to the report"
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    nameless = driver.execute_script(
        "return [...document.querySelectorAll('button, select, input, [role=img], [role=region], [role=button]')]"
        ".filter((each) => !(each.getAttribute('aria-label') || each.textContent.trim() || (each.labels || []).length))"
        ".map((each) => each.outerHTML)"
    )
    assert nameless == []
    levels = [int(tag[1]) for tag in driver.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((each) => each.tagName)"
    )]  # fmt: skip
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_names_stay_names(look, hostile: Path) -> None:
    driver = look(hostile / "out.html")
    shown = [name.split("\n")[0] for name in driver.execute_script(
        "return [...document.querySelectorAll('#sites-table tbody bdi')].map((each) => each.textContent)"
    )]  # fmt: skip
    wanted = [f"{name} w".replace("\u202e", "�").replace("\x07", "�") for name in HOSTILE]
    assert sorted(shown) == sorted(wanted)
    for button in range(len(HOSTILE)):
        driver.find_elements("css selector", "#sites-table tbody button.link")[button].click()
    find(driver, "#graph-search").send_keys("script")
    find(driver, ".results button").click()
    assert driver.execute_script("return window.pwned ?? null") is None
    assert driver.find_elements("css selector", "main a, main img, main script, main b") == []
    assert errors(driver) == []
    assert requests(driver) == []
    label = driver.execute_script(
        "return [...document.querySelectorAll('#treemap .slicetext')].map((each) => each.textContent).join(' ')"
    )
    assert "<" in label  # shown, not obeyed
    beyond = driver.execute_script(
        "return [...document.querySelectorAll('g.node')].flatMap((each) => [...each.querySelectorAll('text')].filter("
        "(text) => text.getBBox().x + text.getBBox().width > each.querySelector('rect').getBBox().x + 190))"
    )
    assert beyond == []
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_hundreds_of_weights_stay_usable(look, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    value = ir.val("x", ir.DataType.FLOAT, [1, 8])
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 20}, name="deep")
    for layer in range(700):
        weight = ir.val(f"block{layer // 100}.layer{layer}.w")
        weight.const_value = ir.Tensor(generator.normal(size=(8, 8)).astype(np.float32), name=weight.name)
        graph.register_initializer(weight)
        node = ir.node("MatMul", [value, weight], name=f"n{layer}")
        node.outputs[0].name = f"y{layer}"
        graph.append(node)
        value = node.outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 8])
    graph.outputs.append(value)
    effic.Model(ir.Model(graph, ir_version=10)).save(tmp_path / "deep.onnx")
    report([tmp_path / "deep.onnx"], tmp_path / "deep.html")
    driver = look(tmp_path / "deep.html")
    assert find(driver, "#sites-status").text == "1 to 50 of 700 weights"
    assert len(column(driver, 1)) == 50
    find(driver, ".pages button:last-child").click()
    assert find(driver, "#sites-status").text == "51 to 100 of 700 weights"
    find(driver, "#filter-text").send_keys("layer699")
    assert column(driver, 1) == ["block6.layer699.w"]
    leaves = driver.execute_script("return document.querySelector('#treemap .chart').data[0].ids.length")
    assert leaves < 600
    assert errors(driver) == []
