"""The page at `/` in a real browser, over the bundled pair and over scripted answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Page, Route, expect

from specinfer.async_llm import AsyncLLM
from specinfer.config import Speculation
from specinfer.serve.settings import ServerSettings
from specinfer.serve.state import Service
from tests.browser import CHROMIUM, chromium, opened
from tests.serving import MODEL, Held, pair, serving, until

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: scripts/install-browser installs one"
)

PROMPT = "Tell me a story about a dog."
CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = pair(
        drafters=["zoo:parley-draft", "ngram"],
        max_model_len=256,
        speculation=Speculation(tree="calibrated", max_nodes=12),
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def url(llm: AsyncLLM) -> Iterator[str]:
    with serving(Service(llm, ServerSettings(), MODEL)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as page:
        yield page


def ask(page: Page, prompt: str = PROMPT, *, num_tokens: int = 32, wait: bool = True) -> None:
    """Send, greedily, and wait for the end of the answer."""
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(num_tokens))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    if wait:
        finished(page)


def finished(page: Page) -> None:
    expect(page.locator(".message.assistant").last).to_have_attribute("aria-busy", "false")
    expect(page.locator("#send")).to_be_visible()
    page.evaluate("new Promise(requestAnimationFrame)")  # the last of it is drawn with a frame


def save_chat(page: Page) -> dict[str, Any]:
    """What "Save" downloads."""
    with page.expect_download() as download:
        page.click("#save-chat")
    chat: dict[str, Any] = json.loads(download.value.path().read_text(encoding="utf-8"))
    return chat


def go_to_branching_step(page: Page) -> dict[str, Any]:
    """Show a step that accepted some drafts and not all, and give it."""
    steps = save_chat(page)["turns"][-1]["steps"]
    for index, step in enumerate(steps):
        accepted = [node for node in step["nodes"] if node["accepted"]]
        if accepted and len(accepted) < len(step["nodes"]) - 1:
            page.locator("#step").evaluate(
                "(slider, value) => { slider.value = value;"
                " slider.dispatchEvent(new Event('input')); }",
                index + 1,
            )
            expect(page.locator("#step-words")).to_have_text(f"step {index + 1} of {len(steps)}")
            found: dict[str, Any] = step
            return found
    raise AssertionError("every step accepted all or nothing")


def sse(*chunks: dict[str, Any], done: bool = True) -> str:
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events)


def says(text: str, **more: Any) -> dict[str, Any]:
    """A chunk that adds text."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} | more


def answering(page: Page, body: str, status: int = 200, **headers: str) -> None:
    """Let every chat be answered with this."""

    def fulfill(route: Route) -> None:
        kind = "text/event-stream" if status == 200 else "application/json"
        route.fulfill(status=status, body=body, headers={"content-type": kind} | headers)

    page.route(CHAT, fulfill)


# --- the answer and its tree ----------------------------------------------------------------------


def test_an_answer_streams_and_every_token_shows_who_proposed_it(page: Page, url: str) -> None:
    ask(page)
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 32}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    text = answer["choices"][0]["message"]["content"]
    turn = save_chat(page)["turns"][-1]
    assert turn["content"] == text
    shown = page.locator(".message.assistant .tok").all_text_contents()
    assert "".join(shown) == "".join(text.split("\n"))  # lines are elements of their own

    styles = {"target": "src-target"}
    tokens = [token for step in turn["steps"] for token in step["emitted"] if token["text"].strip()]
    classes = page.locator(".message.assistant .tok").evaluate_all(
        "tokens => tokens.map(token => [token.textContent, token.className])"
    )
    for token, (piece, style) in zip(tokens, classes, strict=True):
        assert token["text"].strip("\n") == piece
        expected = styles.setdefault(token["source"], f"src-{len(styles) - 1}")
        assert expected in style.split()
    assert len(styles) >= 2
    legend = page.locator("#legend").inner_text()
    assert "parley-draft" in legend
    assert "target’s own" in legend


def test_the_tree_shows_the_accepted_path_and_the_rest_faded(page: Page) -> None:
    ask(page)
    step = go_to_branching_step(page)
    accepted = [node for node in step["nodes"] if node["accepted"]]
    assert page.locator("#tree .node.accepted").count() == len(accepted)
    assert page.locator("#tree .node.drafted").count() == len(step["nodes"]) - 1 - len(accepted)
    assert page.locator("#tree .node.target").count() == 1
    assert page.locator("#tree .edge").count() == len(step["nodes"])
    looks = page.locator("#tree .node.accepted .chip, #tree .node.drafted .chip").evaluate_all(
        "chips => chips.map(chip => [chip.parentNode.classList[1],"
        " getComputedStyle(chip).fill, getComputedStyle(chip).opacity])"
    )
    fills = {state: (fill, opacity) for state, fill, opacity in looks}
    assert fills["accepted"][0] != fills["drafted"][0]
    assert float(fills["accepted"][1]) == 1 > float(fills["drafted"][1])


