"""The ledger once more, as simply as it can be written: dictionaries, loops and no thought of speed.

It predicts for every command what the core must answer and what every balance is afterwards. It shares nothing with the
core but the commands. Slow, and meant to be read beside the rules: what is free is always computed anew from
what is left and what is pinned.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ledger.commands import (
    AnyCommand,
    Commit,
    Debit,
    Expire,
    Extend,
    Freeze,
    Grant,
    Lapse,
    Limit,
    Purchase,
    Refund,
    Release,
    Reserve,
    ReserveLeg,
    Reverse,
    Revoke,
    SetLimit,
    SetOverdraft,
    Tell,
    TopUp,
)
from ledger.model import Charge, Settlement, Tags, WalletRef

DAY_US = 24 * 3600 * 1_000_000
FROM = {"paid": "clearing", "external": "external", "promotional": "promo", "plan": "plan", "limit": "limit"}
Prediction = dict[str, Any]
Pin = tuple[int, WalletRef, str | None, int]
"""Leg, wallet, block (or the overdraft), amount."""


class Naive:
    """Wallets are dictionaries with a list of blocks, blocks too; pins say which reservation holds what of which."""

    def __init__(self) -> None:
        self.wallets: dict[WalletRef, dict[str, Any]] = {}
        self.reservations: dict[Any, dict[str, Any]] = {}
        self.keys: dict[Any, tuple[str, Prediction]] = {}
        self.accounts: dict[tuple[str, str, str], int] = defaultdict(int)
        self.now = 0

    # What anybody may ask.

    def balance(self, ref: WalletRef) -> int:
        wallet = self.wallets[ref]
        return int(sum(block["left"] for block in wallet["blocks"] if not self._over(block)) - wallet["owed"])

    def journal_balance(self, ref: WalletRef) -> int:
        wallet = self.wallets[ref]
        return int(sum(block["left"] for block in wallet["blocks"]) - wallet["owed"])

    def pinned(self, ref: WalletRef, name: str | None) -> int:
        pins = [pin for reservation in self.reservations.values() for pin in reservation["pins"]]
        return sum(amount for _, wallet, block, amount in pins if (wallet, block) == (ref, name))

    # Commands.

    def predict(self, command: AnyCommand, now: int) -> Prediction:
        """What the command must come to, done here at once."""
        self.now = now
        key = None
        if command.key is not None:
            key = (command.scope, command.key.operation, command.key.key)
            if key in self.keys:
                digest, answer = self.keys[key]
                return answer if digest == command.key.digest else {"word": "key_reused"}
        answer = self._do(command)
        if key is not None and command.key is not None and not answer.get("refused") and not answer.get("again"):
            self.keys[key] = (command.key.digest, answer)
        return answer

    def _do(self, command: AnyCommand) -> Prediction:
        name = type(command).__name__.lower()
        return getattr(self, f"_{name}")(command)  # type: ignore[no-any-return]

    def _setoverdraft(self, command: SetOverdraft) -> Prediction:
        self._open(command.wallet)["overdraft"] = command.limit
        return {"word": "changed"}

    def _grant(self, command: Grant) -> Prediction:
        start = command.effective_at_us if command.effective_at_us is not None else self.now
        if command.expires_at_us is not None and command.expires_at_us <= max(start, self.now):
            return _no("invalid_amount")
        cap = command.accumulation_cap
        if cap is not None and cap < command.amount:
            return _no("invalid_amount")
        taken = {block["name"] for block in self.wallets.get(command.wallet, {"blocks": []})["blocks"]}
        if command.block_id in taken or command.block_id + "_2" in taken:
            return _no("already_exists")
        paid = command.operator_paid and command.funding != "external"
        lots = {paid: command.amount}
        if command.from_wallet is not None:
            refused, lots = self._take(command.from_wallet, command.amount)
            if refused:
                return _no(refused)
        else:
            self._book(command.wallet, FROM[command.funding], -command.amount)
        wallet = self._open(command.wallet)
        name = (command.source, str(command.funding))
        older = [b for b in wallet["blocks"] if (b["source"], b["funding"]) == name and not self._over(b)]
        names = iter((command.block_id, command.block_id + "_2"))
        for lot_paid in (True, False):
            amount = lots.get(lot_paid, 0)
            if amount == 0:
                continue
            repaid = self._repay(command.wallet, amount, paid=lot_paid)
            self._add_block(
                wallet, next(names), amount, prio=command.priority, start=start, end=command.expires_at_us,
                apps=command.restriction.apps, paid=lot_paid, funding=str(command.funding), pool=command.from_wallet,
                source=command.source,
            )  # fmt: skip
            wallet["blocks"][-1]["left"] -= repaid
            wallet["blocks"][-1]["used"] += repaid
        new = wallet["blocks"][len(wallet["blocks"]) - sum(amount > 0 for amount in lots.values()) :]
        lapsed = 0 if cap is None else self._cap(command.wallet, older, room=cap - sum(block["left"] for block in new))
        return {"word": "granted", "balance_after": self.balance(command.wallet), "lapsed": lapsed}

    def _topup(self, command: TopUp) -> Prediction:
        names = (command.block_id, command.block_id + "_bonus")
        if command.amount <= 0 or command.bonus < 0 or command.spread < 0:
            return _no("invalid_amount")
        if {block["name"] for block in self.wallets.get(command.wallet, {"blocks": []})["blocks"]} & {*names}:
            return _no("already_exists")
        wallet = self._open(command.wallet)
        owed = wallet["owed"]
        for name, funding, amount in zip(names, ("paid", "promotional"), (command.amount, command.bonus), strict=True):
            if amount:
                repaid = self._repay(command.wallet, amount, paid=True)
                self._add_block(
                    wallet, name, amount, prio=0, start=self.now, end=None, apps=(), paid=True, funding=funding,
                    pool=None, source=command.source,
                )  # fmt: skip
                wallet["blocks"][-1].update(left=amount - repaid, used=repaid)
                self._book(command.wallet, FROM[funding], -amount)
        self._block(command.wallet, command.block_id)["spread"] = command.spread
        self._book(command.wallet, "clearing", -command.spread)
        self._book(command.wallet, "package_spread", command.spread)
        told = {"balance_after": self.balance(command.wallet), "repaid": owed - wallet["owed"]}
        return {"word": "topped_up", **told}

    def _tell(self, command: Tell) -> Prediction:
        self._open(command.wallet)
        return {"word": "changed"}

    def _reverse(self, command: Reverse) -> Prediction:
        """Of each block so much must be gone as of the payment; one credit after the other goes, or comes back."""
        if not 0 <= command.taken <= command.paid or command.paid == 0:
            return _no("invalid_amount")
        ref = command.wallet
        wallet = self.wallets.get(ref)
        first = wallet and self._block(ref, command.block_id)
        if not wallet or not first or first["pool"] is not None or first["funding"] != "paid":
            return _no("not_found")
        bonus = self._block(ref, command.block_id + "_bonus")
        taken = given = 0
        if command.revision > first["revision"]:
            first["revision"] = command.revision
            for block in filter(None, (first, bonus)):
                block["stopped"] = command.frozen
                gone = sum(block["gone"].values())
                target = self._granted_of(block) * command.taken // command.paid
                taken += max(0, target - gone)
                given += max(0, gone - target)
                for _ in range(target - gone):
                    self._take_credit(ref, block)
                for _ in range(gone - target):
                    self._give_credit(ref, block)
            worth = self._granted_of(first) + first["spread"]
            spread = worth * command.taken // command.paid - sum(first["gone"].values())
            self._book(ref, "package_spread", first["spread_gone"] - spread)
            self._book(ref, "clearing", spread - first["spread_gone"])
            first["spread_gone"] = spread
        in_all = sum(sum(block["gone"].values()) for block in (first, bonus) if block)
        return {
            "word": "reversed",
            "taken": taken,
            "given": given,
            "taken_in_all": in_all,
            "receivable": wallet["owed"],
        }

    def _granted_of(self, block: dict[str, Any]) -> int:
        return int(block["left"] + block["used"] + block["lapsed"] + block["revoked"])

    def _take_credit(self, ref: WalletRef, block: dict[str, Any]) -> None:
        origin = FROM[block["funding"]]
        if self._free(ref, block):
            kind = "free"
            block["left"] -= 1
            block["revoked"] += 1
        elif block["used"] + self.pinned(ref, block["name"]) > block["clawed"]:
            kind = "owed"
            block["clawed"] += 1
            self.wallets[ref]["owed"] += 1
            self.wallets[ref]["reversed"] += 1
        elif block["clawed"] > block["gone"]["owed"] + block["gone"]["clawed"]:
            kind = "clawed"
            self._change_sort(self.wallets[ref], ref, to_reversed=True)
        else:
            kind = "lapsed"
        block["gone"][kind] += 1
        if kind in ("free", "owed"):
            self._book(ref, origin, 1)
        elif block["funding"] == "paid":
            self._book(ref, "breakage", -1)
            self._book(ref, origin, 1)

    def _give_credit(self, ref: WalletRef, block: dict[str, Any]) -> None:
        origin = FROM[block["funding"]]
        kind = next(kind for kind in ("lapsed", "clawed", "owed", "free") if block["gone"][kind])
        block["gone"][kind] -= 1
        if kind in ("free", "owed"):
            self._book(ref, origin, -1)
        elif block["funding"] == "paid":
            self._book(ref, "breakage", 1)
            self._book(ref, origin, -1)
        if kind == "owed":
            block["clawed"] -= 1
            self._not_owed(ref, 1, of_reversed=True)
        if kind == "clawed":
            self._change_sort(self.wallets[ref], ref, to_reversed=False)
        if kind == "free":
            block["revoked"] -= 1
            block["lapsed" if self._over(block) else "left"] += 1
            self._book(ref, "breakage", int(self._over(block)))

    def _change_sort(self, wallet: dict[str, Any], ref: WalletRef, *, to_reversed: bool) -> None:
        """One credit of debt is of the other sort now: one that is still owed, or that was paid for, or else a gift."""
        way = 1 if to_reversed else -1
        if (wallet["owed"] - wallet["reversed"] if to_reversed else wallet["reversed"]) > 0:
            wallet["reversed"] += way
        elif wallet["repaid_paid" if to_reversed else "reversed_paid"] > 0:
            wallet["repaid_paid"] -= way
            wallet["reversed_paid"] += way
        else:
            wallet["repaid_due"] += way
            self._book(ref, "revenue", -way)
            self._book(ref, "tenant_due", way)

    def _repay(self, ref: WalletRef, amount: int, *, paid: bool) -> int:
        wallet = self.wallets[ref]
        repaid = int(min(amount, wallet["owed"]))
        for _ in range(repaid):
            due = wallet["reversed"] > 0 and not paid
            wallet["reversed_paid" if wallet["reversed"] > 0 else "repaid_paid"] += paid
            wallet["owed"] -= 1
            wallet["reversed"] -= wallet["reversed"] > 0
            wallet["repaid_due"] += due
            self._book(ref, "revenue", -due)
            self._book(ref, "tenant_due", due)
        return repaid

    def _not_owed(self, ref: WalletRef, amount: int, *, of_reversed: bool) -> None:
        """A debt that is none: it is struck out, and what has repaid it comes back as what it was."""
        wallet = self.wallets[ref]
        back = 0
        for _ in range(amount):
            if (wallet["reversed"] if of_reversed else wallet["owed"] - wallet["reversed"]) > 0:
                wallet["owed"] -= 1
                wallet["reversed"] -= of_reversed
            else:
                back += 1
        repaid = "reversed_paid" if of_reversed else "repaid_paid"
        kinds = {True: min(back, wallet[repaid])}
        kinds[False] = back - kinds[True]
        due = kinds[False] if of_reversed else 0
        wallet[repaid] -= kinds[True]
        wallet["repaid_due"] -= due
        self._book(ref, "revenue", due)
        self._book(ref, "tenant_due", -due)
        for paid, part in kinds.items():
            left = part - self._repay(ref, part, paid=paid)
            if left:
                self._returns(ref, paid=paid)["left"] += left

    def _cap(self, ref: WalletRef, older: list[dict[str, Any]], *, room: int) -> int:
        """Take from the oldest, credit by credit, until the others and what is pinned fit."""
        lapsed = 0
        for block in older:
            part = min(max(0, sum(block["left"] for block in older) - room), self._free(ref, block))
            block["left"] -= part
            block["revoked"] += part
            lapsed += part
        self._book(ref, "breakage", lapsed)
        return lapsed

    def _purchase(self, command: Purchase) -> Prediction:
        """Collect the price from whatever may pay it, then put the credits in as two blocks at most."""
        wallet = self.wallets.get(command.wallet, {"blocks": [], "owed": 0, "frozen": False})
        plans = [
            block
            for block in self._payable(command.wallet, Tags(), any_app=True)
            if block["funding"] == "plan" and block["left"]
        ]
        until = [self.now, *(block["end"] or 0 for block in plans)]
        active = sum(self._free(command.wallet, block) for block in plans)
        if command.price < 0 or command.amount <= 0 or (command.duration_us is not None and command.duration_us <= 0):
            return _no("invalid_amount")
        taken = {block["name"] for block in wallet["blocks"]}
        if command.block_id in taken or command.block_id + "_2" in taken:
            return _no("already_exists")
        if command.unless_active and active:
            return _no("plan_active")
        if wallet["frozen"] or wallet["owed"]:
            return _no("wallet_frozen" if wallet["frozen"] else "receivable_outstanding")
        payers = [
            block
            for block in self._payable(command.wallet, command.tags)
            if block["funding"] != "plan" and (command.priority <= 0 or block["prio"] < command.priority)
        ]
        there = sum(self._free(command.wallet, block) for block in payers)
        if there < command.price:
            return _no("insufficient_credits", needed=command.price, available=there)
        paid, missing = 0, command.price
        for block in payers:
            part = min(missing, self._free(command.wallet, block))
            self._use(command.wallet, block["name"], part)
            missing -= part
            paid += part if block["paid"] else 0
        wallet = self._open(command.wallet)
        paid = min(paid, command.amount)
        end = None if command.duration_us is None else max(until) + command.duration_us
        names = [command.block_id, command.block_id + "_2"]
        for lot_paid, amount in ((True, paid), (False, command.amount - paid)):
            if amount:
                self._add_block(
                    wallet, names.pop(0), amount, prio=command.priority, start=self.now, end=end, apps=(),
                    paid=lot_paid, funding="plan", pool=None, source=command.source,
                )  # fmt: skip
        self._book(command.wallet, "plan", command.price - command.amount)
        return {"word": "purchased", "expires_at_us": end, "balance_after": self.balance(command.wallet)}

    def _take(self, ref: WalletRef, amount: int) -> tuple[str, dict[bool, int]]:
        giver = self.wallets.get(ref)
        if giver is None:
            return "insufficient_credits", {}
        if giver["frozen"]:
            return "wallet_frozen", {}
        if giver["owed"]:
            return "receivable_outstanding", {}
        there = self._payable(ref, Tags())
        if sum(self._free(ref, block) for block in there) < amount:
            return "insufficient_credits", {}
        lots = {True: 0, False: 0}
        for block in there:
            part = min(amount, self._free(ref, block))
            block["left"] -= part
            block["used"] += part
            lots[block["paid"]] += part
            amount -= part
        return "", lots

    def _reserve(self, command: Reserve) -> Prediction:
        known = self.reservations.get(command.reservation)
        if known is not None:
            if known["state"] == "open" and known["request"] == command.request_id:
                return {"word": "reserved", "held": self._held(known), "again": True}
            return _no("already_exists")
        answer = self._hold(command, command.request_id)
        if not answer.get("refused"):
            made = self.reservations[command.reservation]
            made["until"] = self.now + min(command.ttl_us, DAY_US)
            made["mark"] = command.mark
            made["key"] = None if command.key_stays else made["key"]
        return answer

    def _hold(self, command: Reserve | Debit, request: str | None, asked: list[ReserveLeg] | None = None) -> Prediction:
        legs = [tuple(dict.fromkeys(leg.wallets)) for leg in command.legs]
        made = {
            "state": "open",
            "legs": legs,
            "limits": tuple(dict.fromkeys(limit.wallet for limit in command.limits)),
            "line": command.unfunded,
            "tags": command.tags,
            "developer": command.developer,
            "request": request,
            "key": command.key and (command.scope, command.key.operation, command.key.key),
            "pins": [],
            "mark": None,
            "born": self.now,
            "until": self.now,
            "charged": [Charge()] * len(legs),
            "lost": 0,
            "waived": 0,
            "paid": [],
            "given": [],
            "commits": 0,
        }
        self.reservations[command.reservation] = made
        undo = self._open_periods(command.limits)
        for number, leg in enumerate(asked or command.legs):
            refused = self._hold_leg(made, number, leg)
            if refused:
                del self.reservations[command.reservation]
                undo()
                return refused
        self._open(legs[0][0])
        return {"word": "reserved", "held": self._held(made)}

    def _open_periods(self, limits: Iterable[Limit], *, early: bool = False) -> Callable[[], None]:
        """Fill the limits whose period has begun; what undoes it, for a command that is refused."""
        before = copy.deepcopy((self.wallets, self.accounts))
        for limit in limits:
            for period in limit.periods:
                begun = early or period.start_us <= self.now
                now_in_it = begun and (period.end_us is None or self.now < period.end_us)
                if now_in_it and not (limit.wallet in self.wallets and self._block(limit.wallet, period.block_id)):
                    self._add_block(
                        self._open(limit.wallet), period.block_id, limit.amount, prio=0, start=period.start_us,
                        end=period.end_us, apps=(), paid=True, pool=None, funding="limit",
                    )  # fmt: skip
                    self._book(limit.wallet, "limit", -limit.amount)

        def undo() -> None:
            self.wallets, self.accounts = before

        return undo

    def _setlimit(self, command: SetLimit) -> Prediction:
        limit = command.limit
        coming = [period for period in limit.periods if period.end_us is None or self.now < period.end_us]
        if not any(period.start_us <= self.now for period in coming):
            return _no("not_found")
        self._open_periods([limit], early=True)
        for period in coming:
            block = self._block(limit.wallet, period.block_id)
            taken = block["used"] + block["revoked"] + self.pinned(limit.wallet, period.block_id)
            left = max(limit.amount, taken) - block["used"] - block["revoked"]
            self._book(limit.wallet, "limit", block["left"] - left)
            block["left"] = left
        return {"word": "changed"}

    def _hold_leg(self, made: dict[str, Any], number: int, leg: ReserveLeg) -> Prediction | None:
        """Pin the leg's credits one by one: each credit to the first source that may give it."""
        wallets = made["legs"][number]
        bound = min([leg.amount, *(self._all_free(ref) for ref in made["limits"] if number == 0)])
        line = self._all_free(made["line"]) if made["line"] is not None else None
        usable = [ref for ref in wallets if ref in self.wallets and not self._barred(ref)]
        sources = self._sources(usable, made["tags"])
        pins: list[Pin] = []
        unpaid = 0
        for ref, name, paid, amount in sources:
            part = min(amount, bound - sum(pin[3] for pin in pins))
            if line is not None and not paid:
                part = min(part, line - unpaid)
            if part > 0:
                pins.append((number, ref, name, part))
                unpaid += 0 if paid else part
        held = sum(pin[3] for pin in pins)
        if held < leg.minimum:
            if sum(amount for *_, amount in sources) >= leg.minimum:
                left = {ref: self._all_free(ref) for ref in made["limits"] if number == 0}
                tightest = min(left, key=lambda ref: left[ref]) if bound < leg.minimum else made["line"]
                return _no("limit_reached", needed=leg.minimum, available=held, limit=tightest)
            known = [self.wallets[ref] for ref in wallets if ref in self.wallets]
            if any(wallet["frozen"] for wallet in known):
                return _no("wallet_frozen", needed=leg.minimum, available=held)
            if any(wallet["owed"] > wallet["overdraft"] for wallet in known):
                return _no("receivable_outstanding", needed=leg.minimum, available=held)
            return _no("insufficient_credits", needed=leg.minimum, available=held)
        if number == 0:
            for ref in made["limits"]:
                pins += self._pins_of(ref, held, leg=-1)
        if line is not None:
            pins += self._pins_of(made["line"], unpaid, leg=-2)
        for *what, amount in pins:
            same = [i for i, pin in enumerate(made["pins"]) if list(pin[:3]) == what]
            if same:
                made["pins"][same[0]] = (*what, made["pins"][same[0]][3] + amount)
            else:
                made["pins"].append((*what, amount))
        return None

    def _pins_of(self, ref: WalletRef, amount: int, *, leg: int) -> list[Pin]:
        pins: list[Pin] = []
        for block in self._payable(ref, Tags()):
            part = min(amount - sum(pin[3] for pin in pins), self._free(ref, block))
            if part > 0:
                pins.append((leg, ref, block["name"], part))
        return pins

    def _extend(self, command: Extend) -> Prediction:
        known = self.reservations.get(command.reservation)
        if known is None:
            return _no("not_found")
        if known["state"] != "open":
            return _no("reservation_settled")
        if command.amount:
            leg = ReserveLeg(known["legs"][0], command.amount, command.minimum)
            before = len(known["pins"])
            undo = self._open_periods(limit for limit in command.limits if limit.wallet in known["limits"])
            refused = self._hold_leg(known, 0, leg)
            if refused:
                undo()
                assert len(known["pins"]) == before
                return refused
        if command.ttl_us is not None:
            known["until"] = max(known["until"], min(self.now + command.ttl_us, known["born"] + DAY_US))
        known["mark"] = command.mark or known["mark"]
        return {"word": "reserved", "held": self._held(known)}

    def _debit(self, command: Debit) -> Prediction:
        beyond = command.beyond == "receivable"
        usage = command.settlement.usage
        request = usage.request_id if usage is not None else None
        known = self.reservations.get(command.reservation)
        if known is not None:
            if not beyond or request is None or known["request"] != request:
                return _no("already_exists")
            if known["state"] in ("committed", "released") or known["given"]:
                return _no("reservation_settled")
            late = known["state"] == "expired"
            settlement = self._missing(known, command.settlement) if late else command.settlement
            self._charge(command.reservation, settlement, final=True, beyond="receivable")
            return self._end(known, "committed")
        overage = command.beyond == "overage"
        if overage and (word := self._bars_overage(command)):
            return _no(word)
        asked = [(leg.wallets, 0, 0) if beyond else (leg.wallets, leg.amount, leg.minimum) for leg in command.legs]
        if overage:
            asked = [(leg.wallets, leg.amount, 0) for leg in command.legs]
        answer = self._hold(command, request, [ReserveLeg(*leg) for leg in asked])
        if answer.get("refused"):
            return answer
        made = self.reservations[command.reservation]
        whose = "receivable" if beyond or overage else "refuse"
        self._charge(command.reservation, command.settlement, final=True, beyond=whose)
        return self._end(made, "committed")

    def _bars_overage(self, command: Debit) -> str | None:
        payers = [self.wallets[ref] for leg in command.legs for ref in leg.wallets if ref in self.wallets]
        if any(wallet["frozen"] for wallet in payers):
            return "wallet_frozen"
        undo = self._open_periods(command.limits)
        short = any(self._all_free(limit.wallet) < command.legs[0].amount for limit in command.limits)
        undo()
        return "limit_reached" if short else None

    def _commit(self, command: Commit) -> Prediction:
        known = self.reservations.get(command.reservation)
        if known is None:
            return _no("not_found")
        late = known["state"] == "expired"
        if known["state"] in ("committed", "released") or (late and known["given"]):
            return _no("reservation_settled")
        settlement = self._missing(known, command.settlement) if late else command.settlement
        self._charge(command.reservation, settlement, final=late or command.final, beyond=command.beyond)
        if late or command.final:
            return self._end(known, "committed")
        known["mark"] = None
        return self._told(known, "open")

    def _missing(self, known: dict[str, Any], settlement: Settlement) -> Settlement:
        """What is left to charge after the mark was."""
        if known["mark"] is None:
            return settlement
        charges = []
        for actual, marked in zip(settlement.charges, known["mark"].charges, strict=True):
            missing = max(0, actual.base + actual.markup - marked.base - marked.markup)
            base = min(missing, max(0, actual.base - marked.base))
            charges.append(Charge(base, missing - base))
        return Settlement(tuple(charges))

    def _refund(self, command: Refund) -> Prediction:
        """Go through what was paid from the end, and put each part where it came from."""
        known = self.reservations.get(command.reservation)
        if known is None:
            return _no("not_found")
        legs = len(known["legs"])
        lines = self._paid_lines(known)
        left = [sum(base + markup for line, (base, markup) in lines if line[0] == leg) for leg in range(legs)]
        asked = list(left if command.amounts is None else command.amounts)
        if len(asked) != legs or any(amount > most or amount < 0 for amount, most in zip(asked, left, strict=True)):
            return _no("invalid_amount")
        amounts = tuple(asked)
        if command.unfunded is not None:
            drawn = due = 0
            still = list(asked)
            for (leg, _, name, base_account, _), (base, markup) in reversed(lines):
                part = min(still[leg], base + markup)
                still[leg] -= part
                if part and base_account == "revenue":
                    due += base * part // (base + markup)
                    drawn += 0 if name is None else base * part // (base + markup)
            if self._all_free(command.unfunded) < drawn:
                return _no("limit_reached", needed=drawn, limit=command.unfunded)
            self._draw({"pins": []}, -2, command.unfunded, drawn)
            self._book(command.unfunded, "tenant_due", due)
            self._book(command.unfunded, "external", -due)
        for line, (base, markup) in reversed(lines):
            part = min(asked[line[0]], base + markup)
            if part > 0:
                asked[line[0]] -= part
                self._put_back(known, line, base * part // (base + markup), part)
        return {"word": "refunded", "amounts": amounts, "balance": self.balance(known["legs"][0][0])}

    def _paid_lines(self, known: dict[str, Any]) -> list[tuple[Any, tuple[int, int]]]:
        """By leg, block and accounts, in the order of the first payment: what was paid less what was given back."""
        sums: dict[Any, list[int]] = {}
        for line, base, markup in known["paid"]:
            sums.setdefault(line, [0, 0])
            sums[line][0] += base
            sums[line][1] += markup
        for line, base, markup in known["given"]:
            sums[line][0] -= base
            sums[line][1] -= markup
        return [(line, (base, markup)) for line, (base, markup) in sums.items() if base + markup]

    def _put_back(self, known: dict[str, Any], line: Any, base: int, part: int) -> None:
        _, ref, name, base_account, markup_account = line
        known["given"].append((line, base, part - base))
        self._book(ref, base_account, -base)
        gone = 0
        if isinstance(markup_account, WalletRef):
            gone = self._take_from_pool(markup_account, part - base, paid=self._block(ref, name)["paid"])
        else:
            self._book(ref, markup_account, base - part)
        if name is None:
            self._not_owed(ref, part, of_reversed=False)
            return
        block = self._block(ref, name)
        if gone and not self._over(block):
            self._returns(ref, paid=False)["left"] += gone
            part -= gone
        block["used"] -= part
        block["left"] += part
        self._collect(ref, name)
        if self._over(block):
            lapsed = min(part, self._free(ref, block))
            block["left"] -= lapsed
            block["lapsed"] += lapsed
            self._book(ref, "breakage", lapsed)

    def _take_from_pool(self, ref: WalletRef, amount: int, *, paid: bool) -> int:
        """First the like, and of that what was returned to it, then whatever it has; it owes the rest.

        What was paid for and is not there is told.
        """
        missing = amount if paid else 0
        blocks = self._payable(ref, Tags())
        for like in (True, False):
            for returned in (True, False):
                for block in blocks:
                    if block["name"].startswith("blk_returns") is returned and (block["paid"] is paid) is like:
                        part = min(amount, self._free(ref, block))
                        self._use(ref, block["name"], part)
                        amount -= part
                        missing -= part if like and paid else 0
        self.wallets[ref]["owed"] += amount
        return missing

    def _release(self, command: Release) -> Prediction:
        known = self.reservations.get(command.reservation)
        if known is None:
            return _no("not_found")
        if known["state"] == "released":
            return {**self._told(known, "released"), "again": True}
        if known["state"] != "open":
            return _no("reservation_settled")
        return self._end(known, "released")

    def _lapse(self, command: Lapse) -> Prediction:
        known = self.reservations.get(command.reservation)
        if known is None:
            return _no("not_found")
        if known["state"] != "open" or self.now < known["until"]:
            return {"word": "changed"}
        mark = known["mark"]
        if mark is not None:
            self._charge(command.reservation, mark, final=True)
        answer = self._end(known, "expired")
        known["mark"] = mark
        return answer

    def _end(self, known: dict[str, Any], state: str) -> Prediction:
        pinned = [(ref, name) for _, ref, name, _ in known.pop("freed", known["pins"]) if name is not None]
        known["state"], known["pins"], known["mark"] = state, [], None
        for ref, name in dict.fromkeys(pinned):
            self._collect(ref, name)
        if state != "committed" and known["commits"] == 0 and known["key"]:
            del self.keys[known["key"]]
            known["key"] = None
        return self._told(known, state)

    def _collect(self, ref: WalletRef, name: str) -> None:
        """What was clawed back while it was pinned or spent is taken when it is free: the debt goes with it."""
        block = self._block(ref, name)
        taken = max(0, min(block["clawed"] - block["used"] - self.pinned(ref, name), self._free(ref, block)))
        block["left"] -= taken
        block["revoked"] += taken
        block["clawed"] -= taken
        of_reversed = 0
        for kind, becomes in (("owed", "free"), ("clawed", "lapsed")):
            part = min(taken - of_reversed, block["gone"][kind])
            block["gone"][kind] -= part
            block["gone"][becomes] += part
            of_reversed += part
        self._not_owed(ref, of_reversed, of_reversed=True)
        self._not_owed(ref, taken - of_reversed, of_reversed=False)

    def _told(self, known: dict[str, Any], state: str) -> Prediction:
        return {
            "word": state,
            "charged": tuple(known["charged"]),
            "shortfall": known["lost"],
            "waived": known["waived"],
        }

    def _charge(self, ref: Any, settlement: Settlement, *, final: bool, beyond: str = "refuse") -> None:
        """Every leg from its own pins; then, the rest of the pins freed, from whatever is free; then nobody pays."""
        known = self.reservations[ref]
        known["commits"] += 1
        if final:
            known["freed"] = list(known["pins"])
        parts: list[list[tuple[WalletRef, str | None, int]]] = []
        for leg, charge in enumerate(settlement.charges):
            parts.append(self._use_pins(known, leg, None, charge.base + charge.markup))
        if final:
            known["pins"] = [pin for pin in known["pins"] if pin[0] < 0]
        for leg, charge in enumerate(settlement.charges):
            total = charge.base + charge.markup
            missing = total - sum(part for *_, part in parts[leg])
            wallets = [wallet for wallet in known["legs"][leg] if wallet in self.wallets]
            for wallet, name, _, amount in self._sources(wallets, known["tags"]):
                part = min(missing, amount)
                if part > 0:
                    self._use(wallet, name, part)
                    parts[leg].append((wallet, name, part))
                    missing -= part
            if beyond == "receivable" and missing:
                self._open(known["legs"][leg][0])["owed"] += missing
                parts[leg].append((known["legs"][leg][0], None, missing))
                continue
            if beyond == "waive":
                known["waived"] += missing
                continue
            known["lost"] += missing
            self.accounts[ref.tenant, ref.mode, "meter_shortfall"] -= missing
            self.accounts[ref.tenant, ref.mode, "revenue"] += missing
        pairs = zip(settlement.charges, parts, strict=True)
        burnt = sum(self._pay(known, leg, charge, paid) for leg, (charge, paid) in enumerate(pairs))
        for limit in known["limits"]:
            self._draw(known, -1, limit, sum(part for *_, part in parts[0]))
        if known["line"] is not None:
            self._draw(known, -2, known["line"], burnt)

    def _pay(
        self, known: dict[str, Any], leg: int, charge: Charge, parts: list[tuple[WalletRef, str | None, int]]
    ) -> int:
        """Split each part into base and markup, book both; the base cost that the operator was not paid for."""
        covered = done = unfunded = 0
        for ref, name, part in parts:
            covered += part
            base = charge.base * covered // (charge.base + charge.markup) - done
            done += base
            markup = part - base
            block = self._block(ref, name) if name is not None else None
            paid = block is None or block["paid"]
            base_account = "revenue" if paid else "tenant_due"
            self._book(ref, base_account, base)
            if block is None or not paid:
                unfunded += base
            if block is not None and block["funding"] == "developer_grant":
                markup_account = block["pool"]
                self._give_back(block, markup)
            else:
                payable = block is not None and block["funding"] == "paid" and paid and known["developer"]
                markup_account = f"developer_payable:{known['developer']}" if payable else "tenant_margin"
                self._book(ref, markup_account, markup)
            known["paid"].append(((leg, ref, name, base_account, markup_account), base, markup))
            before = known["charged"][leg]
            known["charged"][leg] = Charge(before.base + base, before.markup + markup)
        return unfunded

    def _use_pins(self, known: dict[str, Any], leg: int, only: WalletRef | None, amount: int) -> list[Any]:
        parts, kept = [], []
        for pin_leg, ref, name, held in known["pins"]:
            part = min(amount, held) if pin_leg == leg and only in (None, ref) else 0
            if part:
                self._use(ref, name, part)
                parts.append((ref, name, part))
                amount -= part
            if held > part:
                kept.append((pin_leg, ref, name, held - part))
        known["pins"] = kept
        return parts

    def _use(self, ref: WalletRef, name: str | None, amount: int) -> None:
        if name is None:
            self.wallets[ref]["owed"] += amount
        else:
            self._block(ref, name)["left"] -= amount
            self._block(ref, name)["used"] += amount

    def _draw(self, known: dict[str, Any], leg: int, ref: WalletRef, amount: int) -> None:
        used = sum(part for *_, part in self._use_pins(known, leg, ref, amount))
        for block in self._payable(ref, Tags()) if ref in self.wallets else []:
            part = min(amount - used, self._free(ref, block))
            self._use(ref, block["name"], part)
            used += part
        self._book(ref, "limit", used)

    def _give_back(self, block: dict[str, Any], amount: int) -> None:
        self._open(block["pool"])
        if amount:
            self._returns(block["pool"], paid=block["paid"])["left"] += amount

    def _returns(self, ref: WalletRef, *, paid: bool) -> dict[str, Any]:
        wallet = self.wallets[ref]
        name = "blk_returns_paid" if paid else "blk_returns_unpaid"
        if all(other["name"] != name for other in wallet["blocks"]):
            self._add_block(
                wallet, name, 0, prio=0, start=self.now, end=None, apps=(), paid=paid, pool=None, source="returned",
                funding="paid" if paid else "external",
            )  # fmt: skip
        return self._block(ref, name)

    def _revoke(self, command: Revoke) -> Prediction:
        wallet = self.wallets.get(command.wallet)
        block = wallet and self._block(command.wallet, command.block_id)
        if not wallet or not block:
            return _no("not_found")
        granted = block["left"] + block["used"] + block["lapsed"] + block["revoked"]
        asked = granted if command.amount is None else command.amount
        if asked > granted:
            return _no("invalid_amount")
        still = max(0, block["left"] + block["used"] - block["clawed"])
        free = min(asked, self._free(command.wallet, block), still)
        owed = 0
        if command.clawback and block["pool"] is None:
            owed = min(asked, still) - free
        block["left"] -= free
        block["revoked"] += free
        block["clawed"] += owed
        wallet["owed"] += owed
        if block["pool"] is not None:
            self._give_back(block, free)
        else:
            self._book(
                command.wallet, "breakage" if block["funding"] == "paid" else FROM[block["funding"]], free + owed
            )
        return {"word": "revoked", "amount": free, "owed": owed, "receivable": wallet["owed"]}

    def _expire(self, command: Expire) -> Prediction:
        if command.wallet not in self.wallets:
            return _no("not_found")
        lapsed = unspent = 0
        for block in self.wallets[command.wallet]["blocks"]:
            if self._over(block):
                free = self._free(command.wallet, block)
                block["left"] -= free
                block["lapsed"] += free
                lapsed += free
                unspent += free if block["funding"] == "limit" else 0
        self._book(command.wallet, "breakage", lapsed - unspent)
        self._book(command.wallet, "limit", unspent)
        return {"word": "expired", "amount": lapsed}

    def _freeze(self, command: Freeze) -> Prediction:
        wallet = self.wallets.get(command.wallet)
        target = wallet if command.block_id is None or not wallet else self._block(command.wallet, command.block_id)
        if not target:
            return _no("not_found")
        target["frozen"] = command.frozen
        return {"word": "changed"}

    # Small things.

    def _open(self, ref: WalletRef) -> dict[str, Any]:
        debts = {"owed": 0, "reversed": 0, "reversed_paid": 0, "repaid_paid": 0, "repaid_due": 0}
        return self.wallets.setdefault(ref, {"blocks": [], "overdraft": 0, "frozen": False, **debts})

    def _add_block(self, wallet: dict[str, Any], name: str, amount: int, **facts: Any) -> None:
        age = len(wallet["blocks"])
        empty = {"used": 0, "lapsed": 0, "revoked": 0, "clawed": 0, "frozen": False}
        payment = {"stopped": False, "revision": 0, "spread": 0, "spread_gone": 0}
        gone = {"free": 0, "owed": 0, "clawed": 0, "lapsed": 0}
        wallet["blocks"].append({"name": name, "left": amount, "age": age, "gone": gone, **payment, **empty, **facts})

    def _block(self, ref: WalletRef, name: str | None) -> dict[str, Any]:
        return next((block for block in self.wallets[ref]["blocks"] if block["name"] == name), {})

    def _over(self, block: dict[str, Any]) -> bool:
        return block["end"] is not None and block["end"] <= self.now

    def _barred(self, ref: WalletRef) -> bool:
        wallet = self.wallets[ref]
        return bool(wallet["frozen"] or wallet["owed"] > wallet["overdraft"])

    def _free(self, ref: WalletRef, block: dict[str, Any]) -> int:
        return int(block["left"] - self.pinned(ref, block["name"]))

    def _all_free(self, ref: WalletRef) -> int:
        return sum(self._free(ref, block) for block in self._payable(ref, Tags()))

    def _payable(self, ref: WalletRef, tags: Tags, *, any_app: bool = False) -> list[dict[str, Any]]:
        blocks = self.wallets[ref]["blocks"] if ref in self.wallets else []
        able = [
            block
            for block in blocks
            if not (block["frozen"] or block["stopped"])
            and block["start"] <= self.now
            and not self._over(block)
            and (any_app or not block["apps"] or tags.app in block["apps"])
            and (tags.priority_max is None or block["prio"] <= tags.priority_max)
        ]
        forever = 10**30
        return sorted(able, key=lambda block: (-block["prio"], block["end"] or forever, block["age"]))

    def _sources(self, wallets: list[WalletRef], tags: Tags) -> list[tuple[WalletRef, str | None, bool, int]]:
        found: list[tuple[WalletRef, str | None, bool, int]] = []
        for ref in wallets:
            found += [(ref, block["name"], block["paid"], self._free(ref, block)) for block in self._payable(ref, tags)]
        for ref in wallets:
            wallet = self.wallets[ref]
            found.append((ref, None, False, wallet["overdraft"] - wallet["owed"] - self.pinned(ref, None)))
        return [source for source in found if source[3] > 0]

    def _held(self, known: dict[str, Any]) -> tuple[int, ...]:
        pins = known["pins"]
        return tuple(sum(pin[3] for pin in pins if pin[0] == leg) for leg in range(len(known["legs"])))

    def _book(self, ref: WalletRef, account: str, amount: int) -> None:
        self.accounts[ref.tenant, ref.mode, account] += amount


def _no(word: str, **facts: Any) -> Prediction:
    return {"word": word, "refused": True, **facts}
