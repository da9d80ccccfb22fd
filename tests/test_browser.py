"""The page in a real browser: what reloads, keys and links do, and that nothing leaves the host."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import contextmanager
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

    @contextmanager
    def screen(self, width, height, mobile=True):
        """For a while a screen of so many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

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


def test_what_is_asked_for_during_a_walk_ends_it(page):
    page.open("/tiny/1")
    page.changes(lambda: page.press(Keys.SPACE))
    canvas = page.find("walk-canvas")
    page.press("w")
    page.changes(page.browser.back)
    page.wait(lambda: not canvas.is_displayed())
    assert page.image == "/tiny/1.png" and page.address == "/tiny/1"
    page.press("w")
    assert canvas.is_displayed()
    page.find("truncation").send_keys(Keys.HOME)
    page.wait(lambda: not canvas.is_displayed())
    page.wait(lambda: page.image.endswith("?truncation=0"))
    assert page.image == "/tiny/1.png?truncation=0" and page.address == "/tiny/1?truncation=0"
    assert page.find("download").get_attribute("href") == page.base + page.image


def test_who_went_by_is_had_back(page):
    first = page.open("/").image
    second = page.changes(lambda: page.press(Keys.SPACE))
    assert page.changes(lambda: page.press(Keys.ARROW_LEFT)) == first
    second = page.changes(lambda: page.press(Keys.SPACE))
    page.browser.get(page.base + "/how")
    page.browser.back()
    page.wait(lambda: page.image == second)
    assert page.address == "/"
    page.browser.refresh()
    page.wait(lambda: page.run("return document.getElementById('face')?.naturalWidth > 0"))
    assert page.image not in (first, second), "a reload is still somebody new"


def test_how_unusual_anybody_is_outlives_a_reload(page):
    page.open("/")
    page.find("truncation").send_keys(Keys.HOME)
    page.wait(lambda: page.address == "/?truncation=0")
    assert page.changes(page.browser.refresh).endswith(".png?truncation=0")


def test_a_picture_that_cannot_be_had_is_told_to_everybody(page):
    page.open("/")
    try:
        page.browser.execute_cdp_cmd("Network.enable", {})
        page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*.png*"]})
        page.press(Keys.SPACE)  # the next is there already
        page.wait(lambda: "Another" in page.find("news").get_attribute("textContent"))
        page.press(Keys.SPACE)
        page.wait(page.find("news").is_displayed)
        page.wait(lambda: page.find("news").text.startswith("That picture could not be fetched."))
        page.browser.get(page.base + "/")
        page.wait(lambda: page.find("news").text.startswith("That picture could not be fetched."))
    finally:
        page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        page.browser.get_log("browser")  # that pictures were blocked
    page.changes(page.find("next").click)
    assert page.find("news").size == {"width": 1, "height": 1}, "for screen readers again"


def test_the_slider_changes_how_unusual_the_face_is(page):
    page.open("/tiny/1")
    page.find("truncation").send_keys(Keys.HOME)
    page.wait(lambda: page.image == "/tiny/1.png?truncation=0")
    page.wait(lambda: page.address == "/tiny/1?truncation=0")
    assert page.find("download").get_attribute("href").endswith("/tiny/1.png?truncation=0")
    page.open(page.address)
    slider = page.find("truncation")
    assert slider.get_attribute("value") == "0"
    assert page.changes(page.find("next").click).endswith("truncation=0")
    assert page.changes(lambda: slider.send_keys(Keys.SPACE)), "whoever touched the slider goes on with the keys"


def test_the_recipe_is_shown_and_put_away(page):
    page.open("/tiny/1")
    page.find("recipe").click()
    dialog = page.find("recipe-dialog")
    page.wait(dialog.is_displayed)
    assert page.find("recipe-command").text == "tpdne generate tiny.safetensors --seed 1"
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
    with page.screen(width, 700):
        for address in ("/", "/how"):
            page.browser.get(page.base + address)
            assert page.run("return document.documentElement.scrollWidth") <= width, address


@pytest.mark.parametrize(("width", "height"), [(320, 256), (360, 640), (640, 400)])
def test_nothing_is_cut_off_and_nothing_too_small_to_see(page, width, height):
    """320 x 256 is a screen of 1280 x 1024 at 400 %."""
    with page.screen(width, height):
        page.open("/")
        for name in ("#face", "#next", "#walk", "#truncation", ".links", "h1"):
            place = page.run("return document.querySelector(arguments[0]).getBoundingClientRect()", name)
            assert 0 <= place["left"] < place["right"] <= width, name
        page.browser.get(page.base + "/how")
        widths = page.run("return [...document.querySelectorAll('.row img')].map(image => image.clientWidth)")
        assert min(widths) >= 80


def test_a_large_picture_takes_the_room_there_is(page):
    with page.screen(2560, 1440, mobile=False):
        page.open("/")
        width = "return document.querySelector('.frame').clientWidth"
        assert page.run(width) == 544
        page.run("document.querySelector('figure').className = 'large'")
        assert page.run(width) == 1024


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1440, 900), (390, 664)])
def test_face_and_controls_fit_without_scrolling(page, width, height):
    with page.screen(width, height, mobile=width < 500):
        page.open("/")
        assert page.run("return document.documentElement.scrollHeight") <= height


def test_on_a_phone_on_its_side_the_controls_are_beside_the_face(page):
    with page.screen(844, 390):
        page.open("/")
        bottom = "document.querySelector(name).getBoundingClientRect().bottom"
        bottoms = page.run(f"return ['#face', '#next', '.links'].map(name => {bottom})")
        assert max(bottoms) <= 390, "all of it is seen at once"
