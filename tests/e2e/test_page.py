"""The page in a real browser: it loads, streams a chat, and tells where the time went."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.e2e.server_process import ServerProcess, running

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 60_000
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1280, "height": 1000}
        )
        context.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield context
        context.close()


class Visit:
    """A page, what its console said, and where its requests went."""

    def __init__(self, browser: BrowserContext, url: str) -> None:
        self.page: Page = browser.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self._url = url
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._requested)
        self.page.goto(url)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _requested(self, request: Request) -> None:
        if not request.url.startswith(f"{self._url}/"):
            self.elsewhere.append(request.url)

    def tab_to(self, selector: str) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(60):
            if self.page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"the keyboard does not reach {selector}")

    def close(self) -> None:
        self.page.close()
        assert (self.complaints, self.elsewhere) == ([], [])


@pytest.fixture
def visit(browser: BrowserContext, server: ServerProcess) -> Iterator[Visit]:
    visit = Visit(browser, server.url)
    expect(visit.page.locator("#health")).to_have_attribute("data-state", "good")
    yield visit
    visit.close()


def test_a_chat_its_lane_and_its_waterfall_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    visit.tab_to("#message")
    page.keyboard.type("Tell me a story.")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .user")).to_contain_text("Tell me a story.")
    said = page.locator("#chat .assistant .said")
    expect(said).to_contain_text(
        re.compile(r"first token after [\d.]+ m?s, [\d,]+ tokens, .*tokens/s")
    )
    assert len(page.locator("#chat .assistant").inner_text()) > 40
    expect(page.locator("#announcer")).to_contain_text("The answer is complete")

    page.keyboard.press("Shift+Tab")
    visit.tab_to("#chat .assistant .said button")
    page.keyboard.press("Enter")
    check_waterfall(page)
    page.keyboard.press("Escape")
    expect(page.locator("#waterfall")).not_to_be_visible()
    expect(said.locator("button")).to_be_focused()

    page.locator("#main").focus()
    visit.tab_to(".lane")  # the first may be another test's
    page.keyboard.press("Home")
    page.keyboard.press("End")
    expect(page.locator(".lane:focus")).to_have_attribute(
        "aria-label", re.compile(r"chatcmpl-\w+: ended, ")
    )
    page.keyboard.press("Enter")
    check_waterfall(page)
    page.keyboard.press("Escape")
    expect(page.locator(".lane:focus")).to_have_count(1)


def check_waterfall(page: Page) -> None:
    expect(page.locator("#waterfall")).to_be_visible()
    expect(page.locator("#verdict")).to_have_text(
        re.compile(r"\d+ % of [\d.]+ m?s (went|were|passed)")
    )
    stages = page.locator("#fall tr td:first-child").all_inner_texts()
    assert {stage.split("\n")[0] for stage in stages} >= {"prefill", "decode"}


def test_the_mouse_and_the_list_of_recent_requests(visit: Visit, server: ServerProcess) -> None:
    page = visit.page
    page.emulate_media(reduced_motion="reduce")
    page.request.post(
        f"{server.url}/v1/completions",
        data={"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "request_id": "by-mouse"},
    )
    lane = page.locator('.lane[data-id="cmpl-by-mouse"]')
    lane.click(force=True)
    check_waterfall(page)
    expect(page.locator("#facts")).to_contain_text("200 tokens")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("list", name="Recent requests").get_by_role("button").first.click()
    check_waterfall(page)
    expect(page.locator("#waterfall-title")).to_have_text("cmpl-by-mouse")
    page.keyboard.press("Escape")
    page.get_by_label("Id of a request or answer").fill("by-mouse")
    page.keyboard.press("Enter")
    check_waterfall(page)


def test_what_a_screen_reader_finds(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#kv-text")).to_contain_text("free")
    for role in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
    for name in ("Now", "Requests, the last 30 seconds", "Playground", "Why was this slow?"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    assert page.locator("canvas:not([aria-hidden=true])").count() == 0
    unnamed = "e => e.filter(b => !(b.textContent.trim() || b.getAttribute('aria-label'))).length"
    assert page.eval_on_selector_all("button", unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off(visit: Visit, width: int, scheme: str) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(14, 19, 24)") == (scheme == "dark")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log: Path = tmp_path_factory.mktemp("server") / "log"
    process = ServerProcess(log, "--worker", "simulated", "--api-keys", "sesame,other")
    with running(process):
        yield process


def test_the_page_asks_for_the_key_and_shows_its_holders_requests(
    browser: BrowserContext, locked: ServerProcess
) -> None:
    visit = Visit(browser, locked.url)
    page = visit.page
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("does not know")
    page.get_by_label("Key", exact=True).fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#health")).to_have_attribute("data-state", "good")
    for key in ("other", "sesame"):
        page.request.post(
            f"{locked.url}/v1/completions",
            headers={"authorization": f"Bearer {key}"},
            data={"prompt": "a", "request_id": f"of-{key}"},
        )
    expect(page.locator('.lane[data-id="cmpl-of-sesame"]')).to_have_count(1)
    expect(page.locator("#recent li")).to_have_count(1)
    expect(page.locator('.lane[data-id="cmpl-of-other"]')).to_have_count(0)
    page.reload()
    expect(page.locator("#health")).to_have_attribute("data-state", "good")
    page.get_by_role("button", name="Forget the API key").click()
    expect(page.locator("#key-dialog")).to_be_visible()
    # A browser's console tells of every 401.
    visit.complaints = [text for text in visit.complaints if "401" not in text]
    visit.close()
