"""A cache of scores under the hash of what was scored, so that equal texts are scored once."""

from __future__ import annotations

import collections
import hashlib
import json
import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def content_key(*parts: Any) -> bytes:
    """The SHA-256 of JSON values; equal values have equal keys in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).digest()


class ScoreCache(Generic[T]):
    """The last `size` scores that were used; 0 keeps none. Safe to share between threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: collections.OrderedDict[bytes, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> T | None:
        """The score under `key`, which then counts as used."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: bytes, score: T) -> None:
        """Keep a score; the one not used for longest makes room."""
        with self._lock:
            self._entries[key] = score
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)
