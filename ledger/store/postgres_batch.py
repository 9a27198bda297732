"""Batches on PostgreSQL: one round trip while nobody else touches the same wallets, and locks first when somebody does.

How it works. What the last batches loaded or made is kept. A batch whose wallets and reservations are all kept is
decided on that at once. One call then locks the wallets in the order of their names, sees that everything is still as
kept, writes, and is a transaction of its own. When something has moved, it writes nothing and says so. Then, and when
something is not kept, the batch goes the long way once: begin, lock and load, decide, write, commit. A wallet that
another process has moved is locked first for a while, so that two processes do not chase each other.

Several batches may be under way. What one will have changed is kept at once, before it is committed, so that the next
can be decided while the database works. One that was decided on another's changes is sent when that other is committed
as it was decided, and is decided anew if it was not. The long way waits for all that began before.

Why what is kept can be trusted, if its wallets have the versions that they had:

- A wallet, its blocks and what they hold: each change of them raises the wallet's version.
- A reservation: a heartbeat changes it and no wallet. Its stored text is compared. Nobody changes it meanwhile, because
  who does locks all its wallets, and the first payer's exists since it was made.
- That something is not there (a command's id, a key, a new reservation, block or wallet) is looked up after the locks,
  and what is put there must not be there yet, by its table's primary key.
- The server is the same and has not been started anew, and its table of wallets is the same: a promoted standby, or a
  backup that was restored, may have another past.

The time of a batch is the database's clock after locking. The short way has to know it before, and reckons it from the
last answer by this machine's monotonic clock: never ahead of the database's, and behind it by less than a round trip. A
wallet's time never goes back, whoever writes.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

from ledger.batch import (
    AppliedBefore,
    CommandRef,
    Needs,
    Writes,
    fold,
    needs,
    pools,
    reserved_wallets,
    used_up,
)
from ledger.commands import AnyCommand, Freeze, Hold, Refund, Reverse, Revoke
from ledger.draft import RETURN_BLOCKS
from ledger.model import Block, Funding, Reservation, ReservationRef, ReservationState, Scope, Wallet, WalletRef
from ledger.outcomes import Applied, Outcome
from ledger.state import State
from ledger.store import postgres_rows as rows
from ledger.store.postgres_connection import Connection, Connections
from ledger.store.protocol import StoreUnavailable, WalletBlocks, WalletVersion, Watcher
from ledger.store.row_security import names, naming
from ledger.store.rows import block_from, key_from, reservation_from, result_from, wallet_from

LOCK_WAIT_MS: Final = 2_000
"""How long a batch waits for a lock that another process holds."""

BATCHES_AT_ONCE: Final = 2
"""How many batches may be under way: one is decided while the other is written."""

BATCH_S: Final = 5.0
"""How long a batch may keep a connection, which is dropped then. It may have been committed: its commands' ids tell."""

ROUNDS_MAX: Final = 4
"""How often the long way is begun anew, because a wallet that has to be locked was not known before."""

CONTENDED_S: Final = 1.0
"""How long a wallet that another process has moved is locked before it is decided on."""

SKEW_US_MAX: Final = 1_000_000
"""How far the reckoned time of a batch may be from the database's clock."""

WALLETS_KEPT_MAX: Final = 10_000
BLOCKS_KEPT_MAX: Final = 50_000
RESERVATIONS_KEPT_MAX: Final = 20_000
CONTENDED_MAX: Final = 10_000
ABSENT_KEPT_MAX: Final = 10_000

_RETURNED: Final = frozenset(RETURN_BLOCKS.values())

_BEGIN: Final = f"BEGIN; SET LOCAL lock_timeout = {LOCK_WAIT_MS}"
_LOAD: Final = "SELECT farebox_load_v1($1, $2, $3, $4, $5, $6)"
_WRITE: Final = f"SELECT farebox_write_v2({', '.join(f'${number}' for number in range(1, 14))})"
_APPLY: Final = f"SELECT farebox_apply_v2({', '.join(f'${number}' for number in range(1, 27))})"
_WRITE_WATCHED: Final = f"SELECT farebox_write_v3({', '.join(f'${number}' for number in range(1, 15))})"
_APPLY_WATCHED: Final = f"SELECT farebox_apply_v3({', '.join(f'${number}' for number in range(1, 28))})"
"""These two also write what wallets are watched for."""


