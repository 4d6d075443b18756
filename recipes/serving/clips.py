"""Clips that clients send, within limits: nothing is decoded before its size, rate, channels and length are known."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

import numpy as np
import soundfile

from processing_lsm import load_audio

PORTS = {"http": 80, "https": 443}


class TooLargeError(ValueError):
    """A request or a clip is larger than the server takes."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        body: bytes of a request.
        seconds: length of a clip.
        clips: number of clips of a prompt.
        tokens: tokens of an answer.
        channels: channels of a clip.
        rates: lowest and highest sampling rate of a clip in Hz.
        upload_seconds: time in which a request, or a file behind a URL, must arrive.
        answer_seconds: time in which a request must be answered.
        urls: whether clips may be http(s) URLs. Private addresses are never read.
    """

    body: int = 32 * 2**20
    seconds: float = 600.0
    clips: int = 8
    tokens: int = 1024
    channels: int = 8
    rates: tuple[int, int] = (4_000, 192_000)
    upload_seconds: float = 30.0
    answer_seconds: float = 120.0
    urls: bool = False


def from_base64(data: object) -> bytes:
    """Decode base64. Raises ValueError if it is not."""
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"The clip is not base64: {error}") from error


def from_url(url: object, limits: Limits) -> bytes:
    """Return the file behind a data URI or, if the limits allow URLs, behind an http(s) URL.

    Raises:
        TooLargeError: the file has more bytes than a request may have.
        ValueError: the URL is not allowed, or cannot be read.
    """
    if not isinstance(url, str):
        raise ValueError(f"The URL of a clip must be a string, got {type(url).__name__}.")
    if url.startswith("data:"):
        kind, comma, data = url.partition(",")
        if not comma or not kind.endswith(";base64"):
            raise ValueError("The data URI of a clip must have the form data:audio/wav;base64,DATA.")
        return from_base64(data)
    if not limits.urls:
        raise ValueError("This server reads no URLs: send the clip itself, as input_audio or as a data URI.")
    if urllib.parse.urlsplit(url).scheme not in PORTS:
        raise ValueError("The URL of a clip must begin with http://, https:// or data:.")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _PublicHTTP, _PublicHTTPS)
    try:
        with opener.open(url, timeout=limits.upload_seconds) as response:
            content = response.read(limits.body + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"The URL cannot be read: {reason}") from error
    if len(content) > limits.body:
        raise TooLargeError(f"The file behind the URL has more than {limits.body} bytes.")
    return content


def _connect(address, timeout, source_address=None, **kwargs) -> socket.socket:
    """As `socket.create_connection`, but only to public addresses. The checked address is the one that is used, so that
    a name server cannot answer twice."""
    host, port = address
    *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not ipaddress.ip_address(found[0]).is_global:
        raise ValueError("its address is private")
    return socket.create_connection(found[:2], timeout)


class _HTTPConnection(http.client.HTTPConnection):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._create_connection = _connect


class _HTTPSConnection(http.client.HTTPSConnection):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._create_connection = _connect


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_HTTPConnection, request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_HTTPSConnection, request)


def read_clip(content: bytes, limits: Limits, target_rate: int = 16_000) -> np.ndarray:
    """Decode an audio file.

    Args:
        content: bytes of the file.
        limits: limits of the clip.
        target_rate: rate of the result in Hz.

    Returns:
        `(samples,)` float32 in [-1, 1] at `target_rate`.

    Raises:
        TooLargeError: the clip is too long, or has too many channels.
        ValueError: it cannot be read, or has an unusual rate.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, channels, most = file.samplerate, file.channels, int(limits.seconds * file.samplerate)
            if not limits.rates[0] <= rate <= limits.rates[1]:
                raise ValueError(f"The clip has {rate} Hz; expected {limits.rates[0]} to {limits.rates[1]} Hz.")
            if channels > limits.channels:
                raise TooLargeError(f"The clip has {channels} channels; this server takes {limits.channels}.")
            if file.frames > most:
                raise TooLargeError(_too_long(file.frames / rate, limits))
            samples = file.read(most + 1, "float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise ValueError(f"The clip cannot be read as audio: {reason}.") from error
    if len(samples) > most:  # more than its header says
        raise TooLargeError(_too_long(len(samples) / rate, limits))
    return load_audio(samples, rate, target_rate)


def _too_long(seconds: float, limits: Limits) -> str:
    return f"The clip has {seconds:.0f} s; this server takes clips of up to {limits.seconds:g} s."
