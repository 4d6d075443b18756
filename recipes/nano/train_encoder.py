"""Train the nano speech encoder: a small Whisper encoder that recognises the nano language, by CTC over its words.

    python -m recipes.nano.train_encoder --output assets/nano/encoder

It is trained on `train` sentences in training voices (`dataset_builders.nano.speech`), with additive noise, random gain
and SpecAugment (Park et al. 2019), drawn from `--seed`. It is scored on `test` sentences in voices that the training
does not have. The output is a `WhisperModel` without decoder layers, its feature extractor, and the CTC head in
`ctc_head.safetensors` (`weight`, `bias`; label 0 is the blank, label i is the i-th word of the lexicon).

During the training, a second head spells the words in letters, and the clips of the first steps have one or two words.
Without this, the loss stays on a plateau for long, where the model has learned the grammar but ignores the speech.
"""

import argparse
import functools
import itertools
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("eval"):
    import jiwer
    import numpy as np
    import torch
    from safetensors.torch import save_model
    from torch import nn
    from tqdm import tqdm
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel, get_cosine_schedule_with_warmup
    from transformers.models.whisper.modeling_whisper import sinusoids

    from configuration_lsm import num_encoder_frames
    from dataset_builders.nano.grammar import lexicon
    from dataset_builders.nano.speech import sample_utterance
    from modeling_lsm import LsmAudioTower

logger = logging.getLogger(__name__)

HEAD_FILE = "ctc_head.safetensors"
LETTERS = list(" abcdefghijklmnopqrstuvwxyz")


def featurize(split: str, seed: int, indices: range, most_words: int | None = None) -> list[tuple[np.ndarray, str]]:
    """Return the log-mel features `(frames, 80)` float16 and the transcripts of utterances of the nano corpus. Those of
    the split `train` are noisy."""
    extractor = WhisperFeatureExtractor()
    rows = []
    for index in indices:
        utterance = sample_utterance(seed, split, index, most_words)
        audio = utterance["audio"]
        if split == "train":
            noise = np.random.default_rng([seed, index])
            audio = audio * 10 ** noise.uniform(-1, 0) + noise.normal(0, 10 ** noise.uniform(-5, -2), len(audio))
        features = extractor(audio.astype(np.float32), sampling_rate=16_000, padding=False, return_tensors="np")
        rows.append((features["input_features"][0].T.astype(np.float16), utterance["transcript"]))
    return rows


def load_clips(
    split: str, seed: int, count: int, workers: int, most_words: int | None = None
) -> list[tuple[np.ndarray, str]]:
    """Return features and transcripts of `count` utterances; they do not depend on the number of workers."""
    work = functools.partial(featurize, split, seed, most_words=most_words)
    parts = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        results = list(tqdm(pool.imap(work, parts), total=len(parts), desc=f"speaking {count} {split} clips"))
    return [row for rows in results for row in rows]


