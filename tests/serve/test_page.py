"""The page in a browser: adapters answer side by side, by keyboard alone, and nothing else is asked."""

from __future__ import annotations

import json
import time

import pytest
from support import served
from support.browser import PATH, Browser

from veneer.serve.http.running import Background

pytestmark = pytest.mark.skipif(PATH is None, reason="Chromium is missing; install Debian's chromium")
ANSWERS = """[...document.querySelectorAll("article")].map(a => [a.querySelector("h2").textContent,
    a.querySelector("pre").textContent, a.querySelector(".note").textContent])"""
DONE = """document.querySelectorAll("article").length &&
    !document.querySelector('article[aria-busy="true"]')"""


@pytest.fixture
def page(server, tmp_path):
    with Background(server) as web:
        browser = Browser(tmp_path)
        try:
            browser.call("Page.navigate", url=web.url)
            browser.until('document.querySelectorAll(".adapter").length')
            yield browser, web
        finally:
            browser.close()


def focused(browser):
    return browser.value("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


def tab_to(browser, wanted):
    """Presses Tab until the element that `wanted` names has the focus."""
    for _ in range(60):
        browser.press("Tab", code=9)
        if focused(browser) == wanted:
            return
    raise AssertionError(f"Tab never reached {wanted!r}")


def fill(browser, id, value):
    """Replaces a field's content by typing."""
    tab_to(browser, id)
    browser.press("a", code=65, ctrl=True)
    browser.value("document.activeElement.select()")
    browser.call("Input.insertText", text=value)


def test_adapters_answer_side_by_side_by_keyboard(page, server):
    browser, web = page
    names = browser.value('[...document.querySelectorAll(".adapter")].map(r => r.dataset.name)')
    assert names == sorted(served.ADAPTERS)
    assert "6 adapters" in browser.until(
        'document.getElementById("state").textContent.includes("adapters") &&'
        ' document.getElementById("state").textContent'
    )
    tab_to(browser, "sum")
    browser.press(" ", code=32, text=" ")
    tab_to(browser, "Strength of formal")
    for _ in range(6):
        browser.press("ArrowLeft", code=37)
    tab_to(browser, "Strength of french")
    browser.press("ArrowLeft", code=37)
    fill(browser, "prompt", "the cat sat")
    browser.press("Tab", code=9)
    assert focused(browser) == "tokens"
    browser.value("document.activeElement.select()")
    browser.call("Input.insertText", text="12")
    fill(browser, "temperature", "0")
    browser.value('document.getElementById("prompt").focus()')
    browser.press("Enter", code=13, ctrl=True, text="\r")
    browser.until(DONE)
    shown = browser.value(ANSWERS)
    strengths = {"formal at 0.7": "formal@0.7", "french at 0.95": "french@0.95"}
    asked = {"tiny": None, **strengths, "formal at 0.7 + french at 0.95": "formal@0.7+french@0.95"}
    assert [title for title, _, _ in shown] == list(asked)
    for title, text, note in shown:
        answer = server.complete("the cat sat", asked[title], max_tokens=12, temperature=0)
        assert text == answer.text and note.startswith(f"{answer.completion_tokens} tokens, ")
    assert len({text for _, text, _ in shown}) > 1
    places = browser.value('[...document.querySelectorAll(".adapter .note")].map(n => n.textContent)')
    assert set(places) <= {"in the bank", "in memory", "on the disk"}
    _nothing_else(browser, web)


def test_an_error_and_a_stop_are_shown(page, server, monkeypatch):
    browser, web = page
    step = server.engine.runner.step

    def slow(works, *, decoding):
        time.sleep(0.05)
        return step(works, decoding=decoding)

    monkeypatch.setattr(server.engine.runner, "step", slow)
    browser.value('document.getElementById("prompt").value = "cat ".repeat(400)')
    browser.value('document.getElementById("form").requestSubmit()')
    browser.until(DONE)
    assert "at most 256 tokens" in browser.value(ANSWERS)[0][2]
    browser.value('document.getElementById("prompt").value = "the cat"')
    browser.value('document.getElementById("tokens").value = 240')
    browser.value('document.getElementById("form").requestSubmit()')
    browser.until('document.querySelector("article pre").textContent.length')
    browser.value('document.getElementById("stop").click()')
    browser.until(DONE)
    assert browser.value(ANSWERS)[0][2] == "stopped" and browser.value(
        'document.getElementById("stop").disabled'
    )
    deadline = time.monotonic() + 5
    while server.engine.known and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.engine.known
    _nothing_else(browser, web)


def _nothing_else(browser, web):
    """Asserts that the page asked this server only, and raised nothing."""
    browser.value("1")
    sent = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert sent and all(url.startswith((web.url, "data:")) for url in sent), sent
    assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    policy = [e for e in browser.events if "Content Security Policy" in json.dumps(e)]
    assert policy == []
