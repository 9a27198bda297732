"""From an empty wallet to an answer, in a real browser: refused, led to our page and on to Checkout, paid, credited.

Screenshots of our page are left in the test's folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.emulated_checkout import EmulatedCheckout
from tests.e2e.farebox import Farebox, Gateway, Upstream, installed

BROWSER: Final = os.environ.get("FAREBOX_TEST_BROWSER", "/usr/bin/chromium")
"""`make check` installs it. Without one these tests fail: what is not looked at in a browser is not known to work."""

OPTIONS: Final = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)
PHONE: Final = {"width": 360, "height": 740}
DESKTOP: Final = {"width": 1280, "height": 900}
TAP_PX_MIN: Final = 44
"""Source: WCAG 2.2, 2.5.5 Target Size (Enhanced)."""

WAIT_MS: Final = 30_000

ASKED: Final = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert Path(BROWSER).exists(), f"there is no browser at {BROWSER}: make check CHROMIUM=… names another"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(OPTIONS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def stripe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedCheckout]:
    with EmulatedCheckout(tmp_path_factory.mktemp("stripe")) as stripe:
        yield stripe


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, stripe: EmulatedCheckout) -> Iterator[tuple[Farebox, Gateway]]:
    """An installation that takes payments, in two processes."""
    folder = tmp_path_factory.mktemp("shop")
    settings = {
        "stripe_secret_key": stripe.secret_key,
        "stripe_webhook_secret": stripe.webhook_secret,
        "stripe_api_base": stripe.url,
        "workers": 2,
    }
    with (
        Upstream(folder) as upstream,
        installed(folder / "installation", upstream.url, settings=settings) as farebox,
    ):
        gateway = farebox.serve()
        stripe.webhook_url = f"{gateway.base_url.removesuffix('/v1')}/stripe/webhook"
        yield farebox, gateway


def chat(farebox: Farebox, gateway: Gateway, user: str) -> httpx.Response:
    return httpx.post(
        f"{gateway.base_url}/chat/completions", headers=farebox.headers(user), json=ASKED, timeout=60, trust_env=False
    )


def opened(browser: Browser, *, size: dict[str, Any] = PHONE, dark: bool = False) -> Page:
    context = browser.new_context(
        viewport={"width": size["width"], "height": size["height"]}, color_scheme="dark" if dark else "light"
    )
    context.set_default_timeout(WAIT_MS)
    return context.new_page()


def top_up_url(farebox: Farebox, gateway: Gateway, user: str) -> str:
    refused = chat(farebox, gateway, user)
    assert refused.status_code == 402, refused.text
    url: str = refused.json()["error"]["top_up_url"]
    return url


def credits_of(farebox: Farebox, gateway: Gateway, user: str) -> int:
    answer = gateway.get(f"/customers/{user}/credits", farebox.live_key)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["balance"])


def test_a_user_with_an_empty_wallet_pays_and_the_same_request_works(
    browser: Browser, served: tuple[Farebox, Gateway], stripe: EmulatedCheckout, tmp_path: Path
) -> None:
    farebox, gateway = served
    url = top_up_url(farebox, gateway, "alice")
    page = opened(browser)
    try:
        page.goto(url)
        expect(page.get_by_role("heading", name="Add credits")).to_be_visible()
        expect(page.locator(".amount")).to_have_text("0 credits")
        page.screenshot(path=tmp_path / "add-credits.png", full_page=True)
        page.get_by_text("$10.00").click()
        expect(page.get_by_role("radio", name="$10.00")).to_be_checked()
        page.get_by_role("button", name="Continue to payment").click()

        page.wait_for_url(f"{stripe.pages}/checkout/**")
        expect(page.get_by_text("1000 credits")).to_be_visible()
        page.get_by_role("button", name="Pay $10.00").click()

        page.wait_for_url(f"{url.partition('/topup/')[0]}/topup/**/return?order=ord_*")
        expect(page.get_by_text("Your payment has arrived")).to_be_visible()
        expect(page.locator(".amount")).to_have_text("1,000 credits")
        page.screenshot(path=tmp_path / "paid.png", full_page=True)
    finally:
        page.context.close()

    assert ("checkout.session.completed", 200) in stripe.delivered
    assert {status for _, status in stripe.delivered} == {200}
    assert credits_of(farebox, gateway, "alice") == 1_000_000
    answered = chat(farebox, gateway, "alice")
    assert answered.status_code == 200, answered.text
    farebox.verify()


def test_who_turns_back_has_paid_nothing_and_may_choose_again(
    browser: Browser, served: tuple[Farebox, Gateway], stripe: EmulatedCheckout
) -> None:
    farebox, gateway = served
    page = opened(browser)
    try:
        page.goto(top_up_url(farebox, gateway, "bob"))
        page.get_by_role("button", name="Continue to payment").click()
        page.wait_for_url(f"{stripe.pages}/checkout/**")
        page.get_by_role("link", name="Cancel").click()
        expect(page.get_by_text("Nothing was paid")).to_be_visible()
        expect(page.get_by_role("button", name="Continue to payment")).to_be_visible()
    finally:
        page.context.close()
    assert credits_of(farebox, gateway, "bob") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_fits_is_reachable_by_keys_and_asks_nobody_else(
    browser: Browser, served: tuple[Farebox, Gateway], tmp_path: Path, size: dict[str, Any], dark: bool
) -> None:
    farebox, gateway = served
    url = top_up_url(farebox, gateway, "carol")
    page = opened(browser, size=size, dark=dark)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    try:
        page.goto(url)
        page.screenshot(path=tmp_path / f"{size['width']}-{'dark' if dark else 'light'}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"], "nothing sticks out sideways"
        for target in page.locator("label, button").all():
            box = target.bounding_box()
            assert box is not None
            assert box["height"] >= TAP_PX_MIN, target.inner_text()
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        expect(page.get_by_role("radio").nth(1)).to_be_checked()
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        expect(page.get_by_role("checkbox")).to_be_checked()
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Continue to payment")).to_be_focused()
        for colours in page.evaluate(CONTRASTS):
            assert colours["ratio"] >= 4.5, colours
    finally:
        page.context.close()
    assert {urlsplit(each).netloc for each in asked if not each.startswith("data:")} == {urlsplit(url).netloc}
    assert complaints == []


CONTRASTS: Final = """() => {
  const light = ([r, g, b]) => {
    const part = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const numbers = text => text.match(/[0-9.]+/g).map(Number);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("main *")]
    .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .map(element => {
      const [a, b] = [light(numbers(getComputedStyle(element).color)), light(ground(element))];
      return {text: element.textContent.trim(), ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)};
    });
}"""
"""How well each text stands out from what is behind it. Source: WCAG 2.2, 1.4.3 Contrast (Minimum): 4.5."""
