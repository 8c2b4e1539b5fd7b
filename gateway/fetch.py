"""Files that a request names by URL, brought in by one guarded client.

In goes a URL from anybody, out comes a file on the disk, or an error that says what is wrong with the URL. The gateway
stands inside the network and the URL comes from outside, so it must not become a way in: every address that a host name
stands for is looked at, the connection goes to one of the addresses that were looked at (the name is not looked up
again), and so it is for every redirect. Proxies of the environment are not used: they would look the name up.

What is fetched is bounded in bytes, seconds and redirects, and must be a picture, a video or a sound, by its header and
by its first bytes.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import h11

from bunraku.errors import BunrakuError, InvalidRequest, WrongState
from gateway.blobs import full_disk_is_not_ready
from runtime.media_type import HEAD_BYTES, media_type

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

NOT_FETCHED, UNREACHABLE = "URL_NOT_FETCHED", "URL_UNREACHABLE"

_MAX_URL_CHARACTERS = 2048
_MAX_HEADER_BYTES = 64 << 10
_READ_BYTES = 256 << 10
_RETRY_S = 10.0
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_SUCCEED_LATER = (408, 425, 429, 500, 502, 503, 504)
_URL = re.compile(r"https?://", re.IGNORECASE)
_WRITTEN = re.compile(r"[!-~]+")  # a URL is printable ASCII; other characters are percent-encoded in it
_HOST = re.compile(r"[a-z0-9.-]{1,253}|[0-9a-f:.]{2,45}")  # names in Punycode, and addresses
_NOT_IN_FILENAMES = re.compile(r"[/\\\x00-\x1f\x7f]")
_MEDIA = re.compile(r"(image|video|audio)/[\w.+-]+|(application|binary)/octet-stream", re.ASCII)

_EMBEDDED_IPV4 = ip_network("64:ff9b::/96")  # NAT64 (RFC 6052): the last 32 bits are where it leads
_GLOBAL_UNICAST = ip_network("2000::/3")
# Source: the special-purpose registries of IANA for IPv4 and IPv6, without what `_GLOBAL_UNICAST` leaves out already
_REFUSED = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
            "168.63.129.16/32",  # the platform of Azure, which every machine there reaches
            *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
        ),
    )
)


@dataclass(frozen=True)
class FetchLimits:
    """What is fetched.

    Attributes:
        schemes: `https`, and `http` where that is wanted.
        networks: addresses that are allowed although they are not public, such as those of an object store.
        max_bytes: of a file.
        max_seconds: from the first look-up to the last byte.
        connect_seconds: for one attempt to connect.
        max_redirects: that are followed.
        max_at_once: files that are fetched at the same time; others wait within their max_seconds.
    """

    schemes: tuple[str, ...] = ("https",)
    networks: tuple[Network, ...] = ()
    max_bytes: int = 2 << 30
    max_seconds: float = 120.0
    connect_seconds: float = 10.0
    max_redirects: int = 5
    max_at_once: int = 4


def is_url(text: str) -> bool:
    """Whether a field holds a URL, and not the name of an asset."""
    return _URL.match(text) is not None


def is_public(address: Address) -> bool:
    """Whether an address is one of the public Internet; IPv4 addresses inside of IPv6 ones are looked at as IPv4."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _EMBEDDED_IPV4:
            return is_public(IPv4Address(address.packed[-4:]))
        if address not in _GLOBAL_UNICAST:
            return False
    return not any(address in network for network in _REFUSED)


async def system_resolve(host: str, port: int) -> list[str]:
    """Addresses of a host by this machine's resolver. Raises OSError."""
    rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(row[4][0]) for row in rows]


