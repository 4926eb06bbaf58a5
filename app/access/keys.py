"""API keys: who a request is from, and what the holder of the key may do.

A file holds hashes, so that reading it lets nobody in. SHA-256 without salt or stretching is
enough for secrets that are made at random (`slipstream key new`): there are too many to try.
Passwords that people think of would need a slow hash, and have no place here.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from app.access.quota import Quota
from app.http.errors import ApiError
from config.settings import ServerSettings

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECK_SECONDS = 1.0
_LOWEST_PRIORITY = -(2**31)
_Limit = Annotated[int, Meta(ge=1, le=2**53)]


class KeyFileError(ValueError):
    """The file of keys cannot be used; the message is one line that says why."""


class KeyRights(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a line of the file says of a key. Without a limit there is none."""

    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # of the secret
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None  # of prompts and answers together
    concurrent: _Limit | None = None  # requests open at once
    priority: int = 0  # the most urgent that it may ask for
    admin: bool = False  # may see /metrics and /debug
    gateway: bool = False  # is believed whom a request is for (x-gateway-inference-fairness-id)


class Key:
    """A key and what was used of its quota."""

    def __init__(self, name: str, rights: KeyRights, quota: Quota | None = None) -> None:
        self.name = name
        self.rights = rights
        self.quota = quota or Quota(name)
        self.quota.limit(rights.requests_per_minute, rights.tokens_per_minute, rights.concurrent)

    def check_priority(self, asked: int) -> None:
        """Raises `ApiError` (403) if it is more urgent than the key may ask for."""
        if asked < self.rights.priority:
            raise ApiError(
                f"priority: this key may ask for {self.rights.priority} or later",
                status=403,
                param="priority",
                code="priority_not_allowed",
            )


ANYONE = Key("", KeyRights("", priority=_LOWEST_PRIORITY, gateway=True))


class KeyRing:
    """All keys, by the hash of their secrets; those of the file change when it does."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises `KeyFileError`."""
        self._fixed = [_plain(secret, settings) for secret in settings.api_keys]
        if settings.admin_key:
            digest = digest_of(settings.admin_key)
            rights = KeyRights(digest, priority=_LOWEST_PRIORITY, admin=True)
            self._fixed.append(Key(digest[:32], rights))
        self._path = Path(settings.api_key_file) if settings.api_key_file else None
        self._keys: dict[str, Key] = {}
        self._by_digest: dict[str, Key] = {}
        self._seen: Hashable = None  # the file's state when it was last read
        self._checked = 0.0
        self.required = bool(settings.api_keys) or self._path is not None
        self._use({} if self._path is None else self._read())

    @property
    def guards_admin(self) -> bool:
        """Whether /metrics and /debug need a key with the right to see them."""
        return any(key.rights.admin for key in self._by_digest.values())

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret."""
        self._look_for_changes()
        if not secret:
            return None
        # Where a lookup fails early tells something about a hash, and of the secret nothing.
        digest = hashlib.sha256(secret).hexdigest()
        key = self._by_digest.get(digest)
        return key if key and hmac.compare_digest(key.rights.sha256, digest) else None

    def reload(self) -> None:
        """Read the file again. If it cannot be used, the keys stay as they are."""
        if self._path is None:
            return
        try:
            self._use(self._read())
        except KeyFileError as error:
            logger.error("keys stay as they were: %s", error)
            return
        logger.info("%d keys read from %s", len(self._keys), self._path)

    def _look_for_changes(self) -> None:
        """At most once a second: mounted secrets change without a signal."""
        now = time.monotonic()
        if self._path is None or now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        if (state := _state(self._path)) != self._seen:
            self._seen = state
            self.reload()

    def _read(self) -> dict[str, KeyRights]:
        assert self._path is not None
        self._seen = _state(self._path)
        return read_keys(self._path)

    def _use(self, rights: dict[str, KeyRights]) -> None:
        before = self._keys
        quotas = {name: key.quota for name, key in before.items()}
        self._keys = {name: Key(name, r, quotas.get(name)) for name, r in rights.items()}
        self._by_digest = {k.rights.sha256: k for k in (*self._keys.values(), *self._fixed)}


class _UniqueKeys(yaml.SafeLoader):
    """YAML, whose mappings may not have a key twice: else the first one is lost unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} comes twice")
        return super().construct_mapping(node, deep)


def read_keys(path: Path) -> dict[str, KeyRights]:
    """Names and rights in a YAML or JSON file. Raises `KeyFileError`."""
    try:
        content = yaml.load(path.read_text(), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise KeyFileError(f"{path}: {' '.join(str(error).split())}") from error
    content = {} if content is None else content  # an empty file
    if not isinstance(content, dict):
        raise KeyFileError(f"{path} must map names to keys")
    rights = {}
    for name, value in content.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise KeyFileError(
                f"{path}: {name!r} is no name of a key: up to 64 of A-Z a-z 0-9 . _ -"
            )
        try:
            rights[name] = msgspec.convert(value, KeyRights)
        except msgspec.ValidationError as error:
            raise KeyFileError(f"{path}: {name}: {error}") from error
    if len({r.sha256 for r in rights.values()}) < len(rights):
        raise KeyFileError(f"{path}: two names have the same secret")
    return rights


def _plain(secret: str, settings: ServerSettings) -> Key:
    """A key that was given as it is. One alone may be a gateway's."""
    digest = digest_of(secret)
    alone = len(settings.api_keys) == 1 and not settings.api_key_file
    # What belongs to its holder is known by this name, also after a restart.
    return Key(digest[:32], KeyRights(digest, priority=_LOWEST_PRIORITY, gateway=alone))


def digest_of(secret: str) -> str:
    """What the file has in place of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _state(path: Path) -> Hashable:
    """Changes when the file does, also when another is put in its place."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
