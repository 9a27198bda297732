"""The one connection that writes: a batch is one transaction, one lock, one fsync.

How it works. What the last batches loaded is kept: a :class:`~ledger.state.State` with the wallets, their live blocks
and the open reservations. It is good as long as nobody else has written, which SQLite tells (``PRAGMA data_version``,
read after the write lock is held). Anything that goes wrong drops it, and so does growth past a bound.
"""

import sqlite3
from collections.abc import Callable, Sequence

from ledger.batch import (
    AppliedBefore,
    BlockRef,
    CommandRef,
    Needs,
    Writes,
    clawed,
    fold,
    needs,
    pools,
    reserved_wallets,
    return_blocks,
)
from ledger.commands import AnyCommand
from ledger.model import Reservation, ReservationState, Scope, WalletRef
from ledger.outcomes import Outcome
from ledger.state import State
from ledger.store import statements
from ledger.store.erasure import Statement
from ledger.store.lock import ProcessLock
from ledger.store.rows import (
    Row,
    block_amounts,
    block_from,
    block_row,
    event_row,
    facts_json,
    key_from,
    key_row,
    reservation_from,
    reservation_row,
    result_from,
    reversal_json,
    to_json,
    transfer_row,
    usage_row,
    wallet_books,
    wallet_from,
    wallet_row,
    wallet_watched,
)

WALLETS_KEPT_MAX = 10_000
BLOCKS_KEPT_MAX = 50_000
RESERVATIONS_KEPT_MAX = 20_000

CHECKPOINT_PAGES = 8_000
"""How long the log may grow (32 MB) before it is copied into the file: a batch writes the same few pages again and
again, and the copy has two syncs of its own."""

BUSY_TIMEOUT_S = 5.0
"""How long to wait for a writer that is not a ledger: other tables live in the same file."""

_WALLET = ("tenant", "mode", "wallet")
_RESERVATION = ("tenant", "mode", "reservation")
_KEY = ("tenant", "mode", "operation", "key")

_FIND_COMMANDS = statements.lookup(
    "ledger_command", ("tenant", "mode", "id"), take=("tenant", "mode", "id", "kind", "result")
)
_FIND_WALLETS = statements.lookup("ledger_wallet", _WALLET)
_FIND_LIVE_BLOCKS = statements.lookup("ledger_block", _WALLET, where="t.live")
_FIND_BLOCKS = statements.lookup("ledger_block", (*_WALLET, "id"))
_FIND_RESERVATIONS = statements.lookup("ledger_reservation", _RESERVATION, take=("body",))
_FIND_KEYS = statements.lookup("ledger_key", _KEY)

_ADD_COMMANDS = statements.insert("ledger_command")
_ADD_TRANSFERS = statements.insert("ledger_transfer")
_ADD_WALLETS = statements.insert("ledger_wallet")
_ADD_BLOCKS = statements.insert("ledger_block")
_ADD_RESERVATIONS = statements.insert("ledger_reservation")
_ADD_EVENTS = statements.insert("ledger_event")
_ADD_USAGE = statements.insert("ledger_usage")
_PUT_KEYS = statements.insert("ledger_key", replace=True)
_PUT_RESPONSES = statements.insert("ledger_response", replace=True)
_FREE_KEYS = statements.delete("ledger_key", _KEY)

_WALLET_CHANGES = (
    "overdraft_limit",
    "receivable",
    "overdraft_reserved",
    "frozen",
    "version",
    "last_fact_us",
    "blocks_opened",
    "events_raised",
    "debts",
)
_CHANGE_WALLETS = statements.update("ledger_wallet", (*_WALLET, "version"), _WALLET_CHANGES)
_WATCH_WALLETS = statements.update("ledger_wallet", _WALLET, ("alerts", "rung"))

_BLOCK_CHANGES = ("granted", "consumed", "reserved", "expired", "revoked", "clawed", "remaining", "frozen", "reversal")
_CHANGE_BLOCKS = statements.update("ledger_block", (*_WALLET, "id"), _BLOCK_CHANGES)
_CHANGE_BLOCKS_LIVE = statements.update("ledger_block", (*_WALLET, "id"), (*_BLOCK_CHANGES, "live"))
"""For the few blocks that run dry or fill again: setting ``live`` rewrites two indexes."""

_CHANGE_RESERVATIONS = statements.update(
    "ledger_reservation", _RESERVATION, ("state", "expires_at_us", "request_id", "body")
)


