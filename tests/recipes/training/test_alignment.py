"""Alignment: the projector learns with CTC to express transcripts in the LLM's embeddings."""

import copy
import io
import itertools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from corpus_files import clip, write
from datasets import Audio, Dataset, concatenate_datasets
from hub_clients import start
from transformers import AutoModelForCausalLM, AutoProcessor

from dataset_builders.corpora.opening import load_corpus
from dataset_builders.files import read_lines
from modeling_lsm import LsmModel
from recipes import align as command
from recipes.listening.composing import compose
from recipes.listening.features import AudioFeatureStore, audio_key
from recipes.listening.speech_llm import Lsm
from recipes.training.alignment import (
    NEAR_PIECES,
    STEPS,
    AlignmentCollator,
    AlignmentModel,
    AlignmentTrainer,
    Slot,
    alignment_rows,
    ctc_loss,
    near_pieces,
    needs_alignment,
    piece_weights,
    speech_tokens_needed,
    text_pieces,
)
from recipes.training.checkpoints import last_checkpoint

ROOT = Path(__file__).parents[3]
SAID = ["the speech says", "what is said", "what is asked", "so be it", "the sea", "nothing", "a bell", "is it asked"]


@pytest.fixture(scope="module")
def aligned_dir(tmp_path_factory, compose_tiny, whisper_dir, llm_dir):
    """Make an LSM with 25 speech tokens per second, because the tiny tokenizer spells most words in bytes."""
    folder = tmp_path_factory.mktemp("lsm") / "tiny"
    compose_tiny(str(whisper_dir), str(llm_dir), str(folder), window_frames=2)
    return folder


@pytest.fixture(scope="module")
def small_lsm(aligned_dir):
    return AutoModelForCausalLM.from_pretrained(aligned_dir, trust_remote_code=True)


@pytest.fixture(scope="module")
def processor(aligned_dir):  # of `small_lsm`
    return AutoProcessor.from_pretrained(aligned_dir, trust_remote_code=True)


@pytest.fixture(scope="module")
def words_dir(tmp_path_factory):
    """Make a corpus of eight clips of a second and more, each with a few words."""
    rows = []
    for index, said in enumerate(SAID):
        wav = io.BytesIO()
        noise = np.random.default_rng(index).normal(0, 0.1, 20_000 + 800 * index)
        soundfile.write(wav, noise, 16_000, format="WAV", subtype="PCM_16")
        rows.append({"id": f"utt-{index}", "audio": {"bytes": wav.getvalue(), "path": None}, "transcript": said})
    folder = tmp_path_factory.mktemp("corpora") / "words"
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture
def clips():
    return clips_of(SAID, 1.2)


def clips_of(transcripts, seconds):
    rows = []
    for index, said in enumerate(transcripts):
        wav = io.BytesIO()
        noise = np.random.default_rng(index).normal(0, 0.1, int(16_000 * seconds))
        soundfile.write(wav, noise, 16_000, format="WAV", subtype="PCM_16")
        audio = {"bytes": wav.getvalue(), "path": None}
        rows.append({"audio": audio, "transcript": said, "duration": seconds, "source": "words/train"})
    return Dataset.from_list(rows).cast_column("audio", Audio(16_000, decode=False))


@pytest.fixture
def run(aligned_dir, words_dir, tmp_path, parts_of):
    """Return `run(align_steps=2, ...)`, which runs the command on the corpus and returns its folder."""

    def go(held_out=None, features=None, **options):
        defaults = {
            "model_name_or_path": str(aligned_dir),
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
        }
        defaults |= {"align_batch_size": 4, "align_steps": 2, "logging_steps": 1, "save_steps": 1, "disable_tqdm": True}
        options = {**defaults, **options}
        _, training_args, model_args = parts_of(options | {"dataset_name": "-"})
        script_args = command.AlignArguments(
            corpus=str(words_dir),
            following_corpus=held_out,
            following_split="train",
            following_steps=2,
            audio_feature_store=features,
        )
        command.run(script_args, training_args, model_args)
        return Path(options["output_dir"])

    return go


def losses(folder):
    return [line["loss"] for line in read_lines(folder / "alignment" / "log.jsonl") if "loss" in line]


# The loss


