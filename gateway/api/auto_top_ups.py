"""Automatic top-ups, as the settings of a customer ask for them."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from gateway.api.services import Services
from gateway.database import Transactions
from gateway.errors import invalid_request
from gateway.identity.principals import Principal
from gateway.payments.auto_top_up_terms import SETTINGS, TermsInvalid, check_terms
from ledger.model import Scope

NOBODY_CAN_PAY: Final = (
    "Automatic top-ups need a payment processor: none is set up here that takes payments from customers of this mode."
)


class AutoTopUpChange:
    """What a request changes of a customer's automatic top-ups, if anything. *settings* are those that it sent."""

    def __init__(self, settings: BaseModel | None, principal: Principal, services: Services) -> None:
        fields = set() if settings is None else settings.model_fields_set
        self._sent = frozenset(name for name in SETTINGS if name in fields)
        self._wanted = [name for name in SETTINGS if name in fields and getattr(settings, name)]
        self._scope = Scope(principal.tenant_id, principal.mode)
        self._asset = principal.asset
        self._packages = services.packages
        self._payments = services.payments
        self._changed = True

    def check(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Whether the settings go together as they would stand then.

        Raises:
            ApiError: 400 naming the setting.
        """
        if self._wanted and (self._payments is None or not self._payments.serves(self._scope.mode)):
            raise invalid_request(NOBODY_CAN_PAY, param=f"settings.{self._wanted[0]}")
        if not self._sent:
            return
        try:
            check_terms(settings, self._packages, self._asset, sent=self._sent)
        except TermsInvalid as error:
            raise invalid_request(str(error), param=f"settings.{error.setting}") from None
        self._changed = any((before.get(name) or None) != (settings.get(name) or None) for name in SETTINGS)

    async def agree(self, customer_id: str, transactions: Transactions) -> None:
        """With the settings: have the wallet looked at, which may be below the threshold already.

        To send what stands there already changes nothing: who does so at every log-in does not have a card tried again
        each time that was declined.
        """
        if self._sent and self._payments is not None:
            turns = self._payments.auto_top_ups.turns.within(transactions)
            await turns.news(self._scope, customer_id, forgiven=self._changed)

    async def agreed(self, customer_id: str, version: int) -> None:
        """The settings are committed: begin, and tell where there is nothing to pay with."""
        if self._sent and self._changed and self._payments is not None:
            self._payments.auto_top_ups.wake()
            cause = f"{customer_id}:{version}"
            await self._payments.auto_top_ups.tell_if_no_method(self._scope, customer_id, cause=cause)
