"""Clips that clients send, within limits: nothing is decoded before its size, rate, channels and length are known."""

import base64
import binascii
import io
import urllib.parse
from dataclasses import dataclass

import numpy as np
import soundfile

from processing_lsm import load_audio

PORTS = {"http": 80, "https": 443}
BLOCK = 16_384  # samples of a channel that are decoded at once


class TooLargeError(ValueError):
    """A request or a clip is larger than the server takes."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body: int = 32 * 2**20  # bytes of a request
    seconds: float = 600.0  # length of a clip
    clips: int = 8  # of a prompt
    tokens: int = 1024  # of an answer
    channels: int = 8  # of a clip
    rates: tuple[int, int] = (4_000, 192_000)  # lowest and highest sampling rate of a clip in Hz
    upload_seconds: float = 30.0  # time in which a request must arrive, and then the files behind its URLs
    answer_seconds: float = 120.0  # time in which a request must be answered
    urls: bool = False  # whether clips may be http(s) URLs; private addresses are never read


def from_base64(data: object) -> bytes:
    """Decode base64. Raises ValueError if it is not."""
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"The clip is not base64: {error}") from error


def from_url(url: object, limits: Limits) -> bytes | str:
    """Return the file in a data URI or, if the limits allow URLs, an http(s) URL itself, which is read later.

    Raises:
        ValueError: the URL is not allowed.
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
    return url


def read_clip(content: bytes, limits: Limits, target_rate: int = 16_000) -> np.ndarray:
    """Decode an audio file to `(samples,)` float32 in [-1, 1] at `target_rate` Hz.

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
                raise TooLargeError(
                    f"The clip has {file.frames / rate:.0f} s; this server takes clips of up to {limits.seconds:g} s."
                )
            samples, read = np.empty(file.frames, np.float32), 0
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):  # channels are many times the memory
                samples[read : read + len(block)] = block.mean(axis=1)
                read += len(block)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise ValueError(f"The clip cannot be read as audio: {reason}.") from error
    return load_audio(samples[:read], rate, target_rate)