def test_a_node_tells_p_q_and_source_under_pointer_and_focus(page: Page) -> None:
    ask(page)
    step = go_to_branching_step(page)
    node = next(node for node in step["nodes"] if node["accepted"])
    (slot,) = node["slots"][:1]
    page.hover(f'#tree .node[data-index="{node["id"]}"]')
    detail = page.locator("#detail")
    expect(detail).to_contain_text("accepted")
    name = slot["source"].split(":")[-1]
    expect(detail).to_contain_text(name)
    values = [float(value) for value in detail.locator(".value").all_text_contents()]
    assert values[0] == pytest.approx(node["p"], abs=0.006)
    assert values[1] == pytest.approx(slot["score"], abs=0.006)  # greedy drafts are picked
    words = page.locator(f'#tree .node[data-index="{node["id"]}"]').get_attribute("aria-label")
    assert words is not None
    assert name in words
    page.mouse.move(5, 5)
    expect(detail).to_contain_text("drafted tokens accepted")
    page.locator("#tree .node.root").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#tree .node:focus")).to_have_count(1)
    expect(detail.locator(".bar-row").first).to_contain_text("target")


def test_keys_slider_and_tokens_walk_through_the_steps(page: Page) -> None:
    ask(page)
    words = page.locator("#step-words")
    num_steps = len(save_chat(page)["turns"][-1]["steps"])
    expect(words).to_have_text(f"step {num_steps} of {num_steps}")
    page.locator("#messages").focus()
    page.keyboard.press("ArrowLeft")
    expect(words).to_have_text(f"step {num_steps - 1} of {num_steps}")
    page.keyboard.press("ArrowRight")
    expect(words).to_have_text(f"step {num_steps} of {num_steps}")
    page.locator("#step").focus()
    page.keyboard.press("Home")
    expect(words).to_have_text(f"step 1 of {num_steps}")
    page.locator('.tok[data-step="2"]').first.click()
    expect(words).to_have_text(f"step 3 of {num_steps}")
    expect(page.locator(".tok.shown").first).to_have_attribute("data-step", "2")
    page.locator("#prompt").fill("ab")
    page.keyboard.press("ArrowLeft")  # in a text, arrows move the cursor
    expect(words).to_have_text(f"step 3 of {num_steps}")


def test_figures_and_charts_are_drawn(page: Page) -> None:
    ask(page)
    expect(page.locator("#figures .tile b")).to_have_count(4)
    chat = save_chat(page)["turns"][-1]
    steps = chat["steps"][1:]
    tokens = sum(len(step["emitted"]) for step in steps)
    seconds = sum(sum(step["time_ms"].values()) for step in steps) / 1000
    expect(page.locator("#figures .tile b").first).not_to_have_text("–")
    rate, _, per_step, _ = page.locator("#figures .tile b").all_inner_texts()
    assert float(rate) == pytest.approx(tokens / seconds, rel=0.01)
    assert float(per_step) == pytest.approx(tokens / len(steps), abs=0.01)
    for chart in ("#rate-chart", "#accepted-chart"):
        is_drawn = page.locator(f"{chart} canvas").evaluate(
            "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
            ".data.some(value => value > 0)"
        )
        assert is_drawn


def test_comparing_with_plain_decoding(page: Page) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.method == "POST" else None)
    ask(page)
    page.click("text=Compare with plain")
    table = page.locator(".comparison")
    expect(table).to_contain_text("The same text, character for character.")
    assert re.search(r"tokens per step\s+[1-9][\d.]*\s+1\.00", table.inner_text())
    speculation = {"tree": "off"}
    assert [body.get("speculation") for body in asked] == [None, speculation]
    assert asked[0] | {"speculation": speculation} == asked[1]
    expect(page.locator("#rate-key")).to_contain_text("plain, measured")
    expect(page.locator("#figures")).to_contain_text("plain decoding, measured")


# --- the conversation -----------------------------------------------------------------------------


