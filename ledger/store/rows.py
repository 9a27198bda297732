"""Values to rows and back: the same for every store. A row is a tuple in the order of its table's columns."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ledger.commands import StoredResponse
from ledger.erasable import facts_to_keep
from ledger.model import (
    NO_DEBTS,
    NOT_REVERSED,
    UNRESTRICTED,
    Alert,
    Block,
    Charge,
    Debts,
    Funding,
    Reservation,
    ReservationRef,
    Restriction,
    Reversal,
    Scope,
    UsageRecord,
    Wallet,
    WalletRef,
)
from ledger.outcomes import Event, Fact, KeyTaken, Result, Transfer, UsageRecorded

Row = tuple[Any, ...]

_encode = msgspec.json.Encoder().encode
_decode_facts = msgspec.json.Decoder(tuple[Fact, ...]).decode
_decode_result: Callable[[str], Result] = msgspec.json.Decoder(Result).decode
_decode_reservation = msgspec.json.Decoder(Reservation).decode
_decode_restriction = msgspec.json.Decoder(Restriction).decode
_decode_debts = msgspec.json.Decoder(Debts).decode
_decode_reversal = msgspec.json.Decoder(Reversal).decode
_decode_wallet_ref = msgspec.json.Decoder(WalletRef).decode
_decode_mapping = msgspec.json.Decoder(dict[str, Any]).decode
_decode_alerts = msgspec.json.Decoder(tuple[Alert, ...]).decode
_decode_units = msgspec.json.Decoder(dict[str, int]).decode
_decode_charges = msgspec.json.Decoder(tuple[Charge, ...]).decode
_decode_headers = msgspec.json.Decoder(tuple[tuple[str, str], ...]).decode


def to_json(value: object) -> str:
    return _encode(value).decode()


def facts_json(facts: Sequence[Fact]) -> str:
    """As the journal has them: without metadata."""
    return to_json(facts_to_keep(facts))


def facts_from(body: str) -> tuple[Fact, ...]:
    return _decode_facts(body)


def result_from(body: str) -> Result:
    return _decode_result(body)


def wallet_row(wallet: Wallet) -> Row:
    return (*wallet_books(wallet), *wallet_watched(wallet))


def wallet_watched(wallet: Wallet) -> Row:
    """What few commands change of a wallet."""
    return (to_json(wallet.alerts) if wallet.alerts else None, to_json(wallet.rung) if wallet.rung else None)


def wallet_books(wallet: Wallet) -> Row:
    """A wallet's row without what it is watched for."""
    return (
        *wallet.ref,
        wallet.asset,
        wallet.overdraft_limit,
        wallet.receivable,
        wallet.overdraft_reserved,
        wallet.frozen,
        wallet.version,
        wallet.last_fact_us,
        wallet.blocks_opened,
        wallet.events_raised,
        None if wallet.debts == NO_DEBTS else to_json(wallet.debts),
    )


def wallet_from(row: Sequence[Any]) -> Wallet:
    return Wallet(
        ref=WalletRef(*row[:3]),
        asset=row[3],
        overdraft_limit=row[4],
        receivable=row[5],
        overdraft_reserved=row[6],
        frozen=bool(row[7]),
        version=row[8],
        last_fact_us=row[9],
        blocks_opened=row[10],
        events_raised=row[11],
        debts=NO_DEBTS if row[12] is None else _decode_debts(row[12]),
        alerts=() if row[13] is None else _decode_alerts(row[13]),
        rung=() if row[14] is None else _decode_alerts(row[14]),
    )


def block_amounts(block: Block) -> Row:
    """What a block was granted and what became of it, in the order of the columns."""
    return (
        block.granted,
        block.consumed,
        block.reserved,
        block.expired,
        block.revoked,
        block.clawed,
        block.remaining,
    )


def reversal_json(block: Block) -> str | None:
    return None if block.reversal == NOT_REVERSED else to_json(block.reversal)


def block_row(block: Block) -> Row:
    return (
        *block.wallet,
        block.id,
        block.sequence,
        *block_amounts(block),
        block.live,
        block.frozen,
        block.created_at_us,
        block.effective_at_us,
        block.expires_at_us,
        block.priority,
        block.source,
        block.funding.value,
        block.operator_paid,
        "{}" if block.restriction is UNRESTRICTED else to_json(block.restriction),
        None if block.pool is None else to_json(block.pool),
        block.payment_reference,
        to_json(block.metadata) if block.metadata else "{}",
        reversal_json(block),
    )


