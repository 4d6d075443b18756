"""The configurations: each can be read, its header has the estimates of the preflight, and it trains a tiny
stand-in."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, WhisperConfig, WhisperFeatureExtractor
from trl import ModelConfig, TrlParser

from dataset_builders.files import read_lines
from recipes.sft import train
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, accumulation
from recipes.training.callbacks import LOG
from recipes.training.preflight import Preflight

FOLDER = Path(__file__).parents[3] / "recipes" / "configs"
OTHERS = ("quickstart", "quickstart_real", "study")
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in OTHERS)
REAL = [name for name in CONFIGS if not name.startswith("nano")]

# Shapes of the checkpoints that the configurations name, as their own config.json has them.
WHISPERS = {"base": (512, 6, 8), "small": (768, 12, 12), "medium": (1024, 24, 16)}
WHISPERS |= {"large-v2": (1280, 32, 20), "large-v3": (1280, 32, 20)}
LLMS = {
    "lmsys/vicuna-7b-v1.5": LlamaConfig(max_position_embeddings=4096),  # Llama's defaults are those of the 7B
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, max_position_embeddings=32768,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
}  # fmt: skip

# LibriSpeech's train-clean-100: 28,539 clips of 12.7 s, two rows each. The largest row is of 16 s and 120 words. Tokens
# are those besides the speech.
MEAN = {"frames": 635, "tokens": 112, "labels": 50}
LARGEST = {"frames": 810, "tokens": 212, "labels": 160}
ROWS = 2 * 28_539


def sizes(row, window_frames):
    """Return the sizes of a row, as `RowSizes` measures them."""
    speech = -(-row["frames"] // window_frames)
    row = row | {"speech_tokens": speech, "tokens": row["tokens"] + speech}
    return {key: np.array([value]) for key, value in row.items()}


def parse(name, *flags):
    parser = TrlParser((LsmScriptArguments, LsmTrainingArguments, ModelConfig))
    return parser.parse_args_and_config(["--config", str(FOLDER / f"{name}.yaml"), *map(str, flags)])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return `shapes(id)`, which makes a folder with the shapes of a checkpoint, without weights."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("shapes") / name.rpartition("/")[2]
        if (size := name.partition("whisper-")[2]) in WHISPERS:
            width, layers, heads = WHISPERS[size]
            mels = 128 if size == "large-v3" else 80
            WhisperConfig(
                d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width,
                decoder_layers=1, decoder_attention_heads=heads, num_mel_bins=mels,
            ).save_pretrained(folder)  # fmt: skip
            WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
        else:
            LLMS[name].save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            save_file({}, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_known(name):
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    flags = [] if "dataset_name" in options else ["--dataset_name", "any", "--output_dir", "any"]
    parts = parse(name, "--bf16", "false", "--use_cpu", "true", *flags)
    for key, value in options.items():
        if key != "bf16":
            assert any(str(getattr(part, key, None)) == str(value) or hasattr(part, key) for part in parts), key


def test_an_unknown_key_is_refused_by_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("dataset_name: any\noutput_dir: any\nlearning_rat: 1.0e-3\n")
    parser = TrlParser((LsmScriptArguments, LsmTrainingArguments, ModelConfig))
    with pytest.raises(ValueError, match="learning_rat"):
        parser.parse_args_and_config(["--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("name", REAL)
def test_the_header_says_what_the_preflight_estimates(name, shapes):
    """The rows are those of LibriSpeech, and the machine is the target of the configuration."""
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    audio, text = shapes(options["audio"]), shapes(options["text"])
    flags = ["--audio", audio, "--text", text, "--use_cpu", "true"]
    check = Preflight(*parse(name, *flags))
    check.model()
    window = options["composition"].get("window_frames", 17)
    check.sizes = sizes(LARGEST, window)
    memory = check.memory()
    check.sizes, check.whole = sizes(MEAN, window), False
    check.total = ROWS // 2 if options["tasks"] == ["transcription"] else ROWS
    expected = f"{float(memory.split()[0]):.0f} GiB on each GPU, {check.time().partition(' for')[0]}"
    assert expected in (FOLDER / f"{name}.yaml").read_text(), expected
    assert (options["weight_decay"], options["warmup_steps"], options["num_train_epochs"]) == (
        0.05,
        100,
        1,
    )  # the paper's


@pytest.mark.parametrize("name", [name for name in REAL if name != "qlora_16gb"])
def test_it_trains_a_stand_in_of_the_same_kind(name, whisper_dir, llm_dir, set_dir, tmp_path):
    """A tiny Whisper and a tiny LLM replace the large ones of the configuration; all other settings are its own."""
    flags = {
        "audio": whisper_dir, "text": llm_dir, "dataset_name": set_dir, "dataset_train_split": "train",
        "output_dir": tmp_path / "out", "allow_foreign_responses": True, "max_steps": 2, "global_batch_size": 8,
        "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "dataloader_num_workers": 0,
        "report_to": "none", "logging_steps": 1, "align_steps": 0,  # whose clips are too short for their transcripts
    }  # fmt: skip
    options = [part for key, value in flags.items() for part in (f"--{key}", value)]
    script_args, training_args, model_args = parse(name, *options)
    if script_args.tasks != ["transcription"]:
        script_args.tasks = None  # the tiny set has only some tasks
    script_args.composition = {"qformer_hidden": 32, "qformer_heads": 4}
    train(script_args, training_args, model_args)
    lines = [line for line in read_lines(tmp_path / "out" / LOG) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert training_args.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("size", "per_device", "devices", "steps"), [(384, 8, 1, 48), (384, 8, 4, 12), (384, 96, 4, 1)]
)
def test_the_global_batch_is_the_same_on_any_number_of_devices(size, per_device, devices, steps):
    assert accumulation(size, per_device, devices) == steps


@pytest.mark.parametrize(("size", "per_device", "devices"), [(384, 8, 5), (384, 512, 1)])
def test_a_global_batch_that_cannot_be_cut_is_refused(size, per_device, devices):
    with pytest.raises(ValueError, match=rf"{size} is not a multiple of {per_device} rows on {devices} devices"):
        accumulation(size, per_device, devices)
