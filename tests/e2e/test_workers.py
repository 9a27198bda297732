"""A host's workers: one that dies is replaced, whatever is away just then."""

import os
import signal
from typing import Final

import httpx

from tests.e2e.conftest import Install
from tests.e2e.farebox import Gateway, until

BACK_S: Final = 10.0
TRIED_S: Final = 60.0


def test_a_worker_that_dies_while_the_database_is_away_is_replaced_when_it_is_back(install: Install) -> None:
    farebox = install()
    gateway = farebox.serve("--workers", "2")
    aside = farebox.database.with_suffix(".aside")
    os.rename(farebox.database, aside)
    farebox.database.write_text("no database")
    survivor, victim = gateway.workers
    os.kill(victim, signal.SIGKILL)
    until(lambda: gateway.err.count(" ended with ") >= 3, within_s=TRIED_S, what="successor that tried twice")
    assert survivor in gateway.workers
    os.replace(aside, farebox.database)
    os.kill(survivor, signal.SIGKILL)
    until(lambda: answers(gateway, farebox.live_key), within_s=BACK_S, what="worker that serves again")
    assert gateway.stop() == 0, gateway.err


def answers(gateway: Gateway, key: str) -> bool:
    try:
        return gateway.get("/models", key).status_code == 200
    except httpx.TransportError:
        return False