def test_settings_and_earlier_turns_are_sent(page: Page) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.method == "POST" else None)
    page.fill("#system", "Be brief.")
    page.fill("#top_p", "0.9")
    page.fill("#seed", "7")
    page.select_option("#speculation", "shape")
    page.fill("#shape", "2,1")
    ask(page, num_tokens=8)
    first = save_chat(page)["turns"][-1]["content"]
    ask(page, "And a cat?", num_tokens=8)
    assert asked[1] == {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And a cat?"},
        ],
        "temperature": 0,
        "top_p": 0.9,
        "max_completion_tokens": 8,
        "seed": 7,
        "speculation": {"tree": "2,1"},
        "stream": True,
        "stream_options": {"include_usage": True, "include_tree": True},
    }
    page.locator(".message.assistant").first.get_by_text("Again").click()
    finished(page)
    assert page.locator(".message").count() == 2  # what came after the answer has gone with it
    assert asked[2]["messages"] == asked[0]["messages"]
    page.reload()
    assert page.input_value("#seed") == "7"
    page.click("#new-chat")
    expect(page.locator(".welcome")).to_be_visible()


def test_stop_ends_the_answer_on_the_server_too(page: Page, llm: AsyncLLM) -> None:
    """Held within a step until the page has stopped."""
    for way in ("button", "key"):
        with pytest.MonkeyPatch.context() as patch:
            held = Held(llm, patch, lambda steps: len(steps) == 3)
            page.click("#new-chat")
            ask(page, num_tokens=240, wait=False)
            page.wait_for_selector(".message.assistant:last-child .tok")
            assert held.under_way.wait(60)
            if way == "button":
                page.click("#stop")
            else:
                page.keyboard.press("Escape")
            finished(page)
            expect(page.locator(".message.assistant").last).to_contain_text("stopped")
            held.go_on.set()
            until(lambda: not llm.llm.engine.has_work)
    turn = save_chat(page)["turns"][-1]
    assert turn["finish"] == "stopped"
    assert sum(len(step["emitted"]) for step in turn["steps"]) < 240


def test_model_text_is_never_markup(page: Page) -> None:
    text = (
        "# Title\n<img src=x onerror=alert(1)> **bold** and *soft* with `a <b> **c**`\n\n"
        "- one\n- two **2**\n\n1. first\n\n"
        "```js\nlet x = '<script>';\n\n// *no*\n```\nend ** of * it"
    )
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    answering(page, sse(*(says(piece) for piece in pieces)))
    ask(page)
    body = page.locator(".message.assistant .body")
    assert body.locator("img, script").count() == 0
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("strong").all_inner_texts() == ["bold", "2"]
    assert body.locator("em").all_inner_texts() == ["soft"]
    assert body.locator("p code").inner_text() == "a <b> **c**"
    assert body.locator("ul li").all_inner_texts() == ["one", "two 2"]
    assert body.locator("ol li").all_inner_texts() == ["first"]
    assert body.locator("pre").inner_text() == "let x = '<script>';\n\n// *no*"
    assert body.locator("p").last.inner_text() == "end ** of * it"
    expect(page.locator("#tree")).to_contain_text("Each step’s tree")  # this server sent none


def test_text_that_is_not_the_tokens_own_has_no_colour(page: Page) -> None:
    """A server may shape text between tokens and reader; trees may also come before their text."""
    root = {"id": 0, "parent": -1, "depth": 0, "token": "x", "token_id": 1, "p": 1, "slots": []}

    def tree(*texts: str) -> dict[str, Any]:
        emitted = [
            {"token": each, "token_id": 1, "source": "target", "p": 1, "text": each}
            for each in texts
        ]
        step = {"step": 1, "nodes": [root], "emitted": emitted, "time_ms": {"target": 1.0}}
        return {"tree": step | {"plain_ms": None, "num_sequences": 1}}

    answering(
        page,
        sse(
            says("", **tree("one ", "two")),
            says("one two three ", **tree(" three ")),
            says("[four]", **tree("four")),
        ),
    )
    ask(page)
    shown = page.locator(".tok").evaluate_all("all => all.map(t => [t.textContent, t.className])")
    assert [text for text, _ in shown] == ["one ", "two", " three ", "[four]"]
    assert ["src-none" in style for _, style in shown] == [False, False, False, True]


# --- what goes wrong ------------------------------------------------------------------------------

REFUSAL = json.dumps({"error": {"message": "max_tokens is too large", "type": "invalid"}})
ERRORS: dict[str, tuple[str, int, dict[str, str], list[str]]] = {
    "refused": (REFUSAL, 400, {}, ["refuses this request", "400", "max_tokens is too large"]),
    "key": (REFUSAL, 401, {}, ["wants an API key", "401"]),
    "full": (REFUSAL, 503, {"Retry-After": "3"}, ["is full", "503", "again in 3 s"]),
    "crash": ("<h1>oh</h1>", 500, {}, ["The server failed", "500", "<h1>oh</h1>"]),
    "midway": (
        sse(says("Once"), {"error": {"message": "the step failed"}}),
        200,
        {},
        ["The server failed", "the step failed"],
    ),
    "cut": (sse(says("Once upon"), done=False), 200, {}, ["The answer broke off"]),
}


