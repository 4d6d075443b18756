"""Train the nano chat LLM: a 2 M parameter Llama that follows instructions about sentences of the nano language.

    python -m recipes.nano.train_llm --output assets/nano/llm

It learns all tasks of the pool, also those that no LSM is trained on, from sentences of the `train` split and the
`seen` paraphrases. The instruction is before or after the sentence. The evaluation uses `test` sentences and `held_out`
paraphrases. All draws depend on `--seed`. The output is an ordinary `LlamaForCausalLM` with a BPE tokenizer and a chat
template.
"""

import argparse
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.instructions import Task, load_pool
from dataset_builders.nano.grammar import sample_sentence
from dataset_builders.nano.tasks import POOL_PATH, answers, is_correct
from language_models.command_line import parser_of

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the nano LLM knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]


def sample_example(rng: random.Random, pool: dict[str, Task], split: str, paraphrases: str) -> dict[str, str]:
    """Draw an example: task, instruction, transcript, a right answer, and whether the instruction comes first."""
    task = rng.choice(list(pool))
    transcript = str(sample_sentence(rng, split))
    right = answers(task, transcript)
    response = rng.choice(right) if task == "continuation" else right[0]
    return {
        "task": task,
        "instruction": rng.choice(getattr(pool[task], paraphrases)),
        "transcript": transcript,
        "response": response,
        "instruction_first": rng.random() < 0.5,
    }


def decisive_words(pool: dict[str, Task]) -> dict[str, set[str]]:
    """Return the words of each task that distinguish it from the others: words that only its seen lines have
    (`sentiment`, `keywords`, ...), and `Spanish`, which all lines of two tasks have."""
    lines = {name: [set(bare_words(line).split()) for line in task.seen] for name, task in pool.items()}
    counts = Counter(word for spoken in lines.values() for word in set.union(*spoken))
    return {
        name: {word for word in set.union(*spoken) if counts[word] == 1}
        | {word for word in set.intersection(*spoken) if counts[word] == 2}
        for name, spoken in lines.items()
    }


def filler_words(pool: dict[str, Task]) -> list[str]:
    """Return the words of seen lines that do not distinguish tasks."""
    decisive = set().union(*decisive_words(pool).values())
    return sorted(
        {word for task in pool.values() for line in task.seen for word in bare_words(line).split()} - decisive
    )


def vary(instruction: str, decisive: set[str], fillers: list[str], rng: random.Random) -> str:
    """Return a varied instruction: some words are dropped, others are added, and order and punctuation change.

    Without this, a model of 2 M parameters learns how the lines of the pool begin and end, and answers `In Spanish, how
    do you express what is said?` as if it were a question about the text. The decisive words remain, because they name
    the task.
    """
    if not instruction or rng.random() < 0.2:
        return instruction
    words = instruction.rstrip(".?:").split()
    words = [word for word in words if bare_words(word) in decisive or rng.random() > 0.35] or words
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        words.insert(rng.randrange(len(words) + 1), rng.choice(fillers))
    order = rng.random()
    if order < 0.3:
        rng.shuffle(words)
    elif order < 0.6:
        turn = rng.randrange(len(words))
        words = words[turn:] + words[:turn]
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice((".", "?", ""))


def train_tokenizer(pool: dict[str, Task], seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on instructions, sentences and answers. Almost every word of the nano language
    is one token."""
    rng = random.Random(seed)

    def texts() -> Iterator[str]:
        for task in pool.values():
            yield from [line for line in task.seen if line] * 20
        for _ in range(20_000):
            example = sample_example(rng, pool, "train", "seen")
            yield f"\n{example['transcript']}\n{example['response']}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2047,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def user_turn(example: dict[str, str]) -> list[dict[str, str]]:
    """Return the user's message, in the same form as `LsmProcessor.conversation`."""
    parts = [part for part in (example["instruction"], example["transcript"]) if part]
    return [{"role": "user", "content": "\n".join(parts if example["instruction_first"] else reversed(parts))}]


def collate(examples: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Return right-padded `input_ids`, `attention_mask` and `labels` (int64, `(batch, length)`). Only the responses
    have labels."""
    rows, prompts = [], []
    for example in examples:
        prompt = tokenizer.apply_chat_template(user_turn(example), tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt).input_ids
        prompts.append(len(prompt))
        rows.append(prompt + tokenizer(example["response"]).input_ids + [tokenizer.eos_token_id])
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for labels, length in zip(batch["labels"], prompts, strict=True):
        labels[:length] = -100
    return batch


@torch.inference_mode()
def evaluate(model, tokenizer, pool: dict[str, Task], rows: int, seed: int) -> dict[str, float]:
    """Return the share of right greedy answers by task, on test sentences and held-out paraphrases."""
    rng = random.Random(seed)
    examples = [sample_example(rng, pool, "test", "held_out") for _ in range(rows)]
    right: dict[str, list[bool]] = {task: [] for task in pool}
    model.eval()
    for start in range(0, rows, 250):
        batch = examples[start : start + 250]
        prompts = [
            tokenizer.apply_chat_template(user_turn(e), tokenize=False, add_generation_prompt=True) for e in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs.input_ids.shape[1] :]
        for example, answer in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            right[example["task"]].append(is_correct(example["task"], example["transcript"], answer))
    model.train()
    return {task: sum(hits) / max(1, len(hits)) for task, hits in right.items()}


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pool, rng = load_pool(POOL_PATH), random.Random(args.seed)
    decisive, fillers = decisive_words(pool), filler_words(pool)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(pool, args.seed)
    model = LlamaForCausalLM(configuration(tokenizer)).to(device)
    logger.info("%.2f M parameters, %d tokens", model.num_parameters() / 1e6, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, args.steps)
    output = Path(args.output)
    progress = tqdm(range(1, args.steps + 1), desc="nano LLM")
    for step in progress:
        examples = [sample_example(rng, pool, "train", "seen") for _ in range(args.batch_size)]
        for example in examples:
            example["instruction"] = vary(example["instruction"], decisive[example["task"]], fillers, rng)
        batch = collate(examples, tokenizer).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.eval_every == 0 or step == args.steps:
            scores = evaluate(model, tokenizer, pool, 600 if step < args.steps else 2000, seed=1)
            logger.info("step %d %s", step, {task: round(score, 3) for task, score in scores.items()})
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    report = {"settings": settings, "accuracy": scores}
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", required=True, help="folder of the LLM")
    parser.add_argument("--steps", type=int, default=3500, help="number of steps")
    parser.add_argument("--batch-size", type=int, default=64, help="number of examples per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between two evaluations")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws and initial weights")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster on GPUs and on CPUs with AVX512-BF16")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
