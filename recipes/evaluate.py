r"""Evaluate a speech LLM: its tasks, whether it follows instructions, and whether it listens.

    python -m recipes.evaluate --model runs/quickstart/checkpoint --base runs/quickstart/base --tasks nano \
        --vanilla runs/quickstart/training/vanilla --output runs/evaluation
    python -m recipes.evaluate --model Qwen/Qwen2-Audio-7B-Instruct --tasks librispeech_clean --output runs/qwen2_audio
    python -m recipes.evaluate --endpoint http://localhost:8000/v1 --tasks librispeech_clean --output runs/served
    python -m recipes.evaluate --model CHECKPOINT --tasks voicebench --judge http://localhost:8000/v1 --output runs/mine
    python -m recipes.evaluate --list

`--model` is an LSM or another speech LLM of transformers. `--tasks` are names, groups or suites of
`evaluation/tasks.yaml`, and `--data librispeech_clean=DIR` names a local corpus. Some tasks need an LLM that judges the
answers (`--judge`). The model is compared with baselines (`--systems`): the text LLM (`--base`, otherwise the
checkpoint itself), which reads the transcript, a cascade, a vanilla LSM, and an LSM trained as in the paper. In the
controls, the model gets shuffled clips, silence, or the instruction of another task. The command writes all answers
(`predictions.parquet`), `results.json`, `results.md`, `model_index.yaml` for the model card, `.eval_results/` for the
model's repository, and `report.html`. If it is interrupted, run it again to continue.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("eval"):
    from recipes.evaluation import tables
    from recipes.evaluation.evaluation import Evaluation
    from recipes.evaluation.systems import SYSTEMS
    from recipes.evaluation.tasks import EvaluationTask, choose_tasks, load_tasks, override
    from recipes.listening.features import AudioFeatureStore


def list_tasks(tasks: dict[str, EvaluationTask]) -> str:
    width = max(map(len, tasks))
    return "\n".join(f"{task.group:<10} {task.name:<{width}}  {task.description}" for task in tasks.values())


def parse_overrides(entries: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the settings in entries of the form `TASK=PATH` or `TASK.SETTING=VALUE`, by task, for `tasks.override`.

    Raises:
        ValueError: an entry has another form.
    """
    overrides: dict[str, dict[str, str]] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        name, _, setting = key.partition(".")
        if not equals or not name:
            raise ValueError(f"cannot read --data {entry!r}; expected TASK=PATH or TASK.SETTING=VALUE.")
        overrides.setdefault(name, {})[setting or "corpus"] = value
    return overrides


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", help="folder or Hub id of a speech LLM")
    parser.add_argument("--endpoint", help="instead of --model: URL of an OpenAI-compatible server with a speech LLM")
    parser.add_argument("--endpoint-model", help="name of the model at the endpoint, if it has several")
    parser.add_argument(
        "--instruction-first", action="store_true", help="send the endpoint the instruction before the clip"
    )
    parser.add_argument("--judge", help="URL of an OpenAI-compatible server with the LLM that judges open answers")
    parser.add_argument("--judge-model", help="name of the model at the judge's server, if it has several")
    parser.add_argument("--tasks", nargs="+", help="names of tasks, groups or suites; --list shows them")
    parser.add_argument("--output", help="folder of answers, results and report")
    parser.add_argument("--base", help="the text LLM that the model was composed of")
    parser.add_argument("--vanilla", help="an LSM trained on transcription alone")
    parser.add_argument("--paper", help="an LSM trained as in the paper: the whole LLM, with cross-entropy")
    parser.add_argument("--asr", help="the cascade's ASR model (a Whisper or a speech LLM); the model by default")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"systems that answer, among {', '.join(SYSTEMS)}; by default all whose checkpoints are given",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TASK=PATH",
        help="where the corpus of a task is; TASK.SETTING=VALUE replaces a setting of it, such as `split`",
    )
    parser.add_argument("--task-file", help="YAML of your own tasks, in the form of evaluation/tasks.yaml")
    parser.add_argument("--list", action="store_true", help="show all tasks and stop")
    parser.add_argument("--limit", type=int, help="largest number of utterances of a task; all by default")
    parser.add_argument(
        "--control-limit", type=int, help="largest number of utterances for the controls; all by default"
    )
    parser.add_argument("--audio-feature-store", help="folder of recipes.store_features, so that no clip is encoded")
    parser.add_argument("--batch-size", type=int, default=16, help="questions that are answered together")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument(
        "--constrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether closed questions are also answered with only the allowed answers possible",
    )
    parser.add_argument("--dtype", default="auto", help="data type of the models; auto is that of each checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tasks = load_tasks(more=args.task_file)
    if args.list:
        sys.exit(print(list_tasks(tasks)))
    if not ((args.model or args.endpoint) and args.tasks and args.output):
        parser.error("--model, --tasks and --output are needed; --list shows the tasks. --endpoint replaces --model.")
    if args.model and args.endpoint:
        parser.error(f"--model {args.model} and --endpoint {args.endpoint} exclude each other.")
    args.model = args.model or args.endpoint
    for name, settings in parse_overrides(args.data).items():
        tasks |= {task.name: override(task, settings) for task in choose_tasks([name], tasks)}
    checkpoints = ("model", "base", "vanilla", "paper", "asr")
    run = Evaluation(
        output=args.output,
        checkpoints={name: path for name in checkpoints if (path := getattr(args, name))},
        tasks=choose_tasks(args.tasks, tasks),
        systems=args.systems,
        limit=args.limit,
        control_limit=args.control_limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        constrained=args.constrained,
        seed=args.seed,
        dtype=args.dtype,
        store=AudioFeatureStore(args.audio_feature_store) if args.audio_feature_store else None,
        judge={"url": args.judge, "name": args.judge_model} if args.judge else None,
        endpoint={"name": args.endpoint_model, "instruction_first": args.instruction_first},
    )
    print(tables.markdown(run.run()))


if __name__ == "__main__":
    main()