def test_errors_are_shown_in_words_and_can_be_tried_again(page: Page) -> None:
    for body, status, headers, words in ERRORS.values():
        page.click("#new-chat")
        answering(page, body, status, **headers)
        ask(page, num_tokens=8, wait=False)
        alert = page.get_by_role("alert")
        for each in words:
            expect(alert).to_contain_text(each)
        page.unroute(CHAT)
        alert.get_by_role("button", name="Try again").click()
        finished(page)
        assert page.get_by_role("alert").count() == 0
        assert len(page.locator(".message.assistant .body").inner_text()) > 10
        assert all(str(status) in each for each in page.complaints)  # type: ignore[attr-defined]
        page.complaints.clear()  # type: ignore[attr-defined]


def test_a_full_context_offers_a_new_chat(page: Page) -> None:
    ask(page, num_tokens=16)
    page.fill("#max_tokens", "250")  # of 256
    page.fill("#prompt", "And then?")
    page.press("#prompt", "Enter")
    finished(page)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("No room in the context")
    expect(page.locator(".message.assistant").last.get_by_role("button")).to_have_count(2)
    expect(page.locator("#tree .empty")).to_be_visible()  # the last answer's tree is gone
    alert.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0
    assert page.input_value("#prompt") == "And then?"
    page.press("#prompt", "Enter")
    finished(page)
    assert page.locator(".tok").count() > 0
    page.complaints.clear()  # type: ignore[attr-defined]


def test_a_server_that_is_away_and_comes_back(page: Page) -> None:
    page.context.set_offline(True)
    ask(page, wait=False)
    expect(page.get_by_role("alert")).to_contain_text("The server is away")
    expect(page.locator("#server")).to_have_attribute("data-state", "away")
    page.context.set_offline(False)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    page.complaints.clear()  # type: ignore[attr-defined]


def test_an_api_key_is_asked_for_and_sent(browser: Browser, llm: AsyncLLM) -> None:
    service = Service(llm, ServerSettings(api_key=["open sesame"]), MODEL)
    with serving(service) as url, opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("needs an API key")
        page.complaints.clear()  # type: ignore[attr-defined]
        page.fill("#api-key", "open sesame")
        page.press("#api-key", "Tab")
        expect(page.locator("#server")).to_have_attribute("data-state", "ready")
        ask(page, num_tokens=4)
        assert page.locator(".tok").count() > 0
        assert "open sesame" not in json.dumps(save_chat(page))


# --- files ----------------------------------------------------------------------------------------


def test_the_tree_is_exported_as_svg_and_png(page: Page) -> None:
    ask(page)
    step = go_to_branching_step(page)
    with page.expect_download() as download:
        page.click("#save-svg")
    source = download.value.path().read_text(encoding="utf-8")
    drawing = ElementTree.fromstring(source)
    texts = "".join(drawing.itertext())
    for node in step["nodes"]:
        assert node["token"].strip() in texts
    assert f"step {step['step']}" in texts
    assert not re.search(r"class=|style=|var\(|href=|tabindex=", source)
    assert 'stroke="rgb(' in source
    with page.expect_download() as download:
        page.click("#save-png")
    picture = download.value.path().read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert (
        width == 2 * round(float(drawing.get("width", "0")) - 0.5)
        or abs(width - 2 * float(drawing.get("width", "0"))) <= 2
    )
    assert height > 100
    assert len(picture) > 3000


def test_a_saved_chat_opens_again_and_another_file_does_not(page: Page, tmp_path: Path) -> None:
    ask(page)
    saved = save_chat(page)
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(saved), encoding="utf-8")
    page.reload()
    page.set_input_files("#chat-file", file)
    expect(page.locator(".message.user")).to_have_text(PROMPT)
    expect(page.locator("#tree svg")).to_be_visible()
    assert save_chat(page) == saved
    ask(page, "And then?", num_tokens=4)
    assert page.locator(".message").count() == 4
    for broken in ("[]", "no JSON", json.dumps(saved | {"turns": [{"role": "assistant"}]})):
        file.write_text(broken, encoding="utf-8")
        page.set_input_files("#chat-file", file)
        expect(page.get_by_role("alert").last).to_contain_text("cannot be opened")
        assert page.locator(".message").count() == 4


