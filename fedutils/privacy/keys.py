"""Keys, signatures and streams of masks, all by Flower's and `cryptography`'s functions."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Integers = dict[str, Any]  # int64 tensors by name; torch is imported by who has some
Offer = dict[str, str]  # what a hospital says under its signature: a public key, and more
DRAWN_AT_ONCE = 1 << 17  # numbers of a stream
PUBLIC = ".key.pub"  # after a hospital's name, the file of its public key
KEY_DIGITS = 96  # of a private key
LONGEST = 1024  # characters of a public key, a signature or what a hospital knows


def digest(seed: bytes) -> str:
    """Return what tells a seed that was put together from a false one."""
    return hashlib.sha256(seed).hexdigest()


def sign(key: Any, said: Sequence[str]) -> str:
    """Sign what a hospital says: first what kind of statement it is; "" without a key."""
    from flwr.supercore.primitives.asymmetric import sign_message

    return sign_message(key, json.dumps(list(said)).encode()).hex() if key else ""


def is_signed(key: Any, signature: str, said: Sequence[str]) -> bool:
    """Tell whether there is a key, with whose private half this was signed."""
    from flwr.supercore.primitives.asymmetric import verify_signature

    try:
        given = bytes.fromhex(signature)
    except ValueError:
        return False
    return key is not None and verify_signature(key, json.dumps(list(said)).encode(), given)


def is_introduced(key: Any, run: str, name: str, node: str, said: Offer) -> bool:
    """Tell whether a hospital's introduction, as it speaks through a node, has its signature."""
    about = "introduction", run, name, node, *(str(said.get(key)) for key in ("key", "knows"))
    return is_signed(key, str(said.get("signature")), about)


def add_stream(values: Integers, key: bytes, sign: int = 1) -> None:
    """Add to contiguous integers (int64), modulo 2^64, a key's stream, in the order of names."""
    import torch
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


def public_key(public: str) -> Any:
    """Return the public key of a PEM; ValueError if there is none, or none of P-384."""
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    key = bytes_to_public_key(public.encode()) if len(public) < LONGEST else None
    if getattr(getattr(key, "curve", None), "name", "") != "secp384r1":
        raise ValueError("no public key of P-384")
    return key


def is_key(public: object) -> bool:
    """Tell the PEM of a public key from all else that somebody may send in its place."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return isinstance(public, str) and bool(public_key(public))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def public_of(secret: str) -> str:
    """Return the public key of a private one, as PEM."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    return public_key_to_bytes(private_key(secret).public_key()).decode()


def shared_key(secret: str, public: str) -> bytes:
    """Return what one's private and another's public key have in common, for Fernet."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key

    return generate_shared_key(private_key(secret), public_key(public))


def pair_key(secret: str, public: str) -> bytes:
    """Return the 32 bytes from which a pair of hospitals draws its stream."""
    return base64.urlsafe_b64decode(shared_key(secret, public))
