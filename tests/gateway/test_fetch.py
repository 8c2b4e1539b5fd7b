"""Files by URL: from a real server on this machine under names that only the test's resolver knows."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bunraku.errors import BunrakuError, InvalidRequest, WrongState
from gateway.fetch import NOT_FETCHED, UNREACHABLE, Fetcher, FetchLimits, is_public, is_url, system_resolve
from scripts.certificates import Authority

PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)
HOST = "media.example"
LOCAL = (ip_network("127.0.0.1/32"),)
Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def ok(body: bytes = PNG, *headers: str) -> bytes:
    head = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *(headers or ["Content-Type: image/png"])]
    return "\r\n".join([*head, "", ""]).encode() + body


def found(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@dataclass
class Site:
    """A server.

    Attributes:
        answers: by path; bytes, or what writes them.
        requests: heads of the requests that came.
        connections: how many were made.
    """

    port: int = 0
    answers: dict[str, bytes | Answer] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    connections: int = 0
    open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            answer = self.answers[head.split()[1].partition("?")[0]]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(head, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def listening(tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, host, 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


@dataclass
class Names:
    """A resolver: each look-up of a name takes its next answer, the last one again and again."""

    answers: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.answers.get(host, [])
        if not answers:
            raise OSError("no such name")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    Authority.at(directory / "ca", "test").sign(directory / "site", "site", [HOST, "other.example"], server=True)
    return directory


@pytest.fixture
async def site(certificates: Path) -> AsyncIterator[Site]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / "site.crt", certificates / "site.key")
    async with listening(tls) as listens:
        yield listens


@pytest.fixture
async def plain() -> AsyncIterator[Site]:
    async with listening() as listens:
        yield listens


@pytest.fixture
def trust(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates / "ca.crt")


Fetch = Callable[..., Awaitable[str]]


@pytest.fixture
def fetch(trust: ssl.SSLContext, tmp_path: Path) -> Fetch:
    async def fetched(url: str, names: dict[str, list[list[str]]] | Names | None = None, **limits: Any) -> str:
        answers = {HOST: [["127.0.0.1"]]} if names is None else names
        resolve = answers if isinstance(answers, Names) else Names(answers)
        chosen = {"networks": LOCAL, "max_seconds": 5.0, **limits}
        return await Fetcher(FetchLimits(**chosen), resolve=resolve, tls=trust).fetch(url, tmp_path / "file", "image")

    return fetched


async def refused(call: Awaitable[str]) -> str:
    """What is said of a URL that cannot be fetched."""
    with pytest.raises(InvalidRequest) as raised:
        await call
    assert raised.value.reason == NOT_FETCHED
    ((name, text),) = raised.value.violations
    assert name == "image"
    return text


async def unreachable(call: Awaitable[str]) -> str:
    """What is said of a URL that may be fetched later."""
    with pytest.raises(WrongState) as raised:
        await call
    assert raised.value.reason == UNREACHABLE
    assert raised.value.retry_after_s
    assert raised.value.message.startswith("image: ")
    return raised.value.message


# What comes


async def test_a_file_is_fetched_over_https_and_named_after_the_url(site: Site, fetch: Fetch, tmp_path: Path) -> None:
    site.answers["/pictures/her%20o.png"] = ok()
    name = await fetch(f"https://{HOST}:{site.port}/pictures/her%20o.png?signature=s#top")
    assert name == "her o.png"
    assert (tmp_path / "file").read_bytes() == PNG
    (head,) = site.requests
    assert head.startswith("GET /pictures/her%20o.png?signature=s HTTP/1.1\r\n")
    assert f"host: {HOST}:{site.port}\r\n" in head.lower()
    assert "accept-encoding: identity\r\n" in head.lower()


async def test_a_file_in_chunks_of_unknown_size_is_whole(site: Site, fetch: Fetch, tmp_path: Path) -> None:
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (PNG[:3], PNG[3:90], PNG[90:]))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    site.answers["/f"] = head + chunks + b"0\r\n\r\n"
    await fetch(f"https://{HOST}:{site.port}/f")
    assert (tmp_path / "file").read_bytes() == PNG


async def test_names_of_files_hold_no_directories(site: Site, fetch: Fetch) -> None:
    site.answers["/..%2f..%2fetc%2fpasswd%00"] = ok()
    assert await fetch(f"https://{HOST}:{site.port}/..%2f..%2fetc%2fpasswd%00") == "....etcpasswd"


# Where it may go


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1"),
        *("172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1"),
        *("203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("100.100.100.200", "::", "::1", "::7f00:1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1"),
        *("ff02::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808"),
    ],
)
def test_addresses_that_are_not_of_the_internet(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0"),
        *("192.167.255.255", "223.255.255.255", "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1"),
        *("::ffff:8.8.8.8", "64:ff9b::808:808"),
    ],
)
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(ip_address(address))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_python_knows_not_to_be_global_is_not_public(address: IPv4Address | IPv6Address) -> None:
    if not address.is_global or address.is_multicast:
        assert not is_public(address)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.2"], ["169.254.169.254"], ["127.0.0.1", "10.0.0.1"], ["::1"], ["::ffff:127.0.0.2"], []],
)
async def test_a_name_for_an_address_that_is_not_allowed_is_refused_without_a_connection(
    site: Site, fetch: Fetch, addresses: list[str]
) -> None:
    text = await refused(fetch(f"https://{HOST}:{site.port}/f", {HOST: [addresses]}))
    assert text == f"names {HOST}, which is not a host of the Internet"
    assert site.connections == 0


async def test_a_name_that_does_not_exist_is_refused_in_the_same_words(fetch: Fetch) -> None:
    text = await refused(fetch("https://nowhere.example/f", {}))
    assert text == "names nowhere.example, which is not a host of the Internet"


async def test_addresses_of_this_machine_are_refused_however_they_are_written() -> None:
    fetcher = Fetcher(FetchLimits(), resolve=system_resolve)
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "[::ffff:7f00:1]", "0"):
        with pytest.raises(InvalidRequest, match="not a host of the Internet"):
            await fetcher.fetch(f"https://{host}:1234/f", Path("never"), "image")


async def test_a_network_that_the_settings_name_is_allowed_also_in_its_ipv6_form(site: Site, fetch: Fetch) -> None:
    site.answers["/f"] = ok()
    await fetch(f"https://{HOST}:{site.port}/f", {HOST: [["::ffff:127.0.0.1"]]})


async def test_the_connection_goes_to_the_address_that_was_checked(plain: Site, fetch: Fetch, tmp_path: Path) -> None:
    """DNS rebinding: a name that leads elsewhere the next time it is looked up."""
    async with listening(host="127.0.0.2") as inside:
        plain.answers["/f"], inside.answers["/f"] = ok(), ok(b"\xff\xd8\xff secret")
        names = Names({HOST: [["127.0.0.1"], ["127.0.0.2"]]})
        await fetch(f"http://{HOST}:{plain.port}/f", names, schemes=("http",))
        assert names.asked == [HOST]
        assert inside.connections == 0
    assert (tmp_path / "file").read_bytes() == PNG


async def test_a_redirect_is_looked_up_and_checked_like_the_first_url(site: Site, fetch: Fetch) -> None:
    for status, target in ((301, f"https://inside.example:{site.port}/f"), (307, "//inside.example/f")):
        site.answers["/go"] = found(target, status)
        names = Names({HOST: [["127.0.0.1"]], "inside.example": [["10.0.0.8"]]})
        text = await refused(fetch(f"https://{HOST}:{site.port}/go", names))
        assert "inside.example" in text
        assert names.asked == [HOST, "inside.example"]


async def test_the_same_name_is_checked_again_after_a_redirect(site: Site, fetch: Fetch) -> None:
    site.answers["/go"] = found("/f")
    text = await refused(fetch(f"https://{HOST}:{site.port}/go", {HOST: [["127.0.0.1"], ["127.0.0.2"]]}))
    assert "not a host of the Internet" in text
    assert site.connections == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_to_allowed_places_are_followed(site: Site, fetch: Fetch, status: int) -> None:
    site.answers["/go"] = found(f"https://other.example:{site.port}/a/hero.png", status)
    site.answers["/a/hero.png"] = ok()
    names = {HOST: [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    assert await fetch(f"https://{HOST}:{site.port}/go", names) == "hero.png"


async def test_a_redirect_from_https_to_http_is_refused_even_where_http_is_allowed(site: Site, fetch: Fetch) -> None:
    site.answers["/go"] = found(f"http://{HOST}:{site.port}/f")
    url = f"https://{HOST}:{site.port}/go"
    assert await refused(fetch(url)) == "must begin with https"
    assert await refused(fetch(url, schemes=("https", "http"))) == "leads from https to http"


async def test_redirects_are_followed_so_often_and_no_more(site: Site, fetch: Fetch) -> None:
    for number in range(3):
        site.answers[f"/{number}"] = found(f"/{number + 1}")
    site.answers["/3"] = ok()
    url = f"https://{HOST}:{site.port}/0"
    assert await refused(fetch(url, max_redirects=2)) == "leads on more than 2 times"
    await fetch(url, max_redirects=3)


async def test_a_redirect_to_nowhere_is_refused(site: Site, fetch: Fetch) -> None:
    for target in ("https://[::1/", "file:///etc/passwd", "gopher://media.example/"):
        site.answers["/go"] = found(target)
        await refused(fetch(f"https://{HOST}:{site.port}/go"))
    assert site.connections == 3


async def test_http_is_refused_unless_the_settings_allow_it(plain: Site, fetch: Fetch) -> None:
    plain.answers["/f"] = ok()
    url = f"http://{HOST}:{plain.port}/f"
    assert await refused(fetch(url)) == "must begin with https"
    assert plain.connections == 0
    await fetch(url, schemes=("https", "http"))


@pytest.mark.parametrize(
    "url",
    [
        *("https://", "https:///f", "https://me:secret@media.example/f", "https://me@media.example/f", "media.example"),
        *("https://media.example:22/f", "https://media.example:99999/f", "https://media.example:x/f", "https://[::1/f"),
        *("https://media.example/a b", "https://media.example/\r\nX: y", "https://m\u00e9dia.example/", "ftp://h/f"),
        *("https://media.example\\@inside/f", "https://me%dia/f", "https://" + "m" * 2048, "https://a_b/f"),
    ],
)
async def test_what_is_not_a_url_of_a_file_is_refused_without_a_look_up(fetch: Fetch, url: str) -> None:
    names = Names({HOST: [["127.0.0.1"]]})
    await refused(fetch(url, names))
    assert names.asked == []


def test_urls_and_names_of_assets_are_told_apart() -> None:
    assert is_url("https://media.example/f")
    assert is_url("HTTP://media.example/f")
    assert not is_url("assets/" + "0" * 64)
    assert not is_url("")


async def test_a_certificate_of_another_host_is_refused(site: Site, fetch: Fetch) -> None:
    text = await refused(fetch(f"https://fake.example:{site.port}/f", {"fake.example": [["127.0.0.1"]]}))
    assert text == "names fake.example, whose certificate is not valid"
    assert site.requests == []


async def test_an_authority_that_is_not_trusted_is_refused(site: Site, tmp_path: Path) -> None:
    fetcher = Fetcher(FetchLimits(networks=LOCAL), resolve=Names({HOST: [["127.0.0.1"]]}))
    with pytest.raises(InvalidRequest, match="certificate is not valid"):
        await fetcher.fetch(f"https://{HOST}:{site.port}/f", tmp_path / "file", "image")


# How much, how fast, what


async def test_a_file_that_says_it_is_too_large_is_refused_at_once(site: Site, fetch: Fetch, tmp_path: Path) -> None:
    site.answers["/f"] = b"HTTP/1.1 200 OK\r\nContent-Length: 201\r\n\r\n"  # nothing follows
    text = await refused(fetch(f"https://{HOST}:{site.port}/f", max_bytes=200))
    assert text == "must have at most 200 bytes, has 201"
    assert not (tmp_path / "file").exists()


async def test_a_file_that_does_not_say_its_size_is_cut_off_at_the_limit(
    site: Site, fetch: Fetch, tmp_path: Path
) -> None:
    async def endless(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(f"{len(PNG):x}\r\n".encode() + PNG + b"\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()

    site.answers["/f"] = endless
    text = await refused(fetch(f"https://{HOST}:{site.port}/f", max_bytes=1_000_000))
    assert text == "must have at most 1000000 bytes"
    assert (tmp_path / "file").stat().st_size <= 1_000_000


async def test_a_file_of_exactly_the_limit_is_taken(site: Site, fetch: Fetch) -> None:
    site.answers["/f"] = ok()
    await fetch(f"https://{HOST}:{site.port}/f", max_bytes=len(PNG))


async def test_a_server_that_drips_is_given_up(site: Site, fetch: Fetch) -> None:
    async def dripping(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PNG)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    site.answers["/f"] = dripping
    begun = time.monotonic()
    text = await unreachable(fetch(f"https://{HOST}:{site.port}/f", max_seconds=0.3))
    assert "takes longer than 0.3 seconds" in text
    assert time.monotonic() - begun < 2


async def test_a_place_that_is_waited_for_counts_against_the_time(site: Site, trust: ssl.SSLContext) -> None:
    async def silent(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)

    site.answers["/f"] = silent
    limits = FetchLimits(networks=LOCAL, max_seconds=0.3, max_at_once=1)
    fetcher = Fetcher(limits, resolve=Names({HOST: [["127.0.0.1"]]}), tls=trust)
    url = f"https://{HOST}:{site.port}/f"
    begun = time.monotonic()
    await asyncio.gather(*(unreachable(fetcher.fetch(url, Path("never"), "image")) for _ in range(3)))
    assert time.monotonic() - begun < 0.55
    assert site.connections == 1


async def test_a_cancelled_fetch_lets_go_of_its_connection(site: Site, fetch: Fetch) -> None:
    ended = asyncio.Event()

    async def silent(_: str, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    site.answers["/f"] = silent
    fetching = asyncio.ensure_future(fetch(f"https://{HOST}:{site.port}/f"))
    while not site.requests:
        await asyncio.sleep(0.01)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    async with asyncio.timeout(2):
        await ended.wait()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ok(PNG, "Content-Type: text/html; charset=utf-8"), "is of type 'text/html'"),
        (ok(b"<html>" + bytes(100), "Content-Type: image/png"), "is not a picture, a video or a sound"),
        (ok(b"short", "Content-Type: image/png"), "is not a picture, a video or a sound"),
        (ok(b""), "is not a picture, a video or a sound"),
        (ok(PNG, "Content-Type: image/png", "Content-Encoding: gzip"), "comes compressed"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers with status 404"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n", "answers with status 206"),
        (b"HTTP/1.1 401 Who\r\nContent-Length: 0\r\n\r\n", "answers with status 401"),
    ],
)
async def test_what_is_not_a_media_file_is_refused(site: Site, fetch: Fetch, answer: bytes, said: str) -> None:
    site.answers["/f"] = answer
    assert said in await refused(fetch(f"https://{HOST}:{site.port}/f"))


@pytest.mark.parametrize("kind", ["image/svg+xml; a=b", "VIDEO/MP4", "application/octet-stream", "audio/x-wav"])
async def test_media_types_are_looked_at_without_parameters_and_case(site: Site, fetch: Fetch, kind: str) -> None:
    site.answers["/f"] = ok(PNG, f"Content-Type: {kind}")
    await fetch(f"https://{HOST}:{site.port}/f")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 Slowly\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PNG,  # shorter than it says
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\xff" * 100,
        b"",
    ],
)
async def test_a_server_that_fails_or_breaks_off_may_be_tried_later(site: Site, fetch: Fetch, answer: bytes) -> None:
    site.answers["/f"] = answer
    await unreachable(fetch(f"https://{HOST}:{site.port}/f"))


async def test_another_address_is_tried_when_one_does_not_answer(plain: Site, fetch: Fetch) -> None:
    plain.answers["/f"] = ok()
    names = {HOST: [["127.0.0.3", "127.0.0.1"]]}  # nobody listens at the first
    networks = (ip_network("127.0.0.0/8"),)
    await fetch(f"http://{HOST}:{plain.port}/f", names, schemes=("http",), networks=networks)
    text = await unreachable(
        fetch(f"http://{HOST}:{plain.port}/f", {HOST: [["127.0.0.3"]]}, schemes=("http",), networks=networks)
    )
    assert "does not answer" in text


async def test_signatures_in_a_url_are_not_repeated(site: Site, fetch: Fetch) -> None:
    calls: Iterable[tuple[str, bytes]] = (
        ("/f", b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"),
        ("/g", b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"),
    )
    for path, answer in calls:
        site.answers[path] = answer
        with pytest.raises(BunrakuError) as raised:
            await fetch(f"https://{HOST}:{site.port}{path}?X-Signature=s3cr3t")
        assert "s3cr3t" not in raised.value.message
