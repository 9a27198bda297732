"""A small language of tables, in which the ledger's rules are written down and checked.

One step a line, ``#`` begins a comment. ``-> word fact=value …`` says what the step comes to; without it the step must
be applied. After every step the invariants of ``tests.ledger.oracle`` hold, and replaying all facts gives the state.

=========================================  ==============================================================
``at 40``                                  the time, in microseconds (``90s`` and ``24h`` too)
``grant w1 b1 100``                        ``priority= expires= effective= app= metric= model= funding=``
                                           ``unpaid from=pool asset= source= payment= cap=``
``purchase w1 p1 20 100``                  a pack of 100 for 20: ``duration= priority= metric= pack= unless_active``
                                           ``app= pays-metric= asset=``
``reserve w1,w2 r1 60..20``                hold 60, at least 20, from w1 then w2. A second leg follows a bar:
                                           ``w1|dev  60..20|30``. ``ttl= limits=l1,l2 unfunded=line mark=``
                                           ``thresholds=8000,10000`` where a limit is filled each period:
                                           ``limits=day:100:0..50:50..90`` (amount, periods; ``90..`` has no end)
                                           ``request= developer= app= metric= model= max= asset= keystays``
                                           ``watch=low:50,exhausted:1,top_up:30`` of the first payer; ``watch=``
``extend r1 60..20``                       ``ttl= mark= limits=``. ``heartbeat r1`` extends by nothing
``commit r1 30+5``                         base and markup; a leg each: ``30+5|10``. ``partial response cost=``
                                           ``units=input:3,output:5``; ``waive``, ``beyond tells`` for what is missing
``release r1`` · ``lapse r1``
``debit w1 r1 30+5``                       ``hold=60..20`` where it is not the charge itself; ``beyond`` owes what
                                           is not there, ``overage`` too, within limits, and ``tells`` raises an
                                           event; ``response`` as in commit
``refund r1 20`` · ``refund r1``           an amount a leg: ``20|5``; without one, all that is left of the charge
                                           ``unfunded=line`` where a tenant gives it back
``topup w1 t1 100``                        a payment: ``bonus= spread= payment= asset=``
``reverse w1 t1 5/10 rev=1``               of a payment of 10, 5 are gone; ``frozen``, ``reference=``
``tell w1 topup.failed``
``revoke w1 b1 40`` · ``clawback w1 b1 40``   ``reference=``; ``all`` for an amount
``expire w1`` · ``freeze w1 [b1]`` · ``unfreeze w1 [b1]`` · ``overdraft w1 50`` · ``limit day:70:0..50``

``wallet w1 available=55 reserved=0``      also ``balance receivable overdraft_reserved version frozen alerts rung``
``block w1 b1 remaining=55``               any field of a block
``reservation r1 state=open held=60``      also ``charged shortfall slices payments`` and any other field
``account revenue = 40``                   of the journal; ``account revenue@t2``, ``account provider_cost USD``
``events w1 = credit.granted …``           all that the wallet has raised, in order
``key reserve k1 = taken``                 or ``free``
=========================================  ==============================================================

``key=k1`` (of the operation that the command's name is, with ``digest=``) and ``id=`` go with every command. A wallet
``w1@t2`` or ``w1@t2/test`` belongs to another tenant, or mode; ``scope=t2`` says for whom a command acts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ledger.commands import (
    AnyCommand,
    Beyond,
    Commit,
    Debit,
    Expire,
    Extend,
    Freeze,
    Grant,
    Key,
    Lapse,
    Limit,
    LimitPeriod,
    Purchase,
    Refund,
    Release,
    Reserve,
    ReserveLeg,
    Reverse,
    Revoke,
    SetLimit,
    SetOverdraft,
    StoredResponse,
    Tell,
    TopUp,
    Watch,
)
from ledger.core import decide
from ledger.model import (
    Alert,
    AlertKind,
    Charge,
    Funding,
    Payment,
    ReservationRef,
    Restriction,
    Scope,
    Settlement,
    Slice,
    Tags,
    UsageRecord,
    WalletRef,
)
from ledger.outcomes import (
    Applied,
    Changed,
    Event,
    Expired,
    Fact,
    Granted,
    Outcome,
    Purchased,
    Refunded,
    Rejected,
    Reserved,
    Reversed,
    Revoked,
    Settled,
    ToppedUp,
)
from ledger.state import State, evolve
from tests.ledger import oracle

TENANT = "t1"
SCOPE = Scope(TENANT, "live")
ASSET = "credit"
LONG_US = 1_000_000
"""The life of a reservation that names none."""

_ANSWER = StoredResponse(status=200, headers=(), body=b"{}")
RESULT_WORDS: dict[Any, str] = {
    Granted: "granted",
    ToppedUp: "topped_up",
    Reversed: "reversed",
    Purchased: "purchased",
    Reserved: "reserved",
    Refunded: "refunded",
    Revoked: "revoked",
    Expired: "expired",
    Changed: "changed",
}
_SECONDS = {"s": 1, "h": 3600}


@dataclass
class Case:
    """A ledger under test: its state, all facts and events so far, and the time."""

    state: State = field(default_factory=State)
    facts: list[Fact] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    now_us: int = 0
    commands: int = 0

    def run(self, command: AnyCommand) -> Outcome:
        """Decide, fold, and check that everything that must hold still does."""
        outcome = decide(self.state, command, self.now_us)
        assert outcome == decide(self.state, command, self.now_us), "the same state and time give the same outcome"
        if isinstance(outcome, Applied):
            if outcome.replayed:
                assert not outcome.facts
                assert not outcome.events
            oracle.check_step(self.state, command, outcome, self.now_us)
            before = oracle.watched(self.state, self.now_us)
            for fact in outcome.facts:
                evolve(self.state, fact)
            oracle.check_alerts(before, oracle.watched(self.state, self.now_us), command, outcome)
            self.facts += outcome.facts
            self.events += outcome.events
        oracle.check_state(self.state, oracle.account_balances(self.facts))
        assert oracle.replayed(self.facts) == self.state, "the state is the fold of all facts"
        return outcome

    def complete(self, command: AnyCommand) -> AnyCommand:
        """A refund with the payments of its reservation, which no line of a table spells out."""
        if isinstance(command, Refund) and command.reservation in self.state.reservations:
            payments = self.state.reservations[command.reservation].payments
            return msgspec.structs.replace(command, payments=payments)
        return command

    def account(self, account: str, *, scope: Scope = SCOPE, asset: str = ASSET) -> int:
        return oracle.account_balances(self.facts).get((scope, account, asset), 0)


def check(table: str, case: Case | None = None) -> Case:
    """Run a table; the case it ends with, for whatever else a test wants to know, or for another table to go on."""
    case = case or Case()
    for line in table.splitlines():
        step, _, _ = line.partition("#")
        if step.strip():
            try:
                _step(case, step)
            except AssertionError as failure:
                raise AssertionError(f"{line.strip()}\n{failure}") from failure
    return case


def _step(case: Case, line: str) -> None:
    text, _, expected = line.partition("->")
    verb, *words = text.split()
    if verb == "at":
        case.now_us = _time(words[0])
    elif verb in _ASSERTIONS:
        _ASSERTIONS[verb](case, words)
    else:
        case.commands += 1
        outcome = case.run(case.complete(command(text, command_id=f"cmd_{case.commands:03d}")))
        _expect(_describe(outcome), expected.split(), outcome)


def command(text: str, *, command_id: str = "cmd_x") -> AnyCommand:
    """The command that a line of a table stands for."""
    verb, *words = text.split()
    line = _Line(words, command_id, verb)
    made = _COMMANDS[verb](line)
    assert not line.options, f"nobody knows {line.options}"
    return made


class _Line:
    """One command's words: names and amounts in their order, options by name."""

    def __init__(self, words: list[str], command_id: str, verb: str) -> None:
        self.words = [word for word in words if "=" not in word]
        self.options = dict(word.split("=", 1) for word in words if "=" in word)
        self.id = self.option("id", command_id)
        self.verb = verb

    def option(self, name: str, default: str = "") -> str:
        return self.options.pop(name, default)

    def flag(self, name: str) -> bool:
        found = name in self.words
        if found:
            self.words.remove(name)
        return found

    def time(self, name: str) -> int | None:
        return _time(self.option(name)) if name in self.options else None

    def common(self, scope: Scope) -> dict[str, Any]:
        """Id, scope and key. A command acts for whom its wallet or reservation belongs to, unless it says otherwise."""
        named = self.option("scope")
        scope = _scope(named) if named else scope
        key = self.option("key")
        operation = self.option("operation", self.verb)
        taken = Key(operation=operation, key=key, digest=self.option("digest", "same")) if key else None
        return {"id": self.id, "scope": scope, "key": taken}

    def tags(self) -> Tags:
        return Tags(
            app=self.option("app") or None,
            metric=self.option("metric") or None,
            model=self.option("model") or None,
            priority_max=int(self.option("max")) if "max" in self.options else None,
        )

    def settlement(self, word: str) -> Settlement:
        usage = None
        if {"request", "cost", "units"} & set(self.options):
            units = dict(part.split(":") for part in self.option("units").split(",") if part)
            usage = UsageRecord(
                request_id=self.option("request", "req"),
                provider_cost_nanos=int(self.option("cost", "0")),
                units={unit: int(quantity) for unit, quantity in units.items()},
            )
        return Settlement(charges=tuple(map(_charge, word.split("|"))), usage=usage)

    def limits(self) -> tuple[Limit, ...]:
        thresholds = tuple(map(int, filter(None, self.option("thresholds").split(","))))
        return tuple(_limit(text, thresholds) for text in self.option("limits").split(",") if text)

    def mark(self) -> Settlement | None:
        return _settlement(self.option("mark")) if "mark" in self.options else None


