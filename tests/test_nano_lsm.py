"""The LSM that comes with the repository answers about the clip that comes with it, as a user would ask."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NANO = ROOT / "assets" / "nano"
ANSWERS = {
    "Transcribe the speech.": "the plumber suddenly sold the black necklace before breakfast",
    "List the keywords of the speech.": "Keywords: plumber, necklace, breakfast.",
    "Translate the speech into Spanish.": "El fontanero vendió repentinamente el collar negro antes del desayuno.",
    "Who does it?": "The plumber.",  # of a kind that it was never trained on
}


@pytest.fixture(scope="module")
def lsm():
    from recipes.listening.speech_llm import load

    return load(NANO / "lsm")


@pytest.mark.nano
def test_it_answers_about_its_clip(lsm):
    rows = [{"audio": str(NANO / "example.wav"), "instruction": instruction} for instruction in ANSWERS]
    assert [reply.text for reply in lsm.respond(rows, progress=False)] == list(ANSWERS.values())


@pytest.mark.nano
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near(dtype):
    """Of a trained reader, which is sure of what it reads."""
    from recipes.listening.speech_llm import load

    rows = [{"audio": str(NANO / "example.wav"), "instruction": instruction} for instruction in ANSWERS]
    whole, half = load(NANO / "lsm", "float32"), load(NANO / "lsm", str(dtype).removeprefix("torch."))
    inputs = whole.inputs(rows)
    expected, found = whole.model(**inputs).logits, half.model(**inputs).logits.float()
    real = inputs["attention_mask"] == 1
    assert (found - expected)[real].norm() / expected[real].norm() < 5e-2


@pytest.mark.nano
def test_it_loads_with_the_code_in_its_folder(tmp_path):
    code = f"""
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(NANO / "lsm")!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(NANO / "lsm")!r}, trust_remote_code=True)
messages = processor.conversation("Who does it?", audio={str(NANO / "example.wav")!r})
settings = {{"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}}
inputs = processor.apply_chat_template(messages, **settings)
answer = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "The plumber.", done.stderr[-2000:]


@pytest.mark.nano
def test_it_is_small_enough_to_come_with_the_repository():
    assert (NANO / "lsm" / "model.safetensors").stat().st_size <= 25e6