def block_from(row: Sequence[Any]) -> Block:
    """*remaining* and *live* derive from the other columns; that they agree is a CHECK of the table."""
    restriction, pool, metadata, reversal = row[21], row[22], row[24], row[25]
    return Block(
        wallet=WalletRef(*row[:3]),
        id=row[3],
        sequence=row[4],
        granted=row[5],
        consumed=row[6],
        reserved=row[7],
        expired=row[8],
        revoked=row[9],
        clawed=row[10],
        frozen=bool(row[13]),
        created_at_us=row[14],
        effective_at_us=row[15],
        expires_at_us=row[16],
        priority=row[17],
        source=row[18],
        funding=Funding(row[19]),
        operator_paid=bool(row[20]),
        restriction=UNRESTRICTED if restriction == "{}" else _decode_restriction(restriction),
        pool=None if pool is None else _decode_wallet_ref(pool),
        payment_reference=row[23],
        metadata={} if metadata == "{}" else _decode_mapping(metadata),
        reversal=NOT_REVERSED if reversal is None else _decode_reversal(reversal),
    )


def reservation_row(reservation: Reservation) -> Row:
    return (
        *reservation.ref,
        reservation.state.value,
        reservation.expires_at_us,
        reservation.request_id,
        to_json(reservation),
    )


def reservation_from(body: str) -> Reservation:
    return _decode_reservation(body)


def key_row(taken: KeyTaken) -> Row:
    return (*taken.scope, taken.operation, taken.key, taken.digest, to_json(taken.result))


def key_from(row: Sequence[Any]) -> KeyTaken:
    tenant, mode, operation, key, digest, result = row
    return KeyTaken(
        scope=Scope(tenant, mode), operation=operation, key=key, digest=digest, result=_decode_result(result)
    )


def transfer_row(transfer: Transfer, *, seq: int, position: int, at_us: int) -> Row:
    return (
        *transfer.scope,
        seq,
        position,
        transfer.debit,
        transfer.credit,
        transfer.amount,
        transfer.asset,
        transfer.block,
        transfer.reference,
        at_us,
    )


def transfer_from(row: Sequence[Any]) -> Transfer:
    return Transfer(
        scope=Scope(row[0], row[1]),
        debit=row[4],
        credit=row[5],
        amount=row[6],
        asset=row[7],
        block=row[8],
        reference=row[9],
    )


def response_row(scope: Scope, operation: str, key: str, response: StoredResponse, *, expires_at_us: int) -> Row:
    return (*scope, operation, key, response.status, to_json(response.headers), response.body, expires_at_us)


def response_from(*, status: int, headers: str, body: bytes) -> StoredResponse:
    return StoredResponse(status=status, headers=_decode_headers(headers), body=body)


def event_row(raised: Event) -> Row:
    """As it is before it was delivered."""
    return (*raised.wallet, raised.sequence, raised.id, raised.type, raised.at_us, to_json(raised.body), None)


def usage_row(usage: UsageRecorded) -> Row:
    record = usage.record
    base = sum(charge.base for charge in usage.charges)
    markup = sum(charge.markup for charge in usage.charges)
    return (
        *usage.reservation,
        usage.part,
        record.request_id,
        record.customer_id,
        record.app_id,
        record.key_id,
        record.model,
        record.action,
        record.metric,
        to_json(record.units),
        record.provider_cost_nanos,
        base,
        markup,
        base + markup,
        usage.shortfall,
        to_json(usage.charges),
        record.price_version,
        record.source,
        record.ending,
        record.upstream,
        record.started_at_us,
        usage.at_us,
        to_json(record.metadata) if record.metadata else "{}",
    )


def usage_from(row: Sequence[Any]) -> UsageRecorded:
    record = UsageRecord(
        request_id=row[4],
        customer_id=row[5],
        app_id=row[6],
        key_id=row[7],
        model=row[8],
        action=row[9],
        metric=row[10],
        units=_decode_units(row[11]),
        provider_cost_nanos=row[12],
        price_version=row[18],
        source=row[19],
        ending=row[20],
        upstream=row[21],
        started_at_us=row[22],
        metadata=_decode_mapping(row[24]),
    )
    return UsageRecorded(
        reservation=ReservationRef(*row[:3]),
        part=row[3],
        record=record,
        charges=_decode_charges(row[17]),
        shortfall=row[16],
        at_us=row[23],
    )
