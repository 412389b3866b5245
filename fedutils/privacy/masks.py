"""Masks: of what hospitals send, the server learns a sum and nothing else (extra `flower`).

Bonawitz et al., "Practical secure aggregation", CCS 2017, for a few hospitals and the integers of
`base.fixed`. For each sum a hospital draws a key pair and a seed, and gives every other one a
Shamir share of both, encrypted for it. It sends its numbers plus the stream of its seed, plus or
minus that of the key which it has with each other one: uniform to whom lacks these. Those whose
numbers came sign who they are; once more than half of all have signed the same list, each gives its
shares: of those in the list of the seed, of the others of the key. So all streams fall out of the
sum. A hospital does so for one list, never for fewer than `least`, and of the same numbers for no
other hospitals in any later sum: it signs another list only as long as it has given no share for
the first, which it then forgets. What fewer than `least` of those in a sum know, such as a finding
that one alone labels, nobody shows in it; who knows what stands in the signed introductions.

What a sum is about (`what`) each hospital computes from what it was asked, and signs with its
offer: to ask them for different things is to have their keys refused. Shares are encrypted with
what they are shares of, and open for nothing else. What this does not withstand: one hospital of
an odd number, two of an even one, that break these rules for the server.

The elliptic curves (P-384), HKDF, Fernet and Shamir's shares are Flower's, from `cryptography` and
PyCryptodome; the streams are AES-256 in counter mode.
"""

import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..base.errors import InputError, SumFailed
from ..base.parameters import Parameters, parameter
from .keys import (
    Integers,
    Offer,
    add_stream,
    digest,
    is_introduced,
    is_key,
    is_signed,
    new_secret,
    pair_key,
    public_of,
    shared_key,
    sign,
)  # fmt: skip

TRIED = 1000  # sets of shares
OPEN = 8  # sums that a hospital remembers the shares of
SHARES = re.compile("[0-9a-f]{136}"), re.compile("[0-9a-f]{104}")  # of a key, of a seed


class MaskFault(SumFailed):
    """What is refused, and whose fault it is: another key, another list, too few."""


