"""Audio files, as a corpus has them: how long they are, and whether they are whole."""

import io
import re

import numpy as np

from processing_lsm import load_audio

_UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile says of FLAC that was written to a pipe
_STREAMED = 0x7FFF0000  # bytes and more that the header of a WAV promises if it was written to a pipe
# In libsndfile's log: bytes of samples that WAV, AIFF and AU headers promise, and those that there are.
_PROMISE = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
_LOST = 0.1  # seconds of an audio file that may be missing: no word of it


def duration_of(audio: dict) -> float:
    """Seconds of an audio file given as `{"bytes", "path"}`, from its header.

    Raises:
        ValueError: the file cannot be read, holds no samples, does not say how many, or is shorter than it says.
    """
    import soundfile

    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", error)
        raise ValueError(f"cannot read {audio.get('path') or 'the given bytes'} as audio: {reason}") from error
    if info.frames == 0:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no samples; expected speech.")
    if info.frames == _UNKNOWN_LENGTH:
        raise ValueError(f"{audio.get('path') or 'the audio'} does not say how long it is; write it to a file anew.")
    seconds = info.frames / info.samplerate
    if promise := _PROMISE.search(info.extra_info):
        said, there = map(int, promise.groups())
        if said < _STREAMED:
            _check_whole(audio, seconds, seconds * said / max(there, 1))
    return seconds


def decode(audio: dict, rate: int = 16_000) -> np.ndarray:
    """The waveform `(samples,)` float32 at `rate` Hz of an audio file given as `{"bytes", "path"}`.

    Raises:
        ValueError: as in `load_audio`, or the file ends before its header says.
    """
    waveform = load_audio(audio, target_rate=rate)
    _check_whole(audio, len(waveform) / rate, duration_of(audio))
    return waveform


def _check_whole(audio: dict, seconds: float, promised: float) -> None:
    if seconds < promised - _LOST:
        name = audio.get("path") or "the audio"
        raise ValueError(f"{name} is cut off: it has {seconds:.2f} of the {promised:.2f} s that its header promises.")
