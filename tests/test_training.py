"""Training as Hugging Face users do it: adapters, dtypes, devices, attention, TRL's loss."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN
from recipes.training.models import LORA_TARGETS


@pytest.fixture
def batch(processor, clip):
    inputs = processor(
        text=[f"{AUDIO_TOKEN} what is said?", f"{AUDIO_TOKEN} what is asked?"],
        audio=[clip(0.6, 1), clip(1.2, 2)],
        padding_side="right",
        return_tensors="pt",
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels.masked_fill(labels == processor.audio_token_id, -100)}


def lora(model):
    config = LoraConfig(r=4, target_modules=LORA_TARGETS, modules_to_save=["projector"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model, batch, steps=3, rate=1e-2):
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_an_adapter_learns_is_saved_reloaded_and_merged(lsm_dir, batch, tmp_path):
    model = lora(LsmForConditionalGeneration.from_pretrained(lsm_dir))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "projector" in name for name in trained)
    assert any("lora_" in name for name in trained) and any("queries" in name for name in trained)
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        base = LsmForConditionalGeneration.from_pretrained(lsm_dir)
        assert (base(**batch).logits - expected).abs().max() > 1e-2
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected, atol=1e-5, rtol=0)
        reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = LsmForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=0)


def test_an_adapter_on_a_quantized_llm_learns(wide_lsm_dir, batch, tmp_path):
    """QLoRA: the LLM's layers in 4 bits, the projector and the frozen tower as they are."""
    skipped = ["model.audio_tower", "model.projector", "lm_head"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    model = LsmForConditionalGeneration.from_pretrained(wide_lsm_dir, quantization_config=config)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantized) == 2 * 7 and all("language_model.layers" in name for name in quantized)
    model = lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        base = LsmForConditionalGeneration.from_pretrained(wide_lsm_dir, quantization_config=config)
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(lsm_dir, batch, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_mixed_precision_learns(lsm_dir, plain_lsm_dir, batch, dtype):
    """Near by the paper's plain map; what a token is read as may be decided otherwise in half precision."""
    lsm = LsmForConditionalGeneration.from_pretrained(plain_lsm_dir)
    model = LsmForConditionalGeneration.from_pretrained(plain_lsm_dir, dtype=dtype)
    with torch.no_grad():
        expected, found = lsm(**batch).logits, model(**batch).logits
    assert found.dtype == dtype
    real = batch["attention_mask"] == 1
    assert (found.float() - expected)[real].norm() / expected[real].norm() < 5e-2
    # Mixed precision, as the Trainer does it: weights of float16 alone are more than AdamW's epsilon can take.
    with torch.autocast("cpu", dtype=dtype):
        losses = train(LsmForConditionalGeneration.from_pretrained(lsm_dir), batch, rate=1e-3)
    assert losses[-1] < losses[0]


def test_attention_can_be_chosen_part_by_part(lsm_dir, lsm, batch):
    parts = {"audio_config": "eager", "qformer_config": "eager", "text_config": "eager"}
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, attn_implementation={**parts, "text_config": "sdpa"})
    config = model.config
    assert [getattr(config, name)._attn_implementation for name in parts] == ["eager", "eager", "sdpa"]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, lsm(**batch).logits, atol=2e-5, rtol=0)


def test_parts_may_live_on_different_devices(lsm_dir, lsm, batch, tmp_path):
    """The LLM's layers on disk: what accelerate does when memory is short."""
    device_map = dict.fromkeys(["model.audio_tower", "model.projector", "lm_head"], "cpu")
    device_map["model.language_model"] = "disk"
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, device_map=device_map, offload_folder=tmp_path)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, lsm(**batch).logits, atol=1e-5, rtol=0)
    auto = LsmForConditionalGeneration.from_pretrained(lsm_dir, device_map="auto")
    assert not any(parameter.is_meta for parameter in auto.parameters())


UNITS = {"WhisperEncoderLayer", "Blip2QFormerLayer", "LlamaDecoderLayer"}


def test_accelerate_finds_the_layers_to_shard(lsm):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(lsm)
    assert {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == UNITS
    assert lsm._no_split_modules == lsm.model._no_split_modules == UNITS


def test_trls_loss_is_ours(lsm_dir, batch, tmp_path):
    """SFTTrainer takes the body and the head apart; both ways give one loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = LsmForConditionalGeneration.from_pretrained(lsm_dir)
    expected = model(**batch).loss.item()
    args = SFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list([{"id": 0}]), data_collator=lambda rows: batch
    )
    loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_modules_stay_in_eval(lsm_dir, mode):
    model = lora(LsmForConditionalGeneration.from_pretrained(lsm_dir))
    getattr(model, mode)()
    tower = model.get_base_model().model.audio_tower
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_batch_of_text_uses_every_module_and_teaches_the_projector_nothing(lsm_dir, lsm, processor):
    """Processes that train together must use the same modules, whatever their batches hold."""
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir).train()
    inputs = processor(text="what is said?", return_tensors="pt")
    outputs = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, lsm(**inputs).logits, atol=1e-6, rtol=0)
    outputs.loss.backward()
    gradients = [parameter.grad for parameter in model.model.projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