@dataclass(frozen=True)
class MaskParameters(Parameters):
    """What the server may see of what clients send."""

    secure_aggregation: bool = parameter(
        False, "clients send under masks, and the server learns sums over min_clients or more alone"
    )

    least_count: int = parameter(
        5, "patients: counts of fewer never leave a hospital bare; it is the hospital's own",
        bounds=(1, 1000), identity=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise InputError where masked sums cannot be had, or would hide nothing."""
        if not self.secure_aggregation:
            return
        if self.aggregation != "mean":
            rule = f"aggregation={self.aggregation}"
            raise InputError(f"secure_aggregation: {rule} must see each update, which masks hide")
        if self.min_clients < 2:
            raise InputError("secure_aggregation wants min_clients=2 or more: a sum of one is bare")
        if self.batchnorm == "local":
            raise InputError("secure_aggregation: batchnorm=local has no masks; choose another one")
        if not find_spec("flwr"):
            raise InputError("secure_aggregation needs the extra `flower`: pip install flwr")


def threshold(hospitals: int) -> int:
    """Return how many hospitals must agree, and put a secret together: more than half."""
    return hospitals // 2 + 1


class Masker:
    """A hospital's half. `memory`, plain text for JSON, is what it must not forget.

    `signing` is the hospital's own private key; `trusted` the public ones of the others by name,
    with which all that they say must be signed. Without any nothing is signed: then the server is
    trusted to pass on what was said.
    """

    def __init__(
        self, name: str, run: str, least: int, memory: dict[str, Any], signing: Any = None,
        trusted: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.run, self.least, self.memory = name, run, max(2, least), memory
        self.signing, self.trusted = signing, trusted or {}
        if not memory:
            memory |= {"secret": new_secret(), "sums": {}, "revealed": {}}

    def introduce(self, node: str = "", knows: str = "") -> Offer:
        """Return the key under which others encrypt for this hospital, in this run.

        It is bound to the `node` that speaks for it, so that no other one can pass it off. `knows`
        has a digit for each row that a sum may have: 1 where this hospital knows something of it.
        """
        key = public_of(self.memory["secret"])
        signature = sign(self.signing, ["introduction", self.run, self.name, node, key, knows])
        return {"key": key, "node": node, "knows": knows, "signature": signature}

    def hold(self, name: str, value: Any) -> None:
        """Remember a value for good; raise MaskFault where it was another before."""
        before = self.memory.setdefault("held", {}).setdefault(name, value)
        if before != value:
            raise MaskFault(
                f"{self.name} was told {name}={before}, and now {value}: name a new run"
            )

    def offer(self, what: str, members: Mapping[str, Offer]) -> dict[str, Any]:
        """Return this hospital's offer for one sum, and of its secrets a share for each member.

        `members` are the introductions of all who may take part. Raises MaskFault for one that is
        not its hospital's, and for a sum that was offered before.
        """
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt

        sums, names = self.memory["sums"], sorted(members)
        if what in sums or len(names) < self.least or self.name not in names:
            raise MaskFault(f"{what}: {self.name} offers nothing for it, or not again")
        for name, said in members.items():
            if not is_key(said["key"]):
                raise MaskFault(f"the mask key of {name} is none")
            if self.trusted and not is_introduced(
                self.trusted.get(name), self.run, name, said["node"], said
            ):
                raise MaskFault(f"the mask key of {name} is not signed with the key of {name}")
        secret, seed = new_secret(), secrets.token_bytes(32)
        key, told = public_of(secret), digest(seed)
        parts = [
            create_shares(bytes.fromhex(one), threshold(len(names)), len(names))
            for one in (secret, seed.hex())
        ]
        shares = {}
        for name, *both in zip(names, *parts, strict=True):
            text = json.dumps([what, self.name, name, key, told, *(part.hex() for part in both)])
            pair = shared_key(self.memory["secret"], members[name]["key"])
            shares[name] = encrypt(pair, text.encode()).decode()
        sums[what] = {"secret": secret, "seed": seed.hex(), "members": dict(members)}
        sums[what] |= {"knows": {n: said["knows"] for n, said in members.items()}}
        sums[what] |= {"least": self.least, "enough": threshold(len(names))}
        for old in list(sums)[:-OPEN]:
            del sums[old]
        about = "offer", self.run, self.name, what, key, told
        return {
            "offer": {"key": key, "digest": told, "signature": sign(self.signing, about)},
            "shares": shares,
        }

    def common(self, what: str, names: Collection[str], rows: Iterable[int]) -> list[int]:
        """Return those rows of which enough of these hospitals know something."""
        mine = self.memory["sums"].get(what, {})
        if not {*names} <= mine.get("knows", {}).keys():
            raise MaskFault(f"{what}: no offer of {self.name} is open to these")
        knows, least = [mine["knows"][name] for name in names], max(self.least, mine["least"])
        return [k for k in rows if sum(one[k : k + 1] == "1" for one in knows) >= least]

    def mask(
        self, what: str, called: Sequence[str], offers: Mapping[str, Offer],
        shares: Mapping[str, str], values: Integers, rows: Sequence[int] = (),
    ) -> Integers:  # fmt: skip
        """Return integers (int64) under the masks of one sum, and keep the others' shares.

        `called` are names of the numbers, which are the same however often they are asked for;
        `offers` are those of all who take part, `shares` what each of them encrypted for this one,
        `rows` those of `common` that the numbers show. Raises MaskFault for what is not its
        hospital's or of this sum, and for fewer than `least`.
        """
        mine = self.memory["sums"].get(what, {})
        if "secret" not in mine or self.name not in offers:
            raise MaskFault(f"{what}: no offer of {self.name} is open")
        least = max(self.least, mine["least"])
        if len(offers) < least or not offers.keys() <= mine["members"].keys():
            raise MaskFault(f"{what}: a sum of {len(offers)} hospitals, fewer than {least}")
        kept = {
            other: self._open(what, other, offer, mine["members"][other], shares.get(other, ""))
            for other, offer in offers.items()
        }
        masked = {key: value.clone() for key, value in values.items()}
        add_stream(masked, bytes.fromhex(mine["seed"]))
        for other in offers.keys() - {self.name}:
            sign_of = 1 if self.name < other else -1
            add_stream(masked, pair_key(mine["secret"], offers[other]["key"]), sign_of)
        for forgotten in ("secret", "seed", "members"):  # it masks no more
            del mine[forgotten]
        mine |= {"called": list(called), "shares": kept, "least": least, "rows": list(rows)}
        return masked

    def agree(self, what: str, survivors: Sequence[str]) -> str:
        """Sign whose numbers came, for one list alone; raise MaskFault for another or too few."""
        one, chosen = self.memory["sums"].get(what, {}), sorted(survivors)
        if self.name not in chosen or not {*chosen} <= one.get("shares", {}).keys():
            raise MaskFault(f"{what}: {self.name} has no numbers in that sum")
        if len({*chosen}) < max(self.least, one["least"], len(chosen)):
            raise MaskFault(f"{what}: a sum of {len({*chosen})} hospitals, too few or named twice")
        if self.common(what, chosen, one["rows"]) != one["rows"]:
            raise MaskFault(f"{what}: it holds what too few of {', '.join(chosen)} know; ask again")
        self._bind(what, one, chosen)
        one["agreed"] = chosen
        return sign(self.signing, ["survivors", self.run, self.name, what, *chosen])

    def _bind(self, what: str, one: dict[str, Any], chosen: list[str]) -> None:
        """Remember for whom numbers are unmasked; MaskFault where that was, or will be, for others.

        A list that was signed in other sums gives way, with its shares, as long as none was given.
        """
        revealed, unopened = self.memory["revealed"], self.memory.setdefault("unopened", [])
        for name in one["called"]:
            before = revealed.get(name, chosen)
            if before != chosen and (name not in unopened or "agreed" in one):
                named = f"what {self.name} sent was, or will be, unmasked for {', '.join(before)}"
                again = "with these it goes on, else as another run with other seeds (-p seeds=)"
                raise MaskFault(f"{named}, and is for no other hospitals: {again}")
        moved = {name for name in one["called"] if revealed.get(name, chosen) != chosen}
        for other, old in list(self.memory["sums"].items()):
            if other != what and moved & {*old.get("called", ())}:
                del self.memory["sums"][other]
        unopened += [name for name in one["called"] if name not in revealed]
        revealed |= dict.fromkeys(one["called"], chosen)

    def reveal(self, what: str, signatures: Mapping[str, str]) -> dict[str, str]:
        """Return of each survivor the share of its seed, of each other one that of its key.

        `signatures` are those of survivors under the list that this hospital has signed. Raises
        MaskFault where fewer than half of all have signed the same.
        """
        one = self.memory["sums"].get(what, {})
        if "agreed" not in one:
            raise MaskFault(f"{what}: {self.name} has agreed on no list of hospitals")
        agreed = one["agreed"]

        def has_signed(name: str) -> bool:
            """Tell whether a hospital has signed the same list."""
            about = "survivors", self.run, name, what, *agreed
            return not self.trusted or is_signed(self.trusted.get(name), signatures[name], about)

        good = [name for name in {*signatures} & {*agreed} if has_signed(name)]
        if len(good) < one["enough"]:
            raise MaskFault(f"{what}: {len(good)} hospitals have signed that list: too few")
        unopened = self.memory["unopened"]  # from now on it is for no other list
        self.memory["unopened"] = [name for name in unopened if name not in one["called"]]
        return {other: part[other in agreed] for other, part in one["shares"].items()}

    def _open(
        self, what: str, name: str, offer: Offer, introduced: Offer, token: str
    ) -> tuple[str, str]:
        """Return the shares that another hospital's offer holds for this one."""
        from cryptography.fernet import InvalidToken
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt

        about = "offer", self.run, name, what, offer["key"], offer["digest"]
        if self.trusted and not is_signed(self.trusted.get(name), offer["signature"], about):
            raise MaskFault(f"the mask key of {name} is not signed with the key of {name}")
        wanted = [what, name, self.name, offer["key"], offer["digest"]]
        if not is_key(offer["key"]):
            raise MaskFault(f"the mask key of {name} is none")
        try:
            pair = shared_key(self.memory["secret"], introduced["key"])
            *found, of_key, of_seed = json.loads(decrypt(pair, token.encode()))
        except (InvalidToken, TypeError, ValueError, RecursionError) as error:
            raise MaskFault(f"{what}: what {name} offers cannot be opened") from error
        if found != wanted:
            raise MaskFault(f"{what}: the shares of {name} are of another sum")
        for pattern, share in zip(SHARES, (of_key, of_seed), strict=True):
            if not (isinstance(share, str) and pattern.fullmatch(share)):
                raise MaskFault(f"{what}: the shares of {name} are none")
        return of_key, of_seed


class MaskedSum:
    """The server's half of one sum: what hospitals `offered`, what came, and of whom."""

    def __init__(self, what: str, offered: Mapping[str, dict[str, Any]], members: int) -> None:
        self.what, self.offered, self.enough = what, offered, threshold(members)
        self.offers = {hospital: one["offer"] for hospital, one in offered.items()}
        self.total: Integers = {}
        self.survivors: list[str] = []

    def shares_for(self, hospital: str) -> dict[str, str]:
        """Return what each hospital encrypted for this one."""
        return {name: one["shares"][hospital] for name, one in self.offered.items()}

    def add(self, hospital: str, masked: Integers) -> None:
        """Add what a hospital sent, modulo 2^64; MaskFault if it offered nothing, or has sent."""
        if hospital not in self.offers or hospital in self.survivors:
            raise MaskFault(f"{self.what}: {hospital} has offered nothing for it, or sent before")
        old = self.total
        self.total = {k: old[k] + value if old else value for k, value in masked.items()}
        self.survivors.append(hospital)

    def finish(self, revealed: Mapping[str, Mapping[str, str]]) -> Integers:
        """Return the sum without its masks, by the shares that survivors gave; else MaskFault."""
        for name, offer in self.offers.items():
            came = name in self.survivors
            shares = {by: given[name] for by, given in revealed.items() if name in given}
            secret = put_together(name, shares, self.enough, offer, came)
            if came:
                add_stream(self.total, bytes.fromhex(secret), -1)
                continue
            for survivor in self.survivors:  # who added what it had with the lost one
                sign_of = -1 if survivor < name else 1
                pair = pair_key(secret, self.offers[survivor]["key"])
                add_stream(self.total, pair, sign_of)
        return self.total


def put_together(
    name: str, shares: Mapping[str, str], enough: int, offer: Offer, seed: bool
) -> str:
    """Return a hospital's seed, or its key, of others' shares; MaskFault where none fits its offer.

    A false share spoils a secret: `enough` of them are tried in turn, up to a thousand times.
    """
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    sets = itertools.combinations(sorted(shares), enough)
    for chosen in itertools.islice(sets, TRIED):
        try:
            secret = combine_shares([bytes.fromhex(shares[by]) for by in chosen]).hex()
            told = digest(bytes.fromhex(secret)) if seed else public_of(secret)
        except (ValueError, IndexError):
            continue
        if told == offer["digest" if seed else "key"]:
            return secret
    kind = "seed" if seed else "key"
    raise MaskFault(f"{len(shares)} shares, {enough} wanted, do not give the {kind} of {name}")
