"""How checkpoints are opened."""

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
