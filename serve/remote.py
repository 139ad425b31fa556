"""Fetch a picture from an address that a client named, and from no other machine than those that everybody can reach.

Server-side request forgery: an address in a request may point at this machine, its network or a cloud's metadata. Every name is
resolved here, each of its addresses is checked, and the very address that was checked is dialled; the name stays in the Host
header and in TLS (server name and certificate). So neither a second look-up nor a redirect reaches anything else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import certifi
import httpcore
import httpx

from serve.threads import Threads

SECONDS = 5.0  # for all of it, redirects too
MAX_BYTES = 10 * 10**6
MAX_REDIRECTS = 3
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out for the internet
# Beside what Python's ipaddress knows, which differs between its versions: IETF's own (Oracle's metadata lie there), 6to4's
# relays, Azure's machine agent, which has a public address, and IPv6's protocols.
FORBIDDEN = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23")))

LOOKUPS = 16  # at once: a name server may let each of them wait, and then no other work but look-ups waits too

Address = IPv4Address | IPv6Address


class RemoteRefused(ValueError):
    """An address that is not fetched, or what came from it is no picture that is taken. The message names no address."""


def is_public(address: Address) -> bool:
    """Whether it belongs to the internet. IPv6 addresses that stand for one of IPv4 (mapped, compatible, NAT64, 6to4, Teredo)
    do not: nobody needs them, and what they reach is for a gateway to say."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if any(address in network for network in FORBIDDEN):
        return False
    if isinstance(address, IPv4Address):
        return True
    return address in UNICAST and address.sixtofour is None


def look_up(host: str, port: int) -> list[tuple]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def resolve(host: str, port: int, permitted: Sequence[IPv4Network | IPv6Network], lookups: Threads) -> str:
    """A host's address to dial, decimal and other spellings of IPv4 included, which the system's resolver reads.

    Raises:
        RemoteRefused: there is none, or any of them is not public.
    """
    try:
        found = await lookups.run(lambda: look_up(host, port))
    except (OSError, UnicodeError) as error:
        raise RemoteRefused("the address's host cannot be found") from error
    addresses = [ipaddress.ip_address(entry[4][0].split("%")[0]) for entry in found]
    for address in addresses:
        if not (is_public(address) or any(address in network for network in permitted)):
            raise RemoteRefused("the address is not one of the public internet")
    if not addresses:
        raise RemoteRefused("the address's host cannot be found")
    return str(addresses[0])


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Dials what `resolve` has checked."""

    def __init__(self, permitted: Sequence[IPv4Network | IPv6Network]):
        self.permitted, self.dial = permitted, httpcore.AnyIOBackend()
        self.lookups = Threads(LOOKUPS, "look-up")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = await resolve(host, port, self.permitted, self.lookups)
        return await self.dial.connect_tcp(address, port, timeout=timeout)

    async def sleep(self, seconds: float) -> None:
        await self.dial.sleep(seconds)


class Fetcher:
    """Fetches pictures. Proxies of the environment are not used: one would look names up by itself."""

    def __init__(self, permitted: Sequence[IPv4Network | IPv6Network] = (), trust: ssl.SSLContext | None = None):
        """permitted: networks that are allowed although they are not public; trust: certificates, default certifi's."""
        self.backend = CheckedBackend(permitted)
        self.trust = trust or ssl.create_default_context(cafile=certifi.where())

    async def fetch(self, url: str) -> bytes:
        """The bytes at an http(s) address.

        Raises:
            RemoteRefused: another scheme, an address that is not public, here or after a redirect, more than 10 MB, 5 seconds
                over, or an answer other than 200.
        """
        try:
            return await asyncio.wait_for(self._follow(url), SECONDS)
        except (asyncio.TimeoutError, httpcore.TimeoutException) as error:
            raise RemoteRefused(f"it did not come within {SECONDS:.0f} seconds") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
            raise RemoteRefused("its server cannot be reached, or does not speak HTTP") from error

    async def _follow(self, url: str) -> bytes:
        place = checked_url(url)
        async with httpcore.AsyncConnectionPool(
            ssl_context=self.trust, network_backend=self.backend, max_keepalive_connections=0, retries=0
        ) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                headers = [
                    (b"Host", place.netloc),
                    (b"Accept", b"image/webp,image/png,image/jpeg"),
                    (b"Accept-Encoding", b"identity"),  # nothing that unfolds
                    (b"User-Agent", b"llava_drip"),
                ]
                target = httpcore.URL(
                    scheme=place.raw_scheme, host=place.raw_host, port=place.port, target=place.raw_path
                )
                async with pool.stream("GET", target, headers=headers) as response:
                    given = {name.lower(): value for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in given:
                        place = checked_url(given[b"location"].decode("latin-1"), place)
                        continue
                    return await _body(response, given)
        raise RemoteRefused(f"it redirects more than {MAX_REDIRECTS} times")


def checked_url(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """An http(s) address with a host and without a name or password, seen from base. RemoteRefused otherwise."""
    try:
        place = httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise RemoteRefused("it is not a valid address") from error
    if place.scheme not in ("http", "https"):
        raise RemoteRefused("only http and https addresses are fetched")
    if not place.raw_host or place.userinfo:
        raise RemoteRefused("the address needs a host, and no name or password")
    return place


async def _body(response: httpcore.Response, given: dict[bytes, bytes]) -> bytes:
    if response.status != 200:
        raise RemoteRefused(f"its server answered with status {response.status}")
    if given.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RemoteRefused("its server sent it compressed")
    data = bytearray()
    async for piece in response.aiter_stream():
        data += piece
        if len(data) > MAX_BYTES:
            raise RemoteRefused(f"it has more than {MAX_BYTES:,} bytes")
    return bytes(data)
