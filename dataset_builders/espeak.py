"""Speech from text with espeak-ng, through ctypes on the library that the PyPI package `espeakng-loader` carries.

No system package is needed. The library keeps one global state per process: `speak` may be called from many
processes, not from many threads.
"""

import ctypes
import functools

import numpy as np

SAMPLING_RATE = 16_000  # Hz, of everything `speak` returns
# From espeak-ng's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_CHARS_UTF8, _POS_CHARACTER = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Library:
    """The loaded library and the samples of the utterance being spoken."""

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "espeakng-loader is needed to synthesise speech and is not installed: pip install 'lsm[nano]'."
            ) from error
        path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(
                f"the espeak-ng library at {path} cannot be loaded ({error}): pip install --force-reinstall "
                "espeakng-loader, on a platform for which it has a wheel."
            ) from error
        self.rate = self.lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _DONT_EXIT)
        if self.rate <= 0:
            raise ImportError(f"espeak-ng found no data at {data}: pip install --force-reinstall espeakng-loader.")
        self.chunks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)  # kept: ctypes does not hold a reference
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events) -> int:
        if samples and count:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


@functools.cache
def _library() -> _Library:
    return _Library()


def speak(text: str, voice: str = "en-us", words_per_minute: int = 170, pitch: int = 50) -> np.ndarray:
    """Say `text`.

    Args:
        text: what to say; not empty.
        voice: espeak-ng language, or `language+variant` (`en-us+f2`).
        words_per_minute: 80 to 450.
        pitch: 0 to 99; 50 is the voice's own.

    Returns:
        float32 `(samples,)` in [-1, 1], mono, 16 kHz.

    Raises:
        ImportError: the library or its data is missing; says what to install.
        ValueError: unknown voice, setting out of range, or nothing was said.
    """
    if not 80 <= words_per_minute <= 450 or not 0 <= pitch <= 99:
        raise ValueError(f"{words_per_minute=} must be 80 to 450 and {pitch=} 0 to 99.")
    import soxr

    library = _library()
    if library.lib.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}; expected a language such as 'en-us', or 'en-us+f2'.")
    library.lib.espeak_SetParameter(_RATE, words_per_minute, 0)
    library.lib.espeak_SetParameter(_PITCH, pitch, 0)
    library.chunks.clear()
    data = text.encode() + b"\0"
    library.lib.espeak_Synth(data, len(data), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
    library.lib.espeak_Synchronize()
    if not library.chunks:
        raise ValueError(f"espeak-ng said nothing for {text!r}; expected text with words.")
    samples = np.concatenate(library.chunks).astype(np.float32) / 32768
    return np.clip(soxr.resample(samples, library.rate, SAMPLING_RATE), -1, 1)  # resampling overshoots
