"""Masks: of what hospitals send, the server learns a sum and nothing else (extra `flower`).

Bonawitz et al., "Practical secure aggregation", CCS 2017, for a few hospitals and the integers of
`base.fixed`. For each sum a hospital draws a key pair and a seed, and gives every other one a
Shamir share of both, encrypted for it. It sends its numbers plus the stream of its seed, plus or
minus that of the key which it has with each other one: uniform to whom lacks these. Of those whose
numbers came, the others give their shares of the seed; of those who were lost, of the key; so all
streams fall out of the sum. A hospital gives of nobody both, nothing for a sum of fewer than
`least`, and of the same numbers nothing for a second set of hospitals. More than half of the
hospitals are needed to put a secret together, so no server gets both of one from different
hospitals unless one of them helps it.

The elliptic curves (P-384), HKDF, Fernet and Shamir's shares are Flower's, from `cryptography` and
PyCryptodome; the streams are AES-256 in counter mode.
"""

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter
from ..base.state import State

Offer = dict[str, str]  # of a hospital for one sum: public key, what tells its seed, signature
DRAWN_AT_ONCE = 1 << 17  # numbers of a stream
NODE = "node "  # before its number, in what an introduction is signed for
PUBLIC = ".key.pub"  # after a hospital's name, the file of its public key
KEY_DIGITS = 96  # of a private key
OPEN = 8  # sums that a hospital remembers the shares of


class MaskFault(RuntimeError):
    """What is refused, and whose fault it is: another key, another set, too few."""


@dataclass(frozen=True)
class MaskParameters(Parameters):
    """What the server may see of what clients send."""

    secure_aggregation: bool = parameter(
        False, "clients send under masks, and the server learns sums over min_clients or more alone"
    )

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
    """Return how many hospitals put a secret together: more than half."""
    return hospitals // 2 + 1


def digest(seed: bytes) -> str:
    """Return what tells a seed that was put together from a false one."""
    return hashlib.sha256(seed).hexdigest()


def statement(run: str, name: str, what: str, *said: str) -> bytes:
    """Return what a hospital signs: which run and sum it is about, who it is, what it offers."""
    return json.dumps([run, name, what, *said]).encode()


def is_signed(key: Any, run: str, name: str, what: str, offer: Offer) -> bool:
    """Tell whether there is a key, with whose private half an offer is signed."""
    from flwr.supercore.primitives.asymmetric import verify_signature

    about = statement(run, name, what, offer["key"], offer["digest"])
    return key is not None and verify_signature(key, about, bytes.fromhex(offer["signature"]))