def _grant(line: _Line) -> Grant:
    name, block, amount = line.words[:3]
    wallet = wallet_ref(name)
    source = line.option("from")
    tags = {f"{kind}s": tuple(filter(None, line.option(kind).split(","))) for kind in ("app", "metric", "model")}
    return Grant(
        **line.common(wallet.scope),
        wallet=wallet,
        asset=line.option("asset", ASSET),
        block_id=block,
        amount=int(amount),
        funding=Funding(line.option("funding", "paid")),
        operator_paid=not line.flag("unpaid"),
        from_wallet=wallet_ref(source) if source else None,
        priority=int(line.option("priority", "0")),
        effective_at_us=line.time("effective"),
        expires_at_us=line.time("expires"),
        source=line.option("source"),
        restriction=Restriction(**tags),
        payment_reference=line.option("payment") or None,
        metadata={"note": block},
        accumulation_cap=int(line.option("cap")) if "cap" in line.options else None,
    )


def _topup(line: _Line) -> TopUp:
    name, block, amount = line.words
    wallet = wallet_ref(name)
    return TopUp(
        **line.common(wallet.scope),
        wallet=wallet,
        asset=line.option("asset", ASSET),
        block_id=block,
        amount=int(amount),
        bonus=int(line.option("bonus", "0")),
        spread=int(line.option("spread", "0")),
        payment=line.option("payment", block),
        metadata={"note": block},
        body={"package": "usd-10"},
    )


