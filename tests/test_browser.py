"""The to-do app of docs/web.md in a real browser: Chromium, driven as a person would use it.

And what visitors send to it who are no browsers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

import pytest
from conftest import DEADLINE, Server, start_server
from doc_examples import ROOT
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from wire import Wire, request

import xs

pytestmark = pytest.mark.once

GUIDE = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")


def file_of_the_guide(name: str) -> str:
    """A file that the guide has the reader write."""
    found = re.search(rf"^\$ cat > {re.escape(name)} <<'END'\n((?:>.*\n)+?)> END$", GUIDE, re.M)
    assert found, name
    return "".join(f"{line[2:]}\n" for line in found.group(1).splitlines())


def registration(name: str) -> str:
    """The meta with which the guide registers a handler."""
    found = re.search(rf"xs append \./store {re.escape(name)}\.register --meta '(.*?)' <", GUIDE)
    assert found, name
    return found.group(1)


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver, "the tests need Chromium: tools/test installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


def serve(directory: str) -> tuple[Server, str]:
    """A server with a gateway, and the gateway's address."""
    running = start_server(directory, "--http", ":0")
    with xs.open(directory) as store:
        started = store.last("xs.start")
        assert isinstance(started, xs.Frame)
        return running, started.meta["http"][0]


def install(directory: str) -> None:
    """What the guide has the reader append."""
    with xs.open(directory) as store:
        store.append("todo.page", file_of_the_guide("page.html"))
        for name in ("web", "live"):
            script = file_of_the_guide(f"{name}.nu")
            store.append(f"{name}.register", script, meta=json.loads(registration(name)))
        for frame in store.cat(topic="web.registered,live.registered", follow=True):
            if frame.topic == "live.registered" and store.last("web.registered"):
                break
            if frame.topic == "web.registered" and store.last("live.registered"):
                break


def items(browser: webdriver.Chrome) -> list[str]:
    """The list as it is shown, read at one moment."""
    script = 'return [...document.querySelectorAll("li")].map((each) => each.innerText)'
    found: list[str] = browser.execute_script(script)
    return found


def wait_for_items(browser: webdriver.Chrome, wanted: list[str]) -> None:
    WebDriverWait(browser, DEADLINE).until(lambda _: items(browser) == wanted, str(wanted))


def add(browser: webdriver.Chrome, text: str) -> None:
    browser.find_element(By.NAME, "item").send_keys(text, Keys.ENTER)


def test_what_is_added_in_one_window_appears_in_another_and_survives_a_restart(
    store_dir: str, browser: webdriver.Chrome
) -> None:
    running, address = serve(store_dir)
    try:
        install(store_dir)
        browser.get(address)
        first = browser.current_window_handle
        browser.switch_to.new_window("window")
        browser.get(address)
        second = browser.current_window_handle

        add(browser, "buy milk")
        wait_for_items(browser, ["buy milk"])
        browser.switch_to.window(first)
        wait_for_items(browser, ["buy milk"])
        add(browser, "call Ada & <b>Bob</b> – ünïcode")
        browser.switch_to.window(second)
        wait_for_items(browser, ["buy milk", "call Ada & <b>Bob</b> – ünïcode"])
        browser.find_element(By.CSS_SELECTOR, "li").click()
        browser.switch_to.window(first)
        wait_for_items(browser, ["call Ada & <b>Bob</b> – ünïcode"])

        running.process.kill()
        running.process.wait()
        running, address = serve(store_dir)
        browser.get(address)
        wait_for_items(browser, ["call Ada & <b>Bob</b> – ünïcode"])
        add(browser, "after the restart")
        wait_for_items(browser, ["call Ada & <b>Bob</b> – ünïcode", "after the restart"])
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/items", None, 400),
        ("POST", "/done", b"", 400),
        ("POST", "/items", b"\xff\x00", 400),
        ("POST", "/done", b"\xff\x00", 400),
        ("POST", "/items", b"x" * 501, 400),
        ("POST", "/items", b"x" * (8 * 1024 * 1024 + 1), 400),
        ("POST", "/events", b"x", 404),
        ("HEAD", "/events", None, 404),
        ("GET", "/items", None, 404),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_no_request_takes_the_app_from_those_who_use_it(
    store_dir: str, method: str, path: str, body: bytes | None, status: int
) -> None:
    running, address = serve(store_dir)
    try:
        install(store_dir)
        port = int(address.rpartition(":")[2])
        with Wire(port) as window, Wire(port) as visitor:
            assert visitor.ask(method, path, body).status == status
            window.send(request("GET", "/events"))
            assert window.head()[0] == 200
            assert window.chunk() == b"data: []\n\n"
            assert visitor.ask("POST", "/items", b"buy milk").status == 204
            assert window.chunk() == b'data: ["buy milk"]\n\n'
        with xs.open(store_dir) as store:
            named = [each for each in store.cat(topic="http.response") if "request_id" in each.meta]
            assert len(named) == 1, "what was added is stored for the one window that there is"
            assert not list(store.cat(topic="web.unregistered,live.unregistered"))
    finally:
        running.stop()


def test_what_is_no_text_on_the_stream_keeps_nobody_from_the_list(store_dir: str) -> None:
    running, address = serve(store_dir)
    try:
        with xs.open(store_dir) as store:
            store.append("todo.added", b"\xff\x00")
            store.append("todo.added")
            store.append("todo.done")
        install(store_dir)
        with Wire(int(address.rpartition(":")[2])) as window:
            window.send(request("GET", "/events"))
            assert window.head()[0] == 200
            assert window.chunk() == b"data: [[255,0]]\n\n"
    finally:
        running.stop()