class Masker:
    """A hospital's half of a run. `memory`, plain text for JSON, is what it must not forget.

    `signing` is the hospital's own private key; `trusted` the public ones of the others by name,
    with which their offers must be signed. Without any nothing is signed: then the server is
    trusted to pass keys on as they are.
    """

    def __init__(
        self, name: str, run: str, least: int, memory: dict[str, Any], signing: Any = None,
        trusted: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.run, self.least, self.memory = name, run, least, memory
        self.signing, self.trusted = signing, trusted or {}
        if not memory:
            memory |= {"secret": new_secret(), "sums": {}, "revealed": {}}

    def introduce(self, node: str = "") -> Offer:
        """Return the key under which others encrypt for this hospital, in this run.

        It is bound to the `node` that speaks for it, so that no other one can pass it off.
        """
        return self._signed(NODE + node, public_of(self.memory["secret"])) | {"node": node}

    def offer(self, what: str, members: Mapping[str, Offer]) -> dict[str, Any]:
        """Return this hospital's offer for one sum, and of its secrets a share for each member.

        `members` are the introductions of all who may take part. Raises MaskFault for a key that is
        not its hospital's.
        """
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt

        for name, other in members.items():
            self.check(name, NODE + other["node"], other)
        names, secret, seed = sorted(members), new_secret(), secrets.token_bytes(32)
        parts = [
            create_shares(bytes.fromhex(one), threshold(len(names)), len(names))
            for one in (secret, seed.hex())
        ]
        shares = {}
        for name, *both in zip(names, *parts, strict=True):
            text = json.dumps([part.hex() for part in both]).encode()
            key = shared_key(self.memory["secret"], members[name]["key"])
            shares[name] = encrypt(key, text).decode()
        sums = self.memory["sums"]
        sums[what] = {"secret": secret, "seed": seed.hex(), "members": dict(members)}
        for old in list(sums)[:-OPEN]:
            del sums[old]
        return {"offer": self._signed(what, public_of(secret), digest(seed)), "shares": shares}

    def mask(
        self, what: str, name: str, offers: Mapping[str, Offer], shares: Mapping[str, str],
        values: State,
    ) -> State:  # fmt: skip
        """Return integers (int64) under the masks of one sum, and keep the others' shares.

        `name` is what this hospital calls the numbers, however often they are asked for; `offers`
        are those of all who take part, `shares` what each of them encrypted for this one. Raises
        MaskFault for a key that is not its hospital's, and for fewer than `least`.
        """
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt

        mine = self.memory["sums"].get(what)
        if mine is None or "secret" not in mine or self.name not in offers:
            raise MaskFault(f"{what}: no offer of {self.name} is open")
        if len(offers) < self.least or not offers.keys() <= mine["members"].keys():
            raise MaskFault(f"{what}: a sum of {len(offers)} hospitals, fewer than {self.least}")
        masked, kept = {name: value.clone() for name, value in values.items()}, {}
        add_stream(masked, bytes.fromhex(mine["seed"]))
        for other, offer in offers.items():
            self.check(other, what, offer)
            key = shared_key(self.memory["secret"], mine["members"][other]["key"])
            kept[other] = json.loads(decrypt(key, shares[other].encode()))
            if other != self.name:
                sign = 1 if self.name < other else -1
                add_stream(masked, pair_key(mine["secret"], offer["key"]), sign)
        self.memory["sums"][what] = {"name": name, "shares": kept}  # without secrets: masks no more
        return masked

    def reveal(self, what: str, survivors: Sequence[str]) -> dict[str, str]:
        """Return of each survivor the share of its seed, of each other one that of its key.

        Once that was given for the numbers of a name and a set of survivors, it is for no other
        set. Raises MaskFault.
        """
        one, chosen = self.memory["sums"].get(what, {}), sorted(survivors)
        shares = one.get("shares", {})
        if self.name not in chosen or not {*chosen} <= shares.keys():
            raise MaskFault(f"{what}: {self.name} has no numbers in that sum")
        if len(chosen) < self.least:
            raise MaskFault(f"{what}: a sum of {len(chosen)} hospitals, fewer than {self.least}")
        before = self.memory["revealed"].setdefault(one["name"], chosen)
        if before != chosen:
            named = f"{one['name']} was unmasked for {', '.join(before)}"
            raise MaskFault(f"{named}, and is for no other hospitals")
        return {other: part[other in chosen] for other, part in shares.items()}

    def _signed(self, what: str, key: str, told: str = "") -> Offer:
        from flwr.supercore.primitives.asymmetric import sign_message

        about = statement(self.run, self.name, what, key, told)
        signature = sign_message(self.signing, about).hex() if self.signing else ""
        return {"key": key, "digest": told, "signature": signature}

    def check(self, name: str, what: str, other: Offer) -> None:
        """Raise MaskFault unless an offer is signed by the hospital whose it is said to be."""
        if self.trusted and not is_signed(self.trusted.get(name), self.run, name, what, other):
            raise MaskFault(f"the mask key of {name} is not signed with the key of {name}")


class MaskedSum:
    """The server's half of one sum: what hospitals `offered`, what came, and of whom."""

    def __init__(self, what: str, offered: Mapping[str, dict[str, Any]]) -> None:
        self.what, self.offered = what, offered
        self.offers = {hospital: one["offer"] for hospital, one in offered.items()}
        self.total: State = {}
        self.survivors: list[str] = []

    def shares_for(self, hospital: str) -> dict[str, str]:
        """Return what each hospital encrypted for this one."""
        return {name: one["shares"][hospital] for name, one in self.offered.items()}

    def add(self, hospital: str, masked: State) -> None:
        """Add what a hospital sent, modulo 2^64."""
        old = self.total
        self.total = {k: old[k] + value if old else value for k, value in masked.items()}
        self.survivors.append(hospital)

    def finish(self, revealed: Mapping[str, Mapping[str, str]]) -> State:
        """Return the sum without its masks, by the shares that survivors gave."""
        unmask(self.total, self.offers, self.survivors, revealed)
        return self.total


def unmask(
    total: State, offers: Mapping[str, Offer], survivors: Sequence[str],
    revealed: Mapping[str, Mapping[str, str]],
) -> None:  # fmt: skip
    """Take the masks off the sum of what the `survivors` among those who offered sent.

    `revealed` are the shares that hospitals gave. Raises MaskFault where too few did, or a secret
    that they give together is not what was offered.
    """
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    for name, offer in offers.items():
        shares = [bytes.fromhex(given[name]) for given in revealed.values() if name in given]
        try:
            secret = combine_shares(shares).hex()
        except (ValueError, IndexError) as error:
            raise MaskFault(f"{len(shares)} shares of {name} give no secret: {error}") from error
        if name in survivors:
            if digest(bytes.fromhex(secret)) != offer["digest"]:
                raise MaskFault(f"the shares of {name} give another seed than it offered")
            add_stream(total, bytes.fromhex(secret), -1)
            continue
        if public_of(secret) != offer["key"]:
            raise MaskFault(f"the shares of {name} give another key than it offered")
        for survivor in survivors:  # who added what it had with the lost one
            sign = -1 if survivor < name else 1
            add_stream(total, pair_key(secret, offers[survivor]["key"]), sign)


def add_stream(values: State, key: bytes, sign: int = 1) -> None:
    """Add to contiguous integers (int64), modulo 2^64, a key's stream, in the order of names."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros, drawn = (
        bytes(8 * DRAWN_AT_ONCE),
        bytearray(8 * DRAWN_AT_ONCE + 15),
    )  # as much as it asks for
    for _, value in sorted(values.items()):
        for part in value.view(-1).split(DRAWN_AT_ONCE):
            cipher.update_into(memoryview(zeros)[: 8 * len(part)], drawn)
            numbers = torch.frombuffer(drawn, dtype=torch.int64, count=len(part))
            part.add_(numbers, alpha=sign)


def read_keys(folder: str, name: str) -> tuple[Any, dict[str, Any]]:
    """Return a hospital's private key, and the public ones by name, of a folder; none without.

    `NAME.key` and `*.key.pub`, as `ssh-keygen` writes them.
    """
    from cryptography.hazmat.primitives.serialization import (
        load_ssh_private_key,
        load_ssh_public_key,
    )

    if not folder:
        return None, {}
    own = Path(folder) / f"{name}.key"
    public = {
        path.name.removesuffix(PUBLIC): load_ssh_public_key(path.read_bytes())
        for path in Path(folder).glob(f"*{PUBLIC}")
    }
    return load_ssh_private_key(own.read_bytes(), None) if own.is_file() else None, public


def new_secret() -> str:
    """Draw a private key; return its number in hexadecimal digits."""
    from flwr.supercore.primitives.asymmetric import generate_key_pairs

    return f"{generate_key_pairs()[0].private_numbers().private_value:0{KEY_DIGITS}x}"


def private_key(secret: str) -> Any:
    """Return the private key of such a number."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(int(secret, 16), ec.SECP384R1())


def public_of(secret: str) -> str:
    """Return the public key of a private one, as PEM."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    return public_key_to_bytes(private_key(secret).public_key()).decode()


def shared_key(secret: str, public: str) -> bytes:
    """Return what one's private and another's public key have in common, for Fernet."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    return generate_shared_key(private_key(secret), bytes_to_public_key(public.encode()))


def pair_key(secret: str, public: str) -> bytes:
    """Return the 32 bytes from which a pair of hospitals draws its stream."""
    return base64.urlsafe_b64decode(shared_key(secret, public))