def _reverse(line: _Line) -> Reverse:
    frozen = line.flag("frozen")
    name, block, part = line.words
    wallet = wallet_ref(name)
    taken, _, paid = part.partition("/")
    return Reverse(
        **line.common(wallet.scope),
        wallet=wallet,
        block_id=block,
        taken=int(taken),
        paid=int(paid),
        frozen=frozen,
        revision=int(line.option("rev")),
        reference=line.option("reference") or None,
    )


def _tell(line: _Line) -> Tell:
    wallet = wallet_ref(line.words[0])
    asset = line.option("asset", ASSET)
    return Tell(**line.common(wallet.scope), wallet=wallet, asset=asset, event=line.words[1], body={"order": "ord_1"})


def _purchase(line: _Line) -> Purchase:
    unless_active = line.flag("unless_active")
    name, block, price, amount = line.words
    wallet = wallet_ref(name)
    metrics = tuple(filter(None, line.option("pays-metric").split(",")))
    return Purchase(
        **line.common(wallet.scope),
        wallet=wallet,
        asset=line.option("asset", ASSET),
        block_id=block,
        price=int(price),
        amount=int(amount),
        pack=line.option("pack", "pack"),
        duration_us=line.time("duration"),
        priority=int(line.option("priority", "10")),
        tags=line.tags(),
        unless_active=unless_active,
        cause=line.option("cause"),
        restriction=Restriction(metrics=metrics),
        metadata={"note": block},
    )