def test_the_loss_is_that_of_all_sequences_with_the_pieces():
    """The loss sums over all sequences of 4 speech tokens that give the pieces 1, 2 without repetitions and blanks."""
    torch.manual_seed(0)
    log_probs = torch.randn(4, 3).log_softmax(-1)

    def reads_as(path):
        return [piece for piece, _ in itertools.groupby(path) if piece != 0]

    paths = [path for path in itertools.product(range(3), repeat=4) if reads_as(path) == [1, 2]]
    total = torch.stack([log_probs[range(4), list(path)].sum() for path in paths]).logsumexp(0)
    found = ctc_loss(log_probs, torch.tensor([4]), torch.tensor([1, 2]), torch.tensor([2]))
    assert found == pytest.approx(-total.item() / 2, rel=1e-5)


def test_a_clips_loss_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    log_probs = torch.randn(9, 4).log_softmax(-1)
    alone = [
        ctc_loss(log_probs[:3], torch.tensor([3]), torch.tensor([1]), torch.tensor([1])),
        ctc_loss(log_probs[3:], torch.tensor([6]), torch.tensor([2, 3]), torch.tensor([2])),
    ]
    together = ctc_loss(log_probs, torch.tensor([3, 6]), torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    assert together == pytest.approx(sum(map(float, alone)) / 2, rel=1e-5)


def test_a_reading_merges_repeats_and_drops_blanks(small_lsm, processor, monkeypatch):
    pieces = text_pieces(processor, 300)
    model = AlignmentModel(small_lsm, pieces)
    places, lengths = torch.tensor([0, 5, 5, 0, 5, 7, 7]), torch.tensor([4, 3])
    log_probs = torch.nn.functional.one_hot(places, 9).float()
    monkeypatch.setattr(model, "log_probs", lambda among, chunks, **audio: (log_probs, lengths))
    assert model.read(torch.tensor([1, 1])) == [[int(pieces[4])], [int(pieces[4]), int(pieces[6])]]


def test_windows_are_cut_elsewhere_and_clips_keep_their_tokens(small_lsm, processor):
    """Windows have two frames. After a shift by two frames, all speech tokens but the first are as before."""
    model, pieces = AlignmentModel(small_lsm, text_pieces(processor, 300)), torch.arange(20, 30)
    dataset = alignment_rows(
        concatenate_datasets([clips_of(SAID[:2], 1.2), clips_of(["so be it"], 32.0)]), processor, 300
    )
    batch = AlignmentCollator(processor, weights=torch.ones(300))(list(dataset))
    audio = {name: value for name, value in batch.items() if name.startswith("input_features")}
    assert batch["chunks"].tolist() == [1, 1, 2]
    with torch.no_grad():
        plain, lengths = model.log_probs(pieces, batch["chunks"], **audio)
        assert lengths.tolist() == dataset["speech_tokens"][:] == [30, 30, 800]
        odd, odd_lengths = model.log_probs(pieces, batch["chunks"], shift=1, **audio)
        whole, whole_lengths = model.log_probs(pieces, batch["chunks"], shift=2, **audio)
    assert odd_lengths.tolist() == [31, 31, 802] and whole_lengths.tolist() == [31, 31, 802]
    torch.testing.assert_close(whole.split([31, 31, 802])[1][1:], plain.split([30, 30, 800])[1])
    assert not torch.allclose(odd[1:30], plain[:29], atol=1e-3)


def test_each_step_has_a_shift_of_its_own_that_a_resumed_training_draws_again(run, tmp_path, monkeypatch):
    drawn, original = [], AlignmentModel.forward

    def forward(self, *args, shift, **kwargs):
        drawn.append(shift)
        return original(self, *args, shift=shift, **kwargs)

    monkeypatch.setattr(AlignmentModel, "forward", forward)
    run(align_steps=12, save_steps=6)
    assert set(drawn) == {0, 1}  # less than a window
    first, drawn[:] = list(drawn), []
    run(align_steps=12, save_steps=6, output_dir=str(tmp_path / "again"))
    assert drawn == first


# The rows


@pytest.mark.parametrize("instruction_first", [True, False])
def test_the_pieces_are_those_of_the_prompt(processor, instruction_first, monkeypatch):
    monkeypatch.setattr(processor, "instruction_first", instruction_first)
    for said, ids in zip(SAID, Slot(processor).pieces(SAID), strict=True):
        assert processor.tokenizer.decode(ids) == said
    assert Slot(processor).pieces(["  "]) == [[]]


def test_no_piece_is_a_special_token(processor):
    pieces = set(text_pieces(processor, 300).tolist())
    special = {*processor.tokenizer.all_special_ids, processor.audio_token_id}
    assert not pieces & special and len(pieces) == len(processor.tokenizer) - len(special)


def test_two_pieces_that_are_the_same_need_a_blank_between_them():
    assert speech_tokens_needed([4, 4, 5, 4]) == 5
    assert speech_tokens_needed([4]) == 1


def test_clips_that_cannot_be_aligned_are_counted_and_said(processor, caplog):
    dataset = clips_of(["the speech says", "the speech says", "!?" * 40], 1.0)
    with caplog.at_level(logging.WARNING):
        rows = alignment_rows(dataset, processor, 300)
    assert rows["transcript"] == ["the speech says"]  # once, because its two rows seem to have the same clip
    assert "1 of 2 clips have more word pieces than speech tokens" in caplog.text
    with pytest.raises(ValueError, match=r"none of 1 clips can be aligned.*smaller --window-frames"):
        alignment_rows(dataset.select([2]), processor, 300)


def test_a_step_chooses_among_its_own_pieces_and_others_of_the_set(processor, clips):
    rows = alignment_rows(clips, processor, 300)
    pieces = text_pieces(processor, 300)
    weights = piece_weights(rows, pieces, 300)
    never = weights[pieces].min().item()  # the weight of a piece that no transcript has
    assert never == pytest.approx(1 / len(pieces)) and weights.sum().item() == pytest.approx(2)
    said = [id for ids in rows["pieces"] for id in ids]
    assert weights[said[0]].item() == pytest.approx(never + said.count(said[0]) / len(said))
    collate = AlignmentCollator(processor, weights=weights, others=20)
    batch = collate(list(rows.select([0, 1])))
    own = batch["labels"].unique() - 1
    assert own.tolist() == list(range(len(own))) and len(batch["pieces"]) == len(own) + 20
    assert len(batch["pieces"].unique()) == len(batch["pieces"]) and set(batch["pieces"].tolist()) <= set(
        pieces.tolist()
    )
    said = batch["pieces"][batch["labels"] - 1].split(batch["label_lengths"].tolist())
    assert [ids.tolist() for ids in said] == rows["pieces"][:2]
    assert batch["chunks"].tolist() == [1, 1]
    assert torch.equal(batch["pieces"], collate(list(rows.select([0, 1])))["pieces"])
    assert not torch.equal(batch["pieces"][-20:], collate(list(rows.select([2, 3])))["pieces"][-20:])


def test_a_small_vocabulary_is_chosen_from_as_a_whole(processor, clips):
    rows, pieces = alignment_rows(clips, processor, 300), text_pieces(processor, 300)
    batch = AlignmentCollator(processor, weights=piece_weights(rows, pieces, 300))(list(rows))
    assert sorted(batch["pieces"].tolist()) == pieces.tolist()


def test_a_step_also_chooses_among_the_nearest_pieces(processor, clips):
    """The other spellings of a word are nearest, and drawn from all pieces they hardly ever come."""
    rows, pieces = alignment_rows(clips, processor, 300), text_pieces(processor, 300)
    torch.manual_seed(0)
    vectors = torch.randn(300, 16)
    said, alike = rows["pieces"][0][0], next(id for id in pieces.tolist() if id not in rows["pieces"][0])
    vectors[alike] = vectors[said] + 0.01 * torch.randn(16)
    near = near_pieces(rows, pieces, vectors)
    assert near.shape == (300, 1 + NEAR_PIECES) and near[said, :2].tolist() == [said, alike]
    batch = AlignmentCollator(processor, weights=torch.zeros(300), near=near)(list(rows.select([0])))
    own = rows["pieces"][0]
    assert batch["pieces"][: len(set(own))].tolist() == sorted(set(own))
    assert set(batch["pieces"].tolist()) == {*own, *near[own].flatten().tolist()} and alike in batch["pieces"]
    assert len(batch["pieces"].unique()) == len(batch["pieces"])


# The training


def test_only_the_projector_changes_and_the_result_can_answer(run, small_lsm):
    output = run(align_steps=2)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    before = dict(small_lsm.named_parameters())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("model.projector.") for name in moved)
    assert "model.projector.linear.weight" in moved
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    row = {"instruction": "Listen.", "audio": clips_of(SAID[:1], 1.0)[0]["audio"]}
    assert len(Lsm(model, processor).respond([row], max_new_tokens=2, progress=False)) == 1
    assert len(losses(output)) == 2 and "alignment" in (output / "README.md").read_text()