class _Loaded(msgspec.Struct):
    """What ``farebox_load_v1`` returns. NULL stands for no rows."""

    now_us: int
    server: str
    wallets: list[dict[str, Any]] | None
    blocks: list[dict[str, Any]] | None
    reservations: list[str] | None
    keys: list[dict[str, Any]] | None
    commands: list[tuple[str, str, str, str, str]] | None


class _Answer(msgspec.Struct):
    """What ``farebox_apply_v2`` returns: *moved* are wallets that were not as kept, None when all is written."""

    now_us: int
    moved: list[WalletRef] | None = None


_decode_loaded = msgspec.json.Decoder(_Loaded).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Known(NamedTuple):
    """What a batch is decided on: a state of its own, and the wallets that it is about, there or not."""

    state: State
    wallets: set[WalletRef]


@dataclass(eq=False, slots=True)
class _UnderWay:
    """A batch that has begun: the *wallets* that it was decided on by what was kept, and how it ended."""

    wallets: set[WalletRef] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    as_decided: bool = False


class _MoreToLock(Exception):
    """Wallets that the batch needs were not locked with the others."""

    def __init__(self, wallets: set[WalletRef]) -> None:
        super().__init__(f"{len(wallets)} more wallets are needed")
        self.wallets = wallets


@dataclass(slots=True)
class _Kept:
    """What is known of the database as the last batches left it.

    The blocks of a wallet that is kept are all that are live, of those for returns also the dead, and of a limit's
    period those that are known. One that is not here does not exist, or is found to when it is made. *blocks_count* are
    all of them. *bodies* are the stored texts of the reservations.
    """

    server: str = ""
    state: State = field(default_factory=State)
    blocks_count: int = 0
    bodies: dict[ReservationRef, str] = field(default_factory=dict)
    absent: set[WalletRef] = field(default_factory=set)
    clock_us: int = 0
    clock_read_ns: int = 0

    def forget_wallet(self, ref: WalletRef) -> None:
        self.state.wallets.pop(ref, None)
        self.blocks_count -= len(self.state.blocks.pop(ref, ()))
        self.absent.discard(ref)

    def put_wallet(self, wallet: Wallet, blocks: dict[str, Block]) -> None:
        self.forget_wallet(wallet.ref)
        self.state.wallets[wallet.ref] = wallet
        self.state.blocks[wallet.ref] = blocks
        self.blocks_count += len(blocks)


