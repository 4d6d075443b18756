"""Files behind URLs, from public addresses alone. No thread waits for them, so a slow one holds nobody else up."""

import asyncio
import functools
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Iterable

import h11

from recipes.serving.clips import PORTS, Limits, TooLargeError

MOST_REDIRECTS = 5
REDIRECTED = (301, 302, 303, 307, 308)
PART = 65_536  # bytes that are read at once


async def downloaded(files: Iterable[bytes | str], limits: Limits) -> list[bytes]:
    """Return files, with those behind URLs read one after the other. Together, these may have the bytes of a request,
    and must arrive in its time.

    Raises:
        TooLargeError: the files behind the URLs have more bytes.
        ValueError: a URL leads to a private address, or cannot be read in time.
    """
    found: list[bytes] = []
    left = limits.body
    try:
        async with asyncio.timeout(limits.upload_seconds):
            for file in files:
                if isinstance(file, str):
                    file = await _download(file, left)
                    left -= len(file)
                found.append(file)
    except _FullError as error:
        raise TooLargeError(f"The files behind the URLs have more than {limits.body} bytes.") from error
    except TimeoutError as error:
        reason = f"it did not arrive within {limits.upload_seconds:g} s"
        raise ValueError(f"Clip {len(found) + 1}: The URL cannot be read: {reason}.") from error
    except (OSError, h11.ProtocolError, ValueError) as error:
        raise ValueError(f"Clip {len(found) + 1}: The URL cannot be read: {error}") from error
    return found


class _FullError(Exception):
    """More bytes arrive than may."""


async def _download(url: str, most: int) -> bytes:
    """Return the file of at most `most` bytes behind a URL, also after redirects. Each has its own check."""
    for _ in range(MOST_REDIRECTS + 1):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in PORTS or not parts.hostname:
            raise ValueError("it is no http(s) URL, or leads to another")
        address, port = await _connected_to(parts.hostname, parts.port or PORTS[parts.scheme])
        secure = {"ssl": _trusted(), "server_hostname": parts.hostname} if parts.scheme == "https" else {}
        reader, writer = await asyncio.open_connection(address, port, **secure)
        try:
            found = await _answer(reader, writer, parts, most)
        finally:
            writer.transport.abort()
        if isinstance(found, bytes):
            return found
        url = urllib.parse.urljoin(url, found)
    raise ValueError(f"it is redirected more than {MOST_REDIRECTS} times")


async def _connected_to(host: str, port: int) -> tuple[str, int]:
    """Return the address to connect to. The checked address is the one that is used, so that no name server answers
    twice. Raises ValueError if it is private."""
    *_, found = (await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    if not ipaddress.ip_address(found[0]).is_global:
        raise ValueError("its address is private")
    return found[:2]


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads the system's certificates: tens of milliseconds


async def _answer(reader, writer, parts: urllib.parse.SplitResult, most: int) -> bytes | str:
    """Ask for a file, and return its content, or the URL that the server names instead."""
    connection, content = h11.Connection(h11.CLIENT), bytearray()
    headers = {"host": parts.netloc.rpartition("@")[2], "user-agent": "lsm", "accept": "*/*", "connection": "close"}
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    for event in (h11.Request(method="GET", target=target, headers=list(headers.items())), h11.EndOfMessage()):
        writer.write(connection.send(event))
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(PART))
        elif isinstance(event, h11.Response):
            location = dict(event.headers).get(b"location")
            if event.status_code in REDIRECTED and location:
                return location.decode("ascii")
            if event.status_code != 200:
                raise ValueError(f"it is answered with status {event.status_code}")
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > most:
                raise _FullError
    return bytes(content)