def _hold(line: _Line, wallets: str, amounts: str) -> dict[str, Any]:
    legs = []
    for names, amount in zip(wallets.split("|"), amounts.split("|"), strict=True):
        most, _, least = amount.partition("..")
        legs.append(ReserveLeg(tuple(map(wallet_ref, filter(None, names.split(",")))), int(most), int(least or most)))
    unfunded = line.option("unfunded")
    watched = line.options.pop("watch", None)
    return {
        "watches": () if watched is None else (Watch(legs[0].wallets[0], alerts_of(watched)),),
        "asset": line.option("asset", ASSET),
        "legs": tuple(legs),
        "limits": line.limits(),
        "unfunded": wallet_ref(unfunded) if unfunded else None,
        "developer": line.option("developer") or None,
        "tags": line.tags(),
    }


def _reserve(line: _Line) -> Reserve:
    key_stays = line.flag("keystays")
    wallets, name, amounts = line.words
    reservation = reservation_ref(name)
    ttl_us = line.time("ttl")
    return Reserve(
        **line.common(reservation.scope),
        **_hold(line, wallets, amounts),
        reservation=reservation,
        ttl_us=LONG_US if ttl_us is None else ttl_us,
        mark=line.mark(),
        request_id=line.option("request") or None,
        key_stays=key_stays,
    )


def _extend(line: _Line) -> Extend:
    reservation = reservation_ref(line.words[0])
    most, _, least = (line.words[1] if len(line.words) > 1 else "0").partition("..")
    return Extend(
        **line.common(reservation.scope),
        reservation=reservation,
        amount=int(most),
        minimum=int(least or most),
        limits=line.limits(),
        ttl_us=line.time("ttl"),
        mark=line.mark(),
    )


def _commit(line: _Line) -> Commit:
    partial, response = line.flag("partial"), line.flag("response")
    beyond: Beyond = "receivable" if line.flag("beyond") else "waive" if line.flag("waive") else "shortfall"
    tells = line.flag("tells")
    reservation = reservation_ref(line.words[0])
    return Commit(
        **line.common(reservation.scope),
        reservation=reservation,
        settlement=line.settlement(line.words[1]),
        final=not partial,
        beyond=beyond,
        tells_overage=tells,
        response=_ANSWER if response else None,
    )


def _release(line: _Line) -> Release:
    reservation = reservation_ref(line.words[0])
    return Release(**line.common(reservation.scope), reservation=reservation)


def _lapse(line: _Line) -> Lapse:
    reservation = reservation_ref(line.words[0])
    return Lapse(**line.common(reservation.scope), reservation=reservation)


def _refund(line: _Line) -> Refund:
    reservation = reservation_ref(line.words[0])
    amounts = tuple(map(int, line.words[1].split("|"))) if len(line.words) > 1 else None
    line_of_tenant = line.option("unfunded")
    return Refund(
        **line.common(reservation.scope),
        reservation=reservation,
        payments=(),
        amounts=amounts,
        unfunded=wallet_ref(line_of_tenant) if line_of_tenant else None,
    )


def _debit(line: _Line) -> Debit:
    beyond, response = line.flag("beyond"), line.flag("response")
    overage, tells = line.flag("overage"), line.flag("tells")
    wallets, name, charges = line.words
    reservation = reservation_ref(name)
    settlement = line.settlement(charges)
    amounts = line.option("hold", "|".join(str(charge.total) for charge in settlement.charges))
    return Debit(
        **line.common(reservation.scope),
        **_hold(line, wallets, amounts),
        reservation=reservation,
        settlement=settlement,
        beyond="receivable" if beyond else "overage" if overage else "refuse",
        tells_overage=tells,
        response=_ANSWER if response else None,
    )