class Batches:
    """Runs the batches of one process, on connections of their own."""

    def __init__(self, connections: Connections, *, clock: Callable[[], int] | None, watcher: Watcher | None) -> None:
        self._connections = connections
        self._clock = clock
        self._watcher = watcher
        self._kept = _Kept()
        self._contended: dict[WalletRef, float] = {}
        self._under_way: dict[_UnderWay, None] = {}

    async def run(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        """Decide *commands* in order in one transaction and commit it. Nothing has happened when it raises, as far as
        is known: a connection that was lost may have been so after the commit.
        """
        earlier = list(self._under_way)
        this = _UnderWay()
        self._under_way[this] = None
        try:
            return await self._run(this, earlier, commands)
        except StoreUnavailable:
            # Whatever went wrong there, what is known of it may be another server's, or a past that is lost.
            self._kept = _Kept()
            raise
        finally:
            del self._under_way[this]
            this.ended.set()

    async def _run(
        self, this: _UnderWay, earlier: Iterable[_UnderWay], commands: Sequence[AnyCommand]
    ) -> list[Outcome]:
        named = needs(commands)
        known = self._recall(named, commands)
        if known is None:
            kept = self._kept.state
            reserved = (kept.reservations[ref] for ref in named.reservations if ref in kept.reservations)
            wallets, spending = named.wallets | _wallets_of(reserved), used_up(kept, commands)
        else:
            outcomes = await self._decide_and_apply(this, earlier, named, commands, known)
            if outcomes is not None:
                return outcomes
            wallets, spending = known.wallets, used_up(known.state, commands)
        # Until it is loaded anew, nobody after us is decided on what we are about to change.
        self._let_go(wallets, named.reservations)
        for batch in earlier:
            await batch.ended.wait()
        async with self._connections.one(limit_s=BATCH_S) as connection:
            return await self._lock_first(connection, named, commands, wallets, spending)

    # The short way.

    def _recall(self, named: Needs, commands: Sequence[AnyCommand]) -> _Known | None:
        """What is kept of all that *commands* concern; None when something of it is not known, or often moves."""
        kept = self._kept.state
        # Refunds and reversals fill blocks again that are not kept, because nothing was left in them. A freeze ends an
        # erasure, which took metadata out of blocks as they are stored and not as they are kept.
        if not self._kept.server or any(isinstance(command, Refund | Reverse | Freeze) for command in commands):
            return None
        made = {command.reservation for command in commands if isinstance(command, Hold)}
        state = State()
        wallets = set(named.wallets)
        for ref in named.reservations:
            reservation = kept.reservations.get(ref)
            if reservation is not None:
                state.reservations[ref] = reservation
                wallets |= reserved_wallets(reservation)
            elif ref not in made:
                return None
        if not self._copy(wallets, state) or not all(_is_there(each, state) for each in state.reservations.values()):
            return None
        pool_wallets = pools(state, commands) - wallets
        if pool_wallets and not self._copy(pool_wallets, state):
            return None
        for command in commands:
            if isinstance(command, Revoke) and command.block_id not in state.blocks.get(command.wallet, {}):
                return None
        return _Known(state, wallets | pool_wallets)

    def _copy(self, wallets: Iterable[WalletRef], state: State) -> bool:
        """Copy what is kept of *wallets* into *state*; False when one is not known or contended."""
        kept = self._kept.state
        for ref in wallets:
            if ref in self._contended and self._contended[ref] > time.monotonic():
                return False
            wallet = kept.wallets.get(ref)
            if wallet is not None:
                state.wallets[ref] = wallet
                state.blocks[ref] = dict(kept.blocks[ref])
            elif ref not in self._kept.absent:
                return False
        return True

    async def _decide_and_apply(
        self,
        this: _UnderWay,
        earlier: Iterable[_UnderWay],
        named: Needs,
        commands: Sequence[AnyCommand],
        known: _Known,
    ) -> list[Outcome] | None:
        """Decide on what is kept, then lock, compare and write in one call; None when it was no longer so."""
        bodies = {ref: self._kept.bodies[ref] for ref in known.state.reservations}
        versions = [(*ref, wallet.version) for ref, wallet in known.state.wallets.items()]
        blocks_absent = [
            (ref, block_id) for ref, block_id in named.blocks if block_id not in known.state.blocks.get(ref, {})
        ]
        server, now_us = self._kept.server, self._now_us()
        outcomes, writes = fold(known.state, commands, now_us, {})
        written = rows.writes_of(writes, ())
        parameters = (
            *names(_scopes(named, known.wallets)),
            LOCK_WAIT_MS,
            server,
            now_us if self._clock is None else None,
            SKEW_US_MAX,
            versions,
            [(*ref, body) for ref, body in bodies.items()] or None,
            rows.wallet_names(_without(known.wallets, (row[:3] for row in versions))),
            rows.block_names(_without(blocks_absent, ((block.wallet, block.id) for block in writes.blocks_opened))),
            rows.reservation_names(
                _without(named.reservations, [*bodies, *(made.ref for made in writes.reservations_opened)])
            ),
            rows.key_names(named.keys),
            rows.command_names(_without(named.commands, ((entry.scope, entry.id) for entry in writes.journal))),
            *written.parameters,
        )
        built_on = [batch for batch in earlier if not batch.wallets.isdisjoint(known.wallets)]
        this.wallets = known.wallets
        self._keep(known, named, written.bodies)
        try:
            for batch in built_on:
                await batch.ended.wait()
            if all(batch.as_decided for batch in built_on):
                this.as_decided = await self._apply(writes, parameters)
        finally:
            if not this.as_decided:
                self._let_go(known.wallets, named.reservations)
        if not this.as_decided:
            return None
        self._tell(known.state, writes)
        return outcomes

    async def _apply(self, writes: Writes, parameters: Sequence[Any]) -> bool:
        """Whether everything was as kept, and is written."""
        await self._announce(writes)
        try:
            async with self._connections.one(limit_s=BATCH_S) as connection:
                apply = _APPLY_WATCHED if writes.wallets_watched else _APPLY
                answer = _decode_answer(await connection.fetchval(apply, *parameters))
        except asyncpg.UniqueViolationError:
            return False
        self._read_clock(answer.now_us)
        self._contend(answer.moved or ())
        return answer.moved is None

    def _contend(self, wallets: Iterable[WalletRef]) -> None:
        if len(self._contended) > CONTENDED_MAX:
            self._contended.clear()
        until = time.monotonic() + CONTENDED_S
        for ref in wallets:
            self._contended[ref] = until

    # The long way.

    async def _lock_first(
        self,
        connection: Connection,
        named: Needs,
        commands: Sequence[AnyCommand],
        wallets: set[WalletRef],
        spending: set[WalletRef],
    ) -> list[Outcome]:
        failure: Exception | None = None
        for _ in range(ROUNDS_MAX):
            try:
                return await self._locked(connection, named, commands, wallets, spending)
            except _MoreToLock as more:
                wallets = wallets | more.wallets
                spending = spending | more.wallets
                failure = StoreUnavailable("the wallets of a batch changed faster than they could be locked")
            except asyncpg.UniqueViolationError as error:
                # Somebody else put there what was not there: it will be seen now. Or a command is at fault.
                failure = error
        assert failure is not None
        raise failure

    async def _locked(
        self,
        connection: Connection,
        named: Needs,
        commands: Sequence[AnyCommand],
        wallets: set[WalletRef],
        spending: set[WalletRef],
    ) -> list[Outcome]:
        """One transaction: lock *wallets*, and the pools behind the blocks of those in *spending*, then decide."""
        await connection.execute(f"{_BEGIN}; {naming(_scopes(named, wallets))}")
        try:
            loaded = await self._load(connection, named, wallets, spending)
            state, bodies = _state_of(loaded)
            needed = named.wallets | _wallets_of(state.reservations.values()) | pools(state, commands)
            more = needed - wallets - state.wallets.keys()
            if more:
                raise _MoreToLock(more)
            known = _Known(state, wallets | set(state.wallets))
            keys_there = set(state.keys)
            now_us = loaded.now_us if self._clock is None else self._clock()
            outcomes, writes = fold(state, commands, now_us, _applied(loaded))
            written = rows.writes_of(writes, keys_there)
            await self._announce(writes)
            if writes.journal:
                write = _WRITE_WATCHED if writes.wallets_watched else _WRITE
                await connection.fetchval(write, *written.parameters)
            # A repetition is told that it has happened. A server that was started anew before its standby had it waits
            # for the standby only when something is committed: the locks.
            told = writes.journal or any(isinstance(each, Applied) and each.replayed for each in outcomes)
            await connection.execute("COMMIT" if told else "ROLLBACK")
        except Exception:
            if not connection.is_closed():
                await connection.execute("ROLLBACK")
            raise
        self._keep(known, named, {**bodies, **written.bodies})
        self._tell(state, writes)
        return outcomes

    async def _load(
        self, connection: Connection, named: Needs, wallets: set[WalletRef], spending: set[WalletRef]
    ) -> _Loaded:
        loaded = _decode_loaded(
            await connection.fetchval(
                _LOAD,
                rows.objects(("tenant", "mode", "wallet", "pools"), ((*ref, ref in spending) for ref in wallets))
                or "[]",
                rows.block_names(named.blocks) or "[]",
                list(RETURN_BLOCKS.values()),
                rows.reservation_names(named.reservations) or "[]",
                rows.key_names(named.keys) or "[]",
                rows.command_names(named.commands) or "[]",
            )
        )
        if loaded.server != self._kept.server:
            self._kept = _Kept(server=loaded.server)
        self._read_clock(loaded.now_us)
        return loaded

    # What is known of the time.

    def _read_clock(self, now_us: int) -> None:
        self._kept.clock_us = now_us
        self._kept.clock_read_ns = time.monotonic_ns()

    def _now_us(self) -> int:
        if self._clock is not None:
            return self._clock()
        return self._kept.clock_us + (time.monotonic_ns() - self._kept.clock_read_ns) // 1000

    # What is kept.

    def _let_go(self, wallets: Iterable[WalletRef], reservations: Iterable[ReservationRef]) -> None:
        kept = self._kept
        for ref in wallets:
            kept.forget_wallet(ref)
        for reservation in reservations:
            kept.state.reservations.pop(reservation, None)
            kept.bodies.pop(reservation, None)

    def _keep(self, known: _Known, named: Needs, bodies: Mapping[ReservationRef, str]) -> None:
        """Take the batch's state over, without what later batches hardly need: what is settled or has nothing left."""
        kept = self._kept
        for ref in known.wallets:
            wallet = known.state.wallets.get(ref)
            if wallet is None:
                kept.absent.add(ref)
                continue
            blocks = known.state.blocks.get(ref, {})
            kept.put_wallet(
                wallet, {block_id: block for block_id, block in blocks.items() if _worth_keeping(block, kept.clock_us)}
            )
        kept.bodies.update(bodies)
        for reservation_ref in named.reservations:
            reservation = known.state.reservations.get(reservation_ref)
            if reservation is not None and reservation.state is ReservationState.OPEN:
                kept.state.reservations[reservation_ref] = reservation
            else:
                kept.state.reservations.pop(reservation_ref, None)
                kept.bodies.pop(reservation_ref, None)
        if (
            len(kept.state.wallets) > WALLETS_KEPT_MAX
            or len(kept.state.reservations) > RESERVATIONS_KEPT_MAX
            or kept.blocks_count > BLOCKS_KEPT_MAX
            or len(kept.absent) > ABSENT_KEPT_MAX
        ):
            self._kept = _Kept(server=kept.server, clock_us=kept.clock_us, clock_read_ns=kept.clock_read_ns)

    # Who watches.

    async def _announce(self, writes: Writes) -> None:
        if self._watcher is not None:
            changed = [*writes.wallets_opened, *(wallet for wallet, _ in writes.wallets_changed)]
            if changed:
                await self._watcher.changing([WalletVersion(wallet.ref, wallet.version) for wallet in changed])

    def _tell(self, state: State, writes: Writes) -> None:
        if self._watcher is not None:
            changed = [*writes.wallets_opened, *(wallet for wallet, _ in writes.wallets_changed)]
            if changed:
                self._watcher.changed(
                    [
                        WalletBlocks(
                            wallet, tuple(block for block in state.blocks.get(wallet.ref, {}).values() if block.live)
                        )
                        for wallet in changed
                    ]
                )


def _worth_keeping(block: Block, now_us: int) -> bool:
    """A dead one is when later batches name it."""
    return block.live or block.id in _RETURNED or (block.funding is Funding.LIMIT and not block.expired_at(now_us))


def _is_there(reservation: Reservation, state: State) -> bool:
    """Whether what *reservation* holds is there. If not, somebody else has settled it since, and used that up."""
    return all(held.block is None or held.block in state.blocks.get(held.wallet, {}) for held in reservation.slices)


def _scopes(named: Needs, wallets: Iterable[WalletRef]) -> set[Scope]:
    """Everything that a batch reads or writes is in one of these: a block and its pool are of one tenant."""
    found = {scope for scope, _ in named.commands}
    found.update(ref.scope for ref in wallets)
    found.update(ref.scope for ref in named.wallets)
    found.update(ref.scope for ref in named.reservations)
    return found


def _wallets_of(reservations: Iterable[Reservation]) -> set[WalletRef]:
    return {ref for reservation in reservations for ref in reserved_wallets(reservation)}


def _without(these: Iterable[Any], those: Iterable[Any]) -> list[Any]:
    left_out = set(those)
    return [each for each in these if each not in left_out]


def _state_of(loaded: _Loaded) -> tuple[State, dict[ReservationRef, str]]:
    state = State()
    bodies = {}
    for row in loaded.wallets or ():
        wallet = wallet_from([row[name] for name in rows.WALLET])
        state.wallets[wallet.ref] = wallet
        state.blocks[wallet.ref] = {}
    found = [block_from([row[name] for name in rows.BLOCK]) for row in loaded.blocks or ()]
    for block in sorted(found, key=lambda block: block.sequence):
        state.blocks.setdefault(block.wallet, {})[block.id] = block
    for body in loaded.reservations or ():
        reservation = reservation_from(body)
        state.reservations[reservation.ref] = reservation
        bodies[reservation.ref] = body
    for row in loaded.keys or ():
        taken = key_from([row[name] for name in rows.KEY])
        state.keys[taken.scope, taken.operation, taken.key] = taken
    return state, bodies


def _applied(loaded: _Loaded) -> dict[CommandRef, AppliedBefore]:
    return {
        (Scope(tenant, mode), command_id): AppliedBefore(kind, result_from(result))
        for tenant, mode, command_id, kind, result in loaded.commands or ()
    }
