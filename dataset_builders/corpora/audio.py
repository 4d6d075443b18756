"""Read the audio files of a corpus, check their duration and that they are whole, and encode waveforms."""

import io
import re

import numpy as np
import soundfile

from processing_lsm import load_audio

_UNKNOWN_LENGTH = 2**63 - 1  # frames that libsndfile reports for FLAC that was written to a pipe
_STREAMED = 0x7FFF0000  # a WAV that was written to a pipe states at least this many bytes in its header
# In libsndfile's log: the bytes of samples that WAV, AIFF and AU headers promise, and the bytes in the file.
_PROMISE = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
_LOST = 0.1  # seconds that may be missing from an audio file: too short for a word


def duration_of(audio: dict) -> float:
    """Return the duration in seconds of an audio file, given as `{"bytes", "path"}`, from its header.

    Raises:
        ValueError: the file cannot be read or has no samples, its header states no length, or the file is shorter.
    """
    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", error)
        raise ValueError(f"cannot read {audio.get('path') or 'the given bytes'} as audio: {reason}") from error
    if info.frames == 0:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no samples; expected a clip of speech.")
    if info.frames == _UNKNOWN_LENGTH:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no length in its header; convert the file again.")
    seconds = info.frames / info.samplerate
    if promise := _PROMISE.search(info.extra_info):
        promised, existing = map(int, promise.groups())
        if promised < _STREAMED:
            _check_whole(audio, seconds, seconds * promised / max(existing, 1))
    return seconds


def decode(audio: dict, rate: int = 16_000) -> np.ndarray:
    """Return the waveform `(samples,)` float32 at `rate` Hz of an audio file, given as `{"bytes", "path"}`.

    Raises:
        ValueError: as in `load_audio`, or the file is shorter than its header states.
    """
    waveform = load_audio(audio, target_rate=rate)
    _check_whole(audio, len(waveform) / rate, duration_of(audio))
    return waveform


def encode(samples: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    """Return a waveform `(samples,)` as an audio file, in a format and a subtype of libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def _check_whole(audio: dict, seconds: float, promised: float) -> None:
    if seconds < promised - _LOST:
        name = audio.get("path") or "the audio"
        raise ValueError(f"{name} is cut off: it has {seconds:.2f} of the {promised:.2f} s that its header states.")
