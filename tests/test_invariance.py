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
clip_lengths = st.lists(seconds, min_size=2, max_size=6)
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


def rounded_and_exact(folder) -> tuple[LsmForConditionalGeneration, LsmForConditionalGeneration]:
    """Two models with the weights of bfloat16, of which the second computes in float64."""
    half, exact = (LsmForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval() for _ in range(2))
    return half, exact.double()


def heard(lsm, processor, clips) -> torch.Tensor:
    """Speech embeddings, as the projector gives them to the reader."""
    model = lsm.model
    return model.projector(*model.encode_audio(**processor(audio=clips, return_tensors="pt"))).double()


def worst_error(found, wanted) -> float:
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


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
@given(lengths=clip_lengths)
@settings(max_examples=10, **deterministic)
def test_nor_do_its_embeddings(float64_lsm, processor, clip, lengths):
    """Before they are put into words: which words come first is decided. In float64, rounding cannot be taken for a
    neighbour's effect."""
    clips = [clip(length, seed) for seed, length in enumerate(lengths)]
    alone = torch.cat([heard(float64_lsm, processor, [audio]) for audio in clips])
    assert worst_error(heard(float64_lsm, processor, clips), alone) <= 1e-12


@torch.no_grad()
@given(lengths=clip_lengths)
@settings(max_examples=10, **deterministic)
def test_in_bfloat16_its_embeddings_do_no_more_than_rounding(lsm_dir, processor, clip, lengths):
    """How much bfloat16 rounds depends on the CPU, on the shapes and on the weights, so it is measured here. Alone and
    in a batch, embeddings are as near to the exact ones, and therefore at most twice as far from each other."""
    half, exact = rounded_and_exact(lsm_dir)
    clips = [clip(length, seed) for seed, length in enumerate(lengths)]
    together = heard(half, processor, clips)
    alone, wanted = (torch.cat([heard(lsm, processor, [audio]) for audio in clips]) for lsm in (half, exact))
    assert worst_error(together, alone) <= 2 * worst_error(alone, wanted)


@torch.no_grad()
@given(batch=prompts, side=st.sampled_from(["left", "right"]))
@settings(max_examples=10, **deterministic)
def test_in_bfloat16_logits_depend_on_the_batch_no_more_than_rounding(plain_lsm_dir, processor, clip, batch, side):
    half, exact = rounded_and_exact(plain_lsm_dir)
    texts, clips = write_prompts(batch, clip)
    together = torch.cat(logits_of(half, read(processor, texts, clips, side))).double()
    alone, wanted = (
        torch.cat([logits_of(lsm, read(processor, [text], [clips[row]]))[0] for row, text in enumerate(texts)])
        for lsm in (half, exact)
    )
    assert (together - alone).norm() <= 2 * (alone - wanted).norm()


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
