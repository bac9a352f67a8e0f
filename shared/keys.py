"""Virtual keys: `lr-<id><secret><checksum>`, all base 62, so that a malformed key costs no store call.

The store knows the id and an HMAC of the whole key; a database in the wrong hands opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import time
import zlib
from dataclasses import dataclass, replace

from shared.errors import Forbidden, InvalidKey, InvalidRequest, NotFound
from shared.store.base import NEVER, KeyChange, Store, VirtualKey, knows

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID, SECRET, CHECKSUM = 12, 32, 6
ADMIN_ID = "admin"
"""The id under which `LR_ADMIN_KEY`, which has no id of its own, calls, spends and is recorded."""
ADMIN_CONCURRENCY = 1000


@dataclass(frozen=True, slots=True)
class Credential:
    """Who a caller says to be; only the store can tell whether it is so."""

    key_id: str
    key_hash: str


def random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def time_ordered(now: float) -> str:
    """16 characters, sorted by millisecond: the id of a request, without its `gen-`."""
    number, text = int(now * 1000) * 62**8 + secrets.randbelow(62**8), ""
    for _ in range(16):
        number, digit = divmod(number, 62)
        text = ALPHABET[digit] + text
    return text


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits


def mint(key_id: str | None = None) -> tuple[str, str]:
    """A new key: its public id and the key itself, which is shown once and never kept."""
    key_id = key_id or random_text(ID)
    text = key_id + random_text(SECRET)
    return key_id, f"lr-{text}{_checksum(text)}"


def id_of(key: str) -> str | None:
    """The public id of a well-formed key, else None."""
    text, checksum = key[3:-CHECKSUM], key[-CHECKSUM:]
    well_formed = key.startswith("lr-") and len(text) == ID + SECRET and key.isascii() and _checksum(text) == checksum
    return text[:ID] if well_formed else None


class Keys:
    """What may be done with keys, for the doors and for administrators."""

    def __init__(self, store: Store, pepper: str, admin_key: str | None = None) -> None:
        self._store = store
        self._pepper = pepper.encode()
        self._admin_hash = self.fingerprint(admin_key) if admin_key else None

    def fingerprint(self, key: str) -> str:
        return hmac.digest(self._pepper, key.encode("utf-8", "surrogateescape"), hashlib.sha256).hex()

    def credential(self, authorization: str | None) -> Credential:
        """Read `Authorization: Bearer …` without asking the store; raises InvalidKey."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > 512:
            raise InvalidKey("Missing or malformed API key: send it as 'Authorization: Bearer lr-…'.")
        if self._admin_hash and hmac.compare_digest(self.fingerprint(key), self._admin_hash):
            return Credential(ADMIN_ID, self._admin_hash)
        if (key_id := id_of(key)) is None:
            raise InvalidKey("Incorrect API key provided.")
        return Credential(key_id, self.fingerprint(key))

    async def identify(self, credential: Credential, now: float | None = None) -> VirtualKey:
        """One consistent read: the caller's key, usable now; raises InvalidKey or Forbidden."""
        now = int(now or time.time())
        key = await self._store.key(credential.key_id)
        if key is None or key.deleted or not knows(key, credential.key_hash, now):
            raise InvalidKey("Incorrect API key provided.")
        if not key.enabled:
            raise Forbidden("This API key is disabled.", code="key_disabled")
        if key.expires_at <= now:
            raise Forbidden("This API key has expired.", code="key_expired")
        return key

    async def administrator(self, credential: Credential) -> VirtualKey:
        key = await self.identify(credential)
        if key.role != "admin":
            raise Forbidden("This route needs an admin key.", code="admin_required")
        return key

    async def ensure_admin(self) -> None:
        """Give `LR_ADMIN_KEY` its item, so that its calls are limited, recorded and settled like any other's."""
        if self._admin_hash is None:
            return
        now = int(time.time())
        item = VirtualKey(
            ADMIN_ID, self._admin_hash, "LR_ADMIN_KEY", "admin", concurrency=ADMIN_CONCURRENCY, created_at=now
        )
        if not await self._store.add_key(item):
            change = KeyChange(hash=self._admin_hash, role="admin", enabled=True, expires_at=NEVER, deleted=False)
            await self._store.change_key(ADMIN_ID, change, now)

    async def create(self, wanted: VirtualKey) -> tuple[VirtualKey, str]:
        """Store `wanted` under a fresh id; returns it and the key, this once."""
        while True:
            key_id, key = mint()
            made = replace(wanted, id=key_id, hash=self.fingerprint(key), created_at=int(time.time()))
            if await self._store.add_key(made):
                return made, key

    async def keep(self, wanted: VirtualKey, key: str) -> None:
        """Store a key that was minted before, unless it is there already (`make run` keeps its two in a folder)."""
        key_id = id_of(key)
        if key_id is None:
            raise InvalidKey("Not a key of this gateway.")
        await self._store.add_key(replace(wanted, id=key_id, hash=self.fingerprint(key), created_at=int(time.time())))

    async def get(self, key_id: str) -> VirtualKey:
        key = await self._store.key(key_id)
        if key is None or key.deleted:
            raise NotFound(f"No key with id '{key_id[:64]}'.")
        return key

    async def change(self, key_id: str, change: KeyChange) -> VirtualKey:
        if key_id == ADMIN_ID:
            raise InvalidRequest("This key is LR_ADMIN_KEY: change it in the environment.", code="invalid_value")
        await self.get(key_id)
        changed = await self._store.change_key(key_id, change, int(time.time()))
        if changed is None:
            raise NotFound(f"No key with id '{key_id[:64]}'.")
        return changed

    async def rotate(self, key_id: str, grace: int) -> tuple[VirtualKey, str]:
        """A new secret for the same id; the old one is good for `grace` seconds more."""
        now = int(time.time())
        old = await self.get(key_id)
        _, key = mint(key_id)
        change = KeyChange(hash=self.fingerprint(key), old_hash=old.hash, old_until=now + grace)
        return await self.change(key_id, change), key

    async def delete(self, key_id: str) -> None:
        """Refused from the next request on; the tombstone stays, so that open holds settle and the books keep."""
        await self.change(key_id, KeyChange(deleted=True, enabled=False, old_until=0))