def _revoke(line: _Line) -> Revoke:
    wallet = wallet_ref(line.words[0])
    return Revoke(
        **line.common(wallet.scope),
        wallet=wallet,
        block_id=line.words[1],
        amount=None if line.words[2] == "all" else int(line.words[2]),
        clawback=line.verb == "clawback",
        reference=line.option("reference") or None,
    )


def _expire(line: _Line) -> Expire:
    wallet = wallet_ref(line.words[0])
    return Expire(**line.common(wallet.scope), wallet=wallet)


def _freeze(line: _Line) -> Freeze:
    wallet = wallet_ref(line.words[0])
    block_id = line.words[1] if len(line.words) > 1 else None
    return Freeze(**line.common(wallet.scope), wallet=wallet, frozen=line.verb == "freeze", block_id=block_id)


def _overdraft(line: _Line) -> SetOverdraft:
    wallet = wallet_ref(line.words[0])
    asset = line.option("asset", ASSET)
    return SetOverdraft(**line.common(wallet.scope), wallet=wallet, asset=asset, limit=int(line.words[1]))


def _set_limit(line: _Line) -> SetLimit:
    limit = _limit(line.words[0], tuple(map(int, filter(None, line.option("thresholds").split(",")))))
    asset = line.option("asset", ASSET)
    return SetLimit(**line.common(limit.wallet.scope), limit=limit, asset=asset)


_COMMANDS: dict[str, Callable[[_Line], AnyCommand]] = {
    "grant": _grant,
    "topup": _topup,
    "reverse": _reverse,
    "tell": _tell,
    "purchase": _purchase,
    "reserve": _reserve,
    "extend": _extend,
    "heartbeat": _extend,
    "commit": _commit,
    "release": _release,
    "lapse": _lapse,
    "debit": _debit,
    "refund": _refund,
    "revoke": _revoke,
    "clawback": _revoke,
    "expire": _expire,
    "freeze": _freeze,
    "unfreeze": _freeze,
    "overdraft": _overdraft,
    "limit": _set_limit,
}


def _wallet_facts(case: Case, words: list[str]) -> None:
    ref = wallet_ref(words[0])
    wallet = case.state.wallets[ref]
    blocks = case.state.blocks.get(ref, {}).values()
    facts = {
        **_fields(wallet),
        "balance": case.state.balance(ref, case.now_us),
        "available": sum(block.free for block in blocks if block.pays_at(case.now_us)),
        "reserved": sum(block.reserved for block in blocks),
    }
    _expect(facts, words[1:], wallet)


def _block_facts(case: Case, words: list[str]) -> None:
    block = case.state.blocks[wallet_ref(words[0])][words[1]]
    facts = {**_fields(block), "remaining": block.remaining, "free": block.free, "live": block.live}
    _expect(facts, words[2:], block)


def _reservation_facts(case: Case, words: list[str]) -> None:
    reservation = case.state.reservations[reservation_ref(words[0])]
    facts = {"held": reservation.held_by_leg, "refunded": reservation.refunded}
    _expect({**_fields(reservation), **facts}, words[1:], reservation)


def _account_facts(case: Case, words: list[str]) -> None:
    *names, sign, amount = words
    assert sign == "="
    account, _, owner = names[0].partition("@")
    asset = names[1] if len(names) > 1 else ASSET
    found = case.account(account, scope=_scope(owner or TENANT), asset=asset)
    assert found == int(amount), f"it is {found}"


def _event_facts(case: Case, words: list[str]) -> None:
    ref, (sign, *expected) = wallet_ref(words[0]), words[1:]
    assert sign == "="
    found = [event.type for event in case.events if event.wallet == ref]
    assert found == expected, f"they are {found}"


def _key_facts(case: Case, words: list[str]) -> None:
    operation, key, sign, expected = words
    assert sign == "="
    found = "taken" if (SCOPE, operation, key) in case.state.keys else "free"
    assert found == expected


