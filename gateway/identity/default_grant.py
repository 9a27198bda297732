"""What a tenant gives to every new customer: a setting of the tenant, and what of it a customer is still due."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

_SETTING: Final = "default_grant"


class DefaultGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A block for each new customer, live and test.

    *amount* is in the smallest unit of the tenant's asset; *expires_after_s* counts from the grant, None is never.
    """

    amount: int
    expires_after_s: int | None = None
    priority: int = 0
    source: str = "default_grant"
    apps: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}


class Welcome(msgspec.Struct, frozen=True):
    """The default grant that one customer is due: as it was when they were first seen."""

    asset: str
    grant: DefaultGrant


GiveWelcome = Callable[[str, str, str, Welcome], Awaitable[None]]
"""Gives a welcome to the customer of a tenant, a mode and an id. Repeating it gives nothing more."""


def default_grant(settings: Mapping[str, Any]) -> DefaultGrant | None:
    """What a tenant with these *settings* gives to a new customer."""
    set_to = settings.get(_SETTING)
    return None if set_to is None else msgspec.convert(set_to, DefaultGrant)


def with_default_grant(settings: Mapping[str, Any], grant: DefaultGrant | None) -> dict[str, Any]:
    """*settings* with another default grant, or none."""
    return {**settings, _SETTING: None if grant is None else msgspec.to_builtins(grant)}


def welcome_due(settings: Mapping[str, Any], asset: str) -> dict[str, Any] | None:
    """What a customer who is new to a tenant with these *settings* is due, as it is kept in their row."""
    grant = default_grant(settings)
    return None if grant is None else msgspec.to_builtins(Welcome(asset, grant))
