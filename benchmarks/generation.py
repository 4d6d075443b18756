"""Time whole answers side by side, many questions about one clip, and decoding relative to the memory bandwidth.

    python -m benchmarks.generation --threads 1 --json generation.json --plot generation.png
    python -m benchmarks.generation --threads 1 --only ours,original --workload librispeech

All contestants answer batches of 8 clips with 40 tokens, greedily, from log-mel features. For ours alone, there are two
more figures: 16 questions about one clip of 30 s, encoded once and asked in one batch, against asking them one by one
(`ratios.one_by_one.questions`); and the decoding rate as a fraction of what the memory bandwidth allows if every weight
is read once per token (`limit.decode`), with the default cache, with a static one, and on a GPU with compiled decoding.
"""

import torch

from benchmarks.comparing import Results, Setup, arguments, name_of, take_turns
from benchmarks.contestants import Contestant, Ours
from benchmarks.machine import bandwidth
from benchmarks.workloads import RESPONSE, WORKLOADS, Row
from recipes.training.throughput import seconds_of

QUESTIONS, CLIP = 16, 30.0


def answers(contestant: Contestant, workload: str, batch_size: int, count: int) -> list:
    made = [contestant.prompts(rows) for rows in contestant.some_batches(workload, batch_size, count)]
    return [lambda batch=batch: contestant.write(batch, RESPONSE) for batch in made]


def questions(ours: Ours) -> dict[str, list]:
    """Return jobs that ask the same questions about the same clip, in one batch and one by one."""
    prompts = [ours.prompts([Row(CLIP, seed)]) for seed in range(QUESTIONS)]
    features = {name: prompts[0][name] for name in ("input_features", "input_features_mask")}
    # All prompts have the same length, because the clip is the same.
    text = {name: torch.cat([prompt[name] for prompt in prompts]) for name in ("input_ids", "attention_mask")}
    alone = [{**prompt, **features} for prompt in prompts]

    @torch.inference_mode()
    def at_once():
        speech = ours.model.get_audio_features(**features).pooler_output
        return ours.write({**text, "audio_embeds": speech.repeat(QUESTIONS, 1)}, RESPONSE)

    def one_by_one():
        return torch.cat([ours.write(prompt, RESPONSE) for prompt in alone])

    if not torch.equal(at_once(), one_by_one()):
        raise ValueError("The answers differ, so that the times cannot be compared.")
    return {"ours": [at_once], "one_by_one": [one_by_one]}


def decode_limit(ours: Ours, tokens: int = 64, repeats: int = 3) -> dict[str, float]:
    """Return the rate at which weights are read while decoding, relative to the memory bandwidth, by kind of cache."""
    llm, prompt = ours.model.model.language_model, ours.prompts([Row(5.0, 0)])
    weights = [*llm.layers.parameters(), ours.model.lm_head.weight]
    floor = sum(weight.numel() * weight.element_size() for weight in weights) / bandwidth(ours.device, ours.dtype)
    ways = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    if ours.device.type == "cuda":
        ways["compiled"] = {"cache_implementation": "static"}
    shares = {}
    for name, settings in ways.items():
        ours.write(prompt, 1 + tokens, **settings)
        whole, first = (
            min(
                seconds_of(lambda count=count, settings=settings: ours.write(prompt, count, **settings), ours.device)
                for _ in range(repeats)
            )
            for count in (1 + tokens, 1)
        )
        shares[name] = floor * tokens / (whole - first)
    return shares


def main() -> None:
    parser = arguments(__doc__, WORKLOADS)
    parser.add_argument("--batch", type=int, default=8, help="number of clips per batch")
    parser.add_argument("--batches", type=int, default=2, help="number of batches that represent a workload")
    options = parser.parse_args()
    setup = Setup(options, WORKLOADS)
    results = Results(setup.describe(), f"{options.batches} batches of {options.batch} answers of {RESPONSE} tokens")
    for group in setup.contestants():
        for workload in options.workload:
            jobs = {name_of(one): answers(one, workload, options.batch, options.batches) for one in group}
            for name, seconds in take_turns(jobs, options.rounds, setup.device).items():
                results.add(name, workload, seconds)
        for one in group:
            if type(one) is Ours:
                for name, seconds in take_turns(questions(one), options.rounds, setup.device).items():
                    results.add(name, "questions", seconds)
                results.more["limit"] = {"decode": decode_limit(one)}
    reached = ", ".join(f"{way} cache {part:.0%}" for way, part in results.more["limit"]["decode"].items())
    results.notes.append(f"Share of the memory bandwidth that ours uses to decode one answer: {reached}.")
    results.report(options)


if __name__ == "__main__":
    main()