_ASSERTIONS: dict[str, Callable[[Case, list[str]], None]] = {
    "wallet": _wallet_facts,
    "block": _block_facts,
    "reservation": _reservation_facts,
    "account": _account_facts,
    "events": _event_facts,
    "key": _key_facts,
}


def _describe(outcome: Outcome) -> dict[str, Any]:
    """The word for an outcome, and its facts by name."""
    if isinstance(outcome, Rejected):
        return {**_fields(outcome), "": outcome.reason.value}
    result = outcome.result
    word = result.state.value if isinstance(result, Settled) else RESULT_WORDS[type(result)]
    return {**_fields(result), "": word, "replayed": outcome.replayed, "answers": outcome.answers}


def _expect(found: dict[str, Any], words: Iterable[str], shown: object) -> None:
    for position, word in enumerate(words):
        name, sign, value = word.partition("=")
        if not sign and position == 0 and "" in found:
            assert found[""] == name, f"it is {found['']}: {shown}"
        elif not sign:
            assert found[name] is True, f"not {name}: {shown}"
        else:
            assert _shown(found[name]) == value, f"{name} is {_shown(found[name])}: {shown}"
    if not list(words) and found.get("") is not None:
        assert isinstance(shown, Applied), f"it is refused: {shown}"


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _shown(value: Any) -> str:
    """A value as the tables write it: a tuple's items with a bar where there is one a leg, else with a comma."""
    if isinstance(value, tuple) and not isinstance(value, WalletRef):
        by_leg = value and isinstance(value[0], Charge | int)
        return ("|" if by_leg else ",").join(map(_shown, value))
    show = _SHOWN.get(type(value), str)
    return show(value)


_SHOWN: dict[type, Callable[[Any], str]] = {
    Charge: lambda charge: f"{charge.base}+{charge.markup}",
    Slice: lambda held: f"{held.wallet.wallet}/{held.block or 'overdraft'}:{held.amount}",
    Payment: lambda paid: f"{paid.wallet.wallet}/{paid.block or 'overdraft'}:{paid.base}+{paid.markup}",
    Settlement: lambda settlement: _shown(settlement.charges),
    WalletRef: lambda ref: ref.wallet,
    Alert: lambda alert: f"{alert.kind}:{alert.below}",
    bool: lambda yes: str(yes).lower(),
}


def alerts_of(text: str) -> tuple[Alert, ...]:
    parts = [part.partition(":") for part in text.split(",") if part]
    return tuple(Alert(msgspec.convert(kind, AlertKind), int(below)) for kind, _, below in parts)


def _scope(text: str) -> Scope:
    tenant, _, mode = text.partition("/")
    return Scope(tenant, mode or "live")


def wallet_ref(text: str) -> WalletRef:
    name, _, owner = text.partition("@")
    return WalletRef(*_scope(owner or TENANT), name)


def reservation_ref(text: str) -> ReservationRef:
    name, _, owner = text.partition("@")
    return ReservationRef(*_scope(owner or TENANT), name)


def _limit(text: str, thresholds: tuple[int, ...]) -> Limit:
    """Its blocks are named after their start: ``day_50``."""
    name, *parts = text.split(":")
    periods = []
    for part in parts[1:]:
        start, _, end = part.partition("..")
        block_id = f"{name.partition('@')[0]}_{start}"
        periods.append(LimitPeriod(block_id, _time(start), _time(end) if end else None))
    return Limit(wallet_ref(name), int(parts[0]) if parts else 0, tuple(periods), thresholds)


def _charge(text: str) -> Charge:
    base, _, markup = text.partition("+")
    return Charge(int(base), int(markup or "0"))


def _settlement(text: str) -> Settlement:
    """Marks may carry usage: ``30+5;cost:7;output:20``."""
    charges, *parts = text.split(";")
    facts = {name: int(quantity) for name, quantity in (part.split(":") for part in parts)}
    usage = UsageRecord(request_id="req", provider_cost_nanos=facts.pop("cost", 0), units=facts) if parts else None
    return Settlement(charges=tuple(map(_charge, charges.split("|"))), usage=usage)


def _time(text: str) -> int:
    scale = _SECONDS.get(text[-1])
    return int(text) if scale is None else int(text[:-1]) * scale * 1_000_000