# --- looks ----------------------------------------------------------------------------------------

LUMINANCE = """color => {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const channels = [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)].map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2];
}"""


def luminance(page: Page, name: str) -> float:
    color = page.evaluate(
        "name => import('./page/dom.js').then(({themeColor}) => themeColor(name))", name
    )
    return float(page.evaluate(f"({LUMINANCE})('{color}')"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(browser: Browser, url: str, scheme: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, on every ground it stands on."""
    with opened(browser, url, color_scheme=scheme) as page:
        assert (luminance(page, "--page") > 0.5) == (scheme == "light")
        for ground in ("--page", "--card", "--sunken"):
            for text in ("--ink", "--soft", "--faint", "--error"):
                high, low = sorted((luminance(page, text), luminance(page, ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
        for index in range(6):  # a token's label on its own colour
            high, low = sorted(
                (luminance(page, f"--source-{index}"), luminance(page, "--card")), reverse=True
            )
            assert (high + 0.05) / (low + 0.05) >= 4.5, index


def test_the_theme_button_changes_the_theme_and_is_remembered(page: Page) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    assert luminance(page, "--page") > 0.5
    page.click("#theme")
    dark = page.evaluate(ground)
    assert light != dark
    assert luminance(page, "--page") < 0.1
    page.reload()
    assert luminance(page, "--page") < 0.1
    assert page.evaluate(ground) == dark
    assert page.locator("#theme").get_attribute("aria-label") == "Theme: dark"
    page.emulate_media(color_scheme="dark")
    page.click("#theme")
    page.click("#theme")
    assert page.locator("#theme").get_attribute("aria-label") == "Theme: light"
    assert page.evaluate(ground) == light
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert page.evaluate(ground) == light


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, url: str) -> None:
    with opened(browser, url, viewport={"width": 375, "height": 667}) as page:
        ask_on_phone(page)
        for pane, inside in (("chat", "#prompt"), ("tree", "#tree svg"), ("settings", "#seed")):
            page.click(f'[data-show="{pane}"]')
            expect(page.locator(inside)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == 375
            wide = page.evaluate(
                "[...document.querySelectorAll('main *')]"
                ".filter(each => !each.closest('#tree, pre'))"
                ".filter(each => each.getBoundingClientRect().right > 376)"
                ".map(each => each.outerHTML)"
            )
            assert wide == []
        page.click('[data-show="chat"]')
        page.locator(".tok").first.click()
        expect(page.locator("#tree svg")).to_be_visible()


def ask_on_phone(page: Page) -> None:
    page.click('[data-show="settings"]')
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "32")
    page.click('[data-show="chat"]')
    page.fill("#prompt", PROMPT)
    page.click("#send")
    finished(page)


def test_everything_can_be_reached_and_seen_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#prompt") == "Hello\nthere"
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".message.user").inner_text() == "Hello\nthere"
    page.locator(".skip").focus()
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, has_outline = page.evaluate(
            "() => { const at = document.activeElement, style = getComputedStyle(at);"
            " const chip = at.querySelector?.('.chip');"
            " if (at === document.body) return ['end', true];"
            " return [at.id || at.textContent.trim().slice(0, 20),"
            " style.outlineStyle !== 'none' || at.id === 'prompt'"
            " || (chip !== null && getComputedStyle(chip).strokeWidth === '2px')]; }"
        )
        assert has_outline, f"{name} has focus and does not show it"
        if name == "end":
            break
        seen.append(name)
    for each in ("theme", "system", "seed", "messages", "prompt", "Compare with plain", "step"):
        assert each in seen
    order = [seen.index(each) for each in ("system", "messages", "prompt", "save-svg", "step")]
    assert order == sorted(order)


def test_what_happens_is_told_to_screen_readers(page: Page) -> None:
    ask(page, num_tokens=8)
    answer = save_chat(page)["turns"][-1]["content"]
    expect(page.locator("#announcer")).to_have_text(f"The answer is complete: {answer}".strip())
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input:not([hidden]), select, textarea')].filter("
        "each => !each.textContent.trim() && !each.ariaLabel && !each.labels?.length)"
        ".map(each => each.outerHTML)"
    )
    assert unnamed == []


# --- what is served -------------------------------------------------------------------------------


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    html = httpx.get(url).text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|style=", html)
    assert httpx.get(f"{url}/page/vendor/LICENSE.uPlot").text.startswith("The MIT License")
    assert httpx.get(f"{url}/page/nothing.js").status_code == 404
