"""The page in Chromium, on a small model of the digits: painting, drawing, and what is refused."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import small
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from bitgen.modes import train

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
selenium, actions, keys = (
    pytest.importorskip(f"selenium.{name}", reason="selenium is not installed")
    for name in ("common.exceptions", "webdriver.common.action_chains", "webdriver.common.keys")
)
PATIENCE = 300  # seconds: programs are compiled on machines that have much to do
GROUND = (30, 60, 220)  # of the uploaded digit, to tell it from the page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="there is no Chromium: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of the page of a generator that has seen a few digits."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'bitgen[demo]'")
    folder = tmp_path_factory.mktemp("runs")
    train.run(small.tokenizer().lock(), folder / "tokenizer")
    train.run(small.generator(folder / "tokenizer" / "model").lock(), folder / "bigr")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bitgen.demo", f"--config.generator={folder}/bigr/model"]
    options = {"port": port, "images": 4, "megabytes": 0.2, "sampler.denoiser_steps": 4}
    command += [f"--config.{name}={value}" for name, value in options.items()]
    log = folder / "page.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=file
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: f"open {address}" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser(page):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,1500",
        "--use-angle=swiftshader",  # the brush draws with WebGL
        "--enable-unsafe-swiftshader",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page)
        until(lambda: find(driver, "#generate"))
        yield driver
    finally:
        driver.quit()


def until(done):
    """Waits for something true, and returns it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        # What was found may be gone before it is looked at: the page draws it anew.
        with contextlib.suppress(selenium.StaleElementReferenceException):
            if found := done():
                return found
        time.sleep(0.2)
    raise AssertionError("this took too long")


def find(driver, selector):
    """What of the page is seen that a selector names."""
    return [one for one in driver.find_elements("css selector", selector) if one.is_displayed()]


def only(driver, selector):
    """Waits for what a selector names alone."""
    (one,) = until(lambda: find(driver, selector))
    return one


def says(driver, selector, words):
    """Waits for words in what a selector names."""
    until(lambda: any(words in one.text for one in find(driver, selector)))