def test_an_lsm_that_reads_with_whispers_words_keeps_them(run, reading_whisper_dir, llm_dir, tmp_path):
    before, _ = compose(str(reading_whisper_dir), str(llm_dir), str(tmp_path / "lsm"), window_frames=2)
    after = AutoModelForCausalLM.from_pretrained(
        run(model_name_or_path=str(tmp_path / "lsm"), align_steps=20), trust_remote_code=True
    )
    assert before.config.reading_embeddings == "audio"
    assert torch.equal(before.model.reading_embeddings.weight, after.model.reading_embeddings.weight)
    assert not torch.equal(before.model.projector.linear.weight, after.model.projector.linear.weight)
    log = read_lines(tmp_path / "out" / "alignment" / "log.jsonl")
    assert log[0]["learning_rate"] < max(line.get("learning_rate", 0) for line in log) <= 3e-4


def test_held_out_clips_that_the_store_lacks_are_added_to_it(run, words_dir, tmp_path, monkeypatch):
    """Otherwise every measurement would encode them again."""
    others = clips_of(["so be it"], 1.5).select_columns(["audio", "transcript"]).add_column("id", ["other"])
    (tmp_path / "others").mkdir()
    others.to_parquet(str(tmp_path / "others" / "train.parquet"))
    encode, stored = LsmModel.encode_audio, []

    def watched(model, *args, **audio):
        stored.append(audio.get("audio_hidden_states") is not None)
        return encode(model, *args, **audio)

    monkeypatch.setattr(LsmModel, "encode_audio", watched)
    run(held_out=str(tmp_path / "others"), features=str(tmp_path / "features"))
    clips = [*load_corpus(words_dir, "train"), *load_corpus(tmp_path / "others", "train")]
    assert AudioFeatureStore(tmp_path / "features").clips.keys() == {audio_key(clip["audio"]) for clip in clips}
    assert stored and all(stored)


