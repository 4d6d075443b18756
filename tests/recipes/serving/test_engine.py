"""Each answer is that of its prompt alone, whoever else is answered at the same time."""

import queue

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from language_models.generation import GREEDY, read_answers
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.serving.engine import BusyError, Engine, Job, joins

TOKENS = 12


@pytest.fixture(scope="module")
def served(lsm_dir):
    """An LSM of its own in float64, in which no batch changes a choice."""
    return LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).eval()


@pytest.fixture
def engine(served, processor):
    engine = Engine(served, processor.tokenizer, max_batch=4)
    yield engine
    if engine.is_alive():
        engine.stop()


@pytest.fixture
def ask(processor, clip):
    """Makes jobs: `ask(seconds, ...)`, whose events are in `job.events`."""

    def make(seconds: float, instruction: str = "what is said?", **settings) -> Job:
        text, audio = (
            (f"{AUDIO_TOKEN} {instruction}", clip(seconds, int(seconds * 10))) if seconds else (instruction, None)
        )
        events: queue.Queue = queue.Queue()
        inputs = processor(text=text, audio=audio, return_tensors="pt")
        job = Job(inputs, events.put, **{"max_tokens": TOKENS, **settings})
        job.events = events
        return job

    return make


def read(job: Job) -> tuple[str, str, int]:
    """Return the text of a job's events, why it ended, and its number of tokens."""
    text = ""
    while True:
        event = job.events.get(timeout=60)
        text += event.text
        if event.finish:
            return text, event.finish, event.tokens


@torch.no_grad()
def alone(model, tokenizer, job: Job) -> str:
    output = model.generate(**job.inputs, **GREEDY, max_new_tokens=TOKENS, pad_token_id=0)
    return read_answers(tokenizer, output[:, job.inputs["input_ids"].shape[1] :].tolist())[0]


def test_each_answer_is_that_of_its_prompt_alone(engine, served, processor, ask):
    """More than fit into a batch, of different lengths, with and without speech; some end early, and others join."""
    jobs = []
    for number, seconds in enumerate((3, 0.4, 0, 35, 7, 1, 0, 2)):
        jobs.append(ask(seconds, "and so " * number, max_tokens=2 + 5 * number % (TOKENS - 1)))
        engine.submit(jobs[-1])
    engine.start()
    for job in jobs:
        text, finish, tokens = read(job)
        whole = alone(served, processor.tokenizer, job)
        assert whole.startswith(text)
        assert (tokens == job.max_tokens) == (finish == "length")
        assert text or tokens == 1
    assert not engine.batch and not engine.waiting


