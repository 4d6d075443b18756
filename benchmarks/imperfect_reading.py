"""Measure what each imperfection of a perfect listener would cost a text LLM: what bounds an LSM with this LLM.

    python -m benchmarks.imperfect_reading --llm LLM --corpus CORPUS --split test --rows 48

The LLM answers an instruction about each transcript. Then it gets the same transcripts in other ways:

- `zeros`, `mean`, `space`: all words are right, and blanks follow them up to 6.25 speech tokens per second, as the
  reader gives them where they are not masked. A blank is a vector of zeros, the mean of all embeddings, or the
  embedding of a space.
- `wrong P %`: this share of the words is another word of the split.

`lost` is the log-likelihood that its own answers lose, in nats per token, and `chrf` compares its new answers with
them, from 0 to 100. Both are those of `agreement` in recipes.evaluate.
"""

import itertools
import json
import random
import statistics

import torch
import transformers
from sacrebleu.metrics import CHRF

from benchmarks.machine import describe
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, Draw, load_pool
from dataset_builders.responders.local import LocalResponder
from language_models.command_line import parser_of
from language_models.generation import GREEDY, read_answers
from recipes.listening.collator import render_prompt
from recipes.training.alignment import MARK, Slot

TOKENS_PER_SECOND = 6.25
WRONG = (0.1, 0.2, 0.35)


class TextLLM:
    """The text LLM, and the rows about which it is asked, dicts with `instruction`, `transcript` and `duration` in
    seconds."""

    def __init__(self, responder: LocalResponder, rows: list[dict]):
        self.model, self.tokenizer, self.rows = responder.model, responder.processor.tokenizer, rows
        self.most = responder.max_new_tokens
        self.embeddings = self.model.get_input_embeddings().weight.detach()
        self.around = [
            [
                self.ids(part)
                for part in render_prompt(responder.processor, row | {"transcript": MARK}, "transcript").split(MARK)
            ]
            for row in rows
        ]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompts(self, transcripts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the prompts as embeddings, with the embeddings of each transcript in their place."""
        parts = zip(self.around, transcripts, strict=True)
        return [torch.cat([self.embeddings[before], said, self.embeddings[after]]) for (before, after), said in parts]

    @torch.inference_mode()
    def answers(self, prompts: list[torch.Tensor]) -> list[list[int]]:
        """Return the ids of the greedy answers, with the end."""
        longest = max(map(len, prompts))
        padded = [torch.nn.functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs = {"inputs_embeds": torch.stack(padded), "attention_mask": mask}
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=self.most).tolist()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return [
            [*itertools.takewhile(lambda id: id not in ends, ids), *[id for id in ids if id in ends][:1]]
            for ids in output
        ]

    @torch.inference_mode()
    def likelihood(self, prompts: list[torch.Tensor], answers: list[list[int]]) -> float:
        """Return the log-likelihood of the answers, in nats per token."""
        total = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            inputs = torch.cat([prompt, self.embeddings[answer]])[None]
            logits = self.model(inputs_embeds=inputs).logits[0, len(prompt) - 1 : -1].float()
            total += float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
        return total / sum(map(len, answers))

    def texts(self, answers: list[list[int]]) -> list[str]:
        return read_answers(self.tokenizer, answers)


def ways(llm: TextLLM, slot: Slot) -> dict[str, list[torch.Tensor]]:
    """Return the transcripts as embeddings `(pieces, hidden)`, given in each way."""
    transcripts, table = [row["transcript"] for row in llm.rows], llm.embeddings
    pieces = slot.pieces(transcripts)
    blanks = {
        "zeros": torch.zeros_like(table[0]),
        "mean": table.float().mean(0).to(table.dtype),
        "space": table[llm.ids(" ")[0]],
    }
    lengths = [
        max(0, round(row["duration"] * TOKENS_PER_SECOND) - len(ids)) for row, ids in zip(llm.rows, pieces, strict=True)
    ]
    found = {"as text": [table[ids] for ids in pieces]}
    for name, blank in blanks.items():
        found[name] = [
            torch.cat([table[ids], blank.expand(length, -1)]) for ids, length in zip(pieces, lengths, strict=True)
        ]
    words = [word for transcript in transcripts for word in transcript.split()]
    for share in WRONG:
        draw = random.Random(0)
        wrong = [
            " ".join(draw.choice(words) if draw.random() < share else word for word in said.split())
            for said in transcripts
        ]
        found[f"wrong {share:.0%}"] = [table[ids] for ids in slot.pieces(wrong)]
    return found


def measure(responder: LocalResponder, rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return `lost` and `chrf` of each way."""
    llm, slot = TextLLM(responder, rows), Slot(responder.processor)
    given = ways(llm, slot)
    right = llm.prompts(given.pop("as text"))
    answers = llm.answers(right)
    likelihood, texts, result = llm.likelihood(right, answers), llm.texts(answers), {}
    for name, transcripts in given.items():
        prompts = llm.prompts(transcripts)
        pairs = zip(llm.texts(llm.answers(prompts)), texts, strict=True)
        chrf = statistics.mean(CHRF().sentence_score(mine, [theirs]).score for mine, theirs in pairs)
        result[name] = {"lost": likelihood - llm.likelihood(prompts, answers), "chrf": chrf}
        print(name, json.dumps(result[name]), flush=True)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", required=True, help="folder or Hub id of the LLM, or of an LSM with it")
    parser.add_argument("--corpus", required=True, help="ASR corpus whose transcripts are read")
    parser.add_argument("--split", default="test", help="split of the corpus that is asked about")
    parser.add_argument("--rows", type=int, default=48, help="number of transcripts")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--dtype", default="auto", help="data type of the LLM")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = list(itertools.islice(open_corpus(args.corpus, args.split), args.rows))
    draw = Draw(load_pool(), dict.fromkeys(SELF_POWERED_TASKS, 1.0))
    asked = [row | {"instruction": draw.of(row["id"])[0][1]} for row in rows]
    responder = LocalResponder(args.llm, args.max_new_tokens, dtype=args.dtype)
    found = measure(responder, asked)
    print(json.dumps({"machine": describe(torch.device("cpu")), "rows": len(rows), **found}, indent=2))


if __name__ == "__main__":
    main()
