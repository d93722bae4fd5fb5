"""The playground, driven as people do. Needs Chromium: `apt-get install chromium` or `playwright install chromium`."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from polymerge.engine.local.batching import BatchingEngine
from polymerge.serve.app import create_app
from polymerge.serve.settings import ServeSettings
from tests.serve.conftest import KEY, ScriptedPipeline, ScriptedRouter, Server, running

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except Error:
            pytest.skip("there is no Chromium")
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, opened as a browser that was given a key."""
    context = browser.new_context(http_credentials={"username": "me", "password": KEY})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if _unexpected(message) else None)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    expect(page.locator("#chips button")).to_have_count(3)
    yield page
    assert not problems
    assert all(url.startswith((server.url, "data:")) for url in asked)  # nothing else is asked
    context.close()


def _unexpected(message: Any) -> bool:
    return message.type == "error" and "status of 400" not in message.text


def say(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    expect(page.locator("#send")).to_be_visible(timeout=20_000)


def test_a_question_streams_to_an_answer_with_expert_confidence_and_rate(page: Page) -> None:
    page.fill("#tokens", "40")
    say(page, "w11 w20")
    answer = page.locator(".answer")
    expect(answer.locator(".badge")).to_have_text("e1")
    expect(answer.locator(".confidence")).to_have_text("90% one")
    expect(answer.locator(".text")).to_have_text(re.compile(r"w\d+ w\d+"))
    expect(answer.locator(".foot")).to_have_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s · first after \d+ ms"))
    say(page, "w20")  # unsure: the conversation keeps its expert
    expect(page.locator(".badge").last).to_have_text("e1")
    expect(page.locator(".tag", has_text="kept")).to_have_count(1)


def test_an_expert_is_pinned_and_two_are_compared(page: Page) -> None:
    page.fill("#tokens", "10")
    page.locator("#chips button", has_text="e2").click()
    say(page, "w10")
    expect(page.locator(".badge")).to_have_text("e2")
    page.click("#clear")
    expect(page.locator(".answer")).to_have_count(0)
    page.check("#compare")
    page.select_option("#right", "average")
    say(page, "w10 w30")
    expect(page.locator(".pair.two .badge")).to_have_text(["e2", "average"])


def test_thoughts_are_folded_and_unfold(page: Page) -> None:
    page.select_option("#left", "staged")
    say(page, "w10")
    expect(page.locator(".text")).to_have_text("thought about: w10")
    thoughts = page.locator("details div")
    expect(thoughts).to_be_hidden()
    page.click("summary")
    expect(thoughts).to_have_text("w20 w21")


def test_what_a_user_or_a_model_writes_is_never_markup(page: Page) -> None:
    page.select_option("#left", "staged")
    say(page, "<img src=x onerror=alert(1)><b>w10</b>")
    expect(page.locator(".text")).to_contain_text("<b>w10</b>")
    assert page.locator("#talk img, #talk b").count() == 0


def test_an_error_is_shown_and_the_page_goes_on(page: Page) -> None:
    page.fill("#tokens", "1000")
    with page.expect_response(lambda response: response.status == 400):
        page.fill("#input", "w10")
        page.press("#input", "Enter")
    expect(page.locator(".bad")).to_contain_text("at most 100")
    page.fill("#tokens", "5")
    say(page, "w10")
    expect(page.locator(".badge")).to_have_text("e0")


def test_without_a_key_there_is_no_page(server: Server) -> None:
    answer: Any = httpx2.get(server.url)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
    page = httpx2.get(server.url, auth=("me", KEY))
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(?!data:)", page.text)


@pytest.fixture
def kept(tmp_path: Path, engine: BatchingEngine) -> Iterator[Server]:
    """A server that keeps thumbs and needs no key."""
    app = create_app(engine, ScriptedRouter(), ScriptedPipeline(), ServeSettings(feedback=tmp_path / "thumbs.jsonl"))
    with running(app, engine) as started:
        yield started


def opened(browser: Browser, server: Server, width: int, **options: Any) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 800}, **options).new_page()
    page.goto(server.url)
    expect(page.locator("#chips button")).to_have_count(3)
    return page


def test_markdown_becomes_elements_and_never_markup(page: Page) -> None:
    lines = ["# Head", "**bold** and `code`", "- one", "- two", "", "```", "<b>x</b>", "```"]
    written = "\n".join([*lines, "[web](https://a.example) [no](javascript:alert(1))"])
    page.evaluate("text => { const box = make('div', 'text'); $('talk').append(box); write(box, text); }", written)
    box = page.locator("#talk .text")
    expect(box.locator("strong")).to_have_text("bold")
    expect(box.locator("li")).to_have_text(["one", "two"])
    expect(box.locator("pre")).to_have_text("<b>x</b>")
    links = box.locator("a")
    expect(links).to_have_count(1)
    assert links.first.get_attribute("href") == "https://a.example" and box.locator("b").count() == 0


def test_a_system_prompt_goes_first_and_again_takes_the_place_of_the_last_answer(page: Page) -> None:
    page.fill("#tokens", "6")
    page.click("#more summary")
    page.fill("#system", "w30 w31")
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
    say(page, "w10 w20")
    page.locator(".tools button", has_text="Again").click()
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
    expect(page.locator(".answer")).to_have_count(1)
    assert [[m["role"] for m in body["messages"]] for body in asked] == [["system", "user"]] * 2


def test_thumbs_are_kept_only_where_the_server_was_told_to(page: Page, browser: Browser, kept: Server) -> None:
    page.fill("#tokens", "5")
    say(page, "w11")
    expect(page.locator(".tools button", has_text="Right")).to_have_count(0)
    other = opened(browser, kept, 390)
    other.fill("#tokens", "5")
    say(other, "w11 w21")
    with other.expect_response("**/v1/feedback"):
        other.locator(".tools button", has_text="Wrong").click()
    expect(other.locator(".tools button[aria-pressed=true]")).to_have_text("Wrong")
    file = kept.app.state.service.settings.feedback
    assert json.loads(file.read_text()) == {"prompt": "w11 w21", "expert": "e1", "right": False}
    other.context.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_a_whole_conversation_fits_its_screen(browser: Browser, kept: Server, width: int, tmp_path: Path) -> None:
    page = opened(browser, kept, width, color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(lit := "getComputedStyle($('theme')).backgroundColor") == page.evaluate(
        "getComputedStyle($('send')).backgroundColor"
    )
    page.click("#theme")
    assert page.evaluate(lit) == "rgb(255, 255, 255)"
    page.check("#compare")
    page.select_option("#right", "e2")
    page.fill("#tokens", "12")
    say(page, "w11 w20")
    page.locator(".sure").first.click()
    expect(page.locator(".why").first).to_contain_text("about one")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=os.environ.get("POLYMERGE_SHOTS", str(tmp_path)) + f"/playground-{width}.png")
    axe = os.environ.get("POLYMERGE_AXE")  # axe.min.js, which is not in this repository
    for dark in (False, True) if axe else ():
        page.evaluate("dark => theme(dark)", dark)
        page.evaluate(Path(str(axe)).read_text())
        violations = page.evaluate(
            "axe.run().then(result => result.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
        )
        assert violations == []
    page.context.close()


def test_escape_stops_an_answer(page: Page) -> None:
    page.fill("#tokens", "100")
    page.fill("#input", "w10")
    page.press("#input", "Enter")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
