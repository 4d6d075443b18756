"""Training batches: the prompt of inference, then the response, which is the only part with labels."""

import copy
import io

import numpy as np
import pytest
import soundfile
import torch
from corpus_files import clip as audio_file
from tiny_tokenizer import CHAT_TEMPLATE, THINKING_TEMPLATE, tiny_sentencepiece, tiny_tokenizer
from transformers import ByT5Tokenizer, WhisperFeatureExtractor

from language_models.tokenizers import speech_processor
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.listening.collator import SpeechResponseCollator, render_prompt, render_response, response_tokens


def split(batch, row):
    """Return the token ids of a row's prompt and of its labels, without padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    labels = batch["labels"][row][: len(ids)]
    prompt = int((labels == -100).sum())
    return ids[:prompt], ids[prompt:]


def test_labels_are_the_response_and_its_end_and_nothing_else(processor, rows):
    batch = SpeechResponseCollator(processor)(rows[:4])
    for index, row in enumerate(rows[:4]):
        prompt, response = split(batch, index)
        assert processor.tokenizer.decode(response) == row["response"] + processor.tokenizer.eos_token
        learned = batch["labels"][index] != -100
        assert torch.equal(batch["labels"][index][learned], response)
        assert batch["attention_mask"][index].sum() == len(prompt) + len(response)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_prompt_is_what_inference_reads(processor, rows):
    batch = SpeechResponseCollator(processor)(rows[:4])
    for index, row in enumerate(rows[:4]):
        inputs = processor(
            text=render_prompt(processor, row), audio=row["audio"], add_special_tokens=False, return_tensors="pt"
        )
        assert torch.equal(split(batch, index)[0], inputs["input_ids"][0])
        frames = inputs["input_features"].shape[-1]
        assert torch.equal(batch["input_features"][index, :, :frames], inputs["input_features"][0])
        assert batch["input_features_mask"][index].sum() == frames


def test_instruction_and_speech_alone_are_in_the_prompt(processor, rows):
    prompt = render_prompt(processor, rows[0])
    assert prompt.count(processor.audio_token) == 1
    assert rows[0]["instruction"] in prompt
    assert rows[0]["transcript"] not in prompt
    heard = render_prompt(processor, rows[0], slot="transcript")
    assert heard == prompt.replace(processor.audio_token, rows[0]["transcript"])


def test_training_is_on_the_right_and_generation_on_the_left(processor, rows):
    """The collator must not change the padding side of the tokenizer, which generation needs."""
    batch = SpeechResponseCollator(processor)(sorted(rows, key=lambda row: len(row["response"])))
    assert batch["attention_mask"][:, 0].all()
    assert not batch["attention_mask"][:, -1].all()
    assert processor.tokenizer.padding_side == "left"


def test_a_batch_gives_the_loss_of_its_rows(processor, lsm, rows):
    """Padding, other rows and clips of other lengths make no difference."""
    collate = SpeechResponseCollator(processor)
    with torch.no_grad():
        together = lsm(**collate(rows[:3])).loss
        losses = [(lsm(**batch).loss, (batch["labels"] != -100).sum()) for batch in ([collate([r]) for r in rows[:3]])]
    apart = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_is_refused_by_its_row(processor, rows, response):
    row = {**rows[0], "response": response}
    with pytest.raises(ValueError, match=f"row '{row['id']}' has an empty response"):
        SpeechResponseCollator(processor)([row])


def test_a_template_that_does_not_continue_its_own_prompt_is_refused(processor, rows):
    """Some reasoning models have such templates: their prompt ends with a thought that the whole conversation does not
    have."""
    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")
    with pytest.raises(ValueError, match="does not continue its own prompt"):
        SpeechResponseCollator(other)([rows[0]])


def test_what_a_template_puts_behind_the_end_is_not_learned(processor, rows):
    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace(
        "eos_token }}{% endfor %}", "eos_token + '\\n' }}{% endfor %}"
    )
    assert other.chat_template != processor.chat_template
    response = render_response(other, rows[0], render_prompt(other, rows[0]))
    assert response == rows[0]["response"] + "</s>"


def test_a_template_without_an_end_gets_one(processor, rows):
    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace(" + eos_token", "")
    assert other.chat_template != processor.chat_template
    response = render_response(other, rows[0], render_prompt(other, rows[0]))
    assert response == rows[0]["response"] + "</s>"


def test_a_response_without_tokens_is_refused(processor, answered, monkeypatch):
    """The model could learn nothing from it, and the mean over all labels would hide this."""
    tokenizer_type = type(processor.tokenizer)
    original, turn = tokenizer_type.__call__, "<|assistant|>"

    def drop_responses(self, texts, **settings):
        return original(self, [text.split(turn)[0] + turn for text in texts], **settings)

    monkeypatch.setattr(tokenizer_type, "__call__", drop_responses)
    with pytest.raises(ValueError, match="has no tokens; expected text to learn"):
        SpeechResponseCollator(processor)(answered)


def test_a_clip_that_cannot_be_learned_from_is_refused_by_its_row(processor, answered):
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), 16_000, format="WAV")
    row = answered[1] | {"audio": {"bytes": empty.getvalue(), "path": "empty.wav"}}
    with pytest.raises(ValueError, match=r"row '1' has a clip that cannot be learned from: The audio is empty"):
        SpeechResponseCollator(processor)([answered[0], row])


def test_a_clip_that_is_cut_off_is_not_learned_from_as_a_shorter_one(processor, answered):
    mp3 = audio_file(0, "MP3", seconds=3.0)
    row = answered[1] | {"audio": {"bytes": mp3[: len(mp3) // 3], "path": "cut.mp3"}}
    with pytest.raises(ValueError, match=r"row '1' has a clip .*: cut.mp3 is cut off: .*Leave the row out, or repair"):
        SpeechResponseCollator(processor)([answered[0], row])


def test_rows_that_are_read_and_rows_that_are_heard_make_one_batch(processor, lsm, answered):
    rows = [answered[0], answered[1] | {"audio": None}, answered[2]]
    batch = SpeechResponseCollator(processor)(rows)
    assert len(batch["input_features"]) == 2
    assert answered[1]["transcript"] in processor.tokenizer.decode(batch["input_ids"][1])
    with torch.no_grad():
        together = lsm(**batch).loss
        apart = [SpeechResponseCollator(processor)([row]) for row in rows]
        counts = [(one["labels"] != -100).sum() for one in apart]
        expected = sum(lsm(**one).loss * count for one, count in zip(apart, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


# The border between prompt and response

NEWLINE = CHAT_TEMPLATE.replace("|>' +", "|>\\n' +").replace("'<|assistant|>'", "'<|assistant|>\\n'")
SPACE = CHAT_TEMPLATE.replace("|>' +", "|>: ' +").replace("'<|assistant|>'", "'<|assistant|>: '")


def processor_of(tokenizer, template: str) -> LsmProcessor:
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return speech_processor(WhisperFeatureExtractor(), tokenizer, chat_template=template)


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize("template", [NEWLINE, CHAT_TEMPLATE], ids=["newline", "nothing"])
def test_labels_are_a_span_of_the_tokens_of_the_whole_conversation(answered, kind, template):
    """A response tokenised alone would begin with a space, `▁the`, which does not follow `<|assistant|>\\n`."""
    own = processor_of(tiny_sentencepiece(kind), template)
    rows = [row | {"response": f"the {row['response']}"} for row in answered]
    batch = SpeechResponseCollator(own, teacher=True)(rows)
    for index, row in enumerate(rows):
        messages = own.conversation(row["instruction"], transcript=row["transcript"], response=row["response"])
        whole = own.tokenizer(own.apply_chat_template(messages), add_special_tokens=False).input_ids
        read = batch["teacher_input_ids"][index][batch["teacher_attention_mask"][index].bool()]
        assert read.tolist() == whole
        labels, teachers = (batch[name][index] for name in ("labels", "teacher_labels"))
        assert torch.equal(labels[labels != -100], teachers[teachers != -100])
        assert own.tokenizer.convert_ids_to_tokens(int(labels[labels != -100][0])) == "the"


@pytest.mark.parametrize("kind", ["first", "legacy"])
def test_a_token_across_the_border_is_cut_there(answered, kind):
    """The prompt ends with a space, which would be the beginning of `▁the`. The LLM has read it and continues after
    it."""
    own = processor_of(tiny_sentencepiece(kind), SPACE)
    row = answered[0] | {"response": "the speech"}
    ids, labels = (SpeechResponseCollator(own)([row])[name][0] for name in ("input_ids", "labels"))
    tokens = own.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert tokens == ["the", "▁speech", "</s>"]
    prompt = own.tokenizer(render_prompt(own, row), add_special_tokens=False).input_ids
    assert ids[labels == -100].tolist()[-5:] == prompt[-5:]
    assert own.tokenizer.decode(ids).endswith("<|assistant|>: the speech</s>")


@pytest.mark.parametrize("thinking", [False, True])
def test_a_thought_is_no_label(answered, thinking):
    """This holds for the empty thought that templates put before an answer, and for thoughts in imported rows."""
    own = processor_of(tiny_tokenizer(), CHAT_TEMPLATE)
    own = speech_processor(
        own.feature_extractor, own.tokenizer, THINKING_TEMPLATE, template_settings={"enable_thinking": thinking}
    )
    thoughtful = answered[1] | {"response": "<think>\nHm.\n</think>\n\nNobody says it."}
    batch = SpeechResponseCollator(own, teacher=True)([answered[0], thoughtful])
    for labels in (batch["labels"], batch["teacher_labels"]):
        said = [own.tokenizer.decode(row[row != -100]) for row in labels]
        assert said == ["It is asked.</s>", "Nobody says it.</s>"]
    with pytest.raises(ValueError, match="has an empty response"):
        SpeechResponseCollator(own)([answered[0] | {"response": "<think>\nHm.\n</think>\n"}])


def test_a_slow_tokenizer_has_the_response_by_itself_there():
    class Pairs(ByT5Tokenizer):
        """Has a token of two spaces."""

        def _tokenize(self, text):
            return ["a" if piece == "  " else piece for piece in super()._tokenize(text.replace("  ", "a"))]

    assert response_tokens(Pairs(), ["say: "], [" yes"]) == [Pairs()(" yes", add_special_tokens=False).input_ids]


def test_control_tokens_in_a_row_are_text_to_those_who_learn_and_teach(processor, answered):
    """This holds for all fields: the batch has only the placeholders of its clips and the ends of its turns."""
    evil = "a </s><s> or <|audio|>"
    rows = [row | dict.fromkeys(("instruction", "transcript", "response"), evil) for row in answered]
    rows, plain = rows[2:], answered[2:]
    collate, tokenizer = SpeechResponseCollator(processor, teacher=True), processor.tokenizer
    batch, usual = collate([rows[0], rows[1] | {"audio": None}]), collate([plain[0], plain[1] | {"audio": None}])
    for name in ("input_ids", "teacher_input_ids"):
        for token in (processor.audio_token_id, tokenizer.bos_token_id):
            assert (batch[name] == token).sum() == (usual[name] == token).sum()
    for labels in (*batch["labels"], *batch["teacher_labels"]):
        learned = labels[labels != -100]
        assert tokenizer.decode(learned) == evil + "</s>" and (learned == tokenizer.eos_token_id).sum() == 1
