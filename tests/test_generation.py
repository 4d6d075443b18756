"""Ways to generate: whatever the cache, the search or the front end, the words are those of plain greedy decoding."""

import shutil
import threading

import pytest
import torch
import transformers
from packaging import version
from transformers import CompileConfig, DynamicCache, StaticCache, TextIteratorStreamer, pipeline
from transformers.utils import is_librosa_available

from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def ask(processor, clips, questions=("what is said?", "and what is asked now?"), **kwargs):
    """One prompt per question and clip, as the chat template renders them."""
    conversations = [processor.conversation(text, audio=audio) for text, audio in zip(questions, clips, strict=True)]
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def new_tokens(inputs, output):
    return output[:, inputs["input_ids"].shape[1] :]


# Hear once, ask many times


@pytest.mark.parametrize("seconds", [1.3, 65])
def test_a_clip_heard_before_is_the_clip(lsm_dir, processor, clip, seconds, monkeypatch):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).eval()
    questions = ["what is said?", "and what is asked now?", "the speech"]
    inputs = ask(processor, [clip(seconds)] * 3, questions)
    expected = new_tokens(inputs, lsm.generate(**inputs, **GREEDY))
    logits = lsm(**inputs).logits
    heard = lsm.get_audio_features(**processor(audio=clip(seconds), return_tensors="pt"))
    monkeypatch.setattr(lsm.model.audio_tower, "forward", lambda *_, **__: pytest.fail("encoded again"))
    monkeypatch.setattr(lsm.model.projector, "forward", lambda *_, **__: pytest.fail("projected again"))
    again = ask(processor, [heard] * 3, questions)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert "input_features" not in again
    torch.testing.assert_close(lsm(**again).logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(new_tokens(again, lsm.generate(**again, **GREEDY)), expected)
    sampled = lsm.generate(**again, max_new_tokens=6, min_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(new_tokens(again, sampled), expected.repeat_interleave(2, dim=0))


def test_clips_heard_and_unheard_do_not_mix(lsm, processor, clip):
    heard = lsm.get_audio_features(**processor(audio=clip(1), return_tensors="pt"))
    with pytest.raises(ValueError, match="1 of 2 clips are already encoded"):
        processor(text=AUDIO_TOKEN * 2, audio=[heard, clip(1)])
    with pytest.raises(ValueError, match="0 .* placeholders for 1 clips"):
        processor(text="none", audio=heard)
    with pytest.raises(ValueError, match="Neither `text` nor `audio` is given"):
        processor(audio=heard)
    with pytest.raises(ValueError, match="exactly one"):
        inputs = processor(text=AUDIO_TOKEN, audio=clip(1), return_tensors="pt")
        lsm(**inputs, audio_embeds=heard.pooler_output)


# Long and many


@torch.no_grad()
def test_half_an_hour_in_one_prompt(lsm_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir).eval()
    lsm.config.text_config.max_position_embeddings = 8192
    lecture = clip(30 * 60)
    inputs = ask(processor, [lecture], ["what is said?"])
    assert inputs["input_features"].shape == (60, 80, 3000)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 60 * 89
    lsm(**inputs, logits_to_keep=1)
    # What is heard last is what is heard of it alone: chunks do not disturb each other.
    heard = lsm.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    alone = lsm.get_audio_features(**processor(audio=lecture[-30 * 16_000 :], return_tensors="pt")).pooler_output
    torch.testing.assert_close(heard[-89:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_more_speech_than_positions_is_refused_before_it_is_heard(lsm, processor, clip, settings, monkeypatch):
    monkeypatch.setattr(lsm.model.audio_tower, "forward", lambda *_, **__: pytest.fail("encoded"))
    inputs = ask(processor, [clip(800)], ["what is said?"])
    tokens, speech = inputs["input_ids"].shape[1], int((inputs["input_ids"] == processor.audio_token_id).sum())
    fits = (2048 - tokens + speech) * 30 // 89
    message = f"takes {tokens} tokens, {speech} of them speech, but the LLM has 2048 positions; {fits} s of speech fit"
    with pytest.raises(ValueError, match=message):
        lsm.generate(**inputs, **GREEDY, **settings)
    with pytest.raises(ValueError, match=message):
        lsm(**inputs)
    inputs = ask(processor, [clip(fits)], ["what is said?"])
    assert 2040 < inputs["input_ids"].shape[1] <= 2048


@torch.no_grad()
def test_padding_has_no_position_and_an_answer_ends_at_the_last(lsm, processor):
    inputs = ask(processor, [None], ["what is said?"])
    padding = torch.zeros(1, 2048, dtype=torch.long)
    padded = {name: torch.cat([padding, value], dim=1) for name, value in inputs.items()}
    torch.testing.assert_close(lsm(**padded).logits[:, -1], lsm(**inputs).logits[:, -1], atol=1e-4, rtol=0)
    full = {name: value.repeat(1, 2040)[:, :2040] for name, value in inputs.items()}
    assert lsm.generate(**full, max_new_tokens=60, min_new_tokens=60).shape == (1, 2048)
    embeds = lsm.get_input_embeddings()(full["input_ids"])
    assert lsm.generate(inputs_embeds=embeds, max_new_tokens=60, min_new_tokens=60).shape == (1, 8)
    with pytest.raises(ValueError, match="takes 2049 tokens, 0 of them speech"):
        lsm(inputs_embeds=torch.zeros(1, 2049, 48))


@torch.no_grad()
def test_a_conversation_of_several_turns_and_clips(lsm, processor, clip):
    turns = [
        *processor.conversation("what is said?", audio=clip(1, 1), response="the speech"),
        {"role": "user", "content": "and what is asked"},
        {"role": "assistant", "content": "what is said"},
        *processor.conversation("what is said now?", audio=clip(2, 2)),
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(turns, **settings)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 3 + 6
    swapped = [dict(turn) for turn in turns]
    swapped[0], swapped[4] = (
        *processor.conversation("what is said?", audio=clip(1, 2)),
        *processor.conversation("what is said now?", audio=clip(2, 1)),
    )
    other = lsm(**processor.apply_chat_template(swapped, **settings)).logits
    assert (lsm(**inputs).logits[0, -1] - other[0, -1]).abs().max() > 1e-3


# Search, cache, front end


def with_embeds(lsm, inputs):
    """The prompt as embeddings, those of the speech among them."""
    ids, embeds = inputs["input_ids"], lsm.get_input_embeddings()(inputs["input_ids"])
    if "input_features" in inputs:
        speech = lsm.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
        embeds = embeds.masked_scatter((ids == lsm.config.audio_token_id)[..., None], speech)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
}


@torch.no_grad()
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("way", ["greedy", "beams", "samples", "static cache", "no cache"])  # the others read ids
def test_embeddings_are_a_prompt_as_ids_are(lsm, processor, clip, heard, way):
    inputs = ask(processor, [clip(0.6, 1), clip(33, 2)] if heard else [None] * 2)
    expected = new_tokens(inputs, lsm.generate(**inputs, **GREEDY | WAYS[way]))
    embeds = with_embeds(lsm, inputs)
    assert torch.equal(lsm.generate(**embeds, **GREEDY | WAYS[way]), expected)
    both = lsm.generate(input_ids=inputs["input_ids"], **embeds, **GREEDY | WAYS[way])
    assert torch.equal(new_tokens(inputs, both), expected)
    with pytest.raises(ValueError, match="Audio needs `input_ids`"):
        lsm.generate(**embeds, input_features=torch.zeros(1, 80, 100), **GREEDY)


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("draft", ["prompt", "model"])
def test_a_draft_changes_no_word(lsm, lsm_dir, processor, clip, heard, draft):
    """A draft by a model hears the clip, too."""
    inputs = ask(processor, [clip(1.3) if heard else None], ["what is said?"])
    expected = lsm.generate(**inputs, **GREEDY)
    settings = {"prompt_lookup_num_tokens": 3}
    if draft == "model":
        settings = {"assistant_model": LsmForConditionalGeneration.from_pretrained(lsm_dir).eval()}
    assert torch.equal(lsm.generate(**inputs, **GREEDY, **settings), expected)


def words_and_blanks(lsm, processor, said, blanks):
    """Return the inputs of prompts in which these words are heard and then blanks, and those in which they are read."""

    def ids(text):
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    def padded(rows):
        return dict(processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))

    before, after, words = ids("Repeat: "), ids(" Do."), [ids(text) for text in said]
    heard = [[*before, *[processor.audio_token_id] * (len(row) + blanks), *after] for row in words]
    silence = torch.zeros(blanks, lsm.config.text_config.hidden_size)
    speech = [torch.cat([lsm.get_input_embeddings()(torch.tensor(row)), silence]) for row in words]
    return {**padded(heard), "audio_embeds": torch.cat(speech)}, padded([[*before, *row, *after] for row in words])


@torch.no_grad()
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"penalties"}))  # those are of the ids, which are placeholders
def test_words_that_are_heard_are_what_is_read_however_many_blanks_there_are(lsm, processor, way):
    heard, read = words_and_blanks(lsm, processor, ["the speech says", "what"], blanks=5)
    settings = GREEDY | WAYS[way]
    torch.manual_seed(0)
    expected = new_tokens(read, lsm.generate(**read, **settings))
    torch.manual_seed(0)
    assert torch.equal(new_tokens(heard, lsm.generate(**heard, **settings)), expected)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_logits_after_blanks_are_those_of_the_text(lsm, processor, padding_side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", padding_side)
    heard, read = words_and_blanks(lsm, processor, ["the speech says", "what"], blanks=5)
    logits, expected = lsm(**heard).logits, lsm(**read).logits
    for row in range(2):
        after_hearing, after_reading = (
            inputs["attention_mask"][row].nonzero()[-4:, 0] for inputs in (heard, read)
        )  # " Do." comes after the speech
        torch.testing.assert_close(logits[row, after_hearing], expected[row, after_reading], rtol=1e-4, atol=1e-4)
    alone = {name: value[:1] for name, value in heard.items() if name == "input_ids"}
    if padding_side == "left":
        spoken = int((heard["input_ids"][0] == processor.audio_token_id).sum())
        without_mask = lsm(**alone, audio_embeds=heard["audio_embeds"][:spoken]).logits
        torch.testing.assert_close(without_mask[0, -4:], logits[0, -4:], rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_reset_remembers_no_blanks(lsm, processor):
    heard, read = words_and_blanks(lsm, processor, ["the speech says"], blanks=5)
    cache = StaticCache(config=lsm.config.get_text_config(), max_cache_len=64)
    settings = GREEDY | {"disable_compile": True}
    lsm.generate(**heard, **settings, past_key_values=cache)
    cache.reset()
    assert torch.equal(lsm.generate(**read, **settings, past_key_values=cache), lsm.generate(**read, **settings))


@pytest.mark.parametrize("audio_again", [True, False])
@pytest.mark.parametrize("blanks", [True, False])
def test_a_cache_is_gone_on_from(lsm, processor, clip, blanks, audio_again):
    inputs, cache = ask(processor, [clip(1.3)], ["what is said?"]), DynamicCache()
    if blanks:
        inputs, _ = words_and_blanks(lsm, processor, ["the speech says"], blanks=5)
    ids = lsm.generate(**inputs, **GREEDY, past_key_values=cache)
    ids = torch.cat([ids, inputs["input_ids"][:, -3:]], dim=1)
    more = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = lsm.generate(**more, **GREEDY)
    if not audio_again:
        more = {name: more[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(lsm.generate(**more, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_every_way_are_of_its_tokens(lsm, processor, clip, way):
    inputs = ask(processor, [clip(0.6, 1), clip(3.3, 2)])
    found = lsm.generate(**inputs, **GREEDY | WAYS[way], return_dict_in_generate=True, output_scores=True)
    beams = found.get("beam_indices")
    scores = lsm.compute_transition_scores(found.sequences, found.scores, beams, normalize_logits=True)
    assert scores.shape[0] == found.sequences.shape[0]
    assert torch.isfinite(scores).all()


def test_beams_of_a_batch_are_those_of_each(lsm, processor, clip):
    clips, questions = [clip(0.6, 1), clip(33, 2)], ["what is said?", "and what is asked now?"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    inputs = ask(processor, clips, questions)
    together = new_tokens(inputs, lsm.generate(**inputs, **settings))
    for row in range(2):
        alone = ask(processor, clips[row : row + 1], questions[row : row + 1])
        assert torch.equal(new_tokens(alone, lsm.generate(**alone, **settings))[0], together[row])


def test_sampling_is_repeatable_and_varies(lsm, processor, clip):
    inputs = ask(processor, [clip(1)], ["what is said?"])

    def draw(seed):
        torch.manual_seed(seed)
        return lsm.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=3)

    with torch.random.fork_rng():
        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++ on a CPU")


@pytest.mark.parametrize("compiler", [None, "eager", pytest.param("inductor", marks=needs_compiler)])
def test_static_cache_and_compiled_decode_are_the_dynamic(lsm, processor, clip, compiler):
    inputs = ask(processor, [clip(0.6, 1), clip(3.3, 2)])
    expected = lsm.generate(**inputs, **GREEDY)
    settings = {"disable_compile": True}
    if compiler is not None:
        settings = {"compile_config": CompileConfig(backend=compiler, fullgraph=True, mode=None)}
        settings["compile_config"]._compile_all_devices = True  # transformers would not compile on a CPU
        torch.compiler.reset()
    assert torch.equal(lsm.generate(**inputs, **GREEDY, cache_implementation="static", **settings), expected)


def test_the_answer_streams(lsm, processor, clip):
    inputs = ask(processor, [clip(1)], ["what is said?"])
    expected = processor.decode(new_tokens(inputs, lsm.generate(**inputs, **GREEDY))[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=lsm.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23") and not is_librosa_available(),
    reason="older transformers want librosa for this pipeline, whether or not it is used",
)
def test_the_any_to_any_pipeline_answers(lsm, processor, clip, tmp_path):
    import soundfile

    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(1), 16_000, subtype="FLOAT")
    answers = pipeline("any-to-any", model=lsm, processor=processor)
    inputs = ask(processor, [str(path)], ["what is said?"])
    expected = processor.decode(new_tokens(inputs, lsm.generate(**inputs, **GREEDY))[0], skip_special_tokens=True)
    messages = processor.conversation("what is said?", audio=str(path))
    [answer] = answers(text=messages, return_full_text=False, generate_kwargs=GREEDY)
    assert answer["generated_text"] == expected
