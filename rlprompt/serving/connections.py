"""A listening socket that no crowd of idle clients can close to others.

It counts what it has let in, in all and per address, from the moment of `accept`: before a TLS
handshake, and so before any code that knows HTTP. A newcomer at the limit is not turned away. The
connection that has kept us waiting for the longest goes, so who sends a whole request in time is
served however many others dribble; only where every place belongs to a request that is being
answered does the newcomer go.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any


class Connection(socket.socket):
    """One accepted connection; the listener forgets it when it is closed."""

    def __init__(self, listener: LimitedListener, taken: socket.socket, network: str) -> None:
        super().__init__(taken.family, taken.type, taken.proto, fileno=taken.detach())
        self.network = network
        self.number = self.fileno()
        self.busy = False
        """Whether a whole request is here and being answered: then nobody takes its place."""
        self.waiting_since = time.monotonic()
        self._listener = listener

    def close(self) -> None:
        """Close it, and give its place back."""
        self._listener.forget(self)
        super().close()


class LimitedListener(socket.socket):
    """A listening socket with so many places, and so many for one address.

    Args:
        host: the address or name to listen on.
        port: the port; 0 = any free one.
        total: the connections that may be open at a time.
        per_address: the connections of one IPv4 address or one /64 network of IPv6.

    Raises:
        OSError: the address cannot be used.
    """

    def __init__(self, host: str, port: int, *, total: int, per_address: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name such as localhost may have both; clients that write 127.0.0.1 are many.
        found.sort(key=lambda each: each[0] != socket.AF_INET)
        family, kind, protocol, _, address = found[0]
        super().__init__(family, kind, protocol)
        self._total, self._per_address = total, per_address
        self._open: dict[int, Connection] = {}
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
            self.listen(128)
        except BaseException:
            self.close()
            raise

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection and its address.

        Raises:
            ConnectionAbortedError: it was closed again, as all places are taken by requests that
                are being answered; event loops go on with the next one.
        """
        taken, address = super().accept()
        network = network_of(str(address[0]))
        if not self._make_room(network):
            taken.close()
            raise ConnectionAbortedError(f"all connections of {network} are busy")
        connection = Connection(self, taken, network)
        self._open[connection.number] = connection
        return connection, address

    def mark(self, number: int, *, busy: bool) -> None:
        """Note whether the connection with this file number is being answered, or we wait for it.

        Args:
            number: the file descriptor of the connection.
            busy: whether a whole request is here and not yet answered.
        """
        connection = self._open.get(number)
        if connection is not None and connection.busy != busy:
            connection.busy = busy
            connection.waiting_since = time.monotonic()

    def forget(self, connection: Connection) -> None:
        """Give a connection's place back; twice is fine."""
        if self._open.get(connection.number) is connection:
            del self._open[connection.number]

    def _make_room(self, network: str) -> bool:
        """Whether there is a place for one more of this network; somebody idle may have to go."""
        own = [each for each in self._open.values() if each.network == network]
        if len(own) >= self._per_address:
            return self._drop_longest_waiting(own)
        if len(self._open) < self._total:
            return True
        waiting = Counter(each.network for each in self._open.values() if not each.busy)
        if not waiting:
            return False
        (crowd, _), *_ = waiting.most_common(1)
        return self._drop_longest_waiting(
            [each for each in self._open.values() if each.network == crowd]
        )

    def _drop_longest_waiting(self, among: Collection[Connection]) -> bool:
        idle = [each for each in among if not each.busy]
        if not idle:
            return False
        oldest = min(idle, key=lambda each: each.waiting_since)
        self.forget(oldest)
        # The event loop owns the socket: it sees the end of the stream, and closes.
        with suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)
        return True


def network_of(address: str) -> str:
    """Whom an address belongs to: in IPv4 itself, in IPv6 its /64, which is one host's."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):
        return False
    return all(each.startswith("127.") or each == "::1" for each in addresses)
