"""What `docs/payments.md` tells an operator to do in Stripe is what the code wants."""

from gateway.payments.observed import SELECTED
from gateway.payments.stripe_api import API_VERSION
from gateway.settings import DEFAULT_PACKAGES, PackageSettings
from tests.servers.stripe_cards import TEST_CARDS
from tests.test_docs import ROOT, quoted, rows

PAGE = "docs/payments.md"
TEXT = (ROOT / PAGE).read_text()


def test_the_events_to_select_are_those_that_are_read():
    listed = [event for cells in rows(PAGE, "event to select") for event in quoted(cells[0])]
    assert sorted(listed) == sorted(SELECTED)


def test_the_version_of_the_endpoint_is_the_one_that_is_pinned():
    assert f"`{API_VERSION}`" in TEXT


def test_a_package_has_the_fields_that_are_shown():
    listed = {field for cells in rows(PAGE, "field") for field in quoted(cells[0])}
    assert listed == set(PackageSettings.model_fields) - {"id"}
    prices = [f"${package.price}" for package in DEFAULT_PACKAGES]
    assert f"{', '.join(prices[:-1])} and {prices[-1]}" in TEXT


def test_the_cards_are_those_that_the_stand_in_knows():
    numbers = [number.replace(" ", "") for cells in rows(PAGE, "card") for number in cells[0].split(",")]
    assert all(len(number) == 16 for number in numbers)
    endings = {number[-4:] for number in numbers}
    assert {card.last4 for card in TEST_CARDS.values() if card.type == "card"} - endings <= {"0069"}