def collate(clips: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_features` `(clips, 80, frames)` float32 and `input_features_mask` `(clips, frames)`, padded with
    zeros."""
    features = [torch.from_numpy(clip.astype(np.float32)) for clip, _ in clips]
    masks = [torch.ones(len(clip), dtype=torch.long) for clip in features]
    padded, mask = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (features, masks))
    return padded.transpose(1, 2).contiguous(), mask


def spec_augment(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Set two bands of up to 16 mels and two spans of up to a tenth of its length (at most 0.25 s) to zero, in each
    clip."""
    clips, mels, frames = features.shape
    keep = torch.ones_like(features)
    for row in range(clips):
        for dim, length, widest in ((0, mels, 16), (1, frames, min(25, frames // 10 + 1))):
            for _ in range(2):
                width = int(torch.randint(0, widest, (), generator=generator))
                start = int(torch.randint(0, length - width, (), generator=generator))
                keep[row].narrow(dim, start, width).zero_()
    return features * keep


def labels_of(transcripts: list[str], units: list[str], split: Callable[[str], Iterable[str]]):
    """Return CTC targets: the labels of all transcripts (int64, indices of `units` from 1), and the number of labels of
    each transcript."""
    label = {unit: index for index, unit in enumerate(units, start=1)}
    rows = [[label[unit] for unit in split(transcript)] for transcript in transcripts]
    return torch.tensor([index for row in rows for index in row]), torch.tensor([len(row) for row in rows])


def ctc_loss(logits: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor):
    """Return the mean CTC loss per label of `(clips, frames, labels)` float32 logits."""
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    lengths = encoded_lengths(mask)
    return nn.functional.ctc_loss(log_probs, targets.to(logits.device), lengths, target_lengths, zero_infinity=True)


def encoded_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Return the number of encoder frames (50 per second) of each clip, from the mask of mel frames (100 per
    second)."""
    return num_encoder_frames(mask.sum(-1))


def read_words(logits: torch.Tensor, lengths: torch.Tensor) -> list[str]:
    """Return the greedy CTC decoding of `(clips, frames, 1 + words)`."""
    words, texts = lexicon().words, []
    for row, length in zip(logits.argmax(-1), lengths, strict=True):
        labels = torch.unique_consecutive(row[:length])
        texts.append(" ".join(words[label - 1] for label in labels.tolist() if label))
    return texts


@torch.inference_mode()
def word_error_rate(encoder: nn.Module, head: nn.Linear, clips: list[tuple[np.ndarray, str]]) -> float:
    readings = []
    encoder.eval()
    for start in range(0, len(clips), 64):
        features, mask = collate(clips[start : start + 64])
        device = head.weight.device
        hidden = encoder(features.to(device), mask.to(device)).last_hidden_state
        readings += read_words(head(hidden).cpu(), encoded_lengths(mask))
    encoder.train()
    return jiwer.wer([transcript for _, transcript in clips], readings)


def save(encoder: LsmAudioTower, head: nn.Linear, output: Path) -> None:
    model = WhisperModel(encoder.config)
    model.encoder.load_state_dict(encoder.state_dict())
    model.save_pretrained(output)
    WhisperFeatureExtractor().save_pretrained(output)
    save_model(head, output / HEAD_FILE)


class TrainableTower(LsmAudioTower):
    """An audio tower that learns; in an LSM it is frozen, without gradients and always in eval mode."""

    forward = LsmAudioTower.forward.__wrapped__  # without its `torch.no_grad`
    train = nn.Module.train


def trainable_tower(args: argparse.Namespace) -> TrainableTower:
    config = WhisperConfig(
        d_model=args.hidden_size,
        encoder_layers=args.layers,
        encoder_attention_heads=args.heads,
        encoder_ffn_dim=4 * args.hidden_size,
        decoder_layers=0,
        decoder_attention_heads=args.heads,
        decoder_ffn_dim=4,
        max_target_positions=1,
        vocab_size=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    tower = TrainableTower(config)
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            # With the library's initial weights, N(0, 0.02), the convolutions would keep only 2 % of the signal.
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if isinstance(module, nn.Linear) else "relu")
    with torch.no_grad():  # Whisper's sinusoids, smaller so that they do not dominate the speech
        tower.embed_positions.weight.copy_(0.3 * sinusoids(*tower.embed_positions.weight.shape))
    return tower


def batches(clips: list[tuple[np.ndarray, str]], frames: int, generator: torch.Generator):
    """Yield batches of clips of similar length without end, each of at most `frames` mel frames including padding."""
    while True:
        order = torch.randperm(len(clips), generator=generator).tolist()
        for start in range(0, len(order), 1024):
            groups: list[list[int]] = [[]]
            for index in sorted(order[start : start + 1024], key=lambda index: len(clips[index][0])):
                if groups[-1] and (len(groups[-1]) + 1) * len(clips[index][0]) > frames:
                    groups.append([])
                groups[-1].append(index)
            for group in torch.randperm(len(groups), generator=generator).tolist():
                yield [clips[index] for index in groups[group]]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    phrases = load_clips("train", args.seed, args.phrases, args.workers, most_words=2)
    clips = load_clips("train", args.seed, args.clips, args.workers)
    test = load_clips("test", args.seed, args.test_clips, args.workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = trainable_tower(args).to(device)
    head = nn.Linear(args.hidden_size, 1 + len(lexicon().words)).to(device)
    speller = nn.Linear(args.hidden_size, 1 + len(LETTERS)).to(device)
    modules = (encoder, head, speller)
    parameters = [parameter.requires_grad_() for module in modules for parameter in module.parameters()]
    encoder.embed_positions.requires_grad_(False)
    logger.info("%.2f M parameters", sum(parameter.numel() for parameter in parameters) / 1e6)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 400, args.steps)
    output, scores = Path(args.output), {}
    phrases_only = itertools.islice(batches(phrases, args.batch_frames, generator), args.phrase_steps)
    mixed = batches(phrases + clips, args.batch_frames, generator)
    steps = zip(range(1, args.steps + 1), itertools.chain(phrases_only, mixed), strict=False)
    progress = tqdm(steps, total=args.steps, desc="nano encoder")
    encoder.train()
    for step, batch in progress:
        features, mask = collate(batch)
        transcripts = [transcript for _, transcript in batch]
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            features = features if step <= args.phrase_steps else spec_augment(features, generator)
            hidden = encoder(features.to(device), mask.to(device)).last_hidden_state
        hidden = hidden.float()
        loss = ctc_loss(head(hidden), mask, *labels_of(transcripts, lexicon().words, str.split))
        loss = loss + ctc_loss(speller(hidden), mask, *labels_of(transcripts, LETTERS, list))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.eval_every == 0 or step == args.steps:
            scores[step] = word_error_rate(encoder, head, test[:200] if step < args.steps else test)
            logger.info("step %d loss %.3f test WER %.4f", step, loss.item(), scores[step])
            save(encoder, head, output)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    report = {"settings": settings, "test_wer": scores[args.steps], "test_clips": len(test)}
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", required=True, help="folder of the encoder")
    parser.add_argument("--clips", type=int, default=30_000, help="number of training clips")
    parser.add_argument("--test-clips", type=int, default=1_000, help="number of test clips")
    parser.add_argument("--steps", type=int, default=7_000, help="number of steps")
    parser.add_argument("--batch-frames", type=int, default=4_800, help="mel frames (10 ms) per batch")
    parser.add_argument("--phrases", type=int, default=12_000, help="number of clips with one or two words")
    parser.add_argument("--phrase-steps", type=int, default=1_000, help="first steps, which have only such clips")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the encoder")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--heads", type=int, default=4, help="number of attention heads")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between two evaluations")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of the training")
    parser.add_argument("--workers", type=int, default=2, help="number of processes that synthesise clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws and initial weights")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster on GPUs and on CPUs with AVX512-BF16")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
