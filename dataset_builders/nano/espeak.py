"""Synthesise speech with espeak-ng, calling the library in the PyPI package `espeakng-loader` through ctypes.

No system package is needed. The library has global state, so several processes may call `speak`, but not several
threads.
"""

import _ctypes
import ctypes
from pathlib import Path

import numpy as np

from language_models.extras import extra

SAMPLING_RATE = 16_000  # Hz, of the result of `speak`
# From espeak-ng's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_CHARS_UTF8, _POS_CHARACTER = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Library:
    """The library, loaded for one utterance, and the samples of this utterance.

    A second utterance would depend on the first, because the library never resets its pitch flutter. Its breathing
    noise is random, with a seed from the clock or, in some voices, from libc. Loading takes 2 ms.
    """

    def __init__(self):
        with extra("nano"):
            import espeakng_loader
        path, self.data = espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(
                f"the espeak-ng library at {path} cannot be loaded ({error}): pip install --force-reinstall "
                "espeakng-loader, on a platform for which it has a wheel."
            ) from error
        self.rate = self.lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self.data).encode(), _DONT_EXIT)
        if self.rate <= 0:
            self._unload()
            raise ImportError(f"espeak-ng found no data at {self.data}: pip install --force-reinstall espeakng-loader.")
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(0))
        if hasattr(self.lib, "srand"):  # libc's, if ctypes can find it through the library
            self.lib.srand(0)
        self.chunks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)  # an attribute, because ctypes does not hold a reference
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events) -> int:
        if samples and count:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def set_voice(self, voice: str) -> None:
        variant = voice.partition("+")[2]  # espeak-ng silently ignores an unknown variant
        exists = not variant or (self.data / "voices" / "!v" / variant).is_file()
        if not exists or self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}; expected a language such as 'en-us', or 'en-us+f2'.")

    def close(self) -> None:
        self.lib.espeak_Terminate()
        self._unload()

    def _unload(self) -> None:
        free = _ctypes.dlclose if hasattr(_ctypes, "dlclose") else _ctypes.FreeLibrary
        free(self.lib._handle)


def speak(text: str, voice: str = "en-us", words_per_minute: int = 170, pitch: int = 50) -> np.ndarray:
    """Synthesise `text`. The same arguments always give the same samples.

    Args:
        text: the text; not empty.
        voice: language of espeak-ng, or `language+variant` (`en-us+f2`).
        words_per_minute: 80 to 450.
        pitch: 0 to 99; 50 is the voice's own.

    Returns:
        The samples, float32 `(samples,)` in [-1, 1], mono, 16 kHz.

    Raises:
        ImportError: the library or its data is missing. Says what to install.
        ValueError: the voice is unknown, a setting is out of range, or the speech is empty.
    """
    if not 80 <= words_per_minute <= 450 or not 0 <= pitch <= 99:
        raise ValueError(f"{words_per_minute=} must be 80 to 450 and {pitch=} 0 to 99.")
    import soxr

    library = _Library()
    try:
        library.set_voice(voice)
        library.lib.espeak_SetParameter(_RATE, words_per_minute, 0)
        library.lib.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        library.lib.espeak_Synth(data, len(data), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        library.lib.espeak_Synchronize()
    finally:
        library.close()
    samples = np.concatenate(library.chunks or [np.zeros(0, np.int16)]).astype(np.float32) / 32768
    if not samples.any():
        raise ValueError(f"espeak-ng said nothing for {text!r}; expected text with words.")
    return np.clip(soxr.resample(samples, library.rate, SAMPLING_RATE), -1, 1)  # resampling may exceed the range