class VersionConflict(Exception):
    """A row was not as the batch had loaded it. Nothing was written; the batch can be tried again."""


def connect(path: str, *, timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """A connection with every durability that we promise. It may be handed from thread to thread, one at a time."""
    connection = sqlite3.connect(
        path, timeout=timeout_s, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class BatchConnection:
    """Runs batches. All its methods are called from one thread."""

    def __init__(self, path: str, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._lock = ProcessLock(path)
        self._connection = connect(path)
        self._state = State()
        self._seq = 0
        self._data_version: int | None = None

    def close(self) -> None:
        self._connection.close()
        self._lock.close()

    def tables(self) -> set[str]:
        return {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def run(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._check_version()
                named = needs(commands)
                applied_before = self._load(named, commands)
                outcomes, writes = fold(self._state, commands, self._clock(), applied_before)
                self._write(writes)
                self._connection.execute("COMMIT")
            except BaseException:
                self._forget()
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        self._trim(named, writes)
        return outcomes

    def purge_responses(self, now_us: int, limit: int) -> int:
        with self._lock:
            return self._connection.execute(
                "DELETE FROM ledger_response WHERE rowid IN "
                "(SELECT rowid FROM ledger_response WHERE expires_at_us <= ? LIMIT ?)",
                (now_us, limit),
            ).rowcount

    def edit(self, edits: Sequence[Statement]) -> list[Row]:
        """Do *edits* in one transaction; the rows of the last one. What is kept is loaded anew afterwards."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                rows: list[Row] = []
                for sql, given in edits:
                    named = {str(number): value for number, value in enumerate(given, start=1)}
                    rows = self._connection.execute(sql, named).fetchall()
                self._connection.execute("COMMIT")
            finally:
                self._forget()
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        return rows

    # What is known of the database.

    def _forget(self) -> None:
        self._state = State()
        self._data_version = None

    def _check_version(self) -> None:
        (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if data_version == self._data_version:
            return
        self._forget()
        (seq,) = self._connection.execute("SELECT max(seq) FROM ledger_command").fetchone()
        self._seq = seq or 0
        self._data_version = data_version

    def _trim(self, named: Needs, writes: Writes) -> None:
        """Let go of what later batches hardly need: keys, settled reservations, blocks with nothing left."""
        state = self._state
        if (
            len(state.wallets) > WALLETS_KEPT_MAX
            or len(state.reservations) > RESERVATIONS_KEPT_MAX
            or sum(map(len, state.blocks.values())) > BLOCKS_KEPT_MAX
        ):
            self._state = State()
            return
        state.keys.clear()
        for reservation_ref in named.reservations:
            reservation = state.reservations.get(reservation_ref)
            if reservation is not None and reservation.state is not ReservationState.OPEN:
                del state.reservations[reservation_ref]
        for ref, block_id in named.blocks:
            self._drop_if_dead(ref, block_id)
        for block, _ in writes.blocks_changed:
            self._drop_if_dead(block.wallet, block.id)
        for block in writes.blocks_opened:
            self._drop_if_dead(block.wallet, block.id)

    def _drop_if_dead(self, ref: WalletRef, block_id: str) -> None:
        blocks = self._state.blocks.get(ref)
        if blocks is not None:
            block = blocks.get(block_id)
            if block is not None and not block.live:
                del blocks[block_id]

    # Loading.

    def _load(self, named: Needs, commands: Sequence[AnyCommand]) -> dict[CommandRef, AppliedBefore]:
        state = self._state
        applied_before = {
            (Scope(tenant, mode), command_id): AppliedBefore(kind, result_from(result))
            for tenant, mode, command_id, kind, result in statements.fetch(
                self._connection, _FIND_COMMANDS, ((*scope, command_id) for scope, command_id in named.commands)
            )
        }
        for row in statements.fetch(self._connection, _FIND_KEYS, ((*key[0], *key[1:]) for key in named.keys)):
            taken = key_from(row)
            state.keys[taken.scope, taken.operation, taken.key] = taken
        unknown = [ref for ref in named.reservations if ref not in state.reservations]
        for (body,) in statements.fetch(self._connection, _FIND_RESERVATIONS, unknown):
            reservation = reservation_from(body)
            state.reservations[reservation.ref] = reservation
        wallets = named.wallets | self._reserved_wallets(named)
        self._load_wallets(wallets, named.blocks)
        self._load_wallets(set(), return_blocks(clawed(state, wallets)))
        pool_wallets = pools(state, commands)
        if pool_wallets:
            self._load_wallets(pool_wallets, return_blocks(pool_wallets))
        return applied_before

    def _reserved_wallets(self, named: Needs) -> set[WalletRef]:
        known: list[Reservation] = [
            self._state.reservations[ref] for ref in named.reservations if ref in self._state.reservations
        ]
        return {ref for reservation in known for ref in reserved_wallets(reservation)}

    def _load_wallets(self, wallets: set[WalletRef], blocks: set[BlockRef]) -> None:
        state = self._state
        unknown = [ref for ref in wallets if ref not in state.wallets]
        found = [wallet_from(row) for row in statements.fetch(self._connection, _FIND_WALLETS, unknown)]
        live = statements.fetch(self._connection, _FIND_LIVE_BLOCKS, (wallet.ref for wallet in found))
        for wallet in found:
            state.wallets[wallet.ref] = wallet
            state.blocks[wallet.ref] = {}
        for block in sorted(map(block_from, live), key=lambda block: block.sequence):
            state.blocks[block.wallet][block.id] = block
        dead = [(*ref, block_id) for ref, block_id in blocks if block_id not in state.blocks.get(ref, {})]
        for block in map(block_from, statements.fetch(self._connection, _FIND_BLOCKS, dead)):
            state.blocks.setdefault(block.wallet, {})[block.id] = block

    # Writing.

    def _write(self, writes: Writes) -> None:
        connection = self._connection
        commands = []
        transfers = []
        for seq, entry in enumerate(writes.journal, start=self._seq + 1):
            commands.append(
                (
                    *entry.scope,
                    entry.id,
                    seq,
                    entry.kind,
                    entry.at_us,
                    len(entry.transfers),
                    facts_json(entry.facts),
                    to_json(entry.result),
                )
            )
            for position, transfer in enumerate(entry.transfers):
                transfers.append(transfer_row(transfer, seq=seq, position=position, at_us=entry.at_us))
        _ADD_COMMANDS.run(connection, commands)
        _ADD_TRANSFERS.run(connection, transfers)
        _ADD_WALLETS.run(connection, [wallet_row(wallet) for wallet in writes.wallets_opened])
        _expect(
            _CHANGE_WALLETS.run(
                connection,
                [
                    (*wallet.ref, version, *wallet_books(wallet)[4:])  # All but what never changes.
                    for wallet, version in writes.wallets_changed
                ],
            ),
            len(writes.wallets_changed),
        )
        _WATCH_WALLETS.run(connection, [(*wallet.ref, *wallet_watched(wallet)) for wallet in writes.wallets_watched])
        _ADD_BLOCKS.run(connection, [block_row(block) for block in writes.blocks_opened])
        self._change_blocks(writes)
        _ADD_RESERVATIONS.run(connection, [reservation_row(reservation) for reservation in writes.reservations_opened])
        changed = [reservation_row(reservation) for reservation in writes.reservations_changed]
        _expect(_CHANGE_RESERVATIONS.run(connection, changed), len(changed))
        _FREE_KEYS.run(connection, [(*key[0], *key[1:]) for key in writes.keys_freed])
        _PUT_KEYS.run(connection, [key_row(taken) for taken in writes.keys_taken])
        _PUT_RESPONSES.run(connection, writes.responses)
        _ADD_EVENTS.run(connection, [event_row(raised) for raised in writes.events])
        _ADD_USAGE.run(connection, [usage_row(usage) for usage in writes.usage])
        self._seq += len(commands)

    def _change_blocks(self, writes: Writes) -> None:
        steady = []
        turned = []
        for block, was_live in writes.blocks_changed:
            row = (
                *block.wallet,
                block.id,
                *block_amounts(block),
                block.frozen,
                reversal_json(block),
            )
            if block.live == was_live:
                steady.append(row)
            else:
                turned.append((*row, block.live))
        _expect(_CHANGE_BLOCKS.run(self._connection, steady), len(steady))
        _expect(_CHANGE_BLOCKS_LIVE.run(self._connection, turned), len(turned))


def _expect(changed: int, expected: int) -> None:
    if changed != expected:
        raise VersionConflict(f"{expected} rows were to be changed, {changed} were as they had been loaded")
