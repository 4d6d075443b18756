"""Whatever README and docs tell readers to run runs, as it stands there, on tiny things.

The words of a command are kept but for those that `TINY` replaces, which name a Hub id or a split that is not here, and
the options of `SHORT` are added. A block that cannot be run here says so: see tests/pages.py.
"""

import re
import runpy
import shutil
import sys

import datasets
import pytest
from pages import PAGES, ROOT, blocks, called, commands
from peers import write_qwen2_audio

from dataset_builders import publishing
from dataset_builders.nano import speech

NANO = ROOT / "assets" / "nano"
TINY = {
    "openai/whisper-large-v2": "assets/nano/encoder",
    "lmsys/vicuna-7b-v1.5": "assets/nano/llm",
    "Qwen/Qwen2-Audio-7B-Instruct": "qwen2_audio",
    "librispeech": "runs/quickstart/corpus",
    "train.clean.100": "train",
    "test.clean": "test",
    "librispeech_clean": "nano_asr",
    "format": "nano_format",
    "ORIGINAL": "reference",
}
TRAINING = (
    "--max_steps 2 --align_steps 2 --per_device_train_batch_size 4 --use_cpu true --bf16 false --dtype float32 "
    "--gradient_checkpointing false --report_to none"
)
SHORT = {
    "recipes.compose": "--qformer-hidden 32 --qformer-heads 4",
    "recipes.convert_reference": "--qformer-heads 4",
    "recipes.sft": TRAINING,
    "recipes.sft --config": f"{TRAINING} --global_batch_size 4 --dataset_train_split train "
    "--audio assets/nano/encoder --text assets/nano/llm --dataset_name data/self_powered",
    "recipes.align": "--align_steps 2 --use_cpu true --bf16 false --dtype float32",
    "recipes.evaluate": "--limit 2 --max-new-tokens 4",
    "recipes.analyze_bias": "--limit 4 --max-new-tokens 4",
    "dataset_builders.self_powered build": "--limit 12",
}
# What a page begins with that another page, or the quickstart, has made.
BEFORE = {
    "data.md": ["recipes.compose --audio assets/nano/encoder --text assets/nano/llm --output checkpoints/base"],
    "fine-tuning.md": [
        "recipes.compose --audio assets/nano/encoder --text assets/nano/llm --output checkpoints/base",
        "dataset_builders.self_powered build --llm assets/nano/llm --corpus librispeech --output data/self_powered",
    ],
}


@pytest.fixture
def workplace(lsm_dir, tmp_path, monkeypatch):
    """A folder where the repository's own files and the quickstart's results are where the pages say."""
    monkeypatch.chdir(tmp_path)
    for name in ("assets", "dataset_builders", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "reference").symlink_to(ROOT / "tests" / "reference")
    write_qwen2_audio(tmp_path / "qwen2_audio")
    speech.build(tmp_path / "runs" / "quickstart" / "corpus", {"train": 12, "test": 4})
    for name in ("base", "checkpoint", "training/vanilla", "training/paper"):
        shutil.copytree(lsm_dir, tmp_path / "runs" / "quickstart" / name)
    for name in ("runs/quickstart/example.wav", "clip.wav"):
        shutil.copy(NANO / "example.wav", tmp_path / name)
    return tmp_path


@pytest.fixture
def typed(monkeypatch):
    """What a reader types into a command that asks for it."""
    lines = iter(["Who did it?"])

    def type_in(prompt):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_in)


@pytest.fixture
def published(monkeypatch):
    """The sets that were pushed to the Hub, none of which leaves the machine."""
    pushed = []

    def push(folder, repo, revision, private):
        publishing.check(folder)
        pushed.append(repo)

    monkeypatch.setattr(publishing, "push_to_hub", push)
    return pushed


@pytest.fixture
def run(workplace, typed, published, monkeypatch):
    """`run(module, arguments)` runs a command in this process."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)

    def start(module: str, arguments: list[str]) -> None:
        more = SHORT.get(f"{module} {arguments[0]}", SHORT.get(module, ""))
        words = [TINY.get(word, word) for word in arguments]
        monkeypatch.setattr(sys, "argv", [module, *words, *more.split()])
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, f"{module} {words}"

    return start


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_runs(page, run, capsys):
    for line in BEFORE.get(page.name, []):
        module, *arguments = line.split()
        run(module, arguments)
    names: dict = {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, page.name, "exec"), names)
            said = capsys.readouterr().out
            for promised in re.findall(r"print\(.*\)  # (.*?)(?: ?\.\.\.)?$", block.code, re.M):
                assert promised in said
        elif block.language == "bash":
            for command in commands(block):
                ours = called(command)
                assert ours is not None, f"{page.name}: neither run nor marked as not run: {' '.join(command)}"
                run(*ours)


def test_a_block_that_cannot_be_run_says_why():
    """With a comment right above it, in these words; another form would be run."""
    for page in PAGES:
        marks = len(re.findall(r"^ *<!-- not run", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert marks == sum(block.reason is not None for block in blocks(page))
