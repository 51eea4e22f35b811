"""The playground in a real browser and a server of its routes; and what its files may not hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS
from tests.fixtures.browser import Browser, find_browser
from tests.fixtures.chat_server import (
    ANSWERS,
    HOSTILE,
    PLAYGROUND,
    STATEMENT,
    VERDICT,
    ChatServer,
    chat_server,
)

CHROMIUM = find_browser()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
READY = "document.querySelectorAll('.column').length > 0"
IDLE = "document.getElementById('stop').hidden && !document.querySelector('.answer.live')"
CTRL = 2


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server() as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    found = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(server: ChatServer, browser: Browser) -> Iterator[Browser]:
    """The page as a visitor sees it who was never here."""
    server.forget()
    browser.resize(1280, 800)
    browser.prefer("light")
    if browser.evaluate("location.protocol") == "http:":
        browser.evaluate("localStorage.clear(); sessionStorage.clear()")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(server.url, READY)
    yield browser
    browser.evaluate("document.getElementById('stop').click()")


def visit(page: Browser, server: ChatServer, *models: str) -> None:
    """Open the page with these models beside the base, all shown."""
    server.models = ["base", *(name for name in models if "@" in name)]
    page.evaluate(f"localStorage.setItem('rlprompt.shown', {chr(10).join(models)!r})")
    page.open(f"{server.url}?{len(models)}", READY)


def ask(page: Browser, text: str) -> None:
    page.evaluate(
        f"{{ const q = document.getElementById('question'); q.focus(); q.value = {text!r}; "
        "q.dispatchEvent(new Event('input')) }"
    )
    page.press("Enter", "Enter", CTRL)


def shown(page: Browser) -> list[str]:
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('.column')].filter(e => e.offsetParent !== null)"
        ".map(e => e.dataset.model)"
    )
    return found


def in_column(model: str, selector: str) -> str:
    return f"document.querySelector('[data-model=\"{model}\"] {selector}')"


@needs_browser
def test_base_written_and_learned_stand_side_by_side(page: Browser) -> None:
    assert shown(page) == ["base", "base@written", "base@concise"]
    names = page.evaluate("[...document.querySelectorAll('.chip')].map(e => e.textContent)")
    assert names == ["1base", "2your text", "3written", "4concise"]
    assert page.evaluate(f"{in_column('base@concise', '.tag.good')}.textContent") == "certified"
    assert page.complaints == []


@needs_browser
def test_everything_comes_from_the_server(page: Browser, server: ChatServer) -> None:
    assert len(page.requests) >= 5
    assert [each for each in page.requests if not each.startswith((server.url, "data:"))] == []


@needs_browser
def test_one_question_is_answered_by_all_with_rewards(page: Browser, server: ChatServer) -> None:
    ask(page, "How do I keep bread fresh?")
    page.wait(f"{IDLE} && document.querySelectorAll('.reward.best').length === 2")
    for model in ("base", "base@written"):
        assert page.evaluate(f"{in_column(model, '.answer-text')}.textContent") == ANSWERS[model]
    learned = "[data-model='base@concise']"
    text = page.evaluate(f'document.querySelector("{learned}").innerText')
    assert ANSWERS["base@concise"] in text and "20 tokens" in text and "b41e7f02" in text
    best = page.evaluate(
        "[...document.querySelectorAll('.reward.best')].map(e => e.textContent + "
        "e.closest('.column').dataset.model)"
    )
    assert best == ["concise 0.957base@concise", "relevance 0.930base@concise"]
    assert {each["model"] for each in server.asked} == {"base", "base@written", "base@concise"}
    assert {each["seed"] for each in server.asked} == {0}
    assert all(each["stream"] and each["max_tokens"] == 128 for each in server.asked)


@needs_browser
def test_a_text_of_the_visitor_goes_to_the_base(page: Browser, server: ChatServer) -> None:
    visit(page, server, "your text")
    page.evaluate(
        "{ const w = document.getElementById('written'); w.value = ' Be a pirate. '; "
        "w.dispatchEvent(new Event('change')) }"
    )
    ask(page, "hello")
    page.wait(f"{IDLE} && document.querySelectorAll('.answer').length")
    (asked,) = server.asked
    assert asked["model"] == "base"
    assert asked["messages"] == [
        {"role": "system", "content": "Be a pirate."},
        {"role": "user", "content": "hello"},
    ]


@needs_browser
def test_a_conversation_goes_on_and_is_forgotten(page: Browser, server: ChatServer) -> None:
    visit(page, server, "base@concise")
    for text in ("one", "two"):
        ask(page, text)
        page.wait(f"{IDLE} && document.getElementById('question').value === ''")
    assert [each["role"] for each in server.asked[-1]["messages"]] == ["user", "assistant", "user"]
    page.evaluate("document.getElementById('reset').click()")
    ask(page, "three")
    page.wait(IDLE)
    assert [each["content"] for each in server.asked[-1]["messages"]] == ["three"]


@needs_browser
def test_text_of_a_model_and_of_a_user_is_never_markup(page: Browser, server: ChatServer) -> None:
    visit(page, server, "base@hostile", f"base@{HOSTILE}")
    ask(page, HOSTILE)
    page.wait(f"{IDLE} && {in_column('base@hostile', '.rewards')}.textContent")
    assert page.evaluate(f"{in_column('base@hostile', '.answer-text')}.textContent") == HOSTILE
    assert page.evaluate("document.querySelectorAll('main img, main script, nav img').length") == 0
    assert page.evaluate("window.hacked === undefined")


@needs_browser
def test_escape_stops_an_answer_at_the_server_too(page: Browser, server: ChatServer) -> None:
    visit(page, server, "base@endless")
    ask(page, "go on")
    page.wait(f"{in_column('base@endless', '.answer-text')}.textContent.length > 20")
    assert page.evaluate("document.getElementById('send').disabled") is True
    page.press("Escape", "Escape")
    page.wait(f"{IDLE} && {in_column('base@endless', '.facts')}.textContent.includes('stopped')")
    for _ in range(600):
        if server.open_streams == 0:
            break
        page.evaluate("new Promise(done => setTimeout(done, 50))")
    assert server.open_streams == 0


@needs_browser
def test_numbers_switch_prompts(page: Browser) -> None:
    page.evaluate("document.activeElement.blur()")
    page.press("3", "Digit3")
    assert shown(page) == ["base", "base@concise"]
    page.press("2", "Digit2")
    assert shown(page) == ["base", "your text", "base@concise"]
    page.press("0", "Digit0")
    assert len(shown(page)) == 4
    page.evaluate("document.getElementById('question').focus()")
    page.press("1", "Digit1")
    assert len(shown(page)) == 4  # it was typed
    page.press("1", "Digit1", 1)
    assert "base" not in shown(page)
    page.evaluate("document.activeElement.blur()")
    for key in "234":
        page.press(key, f"Digit{key}")
    assert len(shown(page)) == 1  # the last one stays


@needs_browser
def test_verdict_certificate_and_history_are_told(page: Browser) -> None:
    page.evaluate(f"{in_column('base@concise', '.column-head button')}.click()")
    text = page.evaluate("document.getElementById('sheet').innerText")
    assert VERDICT in text and STATEMENT in text
    assert "prod: nothing → version 1" in text and "ada@lab" in text
    assert "prod: version 1 → version 1 (90%), version 2 (10%)" in text
    page.press("Escape", "Escape")
    page.wait("!document.querySelector('dialog[open]')")
    page.evaluate(f"{in_column('base@written', '.column-head button')}.click()")
    text = page.evaluate("document.getElementById('sheet').innerText")
    assert "No run has compared it yet." in text and "nothing is promised" in text


@needs_browser
def test_a_key_is_asked_for_and_kept_for_the_session_only(
    page: Browser, server: ChatServer
) -> None:
    server.key = "secret-key"
    page.open(server.url + "?key", "document.getElementById('notice')?.hidden === false")
    assert "this key is not known; give another (401)" in page.evaluate("document.body.innerText")
    page.evaluate(
        "{ const k = document.getElementById('key'); k.value = 'secret-key'; "
        "k.dispatchEvent(new Event('change')) }"
    )
    page.wait(f"{READY} && document.getElementById('notice').hidden")
    ask(page, "hello")
    page.wait(f"{IDLE} && document.querySelectorAll('.reward').length")
    assert page.evaluate("Object.values(sessionStorage).join()") == "secret-key"
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage) + location.href")


@needs_browser
def test_what_goes_wrong_is_told_where_it_went_wrong(page: Browser, server: ChatServer) -> None:
    visit(page, server, "base@busy", "base@broken", "base@concise")
    server.has_rewards = False
    ask(page, "hello")
    page.wait(f"{IDLE} && document.querySelectorAll('.failed').length === 2")
    busy = page.evaluate(f"{in_column('base@busy', '.failed')}.textContent")
    assert busy == "too many requests are waiting (429, try again in 7 s)"
    broken = page.evaluate(f"{in_column('base@broken', '.answer')}.innerText")
    assert "It begins well and" in broken and "the prompt was unloaded" in broken
    page.wait(f"{in_column('base@concise', '.facts')}.textContent")
    assert page.evaluate("document.querySelectorAll('.reward').length") == 0


@needs_browser
def test_dark_and_light_follow_the_system_and_the_button(page: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.prefer("dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(ground) == light
    page.evaluate("location.reload()")
    page.wait(READY)
    assert page.evaluate(ground) == light


@needs_browser
def test_it_fits_a_phone(page: Browser) -> None:
    page.resize(380, 740, is_phone=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    assert shown(page) == ["base"]
    page.evaluate("document.querySelectorAll('.chip')[3].click()")
    assert shown(page) == ["base@concise"]
    ask(page, "How do I keep bread fresh?")
    page.wait(f"{IDLE} && document.querySelectorAll('.reward').length")
    box = page.evaluate("document.getElementById('send').getBoundingClientRect().toJSON()")
    assert box["right"] <= 380 and box["bottom"] <= 740


def test_the_files_need_nothing_from_elsewhere_and_make_no_markup_of_texts() -> None:
    assert sorted(path.name for path in PLAYGROUND.iterdir()) == [
        "app.js",
        "index.html",
        "style.css",
    ]
    code = (PLAYGROUND / "app.js").read_text(encoding="utf-8")
    forbidden = r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function|import)\b"
    assert re.findall(forbidden, code) == []
    page = (PLAYGROUND / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in page
    assert not re.search(r"\son\w+=|style=|<script>|<style", page)
    for path in PLAYGROUND.iterdir():
        addresses = re.findall(r"https?://[^\s'\"]+", path.read_text(encoding="utf-8"))
        assert [each for each in addresses if each != "http://www.w3.org/2000/svg"] == []


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_the_pictures_are_small(name: str) -> None:
    picture = Path(DOCS / "figures" / f"playground_{name}.png")
    assert 10_000 < picture.stat().st_size < 150_000