def test_held_out_clips_are_read_every_few_steps_and_at_the_end(run, words_dir):
    log = read_lines(run(align_steps=3, held_out=str(words_dir)) / "alignment" / "log.jsonl")
    read = [line for line in log if "reading_wer" in line]
    assert [line["step"] for line in read] == [2, 3]
    words = sum(len(said.split()) for said in SAID)
    assert all(sum(found["words"] for found in line["missed_words"].values()) == words for line in read)
    assert "0" not in read[0]["missed_words"]  # the training has all words of its own clips


def test_the_loss_gets_smaller(run):
    found = losses(run(align_steps=60, align_learning_rate=1e-2, align_batch_size=8, save_steps=60))
    assert sum(found[-5:]) < 0.5 * sum(found[:5])


@pytest.mark.parametrize("stop", [2, 5])
def test_stopped_at_any_step_it_gives_the_same_curve(run, tmp_path, stop, monkeypatch):
    whole = losses(run(align_steps=6, save_steps=3, output_dir=str(tmp_path / "whole")))
    original = AlignmentTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step + 1 == stop:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(align_steps=6, save_steps=3)
    monkeypatch.setattr(AlignmentTrainer, "training_step", original)
    assert losses(run(align_steps=6, save_steps=3)) == pytest.approx(whole, rel=1e-5)


def test_a_finished_alignment_is_not_repeated(run, monkeypatch):
    before = losses(run())
    monkeypatch.setattr(AlignmentTrainer, "training_step", lambda *args, **kwargs: pytest.fail("learned again"))
    assert losses(run()) == before


def test_another_alignment_in_the_same_folder_is_refused(run):
    run()
    with pytest.raises(ValueError, match=r"other settings \(learning_rate was 0.001, now 0.01"):
        run(align_learning_rate=1e-2)


def test_an_alignment_of_another_model_at_the_same_path_is_refused(run, small_lsm, aligned_dir, tmp_path):
    model = shutil.copytree(aligned_dir, tmp_path / "model")
    run(model_name_or_path=str(model))
    other = copy.deepcopy(small_lsm)
    other.model.projector.linear.weight.data += 1
    other.save_pretrained(model)
    with pytest.raises(ValueError, match=r"content of model_name_or_path was sha256:\w+, now sha256:\w+"):
        run(model_name_or_path=str(model))


def test_an_edited_transcript_in_an_audio_folder_is_learned(tmp_path):
    folder = write(tmp_path / "corpus", {"a.wav": clip(1), "a.txt": "one"})
    args = command.AlignArguments(corpus=str(folder))
    assert command.load_clips(args, 0)["transcript"] == ["one"]
    (folder / "a.txt").write_text("two")
    assert command.load_clips(args, 0)["transcript"] == ["two"]


def test_a_clip_that_cannot_be_used_is_named(tmp_path):
    """And not only that datasets could not generate something."""
    lines = '{"audio": "a.wav", "text": "one"}\n{"audio": "/elsewhere/b.wav", "text": "two"}\n'
    folder = write(tmp_path / "corpus", {"a.wav": clip(1), "train.jsonl": lines})
    args = command.AlignArguments(corpus=str(folder), dataset_train_split="train")
    with pytest.raises(ValueError, match=r"line 2: .*/elsewhere/b.wav is not under .*; put the manifest into a folder"):
        command.load_clips(args, 0)


