"""Memory of a small and a large build of the self-powered set: it must not grow with the corpus.

    python -m benchmarks.build_memory --llm assets/nano/llm --rows 10000 100000

Each build runs in a separate process, with all seven tasks on every utterance of the nano corpus. The figure is the
peak of the resident memory according to the operating system.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dataset_builders.nano.tasks import POOL_PATH
from language_models.command_line import parser_of

COMMAND = [sys.executable, "-m", "dataset_builders.self_powered", "build", "--corpus", "nano", "--pool", str(POOL_PATH)]


def peak_memory(llm: str, rows: int, threads: int) -> float:
    """Return the peak memory in MiB of a build with this number of rows.

    Raises:
        ChildProcessError: the build fails. Shows the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--llm", llm, "--limit", str(rows), "--tasks-per-utterance", "7", "--output", f"{folder}/set"]
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                [*COMMAND, *options], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise ChildProcessError(f"the build ended with {code}: {Path(f'{folder}/log').read_text()[-1000:]}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", default="assets/nano/llm", help="folder or Hub id of the LLM")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="number of rows of each build")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="number of CPU threads")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    peaks = {rows: peak_memory(args.llm, rows, args.threads) for rows in args.rows}
    smallest = peaks[min(peaks)]
    for rows, peak in peaks.items():
        print(f"{rows} rows: at most {peak:.0f} MiB, {peak / smallest:.3f} times that of the smallest build")
    if args.json:
        Path(args.json).write_text(json.dumps({str(rows): peak for rows, peak in peaks.items()}), encoding="utf-8")


if __name__ == "__main__":
    main()
