"""A prompt's answer is its own: whatever stands beside it in the batch, on whichever side it is padded, however long
its clips are and however many."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from configuration_lsm import num_audio_tokens, num_encoder_frames, num_mel_frames
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN

RATE = 16_000
seconds = st.one_of(st.floats(0.05, 5), st.floats(5, 70))
prompts = st.lists(st.lists(seconds, max_size=3), min_size=1, max_size=4)
deterministic = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],  # shrinking would run for minutes
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture(scope="module")
def lsm(plain_lsm_dir):
    """In float64: what float32 rounds differs by machine, up to 1.2e-5 in a logit on a CPU with AVX-512."""
    return LsmForConditionalGeneration.from_pretrained(plain_lsm_dir, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def float64_lsm(lsm_dir):
    """With speech as loud as text: of a few 1e-7 that float32 rounds there, an LLM of such large random weights makes
    1e-5."""
    return LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).eval()


def write_prompts(batch: list[list[float]], clip) -> tuple[list[str], list[list]]:
    """A prompt per list of clip lengths, of its own text and its own clips."""
    texts = [f"what is said {AUDIO_TOKEN * len(lengths)}" + " and asked" * row for row, lengths in enumerate(batch)]
    clips = [[clip(length, 10 * row + i) for i, length in enumerate(lengths)] for row, lengths in enumerate(batch)]
    return texts, clips


def read(processor, texts, clips, side="left"):
    clips = [audio for row in clips for audio in row]
    return processor(text=texts, audio=clips or None, return_tensors="pt", padding_side=side)


def logits_of(lsm, inputs) -> list[torch.Tensor]:
    """Logits of every prompt's real tokens."""
    return [row[real] for row, real in zip(lsm(**inputs).logits, inputs["attention_mask"] == 1, strict=True)]


def continuations(lsm, inputs) -> list[list[int]]:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return lsm.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
@given(batch=prompts, side=st.sampled_from(["left", "right"]))
@example(batch=[[0.05], [70.0], []], side="left")
@example(batch=[[0.05, 29.99, 30.01], [30.0]], side="right")
@settings(max_examples=20, **deterministic)
def test_logits_and_text_do_not_depend_on_the_batch(lsm, processor, clip, batch, side):
    texts, clips = write_prompts(batch, clip)
    together = logits_of(lsm, read(processor, texts, clips, side))
    written = continuations(lsm, read(processor, texts, clips))
    for row, text in enumerate(texts):
        alone = read(processor, [text], [clips[row]])
        torch.testing.assert_close(together[row], logits_of(lsm, alone)[0], atol=1e-9, rtol=0)
        assert [written[row]] == continuations(lsm, alone)


@torch.no_grad()
@given(batch=prompts, side=st.sampled_from(["left", "right"]))
@example(batch=[[0.05, 29.99, 30.01], [30.0]], side="right")
@settings(max_examples=10, **deterministic)
def test_nor_does_speech_that_is_as_loud_as_text(float64_lsm, processor, clip, batch, side):
    texts, clips = write_prompts(batch, clip)
    together = logits_of(float64_lsm, read(processor, texts, clips, side))
    for row, text in enumerate(texts):
        alone = logits_of(float64_lsm, read(processor, [text], [clips[row]]))[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_nor_do_its_embeddings(processor, lsm_dir, clip, dtype, error):
    """Before they are put into words: which words come first is decided, and bfloat16 may decide otherwise. In float64,
    rounding cannot be taken for a neighbour's effect."""
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=dtype).eval().model

    def heard(clips):
        return model.projector(*model.encode_audio(**processor(audio=clips, return_tensors="pt"))).double()

    @given(lengths=st.lists(seconds, min_size=2, max_size=6))
    @settings(max_examples=10, **deterministic)
    def compare(lengths):
        clips = [clip(length, seed) for seed, length in enumerate(lengths)]
        together, alone = heard(clips), torch.cat([heard([audio]) for audio in clips])
        worst = ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max()
        assert worst <= error

    compare()


@torch.no_grad()
@given(batch=prompts, side=st.sampled_from(["left", "right"]))
@settings(max_examples=10, **deterministic)
def test_in_bfloat16_they_hardly_do(bfloat16_lsm, processor, clip, batch, side):
    texts, clips = write_prompts(batch, clip)
    together = logits_of(bfloat16_lsm, read(processor, texts, clips, side))
    for row, text in enumerate(texts):
        [logits] = logits_of(bfloat16_lsm, read(processor, [text], [clips[row]]))
        error = (together[row] - logits).float().norm() / logits.float().norm()
        assert error <= 2e-2


@pytest.fixture(scope="module")
def bfloat16_lsm(plain_lsm_dir):
    return LsmForConditionalGeneration.from_pretrained(plain_lsm_dir, dtype=torch.bfloat16).eval()


def counted(processor, config, samples: list[int]) -> None:
    """The processor's count, the model's, and the windows that the projector really makes are one number."""
    frames = [num_encoder_frames(num_mel_frames(length)) for length in samples]
    expected = num_audio_tokens(frames, **config.windowing)
    assert processor.num_audio_tokens(samples) == expected
    assert min(expected) >= 1


def test_processor_and_model_count_alike_over_every_length(lsm, processor):
    """Every length of up to 30 s in mel frames, each by its first and its last sample."""
    for frames in range(1, 3001):
        counted(processor, lsm.config, [160 * frames - 159])
        counted(processor, lsm.config, [160 * frames])


@pytest.mark.parametrize("mode", ["fixed", "proportional"])
def test_the_projector_makes_as_many_embeddings_as_are_counted(lsm, lsm_dir, mode):
    config = type(lsm.config).from_pretrained(lsm_dir, window_mode=mode)
    projector = type(lsm.model.projector)(config)
    for frames in range(1, 1501):
        windows, _ = projector.cut_windows(torch.zeros(1, frames, 1), [frames])
        assert [len(windows)] == num_audio_tokens(
            [frames], window_frames=config.window_frames, window_mode=mode, queries_per_window=1
        )
        assert len(windows) >= 1
