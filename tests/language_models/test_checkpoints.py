"""How checkpoints are opened."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from language_models.checkpoints import has_fast_bf16, open_model


def stored_in(folder, llm_dir, dtype):
    AutoModelForCausalLM.from_pretrained(llm_dir, dtype=dtype).save_pretrained(folder)
    return folder


def on_a_cpu(monkeypatch, *, with_bf16):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("language_models.checkpoints.has_fast_bf16", lambda: with_bf16)


@pytest.mark.parametrize(
    ("stored", "with_bf16", "opened"),
    [
        ("float16", True, "float32"),
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float32", False, "float32"),
    ],
)
def test_half_precision_is_left_where_a_cpu_multiplies_it_slowly(
    llm_dir, tmp_path, monkeypatch, stored, with_bf16, opened
):
    on_a_cpu(monkeypatch, with_bf16=with_bf16)
    llm = stored_in(tmp_path, llm_dir, stored)
    assert open_model(llm).dtype == open_model(llm, dtype="auto").dtype == getattr(torch, opened)
    assert open_model(llm, run=False).dtype == getattr(torch, stored)  # a model that is only written


@pytest.mark.parametrize(
    ("instructions", "times_as_long", "fast"),
    [
        ("avx512_bf16", 0.5, True),
        ("amx_bf16", 0.1, True),
        ("bf16", 1.1, True),  # ARM; no slower than noise
        ("avx512_bf16", 1.8, False),  # as on some CPUs with AVX512-BF16 that lack AMX
        ("avx2", 0.5, False),  # without instructions nothing is measured, because that alone would take long
    ],
)
def test_a_cpu_with_instructions_for_bfloat16_must_also_be_fast_with_them(
    monkeypatch, instructions, times_as_long, fast
):
    seconds = {torch.float32: 1.0, torch.bfloat16: times_as_long}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True, "architecture": "any"})
    monkeypatch.setattr("language_models.checkpoints._product_seconds", lambda matrix: seconds[matrix.dtype])
    assert has_fast_bf16.__wrapped__() is fast


@pytest.mark.parametrize("with_bf16", [True, False])
def test_a_slow_data_type_is_taken_if_it_is_named_and_warned_about(llm_dir, tmp_path, monkeypatch, caplog, with_bf16):
    on_a_cpu(monkeypatch, with_bf16=with_bf16)
    assert open_model(stored_in(tmp_path, llm_dir, "float32"), dtype="bfloat16").dtype == torch.bfloat16
    assert ("is loaded in bfloat16, which is slow on this CPU" in caplog.text) is not with_bf16


def test_an_lsm_is_opened_by_this_package_and_not_by_the_code_in_its_folder(lsm_dir):
    """transformers would use the code of the first checkpoint for all that follow, which may be newer."""
    code = "from language_models.checkpoints import open_model; import sys; "
    code += "print(type(open_model(sys.argv[1], trust_remote_code=True)).__module__)"
    printed = subprocess.run([sys.executable, "-c", code, str(lsm_dir)], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["modeling_lsm"]
