"""What clients send is limited before it is decoded."""

import base64
import io
import time
import tracemalloc

import numpy as np
import pytest
import soundfile

from recipes.serving.clips import Limits, TooLargeError, from_base64, from_url, read_clip


def audio(seconds: float, rate: int = 16_000, channels: int = 1, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(file, noise, rate, format=format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate, channels", [(8_000, 1), (48_000, 2)])
def test_clips_of_all_formats(format, rate, channels):
    wave = read_clip(audio(1.5, rate, channels, format), Limits())
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert len(wave) == pytest.approx(1.5 * 16_000, abs=1_600)  # mp3 pads


def test_a_bomb_is_refused_without_decoding_it():
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, "PCM_16", format="FLAC") as out:
        for _ in range(120):
            out.write(np.zeros(60 * 8_000, np.int16))
    content, began = file.getvalue(), time.process_time()
    assert len(content) < 500_000
    with pytest.raises(TooLargeError, match="has 7200 s; this server takes clips of up to 600 s"):
        read_clip(content, Limits())
    assert time.process_time() - began < 1  # decoding it takes several times as long


def test_channels_are_mixed_while_they_are_decoded():
    content = audio(15, 48_000, 8, "FLAC")
    channels, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    tracemalloc.start()
    try:
        wave = read_clip(content, Limits(), 48_000)
        assert tracemalloc.get_traced_memory()[1] < channels.nbytes / 2
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(wave, channels.mean(1))


def test_a_header_may_claim_years():
    content = bytearray(audio(3, format="FLAC"))
    total = int.from_bytes(content[21:26], "big") | (2**36 - 1)  # the bits before belong to other fields
    content[21:26] = total.to_bytes(5, "big")
    with pytest.raises(TooLargeError, match="has 4294967 s"):
        read_clip(bytes(content), Limits())
    with pytest.raises(TooLargeError, match="has 3 s; this server takes clips of up to 2.5 s"):
        read_clip(audio(3), Limits(seconds=2.5))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as audio"),
        (b"hello", "cannot be read as audio"),
        (audio(1)[:30], "cannot be read as audio|no samples"),
        (audio(0), "empty"),
        (audio(1, 1_000), "has 1000 Hz; expected 4000 to 192000"),
        (audio(1, channels=9), "has 9 channels"),
    ],
    ids=["nothing", "text", "cut", "empty", "slow", "channels"],
)
def test_clips_that_cannot_be_used(content, message):
    with pytest.raises(ValueError, match=message):
        read_clip(content, Limits())


def test_base64_and_data_uris():
    assert from_base64(base64.b64encode(b"hello").decode()) == b"hello"
    assert from_url("data:audio/wav;base64,aGVsbG8=", Limits()) == b"hello"
    for wrong in ("é", "a", None, 3, "****"):
        with pytest.raises(ValueError, match="base64"):
            from_base64(wrong)
    for wrong in ("data:audio/wav,hello", "data:", 3, None):
        with pytest.raises(ValueError, match="form data:audio/wav;base64|must be a string"):
            from_url(wrong, Limits())


def test_urls_are_read_only_where_they_are_allowed():
    with pytest.raises(ValueError, match="reads no URLs: send the clip itself"):
        from_url("https://example.org/a.wav", Limits())
    for url in ("file:///etc/passwd", "ftp://example.org/a.wav", "/etc/passwd"):
        with pytest.raises(ValueError, match="must begin with http"):
            from_url(url, Limits(urls=True))