def click(driver, selector):
    one = only(driver, selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
    until(lambda: clicked(one))


def clicked(one):
    with contextlib.suppress(Exception):  # while the page still moves
        one.click()
        return True
    return False


def tab(driver, name):
    until(lambda: [one for one in find(driver, "button[role=tab]") if one.text == name])[0].click()


def upload(driver, path):
    tab(driver, "Your picture")
    # Never seen itself: a button stands for it.
    selector = 'input[data-testid$="upload-button"]'
    (field,) = until(lambda: driver.find_elements("css selector", selector))
    field.send_keys(str(path))


def message(driver, words):
    """Waits for a message on the page that holds the words, and closes all."""
    says(driver, "[data-testid=toast-body]", words)
    for one in find(driver, ".toast-close"):
        clicked(one)


def images(driver, selector, count=1):
    """The pictures of a part of the page, as they are delivered, when there are so many."""

    def addresses():
        found = [one.get_attribute("src") for one in find(driver, f"{selector} img")]
        return found if len(found) == count else []

    pages = []
    for address in until(addresses):
        with urllib.request.urlopen(address) as data:
            pages.append(np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB")))
    return pages


def digit(path):
    """A file with a real digit on a blue ground, 384 pixels, as large as the page shows it."""
    ink = Image.fromarray(np.asarray(load_digits().images[3] * 15.9).astype(np.uint8))
    ink = ink.resize((384, 384), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (384, 384), GROUND)
    picture.paste((255, 255, 255), mask=ink)
    picture.save(path)
    return np.asarray(picture)


def shown(driver):
    """Waits for the uploaded picture; returns the canvas that it is on."""
    canvas = only(driver, "#editor canvas")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    until(lambda: blue(canvas).any())
    return canvas


def stroke(driver, path):
    """Paints on the picture; returns where in it, from what is seen."""
    canvas = shown(driver)
    hand = actions.ActionChains(driver)
    hand.move_to_element_with_offset(canvas, -60, -60).click_and_hold()
    for _ in range(5):
        hand = hand.move_by_offset(10, 6)
    hand.release().perform()
    rows, columns = np.nonzero(blue(canvas))
    inside = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    until(lambda: orange(canvas)[inside].any())
    time.sleep(1)  # the last of the stroke
    mask = Image.fromarray(orange(canvas)[inside]).convert("L").resize((384, 384))
    driver.get_screenshot_as_file(str(path))
    return np.asarray(mask.filter(ImageFilter.MaxFilter(9))) > 0  # a brush has a soft edge


def screen(canvas):
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)


def blue(canvas):
    return np.abs(screen(canvas) - GROUND).max(-1) < 12


def orange(canvas):
    return np.abs(screen(canvas) - (255, 120, 0)).max(-1) < 40


def test_inpainting_changes_what_is_painted_only(browser, tmp_path):
    picture = digit(tmp_path / "digit.png")
    upload(browser, tmp_path / "digit.png")
    shown(browser)
    click(browser, "#redraw")
    message(browser, "no mask is drawn")
    mask = stroke(browser, tmp_path / "painted.png")
    assert 0.01 < mask.mean() < 0.3
    click(browser, "#redraw")
    results = images(browser, "#laid", 4)
    browser.get_screenshot_as_file(str(tmp_path / "redrawn.png"))
    for result in results:
        changed = (result != picture).any(-1)
        assert changed.any()
        assert not (changed & ~mask).any()
    assert len({result.tobytes() for result in results}) > 1
    whole = images(browser, "#whole", 4)
    assert all((image != picture).any(-1).mean() > mask.mean() for image in whole)

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {
        event["params"]["request"]["url"]
        for event in requests
        if event["method"] == "Network.requestWillBeSent"
    }
    page = browser.current_url
    assert all(url.startswith((page, "data:", f"blob:{page}")) for url in addresses), addresses


def test_bad_uploads_are_refused_and_the_page_goes_on(browser, tmp_path):
    (tmp_path / "notes.png").write_text("no picture at all")
    upload(browser, tmp_path / "notes.png")
    message(browser, "notes.png cannot be read as a picture")
    noise = np.random.default_rng(0).integers(0, 256, (280, 280, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    upload(browser, tmp_path / "large.png")
    message(browser, "large.png is larger than 0.2 MB")
    (tmp_path / "huge.bin").write_bytes(bytes(2_000_000))
    upload(browser, tmp_path / "huge.bin")
    message(browser, "exceed the maximum allowed size")
    click(browser, "#redraw")
    message(browser, "choose a picture first")
    digit(tmp_path / "digit.png")
    upload(browser, tmp_path / "digit.png")
    shown(browser)


def test_images_are_shown_while_they_are_drawn(browser):
    script = """
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector('#status').innerText))
            .observe(document.body, {subtree: true, childList: true, characterData: true});
    """
    browser.execute_script(script)
    click(browser, "#generate")
    until(lambda: "16 of 16" in "".join(browser.execute_script("return window.seen")))
    seen = {text for text in browser.execute_script("return window.seen") if "of 16" in text}
    assert len(seen) > 2
    (sheet,) = images(browser, "#images")
    assert sheet.shape == (152 + 6, 4 * 134 + 6, 3)


def test_the_other_tabs_show_what_they_promise(browser, tmp_path):
    tab(browser, "From class to class")
    click(browser, "#interpolate")
    (first,) = images(browser, "#between")
    slider = only(browser, "#share input[type=range]")
    slider.send_keys(keys.Keys.END)
    until(lambda: slider.get_attribute("value") == "100")
    # So small a model draws the same for every class.
    assert images(browser, "#between")[0].shape == first.shape
    digit(tmp_path / "digit.png")
    upload(browser, tmp_path / "digit.png")
    shown(browser)
    tab(browser, "Compare tokenizers")
    click(browser, "#compare")
    says(browser, "#table", "1.000")  # bits a pixel
    tab(browser, "Bits of a token")
    click(browser, "#look")
    says(browser, "#words", "row 0, column 0")
    board = only(browser, "#board img")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", board)
    # Not its middle, where four tokens meet.
    actions.ActionChains(browser).move_to_element_with_offset(board, 20, 20).click().perform()
    says(browser, "#words", "row 2, column 2")
    assert images(browser, "#planes")
