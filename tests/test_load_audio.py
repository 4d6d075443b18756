"""Whatever a clip comes as, it is read as the same waveform, or refused with what is wrong."""

import base64
import functools
import io
import threading
import traceback
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from processing_lsm import load_audio


def wav_bytes(waveform, rate, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def read_before(content):
    """A file whose position is at its end."""
    file = io.BytesIO(content)
    file.read()
    return file


class Decoder:
    """What `datasets` gives where torchcodec is installed, as far as it is used."""

    def __init__(self, data, sample_rate):
        self.data, self.sample_rate = data, sample_rate

    def get_all_samples(self):
        return self


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
def test_any_rate_is_resampled(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    audio = load_audio(tone, rate)
    assert audio.dtype == np.float32
    assert audio.shape == (16_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=2e-3)


def test_the_same_clip_however_it_comes(clip, tmp_path):
    integers = (clip(0.5) * 32_767).astype(np.int16)
    expected = integers.astype(np.float32) / 32_768
    path = tmp_path / "clip.wav"
    path.write_bytes(wav_bytes(integers, 16_000))
    sources = {
        "int16": integers,
        "int32": integers.astype(np.int32) << 16,
        "int16 widened to int32": integers.astype(np.int32),
        "int16 widened to int64": torch.from_numpy(integers).long(),
        "list of integers": integers.tolist(),
        "float64": expected.astype(np.float64),
        "list": expected.tolist(),
        "tensor": torch.from_numpy(expected).requires_grad_(),
        "stereo (samples, channels)": np.stack([expected, expected], axis=1),
        "stereo (channels, samples)": np.stack([expected, expected]),
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "file in memory": io.BytesIO(path.read_bytes()),
        "file read before": read_before(path.read_bytes()),
        "data URI": f"data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}",
        "datasets array": {"array": expected, "sampling_rate": 16_000},
        "datasets bytes": {"bytes": path.read_bytes(), "path": None},
        "datasets path": {"bytes": None, "path": str(path)},
        "datasets decoder": Decoder(torch.from_numpy(np.stack([expected, expected])), 16_000),
    }
    for name, source in sources.items():
        np.testing.assert_allclose(load_audio(source), expected, atol=1e-6, err_msg=name)
    with open(path, "rb") as file:
        np.testing.assert_allclose(load_audio(file), expected, atol=1e-6)
    halved = torch.from_numpy(expected).bfloat16()
    np.testing.assert_array_equal(load_audio(halved), halved.float().numpy())


def test_a_decoder_carries_its_rate(clip):
    assert load_audio(Decoder(torch.from_numpy(clip(0.5))[None], 8_000)).shape == (16_000,)


@pytest.mark.parametrize("peak", [1e-4, 1, 1.5, 10])
def test_floats_may_be_quiet_or_above_full_scale(peak):
    """Resampling overshoots, float files may be hot, and a clip may be all but silent."""
    tone = peak * np.sin(np.arange(1600), dtype=np.float32)
    np.testing.assert_array_equal(load_audio(tone), tone)
    np.testing.assert_array_equal(load_audio(wav_bytes(tone, 16_000, "FLOAT")), tone)


TONE = 20_000 * np.sin(np.arange(1600))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TONE.astype(np.float32), r"up to 1\d{4}.*expected in \[-1, 1\].*32768"),
        (TONE.tolist(), r"expected in \[-1, 1\]"),
        (torch.from_numpy(TONE / 256), r"up to 78.*expected in \[-1, 1\]"),  # 8-bit scale
        (wav_bytes(TONE, 16_000, "FLOAT"), r"expected in \[-1, 1\]"),
        ((TONE * 2**40).astype(np.int64), "not PCM; expected uint8, int16 or int32"),
        ((TONE + 30_000).astype(np.uint32), "as uint32 are not PCM"),
    ],
)
def test_samples_of_another_scale_are_refused(source, message):
    """They would give fluent answers to what nobody said."""
    with pytest.raises(ValueError, match=message):
        load_audio(source)


def test_stereo_is_averaged_and_files_carry_their_rate():
    stereo = np.stack([np.full(800, 0.5), np.zeros(800)], axis=1)
    audio = load_audio(wav_bytes(stereo, 8_000))
    assert audio.shape == (1_600,)
    assert abs(audio[800] - 0.25) < 1e-3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0), "empty"),
        ([], "empty"),
        (np.array([0.1, np.nan]), "NaN"),
        (np.array([0.1, np.inf]), "NaN or infinite"),
        (b"not audio at all", "Cannot read"),
        (b"", "Cannot read"),
        ("no/such/file.wav", "no/such/file.wav as audio: the file does not exist"),
        (Path("no/such/file.wav"), "does not exist"),
        (str(Path(__file__).parent), "Is a directory"),
        (io.StringIO("text"), "text mode"),
        (io.BytesIO(b"not audio"), "Cannot read the given BytesIO as audio: Format not recognised"),
        ("data:audio/wav;base64,AAAA", "Cannot read the data URI"),
        ({"samples": [0.1], "rate": 16_000}, r"got a dict of \['samples', 'rate'\]"),
        (wav_bytes(np.zeros(100), 16_000)[:20], "Cannot read"),
        (wav_bytes(np.zeros(0), 16_000), "empty"),
        (np.zeros((2, 3, 4)), "axes"),
        ([[0.1], [0.2, 0.3]], "regular"),
        (np.array(["a"]), "numbers"),
        (None, "numbers"),
    ],
)
def test_unusable_audio_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_audio(source)


@pytest.mark.parametrize("prefix", ["", "data:audio/wav;base64,", "http://127.0.0.1:1/", "http://a b/"])
def test_an_error_never_repeats_the_content(prefix):
    content = "QUJD" * 100_000
    for source in (prefix + content, content.encode(), io.BytesIO(content.encode()), [content], {"bytes": [content]}):
        with pytest.raises(ValueError, match=".") as caught:
            load_audio(source)
        assert len("".join(traceback.format_exception(caught.value))) < 5_000


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="sampling rate"):
        load_audio(np.zeros(10), 0)


def test_a_url_is_fetched_and_a_dead_one_named(clip, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "clip.wav").write_bytes(wav_bytes(clip(0.5), 8_000, "FLOAT"))
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(load_audio(f"{url}/clip.wav"), load_audio(tmp_path / "clip.wav"))
        with pytest.raises(ValueError, match="missing.wav"):
            load_audio(f"{url}/missing.wav")
        server.shutdown()


RAW = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.int16, np.int32, np.uint8, np.int8, np.bool_]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=400),
)


@given(
    source=st.one_of(RAW, st.binary(max_size=200), st.text(max_size=20), st.none(), st.lists(st.floats(), max_size=5)),
    rate=st.sampled_from([None, 8_000, 16_000, 44_100]),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_whatever_comes_is_audio_or_a_value_error(source, rate):
    try:
        audio = load_audio(source, rate)
    except ValueError as error:
        assert str(error)
        return
    assert audio.dtype == np.float32 and audio.ndim == 1 and audio.size > 0
    assert np.isfinite(audio).all()
