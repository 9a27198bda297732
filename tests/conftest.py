"""What all tests share: the length and the seed of the randomised campaigns."""

import os
import random
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Campaign:
    """How long a randomised campaign runs, and the seed that repeats it."""

    seed: int
    long: bool

    def rounds(self, *, short: int, long: int) -> int:
        """*short* in `make check`, *long* in `make soak`."""
        return long if self.long else short

    def random(self) -> random.Random:
        """A fresh generator; every test that takes one starts from the same seed."""
        return random.Random(self.seed)


CAMPAIGN = Campaign(
    seed=int(os.environ.get("FAREBOX_TEST_SEED", "20250115")),
    long=os.environ.get("FAREBOX_TEST_CAMPAIGN") == "long",
)


def pytest_report_header() -> str:
    return f"campaigns: {'long' if CAMPAIGN.long else 'short'}, FAREBOX_TEST_SEED={CAMPAIGN.seed}"


@pytest.fixture(scope="session")
def campaign() -> Campaign:
    return CAMPAIGN
