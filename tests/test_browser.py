"""The page in a real browser: what reloads, keys and links do, and that nothing leaves the host."""

from __future__ import annotations

import json
import shutil
import time
from urllib.request import urlopen

import pytest
from serving import serving

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("selenium", reason="Selenium, which drives the browser, is not installed")

from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium and its driver are not installed")
PATIENCE = 30  # seconds; a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def base(tiny_model):
    with serving(str(tiny_model)) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1000,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, base):
    """Opens addresses; afterwards, nothing was complained of and nothing was asked of another host."""
    browser.get_log("performance")
    browser.get_log("browser")
    yield Page(browser, base)
    assert browser.get_log("browser") == []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            assert message["params"]["request"]["url"].startswith((base, "data:")), message["params"]["request"]["url"]


class Page:
    def __init__(self, browser, base):
        self.browser, self.base = browser, base

    def open(self, address):
        self.browser.get(self.base + address)
        self.wait(lambda: self.run("return document.getElementById('face')?.naturalWidth > 0"))
        return self

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition):
        return WebDriverWait(self.browser, PATIENCE, 0.05).until(lambda _: condition())

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def find(self, name):
        return self.browser.find_element(By.ID, name)

    @property
    def image(self):
        """The address of the image that is shown."""
        return self.run("return document.getElementById('face').src").removeprefix(self.base)

    @property
    def address(self):
        return self.browser.current_url.removeprefix(self.base)

    def changes(self, action):
        """The image after an action, which must be another one."""
        before = self.image
        action()
        self.wait(lambda: self.image != before)
        return self.image


def test_a_reload_is_somebody_new(page):
    images = [page.open("/").image for _ in range(3)]
    assert len(set(images)) == 3


def test_space_and_button_bring_the_next_without_a_reload(page):
    page.open("/")
    page.run("window.here = true")
    images = [page.image, page.changes(lambda: page.press(Keys.SPACE)), page.changes(page.find("next").click)]
    images += [page.changes(lambda: page.press(Keys.SPACE)), page.changes(lambda: page.press(Keys.ARROW_RIGHT))]
    assert len(set(images)) == 5
    assert page.run("return window.here") and page.address == "/"
    assert page.find("permalink").get_attribute("href") == page.base + page.image.removesuffix(".png")
    assert "does not exist" in page.find("news").get_attribute("textContent"), "told to screen readers"


def test_a_permalink_is_the_same_image_for_ever(page):
    shown = page.open("/").image
    page.find("permalink").click()
    page.wait(lambda: page.address != "/")
    assert page.image == shown
    first, second = (urlopen(page.base + shown).read() for _ in range(2))
    assert first == second
    page.open(page.address)
    assert page.image == shown


def test_on_a_permalink_the_address_follows_and_back_leads_back(page):
    page.open("/tiny/alice%40example.com")
    assert page.image == "/tiny/alice@example.com.png"
    shown = page.changes(lambda: page.press(Keys.SPACE))
    assert page.address == shown.removesuffix(".png")
    page.changes(page.browser.back)
    assert page.image == "/tiny/alice%40example.com.png" and page.address.startswith("/tiny/alice")


def test_a_walk_arrives_at_the_next(page):
    page.open("/tiny/1")
    shown = page.changes(lambda: page.press("w"))
    page.wait(page.find("walk").is_enabled)
    assert shown.endswith(".png") and page.address == shown.removesuffix(".png")
    asked = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert sum("frame=" in name for name in asked) == 23


def test_the_slider_changes_how_unusual_the_face_is(page):
    page.open("/tiny/1")
    page.find("truncation").send_keys(Keys.HOME)
    page.wait(lambda: page.image == "/tiny/1.png?truncation=0")
    page.wait(lambda: page.address == "/tiny/1?truncation=0")
    assert page.find("download").get_attribute("href").endswith("/tiny/1.png?truncation=0")
    page.open(page.address)
    assert page.find("truncation").get_attribute("value") == "0"
    assert page.changes(page.find("next").click).endswith("truncation=0")


def test_the_recipe_is_shown_and_put_away(page):
    page.open("/tiny/1")
    page.find("recipe").click()
    dialog = page.find("recipe-dialog")
    page.wait(dialog.is_displayed)
    assert page.find("recipe-command").text == "tpdne generate tiny --seed 1"
    assert json.loads(page.find("recipe-json").text)["seed"] == 1
    page.press(Keys.ESCAPE)
    page.wait(lambda: not dialog.is_displayed())


def test_everything_one_can_use_has_a_name(page):
    page.open("/")
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {}
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in ("button", "link", "slider", "image", "heading"):
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert all(all(names) for names in named.values()), named
    assert len(named["button"]) == 2 and len(named["slider"]) == 1 and len(named["image"]) == 1


def test_the_page_that_explains_moves(page):
    page.browser.get(page.base + "/how")
    slider = page.wait(lambda: page.find("walk-position"))
    for _ in range(3):
        slider.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: "frame=3" in page.find("walk-image").get_attribute("src"))
    page.wait(lambda: page.run("return document.getElementById('walk-image').naturalWidth > 0"))
    time.sleep(0.2)  # late complaints would come now


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_makes_it_scroll_sideways(page, width):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    for address in ("/", "/how"):
        page.browser.get(page.base + address)
        assert page.run("return document.documentElement.scrollWidth") <= width, address
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1440, 900), (390, 664)])
def test_face_and_controls_fit_without_scrolling(page, width, height):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        page.open("/")
        assert page.run("return document.documentElement.scrollHeight") <= height
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_phone_on_its_side_the_controls_are_beside_the_face(page):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 844, "height": 390, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.open("/")
        bottom = "document.querySelector(name).getBoundingClientRect().bottom"
        bottoms = page.run(f"return ['#face', '#next', '.links'].map(name => {bottom})")
        assert max(bottoms) <= 390, "all of it is seen at once"
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