def test_two_processes_give_the_losses_of_one(run, aligned_dir, words_dir, tmp_path):
    """The loss of a step is the mean over its clips, on any number of devices."""
    one = losses(run(align_steps=4, align_batch_size=4))
    options = {"model_name_or_path": aligned_dir, "corpus": words_dir, "output_dir": tmp_path / "two", "use_cpu": True}
    options |= {"align_steps": 4, "align_batch_size": 2, "logging_steps": 1, "report_to": "none", "bf16": False}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command += ["recipes/align.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True)


def test_a_trained_projector_is_not_aligned(run, small_lsm, parts_of, defaults):
    for model, asked, steps in ((small_lsm, None, STEPS), (small_lsm, 0, 0), (small_lsm, 7, 7)):
        args = parts_of({**defaults, "align_steps": asked})[1]
        assert needs_alignment(model, args) == (steps > 0) and args.align_steps == steps
    learned = AutoModelForCausalLM.from_pretrained(run(), trust_remote_code=True)
    assert learned.config.projector_trained and not small_lsm.config.projector_trained
    assert not needs_alignment(learned, parts_of({**defaults, "align_steps": None})[1])


def test_a_training_begins_with_the_alignment(train, tmp_path, monkeypatch):
    """The clips of the shared set are too short for their transcripts, so each transcript is one piece here."""
    monkeypatch.setattr(Slot, "pieces", lambda self, transcripts: [[100] for _ in transcripts])
    output = train(align_steps=2, align_batch_size=4, llm="frozen", save_steps=1)
    assert len(losses(output)) == 2 and last_checkpoint(output / "alignment").name == "checkpoint-2"
    assert AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).config.projector_trained
    with pytest.raises(ValueError, match="--align_steps 2 needs all clips at once"):
        train(align_steps=2, dataset_streaming=True, tasks=["transcription"], output_dir=str(tmp_path / "stream"))


def test_invalid_settings_are_refused(parts_of, defaults):
    for name, value in {"align_steps": -1, "align_batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"--{name} {value}"):
            parts_of({**defaults, name: value})


def test_a_projector_without_a_reader_is_not_aligned(compose_tiny, whisper_dir, llm_dir, parts_of, defaults):
    model, _ = compose_tiny(str(whisper_dir), str(llm_dir), pieces_per_token=0)
    args = parts_of({**defaults, "align_steps": None})[1]
    assert not needs_alignment(model, args) and args.align_steps == 0
    with pytest.raises(ValueError, match=r"--align_steps is 7, but .* no reader .*--pieces-per-token 8"):
        needs_alignment(model, parts_of({**defaults, "align_steps": 7})[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning_rate 1e-4", "--learning_rate 0.0001 has no effect on an alignment: give --align_learning_rate"),
        ("--max_steps 5", "--max_steps 5 .* give --align_steps"),
        ("--per_device_train_batch_size 64", "--per_device_train_batch_size 64 .* give --align_batch_size"),
        ("--weight_decay 0.1", "--weight_decay 0.1 .* leave it out; it is an option of recipes.sft"),
        ("--preflight true", "--preflight True .* it is an option of recipes.sft"),
        ("--llm full", "--llm full"),
        ("--lora_r 4", "--lora_r 4"),
    ],
)
def test_options_that_an_alignment_does_not_take_are_refused(tmp_path, monkeypatch, options, message):
    """A preflight, for example, would otherwise be the alignment itself."""
    words = f"align --model LSM --corpus CLIPS --output {tmp_path} {options}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(ValueError, match=message):
        command.main()


def test_an_aligned_model_is_pushed_with_its_card(hub, aligned_dir, words_dir, tmp_path):
    code = 'import runpy, sys; sys.argv[0] = "align.py"; runpy.run_module("recipes.align", run_name="__main__")'
    options = {"model_name_or_path": aligned_dir, "corpus": words_dir, "output_dir": tmp_path / "out", "use_cpu": True}
    options |= {"align_steps": 1, "bf16": False, "push_to_hub": True, "hub_model_id": "me/aligned"}
    done = start(
        code, hub, tmp_path / "home", *(part for name in options for part in (f"--{name}", str(options[name])))
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = set(hub.repos["model", "me/aligned"].files())
    assert {"README.md", "model.safetensors", "processor_config.json", "modeling_lsm.py"} <= files
    assert not any("checkpoint-" in name for name in files)
