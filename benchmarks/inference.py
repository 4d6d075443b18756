"""Measure the time to the first token of an answer about one clip, side by side.

    python -m benchmarks.inference --threads 1 --json inference.json --plot inference.png
    python -m benchmarks.inference --threads 1 --only ours,original --workload common_voice

The time runs from a clip's log-mel features to the first token from `generate`. Contestants that truncate or refuse a
file of ten minutes are left out for this file.
"""

from benchmarks.comparing import Results, Setup, arguments, name_of, take_turns
from benchmarks.contestants import Contestant
from benchmarks.workloads import TEN_MINUTES, WORKLOADS, Row, draw_rows, representative, static_batches

TEN = "ten_minutes"
CHOICES = [*WORKLOADS, TEN]


def clips(workload: str, count: int) -> list[Row]:
    if workload == TEN:
        return [Row(TEN_MINUTES, 0)]
    return [row for [row] in representative(static_batches(draw_rows(workload), 1), count)]


def first_tokens(contestant: Contestant, rows: list[Row]) -> list:
    made = [contestant.prompts([row]) for row in rows]
    return [lambda batch=batch: contestant.write(batch, 1) for batch in made]


def main() -> None:
    parser = arguments(__doc__, CHOICES)
    parser.add_argument("--clips", type=int, default=5, help="number of clips that represent a workload")
    options = parser.parse_args()
    setup = Setup(options, CHOICES)
    results = Results(
        setup.describe(), f"First tokens about {options.clips} clips one after the other (one of ten minutes)"
    )
    for group in setup.contestants():
        for workload in options.workload:
            rows = clips(workload, options.clips)
            able = [one for one in group if one.longest >= max(row.seconds for row in rows)]
            jobs = {name_of(one): first_tokens(one, rows) for one in able}
            for name, seconds in (take_turns(jobs, options.rounds, setup.device) if jobs else {}).items():
                results.add(name, workload, seconds)
            if unable := [name_of(one) for one in group if one not in able]:
                results.notes.append(f"Left out of {workload}, because it is too long for them: {', '.join(unable)}.")
    results.report(options)


if __name__ == "__main__":
    main()
