"""URLs lead nowhere private, and what is behind them is limited in bytes and time."""

import asyncio
import http.server
import socket
import threading

import pytest

from recipes.serving import downloads
from recipes.serving.clips import Limits, TooLargeError

LIMITS = Limits(urls=True, body=1_000_000, upload_seconds=5)


def read(*files: bytes | str, limits: Limits = LIMITS) -> list[bytes]:
    return asyncio.run(downloads.downloaded(files, limits))


@pytest.fixture
def web():
    """A web server at this machine, with a file of 1 kB, one of 2 MB, one in chunks, one that never ends or begins, and
    redirects; and the paths that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/never":
                over.wait(10)
            self.send_response({"/moved": 302, "/round": 302, "/file": 302, "/none": 404}.get(self.path, 200))
            self.send_header("location", {"/round": "/round", "/file": "file:///etc/passwd"}.get(self.path, "small"))
            if self.path == "/chunks":
                self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            while self.path == "/slow" and not over.wait(0.01):
                self.wfile.write(b"x")
            content = b"3\r\nabc\r\n0\r\n\r\n" if self.path == "/chunks" else b"x" * 1_000
            self.wfile.write(content * (2_000 if self.path == "/large" else 1))

        def log_message(self, *args):
            pass

        def handle(self):
            try:
                super().handle()
            except ConnectionError:
                left.set()

    asked: list[str] = []
    over, left = threading.Event(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.protocol_version = "HTTP/1.1"
    server.left, server.asked, server.url = left, asked, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    over.set()
    server.shutdown()


@pytest.fixture
def private(monkeypatch):
    """Private addresses are as good as public ones."""

    async def connected_to(host, port):
        return host, port

    monkeypatch.setattr(downloads, "_connected_to", connected_to)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.0.0.1", "169.254.169.254"]
)
def test_private_addresses_are_never_connected_to(web, host, monkeypatch):
    monkeypatch.setattr(asyncio, "open_connection", lambda *args, **kwargs: pytest.fail("it connected"))
    with pytest.raises(ValueError, match="Clip 1: The URL cannot be read: its address is private"):
        read(f"http://{host}:{web.server_port}/small")
    assert not web.asked


def test_a_public_address_may_not_lead_to_a_private_one(web, monkeypatch):
    connected_to, hosts = downloads._connected_to, []

    async def first(host, port):  # as if the first address were public
        hosts.append(host)
        return (host, port) if len(hosts) == 1 else await connected_to(host, port)

    monkeypatch.setattr(downloads, "_connected_to", first)
    with pytest.raises(ValueError, match="its address is private"):
        read(f"{web.url}/moved")
    assert web.asked == ["/moved"]


def test_a_name_is_looked_up_once_and_its_checked_address_used(monkeypatch):
    asked, connected = [], []

    def lookup(host, port, *settings):  # a name server that answers a private address to who asks again
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1" if len(asked) == 1 else "127.0.0.1", port))]

    async def connect(address, port, **kwargs):
        connected.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(ValueError, match="no network"):
        read("http://example.org/a.wav")
    assert (asked, connected) == (["example.org"], ["1.1.1.1"])


def test_files_behind_urls(web, private):
    assert read(b"sent", f"{web.url}/small?a=b", f"{web.url}/moved") == [b"sent", b"x" * 1_000, b"x" * 1_000]
    assert web.asked == ["/small?a=b", "/moved", "/small"]
    assert read(f"{web.url}/chunks") == [b"abc"]


@pytest.mark.parametrize(
    "path, message",
    [
        ("/none", "is answered with status 404"),
        ("/round", "is redirected more than 5 times"),
        ("/file", "is no http"),
        ("/a b", "Illegal"),
        ("/\0", "Illegal"),
        ("/é", "ascii"),
    ],
)
def test_urls_that_cannot_be_read(web, private, path, message):
    with pytest.raises(ValueError, match=f"Clip 2: The URL cannot be read: .*{message}"):
        read(b"sent", web.url + path)


def test_files_behind_urls_are_limited_together(web, private):
    with pytest.raises(TooLargeError, match="have more than 1000000 bytes"):
        read(f"{web.url}/large")
    with pytest.raises(TooLargeError, match="have more than 1500 bytes"):
        read(f"{web.url}/small", f"{web.url}/small", limits=Limits(body=1_500))


@pytest.mark.parametrize("path", ["/slow", "/never"])
def test_a_slow_file_is_given_up(web, private, path):
    with pytest.raises(ValueError, match="The URL cannot be read: it did not arrive within 0.2 s"):
        read(web.url + path, limits=Limits(upload_seconds=0.2))
