r"""Measure how fast the LLM answers here and on servers, on the same rows, in turns.

    python -m benchmarks.responders --llm LLM --corpus CORPUS --split test --rows 64 \
        --servers llama.cpp=http://localhost:8001/v1 vLLM=http://localhost:8002/v1

The servers must already run the LLM, and be the only other work of the machine. They share it with this process, which
waits while they answer. Rows per second are of the clock. On a machine that others use as well, compare the rows per
second of CPU time: `--pids llama.cpp=1234` adds the time of a server to that of this process. `same` is the share of
the answers of a server that are those of the LLM here; other arithmetic, such as 4-bit weights, gives other answers.
No row is asked twice, because servers keep prompts that they have read.
"""

import itertools
import json
import statistics
import time

import psutil
import torch
import transformers

from benchmarks.machine import describe
from dataset_builders.building import draw_rows
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, Draw, load_pool
from dataset_builders.responders.exchange import Request
from dataset_builders.responders.local import LocalResponder, Responder
from dataset_builders.responders.server import ServerResponder
from language_models.command_line import parser_of


def cpu_seconds(server: int | None) -> float:
    """Return the CPU time so far of this process, and of a server and its children."""
    family = [] if server is None else [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in family)


def measure(
    responders: dict[str, Responder], turns: list[list[Request]], pids: dict[str, int] | None = None
) -> dict[str, dict]:
    """Return the rows per second of each responder in each turn, their median, the rows per second of its CPU time (of
    a server whose process is in `pids`), and the share of answers that are those of the first responder."""
    answers: dict[str, list[str]] = {name: [] for name in responders}
    rates: dict[str, list[float]] = {name: [] for name in responders}
    cpu_rates: dict[str, list[float]] = {name: [] for name in responders}
    local, pids = next(iter(responders)), pids or {}
    for responder in responders.values():
        responder.respond(turns[0][:1])  # warms up
    for requests in turns:
        for name, responder in responders.items():
            start, cpu = time.perf_counter(), cpu_seconds(pids.get(name))
            answers[name] += [reply.text for reply in responder.respond(requests)]
            rates[name].append(len(requests) / (time.perf_counter() - start))
            if name == local or name in pids:
                cpu_rates[name].append(len(requests) / (cpu_seconds(pids.get(name)) - cpu))
    first = answers[local]
    return {
        name: {
            "rows_per_second": statistics.median(rates[name]),
            "turns": rates[name],
            "turns_of_cpu_time": cpu_rates[name],
            "same": sum(mine == theirs for mine, theirs in zip(first, answers[name], strict=True)) / len(first),
        }
        for name in responders
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", required=True, help="folder or Hub id of the LLM")
    parser.add_argument("--corpus", required=True, help="ASR corpus whose transcripts are read")
    parser.add_argument("--split", default="test", help="split of the corpus")
    parser.add_argument("--rows", type=int, default=64, help="number of answers in a turn")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="most tokens of an answer")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements")
    parser.add_argument("--dtype", default="auto", help="data type of the LLM here")
    parser.add_argument("--servers", nargs="*", default=[], metavar="NAME=URL", help="servers that run the LLM")
    parser.add_argument("--pids", nargs="*", default=[], metavar="NAME=PID", help="processes of the servers")
    parser.add_argument("--prompt-format", default="tokens", help="tokens; or text, if a server takes no tokens")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    draw = Draw(load_pool(), dict.fromkeys(SELF_POWERED_TASKS, 1.0))
    utterances = list(itertools.islice(open_corpus(args.corpus, args.split), args.rows * args.turns))
    requests = [Request(row["instruction"], row["transcript"], row["task"]) for row in draw_rows(utterances, draw)]
    turns = [requests[turn * args.rows : (turn + 1) * args.rows] for turn in range(args.turns)]
    if not all(turns):
        parser.error(f"{args.corpus} has {len(requests)} rows; {args.turns} turns of {args.rows} need more.")
    pids = {name: int(pid) for name, pid in (process.split("=", 1) for process in args.pids)}
    responders: dict[str, Responder] = {"here": LocalResponder(args.llm, args.max_new_tokens, dtype=args.dtype)}
    for name, url in (server.split("=", 1) for server in args.servers):
        responders[name] = ServerResponder(
            args.llm, url, max_new_tokens=args.max_new_tokens, prompt_format=args.prompt_format
        )
    print(json.dumps({"machine": describe(torch.device("cpu")), **measure(responders, turns, pids)}, indent=2))


if __name__ == "__main__":
    main()