class Fetcher:
    """Fetches files.

    Args:
        resolve: looks names up.
        tls: what server certificates are checked with; None: the authorities of this machine.
    """

    def __init__(
        self,
        limits: FetchLimits,
        *,
        resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.limits, self._resolve = limits, resolve
        self._tls = tls or ssl.create_default_context()
        self._places = asyncio.Semaphore(limits.max_at_once)

    async def fetch(self, url: str, path: Path, field: str) -> str:
        """Writes what is at a URL to a file; gives a name for it, for people.

        Args:
            path: of the file, which is made; after an error it may hold a part.
            field: the field of the request that names the URL.

        Raises:
            InvalidRequest: it may not be fetched, is not there, or is not what may be fetched (reason NOT_FETCHED).
            WrongState: its server does not answer, or not fast enough (reason UNREACHABLE).
            NotReady: the disk is full.
        """
        problem = _Problem(field)
        try:
            async with asyncio.timeout(self.limits.max_seconds), self._places:
                return await self._follow(url, path, problem)
        except TimeoutError:
            raise problem.unreachable(f"takes longer than {self.limits.max_seconds:g} seconds") from None

    async def _follow(self, url: str, path: Path, problem: _Problem) -> str:
        place: SplitResult | None = None
        for _ in range(self.limits.max_redirects + 1):
            before, place = place, self._checked(url, problem)
            if before is not None and before.scheme == "https" != place.scheme:
                raise problem.refused("leads from https to http")
            async with self._connected(place, problem) as exchange:
                response = await exchange.ask(place)
                if response.status_code not in _REDIRECTS:
                    self._require_file(response, problem)
                    await self._store(exchange, path, problem)
                    return _filename(place)
                url = self._target(url, response, problem)
        raise problem.refused(f"leads on more than {self.limits.max_redirects} times")

    def _target(self, url: str, response: h11.Response, problem: _Problem) -> str:
        try:
            return urljoin(url, _header(response, b"location"))
        except ValueError as error:
            raise problem.refused(f"leads to what is not a URL: {error}") from error

    def _checked(self, url: str, problem: _Problem) -> SplitResult:
        if len(url) > _MAX_URL_CHARACTERS or not _WRITTEN.fullmatch(url) or "\\" in url:
            raise problem.refused(f"must be a URL of at most {_MAX_URL_CHARACTERS} ASCII characters without spaces")
        try:
            place = urlsplit(url)
            port = _port(place)
        except ValueError as error:
            raise problem.refused(f"is not a URL: {error}") from error
        if place.scheme not in self.limits.schemes:
            raise problem.refused(f"must begin with {' or '.join(self.limits.schemes)}")
        if place.username is not None or place.password is not None:
            raise problem.refused("must not hold a name or a password")
        if not _HOST.fullmatch(place.hostname or ""):
            raise problem.refused("must name a host")
        if port < 1024 and port not in _PORTS.values():
            raise problem.refused("must name port 80, 443 or one from 1024 on")
        return place

    async def _addresses(self, place: SplitResult, problem: _Problem) -> list[Address]:
        """Of a host, all of them allowed. Which of them is not allowed, or whether there are any, is not told."""
        host = place.hostname or ""
        try:
            found = [ip_address(address) for address in await self._resolve(host, _port(place))]
        except (OSError, UnicodeError, ValueError):
            found = []
        if not found or not all(map(self._is_allowed, found)):
            raise problem.refused(f"names {host}, which is not a host of the Internet")
        return list(dict.fromkeys(found))

    def _is_allowed(self, address: Address) -> bool:
        inner = address.ipv4_mapped if isinstance(address, IPv6Address) and address.ipv4_mapped else address
        return is_public(address) or any(inner in network for network in self.limits.networks)

    @asynccontextmanager
    async def _connected(self, place: SplitResult, problem: _Problem) -> AsyncIterator[_Exchange]:
        """A connection to the first of the checked addresses that answers; the certificate must be of the host."""
        host, failure = place.hostname or "", ""
        tls, server_name = (self._tls, host) if place.scheme == "https" else (None, None)
        for address in await self._addresses(place, problem):
            try:
                async with asyncio.timeout(self.limits.connect_seconds):
                    # an address, not a name: nothing is looked up again
                    reader, writer = await asyncio.open_connection(
                        str(address), _port(place), ssl=tls, server_hostname=server_name
                    )
            except ssl.SSLCertVerificationError as error:
                raise problem.refused(f"names {host}, whose certificate is not valid") from error
            except (OSError, TimeoutError) as error:
                failure = type(error).__name__
                continue
            try:
                yield _Exchange(reader, writer, problem)
            finally:
                writer.transport.abort()
            return
        raise problem.unreachable(f"does not answer: {failure}")

    def _require_file(self, response: h11.Response, problem: _Problem) -> None:
        """Checks the head of an answer, before any of the body is read."""
        if response.status_code in _MAY_SUCCEED_LATER:
            raise problem.unreachable(f"answers with status {response.status_code}")
        if response.status_code != 200:
            raise problem.refused(f"answers with status {response.status_code}")
        kind = _header(response, b"content-type").partition(";")[0].strip().lower()
        if kind and not _MEDIA.fullmatch(kind):
            raise problem.refused(f"is of type {kind[:100]!r}, not a picture, a video or a sound")
        if _header(response, b"content-encoding").strip().lower() not in ("", "identity"):
            raise problem.refused("comes compressed, which was not asked for")
        length = _header(response, b"content-length")
        if length and int(length) > self.limits.max_bytes:  # h11 has seen that it is a number
            raise problem.refused(f"must have at most {self.limits.max_bytes} bytes, has {length}")

    async def _store(self, exchange: _Exchange, path: Path, problem: _Problem) -> None:
        head, size_bytes = b"", 0
        with path.open("wb") as file:
            async for data in exchange.body():
                size_bytes += len(data)
                if size_bytes > self.limits.max_bytes:
                    raise problem.refused(f"must have at most {self.limits.max_bytes} bytes")
                if len(head) < HEAD_BYTES:
                    head += data[: HEAD_BYTES - len(head)]
                    if len(head) == HEAD_BYTES:
                        _require_media(head, problem)
                await asyncio.to_thread(_write, file, data)
        _require_media(head, problem)


class _Problem:
    """What is wrong with the URL in a field. Neither path nor query are told: they may hold a signature."""

    def __init__(self, field: str) -> None:
        self._field = field

    def refused(self, text: str) -> BunrakuError:
        """It cannot be fetched, now or later."""
        return InvalidRequest((self._field, text), reason=NOT_FETCHED)

    def unreachable(self, text: str) -> BunrakuError:
        """It may be fetched later."""
        return WrongState(f"{self._field}: the URL {text}", reason=UNREACHABLE, retry_after_s=_RETRY_S)


class _Exchange:
    """One request and its answer over HTTP/1.1. Raises WrongState where the server breaks off or talks nonsense."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, problem: _Problem) -> None:
        self._reader, self._writer, self._problem = reader, writer, problem
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)

    async def ask(self, place: SplitResult) -> h11.Response:
        """Sends a GET and gives the head of the answer."""
        target = (place.path or "/") + (f"?{place.query}" if place.query else "")
        headers = [
            ("Host", place.netloc),
            ("User-Agent", "bunraku"),
            ("Accept", "image/*, video/*, audio/*, application/octet-stream"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = self._http.send(h11.Request(method="GET", target=target, headers=headers))
        self._writer.write((request or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        while isinstance(event := await self._next(), h11.InformationalResponse):
            pass
        if not isinstance(event, h11.Response):
            raise self._problem.unreachable("does not answer: the connection is closed")
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """The rest of the answer."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def _next(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        except (OSError, h11.RemoteProtocolError) as error:  # also where a body is shorter than its head said
            raise self._problem.unreachable(f"breaks off: {type(error).__name__}") from error
        return event


def _port(place: SplitResult) -> int:
    return place.port if place.port is not None else _PORTS.get(place.scheme, 0)


def _header(response: h11.Response, name: bytes) -> str:
    """The first header of this name, in small letters; empty where there is none."""
    return next((value.decode("latin-1") for key, value in response.headers if key == name), "")


def _require_media(head: bytes, problem: _Problem) -> None:
    if media_type(head) == "application/octet-stream":
        raise problem.refused("is not a picture, a video or a sound of a kind that is known here")


def _filename(place: SplitResult) -> str:
    """The end of the path, without what is not allowed in names."""
    name = unquote(place.path.rpartition("/")[2], errors="replace")
    return _NOT_IN_FILENAMES.sub("", name)[-255:]


def _write(file: BinaryIO, data: bytes) -> None:
    with full_disk_is_not_ready():
        file.write(data)
