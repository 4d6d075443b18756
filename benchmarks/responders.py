"""Measure how fast the LLM answers here and on servers, on the same rows, in turns.

    python -m benchmarks.responders --llm LLM --corpus CORPUS --split test --rows 64 \
        --servers llama.cpp=http://localhost:8001/v1 vLLM=http://localhost:8002/v1

The servers must already run the LLM, and be the only other work of the machine. They share it with this process, which
waits while they answer. Rows per second are of the clock, and `same` is the share of the answers of a server that are
those of the LLM here; other arithmetic, such as 4-bit weights, gives other answers.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import transformers

from benchmarks.machine import describe
from dataset_builders.building import draw_rows
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, Draw, load_pool
from dataset_builders.responders.exchange import Request
from dataset_builders.responders.local import LocalResponder, Responder
from dataset_builders.responders.server import ServerResponder


def measure(responders: dict[str, Responder], requests: list[Request], turns: int) -> dict[str, dict]:
    """Return the rows per second of each responder in each turn, their median, and the share of answers that are those
    of the first responder."""
    answers: dict[str, list[str]] = {}
    rates: dict[str, list[float]] = {name: [] for name in responders}
    for turn in range(-1, turns):  # the first one warms up
        for name, responder in responders.items():
            start = time.perf_counter()
            answers[name] = [reply.text for reply in responder.respond(requests)]
            if turn >= 0:
                rates[name].append(len(requests) / (time.perf_counter() - start))
    first = next(iter(answers.values()))
    return {
        name: {
            "rows_per_second": statistics.median(rates[name]),
            "turns": rates[name],
            "same": sum(mine == theirs for mine, theirs in zip(first, answers[name], strict=True)) / len(first),
        }
        for name in responders
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder or Hub id of the LLM")
    parser.add_argument("--corpus", required=True, help="ASR corpus whose transcripts are read")
    parser.add_argument("--split", default="test", help="split of the corpus")
    parser.add_argument("--rows", type=int, default=64, help="number of answers in a turn")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="most tokens of an answer")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements")
    parser.add_argument("--dtype", default="bfloat16", help="data type of the LLM here")
    parser.add_argument("--servers", nargs="*", default=[], metavar="NAME=URL", help="servers that run the LLM")
    parser.add_argument("--prompt-format", default="tokens", help="tokens; or text, if a server takes no tokens")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    draw = Draw(load_pool(), dict.fromkeys(SELF_POWERED_TASKS, 1.0))
    rows = draw_rows(list(itertools.islice(open_corpus(args.corpus, args.split), args.rows)), draw)
    requests = [Request(row["instruction"], row["transcript"], row["task"]) for row in rows[: args.rows]]
    responders: dict[str, Responder] = {"here": LocalResponder(args.llm, args.max_new_tokens, dtype=args.dtype)}
    for name, url in (server.split("=", 1) for server in args.servers):
        responders[name] = ServerResponder(
            args.llm, url, max_new_tokens=args.max_new_tokens, prompt_format=args.prompt_format
        )
    print(json.dumps({"machine": describe(torch.device("cpu")), **measure(responders, requests, args.turns)}, indent=2))


if __name__ == "__main__":
    main()