def test_an_answer_ends_before_a_stop_text_also_if_it_is_streamed(engine, served, processor, ask):
    job = ask(3)
    whole = alone(served, processor.tokenizer, job)
    stop = whole[len(whole) // 2 :][:3]
    job = ask(3, stop=[stop])
    engine.start()
    engine.submit(job)
    text, finish, _ = read(job)
    assert finish == "stop"
    assert text == whole[: whole.index(stop)]


def test_nothing_of_a_stop_text_is_emitted_before_it_is_whole(processor, ask):
    """Also where the answer is still shorter than the stop text, which it begins with."""
    job, tokenizer = ask(1, max_tokens=100, stop=["abcdef"]), processor.tokenizer
    tokens = tokenizer("abcdef", add_special_tokens=False).input_ids
    assert len(tokens) > 3
    assert [job.take(token, tokenizer, []) for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert read(job)[:2] == ("", "stop")


def test_a_seed_draws_the_same_again_and_another_one_something_else(engine, ask):
    engine.start()
    jobs = [ask(2, temperature=1.5, top_p=0.99, seed=seed) for seed in (1, 2, 1)]
    for job in jobs:
        engine.submit(job)
    first, other, again = (read(job)[0] for job in jobs)
    assert first == again != other


def test_a_cancelled_request_frees_its_place(engine, served, processor, ask):
    gone, waiting, other = ask(2, max_tokens=1000), ask(1), ask(1)
    for job in (gone, waiting, other):
        engine.submit(job)
    engine.cancel(waiting)
    engine.start()
    assert gone.events.get(timeout=60).finish is None
    engine.cancel(gone)
    assert alone(served, processor.tokenizer, other).startswith(read(other)[0])
    assert len(gone.tokens) < 1000
    assert not waiting.tokens


def test_who_leaves_while_another_clip_is_encoded_is_not_read(engine, served, processor, ask, monkeypatch):
    jobs, encode, encoded = [ask(1), ask(2), ask(3)], served.get_audio_features, []

    def leave(**inputs):
        encoded.append(inputs["input_features"].shape[-1])
        for job in jobs[:2] if len(encoded) == 1 else ():
            engine.cancel(job)
        return encode(**inputs)

    monkeypatch.setattr(served, "get_audio_features", leave)
    for job in jobs:
        engine.submit(job)
    engine.start()
    assert alone(served, processor.tokenizer, jobs[2]).startswith(read(jobs[2])[0])
    assert encoded[:2] == [100, 300]
    assert not jobs[0].tokens and not jobs[1].tokens


def test_a_tiny_temperature_is_greedy(engine, served, processor, ask):
    jobs = [ask(2, temperature=temperature, seed=1) for temperature in (5e-324, 1e-300, 1e-40)]
    for job in jobs:
        engine.submit(job)
    engine.start()
    assert all(alone(served, processor.tokenizer, job).startswith(read(job)[0]) for job in jobs)
    assert all(len(job.tokens) > 1 for job in jobs)


def test_an_answer_that_fails_fails_alone(engine, served, processor, ask, monkeypatch):
    bad, good = ask(2, temperature=1.0), ask(2)
    monkeypatch.setattr(bad, "choose", lambda logits: torch.multinomial(logits * torch.nan, 1), raising=False)
    engine.submit(bad)
    engine.submit(good)
    engine.start()
    assert read(bad)[1] == "error"
    assert alone(served, processor.tokenizer, good).startswith(read(good)[0]) and len(good.tokens) > 1


def test_a_full_queue_is_refused(engine, ask):
    engine.max_waiting = 2
    for _ in range(2):
        engine.submit(ask(1))
    with pytest.raises(BusyError, match="2 requests are waiting already"):
        engine.submit(ask(1))


def test_a_failing_model_is_told_and_the_next_request_answered(engine, served, ask, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(served, "get_audio_features", fail)
        job = ask(2)
        engine.submit(job)
        assert read(job)[1] == "error"
    with monkeypatch.context() as patch:
        job = ask(2, max_tokens=1000)
        engine.submit(job)
        job.events.get(timeout=60)
        patch.setattr(engine, "_choose", fail)
        assert read(job)[1] == "error"
    job = ask(2)
    engine.submit(job)
    assert read(job)[1] in ("stop", "length")


def test_generation_settings_of_the_checkpoint_are_kept(lsm_dir, processor, ask):
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).eval()
    model.generation_config.repetition_penalty = 3.0
    engine, job = Engine(model, processor.tokenizer), ask(2)
    engine.start()
    engine.submit(job)
    text = read(job)[0]
    assert alone(model, processor.tokenizer, job) == text
    model.generation_config.repetition_penalty = 1.0
    assert alone(model, processor.tokenizer, job) != text
    engine.stop()


def test_sliding_windows_are_answered_in_batches_that_nobody_joins(whisper_dir, llm_dir, tmp_path, compose_tiny, clip):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "initializer_range": 0.3}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), layer_types=["sliding_attention", "full_attention"], **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    compose_tiny(str(whisper_dir), str(tmp_path / "llm"), str(tmp_path / "lsm"))
    model = LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm", dtype=torch.float64).eval()
    processor = LsmProcessor.from_pretrained(tmp_path / "lsm")
    assert not joins(DynamicCache(config=model.config.text_config))
    engine = Engine(model, processor.tokenizer)
    jobs = []
    for seconds in (1, 4, 2):
        events: queue.Queue = queue.Queue()
        inputs = processor(text=f"{AUDIO_TOKEN} what is said?", audio=clip(seconds), return_tensors="pt")
        jobs.append(Job(inputs, events.put, max_tokens=3 * seconds))
        jobs[-1].events = events
    for job in jobs[:2]:
        engine.submit(job)
    engine.start()
    engine.submit(jobs[2])
    for job in jobs:
        assert alone(model, processor.tokenizer, job).startswith(read(job)[0])
    engine.stop()
