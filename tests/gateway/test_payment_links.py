"""Links to the page where credits are added: whoever holds one may see and pay, and nobody makes one but us."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.payments.links import LIFE_S, LinkExpired, LinkInvalid, Links
from ledger.model import Scope

pytestmark = pytest.mark.sqlite

LIVE, TEST = Scope("ten_1", "live"), Scope("ten_1", "test")
BASE = "https://pay.example"


class Time:
    def __init__(self) -> None:
        self.now_us = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now_us


def links(
    *, key: str = "sk_test_1", live: bool = False, public_url: str | None = BASE, time: Time | None = None
) -> Links:
    return Links(
        secret_key=key, processor_mode="live" if live else "test", public_url=public_url, now_us=time or Time()
    )


def token_of(url: str | None) -> str:
    assert url is not None
    assert url.startswith(f"{BASE}/topup/")
    return url.removeprefix(f"{BASE}/topup/")


@pytest.mark.parametrize("package", [None, "usd-10"])
def test_a_link_says_whose_wallet_it_is_for_and_nothing_is_stored(package: str | None) -> None:
    token = token_of(links().url_of(TEST, "cus_1", package=package))
    opened = links().opened(token)  # Another process with the same secret key.
    assert (opened.scope, opened.customer_id, opened.package) == (TEST, "cus_1", package)


def test_it_works_for_a_week_and_not_a_second_longer() -> None:
    time = Time()
    here = links(time=time)
    token = token_of(here.url_of(LIVE, "cus_1"))
    time.now_us += (LIFE_S - 1) * 1_000_000
    assert here.opened(token).customer_id == "cus_1"
    time.now_us += 1_000_000
    with pytest.raises(LinkExpired):
        here.opened(token)


def test_every_changed_character_is_noticed() -> None:
    token = token_of(links().url_of(LIVE, "cus_1"))
    for at, character in enumerate(token):
        changed = token[:at] + ("A" if character != "A" else "B") + token[at + 1 :]
        # The last character may have bits that stand for nothing: another spelling of the same link.
        if at == len(token) - 1:
            continue
        with pytest.raises(LinkInvalid):
            links().opened(changed)


def test_another_installations_links_are_not_ours() -> None:
    token = token_of(links(key="sk_test_2").url_of(LIVE, "cus_1"))
    with pytest.raises(LinkInvalid):
        links().opened(token)


@given(st.text(max_size=600))
def test_whatever_stands_in_the_address_is_refused_in_good_order(token: str) -> None:
    with pytest.raises(LinkInvalid):
        links().opened(token)


def test_there_is_no_link_where_nobody_could_pay() -> None:
    assert links(public_url=None).url_of(LIVE, "cus_1") is None
    assert links(live=True).url_of(TEST, "cus_1") is None
    assert links(live=True).return_url_of(TEST, "cus_1", "ord_1") is None
    assert links(live=True).cancel_url_of(TEST, "cus_1") is None
    assert links(live=True).url_of(LIVE, "cus_1") is not None


def test_the_ways_back_carry_a_link_of_their_own() -> None:
    here = links()
    back = here.return_url_of(TEST, "cus_1", "ord_1")
    cancelled = here.cancel_url_of(TEST, "cus_1")
    assert back is not None
    assert cancelled is not None
    assert back.endswith("/return?order=ord_1")
    assert cancelled.endswith("?cancelled=1")
    assert here.leads_back_here(back)
    assert here.leads_back_here(cancelled)
    assert not here.leads_back_here("https://app.example/topup/x")
    assert not here.leads_back_here(None)
    assert here.opened(token_of(back).partition("/")[0]).customer_id == "cus_1"
