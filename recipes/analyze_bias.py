r"""Where an answer comes from: layer by layer, the share that the instruction and the speech have in it.

    python -m recipes.analyze_bias --model runs/quickstart/checkpoint --data runs/quickstart/corpus --split test \
        --pool dataset_builders/nano/instructions.yaml --output runs/bias/self_powered
    python -m recipes.analyze_bias --model runs/quickstart/base --slot transcript --data runs/quickstart/corpus \
        --split test --pool dataset_builders/nano/instructions.yaml --output runs/bias/text_llm \
        --beside "self-powered LSM=runs/bias/self_powered/bias.json"

`--model` is an LSM, another speech LLM of transformers or, with `--slot transcript`, a text LLM. `--data` is a
self-powered set or an ASR corpus. Writes `bias.json`, the pictures and `report.html`.
"""

import json
import logging
from pathlib import Path

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("eval"):
    from dataset_builders.instructions import SELF_POWERED_TASKS, load_pool
    from recipes.bias.analysis import analyze, behave, write
    from recipes.bias.rows import TARGETS, load_rows, with_targets
    from recipes.evaluation.following import BY_FORM
    from recipes.listening.speech_llm import load

logger = logging.getLogger(__name__)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="self-powered set, or ASR corpus: folder, manifest or Hub id")
    parser.add_argument("--split", help="`test` if there is one, else the first")
    parser.add_argument("--output", required=True, help="folder of bias.json, pictures and report")
    parser.add_argument(
        "--slot", choices=("audio", "transcript"), default="audio", help="what stands where the speech belongs"
    )
    parser.add_argument("--target", choices=TARGETS, default="response", help="which response is traced")
    parser.add_argument("--tasks", nargs="+", default=list(SELF_POWERED_TASKS), help="tasks whose answers are traced")
    parser.add_argument(
        "--pool",
        help="YAML file of tasks and their wordings, of which the held-out ones are asked about an ASR corpus; by "
        "default dataset_builders/instructions.yaml",
    )
    parser.add_argument("--limit", type=int, default=120, help="largest number of rows")
    parser.add_argument(
        "--checker",
        default=BY_FORM,
        help="module whose is_correct(task, transcript, response) judges the answers; by default their form alone is "
        "judged. Of nano: dataset_builders.nano.tasks",
    )
    parser.add_argument("--label", help="the model's label in figures; its name by default")
    parser.add_argument(
        "--beside", nargs="*", default=[], metavar="LABEL=BIAS_JSON", help="other results to draw in the same figure"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="rows that are traced together")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    beside = {}
    for entry in args.beside:
        name, equals, file = entry.rpartition("=")
        if not equals or not Path(file).is_file():
            parser.error(f"--beside {entry!r}: expected LABEL=FILE, a bias.json that is there.")
        if name in beside:
            parser.error(f"--beside names {name!r} twice.")
        beside[name] = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = load_rows(args.data, args.split, args.limit, args.tasks, args.seed, load_pool(args.pool))
    llm = load(args.model)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    answers = [reply.text for reply in llm.respond(rows, args.slot, **options)]
    traced = with_targets(rows, llm, args.target, answers, **options)
    if len(traced) < len(rows):
        logger.warning("%d of %d rows have an empty response and are not traced", len(rows) - len(traced), len(rows))
    bias = analyze(llm, traced, args.slot, batch_size=args.batch_size)
    about = {"model": llm.name, "data": args.data, "source": rows[0]["source"], "hear": args.slot}
    bias |= behave(rows, answers, args.checker) | about | {"target": args.target}
    label = args.label or llm.name
    if label in beside:
        label = f"{label} (this run)"
    write(Path(args.output), bias, label, beside)
    logger.info("%s: following %s, transcript copies %s", args.output, bias["following"], bias["transcript_copy"])


if __name__ == "__main__":
    main()
