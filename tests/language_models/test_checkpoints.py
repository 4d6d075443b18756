"""How checkpoints are opened."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from language_models.checkpoints import open_model


@pytest.mark.parametrize(
    ("stored", "opened"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_float16_is_left_where_a_cpu_multiplies_it_slowly(llm_dir, tmp_path, monkeypatch, stored, opened):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AutoModelForCausalLM.from_pretrained(llm_dir, dtype=stored).save_pretrained(tmp_path)
    assert open_model(tmp_path).dtype == open_model(tmp_path, dtype="auto").dtype == getattr(torch, opened)
    assert open_model(tmp_path, dtype="float16").dtype == torch.float16  # as it was told


def test_an_lsm_is_opened_by_this_package_and_not_by_the_code_in_its_folder(lsm_dir):
    """transformers would use the code of the first checkpoint for all that follow, which may be newer."""
    code = "from language_models.checkpoints import open_model; import sys; "
    code += "print(type(open_model(sys.argv[1], trust_remote_code=True)).__module__)"
    printed = subprocess.run([sys.executable, "-c", code, str(lsm_dir)], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["modeling_lsm"]
