"""TRL's SFTTrainer for speech: batches of similar cost, two objectives, a learning rate for the projector, MFU."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import MethodType

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerCallback
from trl import ModelConfig, SFTTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from dataset_builders.files import read_lines
from language_models.checkpoints import calling_peft
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import LsmProcessor
from recipes.listening.collator import SpeechResponseCollator
from recipes.listening.features import AudioFeatureStore
from recipes.reporting.training_card import write_trained_card
from recipes.training.arguments import LsmTrainingArguments
from recipes.training.callbacks import FOLLOWING, LOG
from recipes.training.checkpoints import WholeCheckpoints
from recipes.training.costs import Costs
from recipes.training.models import adapter_settings
from recipes.training.objectives import distillation_loss, most_likely, predicts, response_loss
from recipes.training.order import EpochSampler
from recipes.training.sharding import as_before_sharding, check_strategy, prepare_for_fsdp2
from recipes.training.throughput import Throughput


class LsmTrainer(WholeCheckpoints, SFTTrainer):
    """SFTTrainer for an LSM and rows of a self-powered set.

    Args:
        model: the LSM, from `recipes.training.models.prepare`, which sets the trainable parameters.
        args: [`LsmTrainingArguments`](recipes.training.arguments).
        rows: training set, a `Dataset` or a stream.
        processor: the LSM's processor, which is saved with every checkpoint.
        model_args: settings of the adapter, if one is trained.
        costs: computes the cost of a row, for the throughput.
        row_costs: cost of each row, by which rows are grouped; None for a stream.
        store: store of the clips' features, if there is one.
        teacher: the LLM that reads the transcripts for `distill`; None if the model's weights without its adapter are
            still those of this LLM.
        callbacks: as in SFTTrainer.
        card: arguments of `write_trained_card` besides title, log and following rates.
        projector_only: whether `output_dir` gets only the projector in the end. Checkpoints are whole.

    Raises:
        ValueError: an option that cannot work here; the message names it.
    """

    def __init__(
        self,
        model: LsmForConditionalGeneration,
        args: LsmTrainingArguments,
        rows: Dataset | IterableDataset,
        processor: LsmProcessor,
        model_args: ModelConfig,
        costs: Costs,
        row_costs: Sequence[float] | None = None,
        store: AudioFeatureStore | None = None,
        teacher: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        card: dict | None = None,
        projector_only: bool = False,
    ):
        self.processor, self.card, self.row_costs, self.sampler = processor, card or {}, row_costs, None
        self.projector_only = projector_only
        response_tasks = frozenset(args.response_tasks or ())
        # TRL gets the tokenizer, because it regards every model with a processor as a model of images.
        with calling_peft():
            super().__init__(
                model,
                args,
                data_collator=SpeechResponseCollator(processor, store, args.objective == "distill", response_tasks),
                train_dataset=rows,
                processing_class=processor.tokenizer,
                peft_config=adapter_settings(model_args),
                callbacks=list(callbacks),
            )
        check_strategy(self.accelerator)
        if projector_only and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "--projector_only needs the whole LSM on each device, which FSDP and DeepSpeed divide: leave it out, "
                "and in the end load the LSM and call save_pretrained(FOLDER, projector_only=True)."
            )
        if self.is_fsdp_enabled:
            prepare_for_fsdp2(self.model, self.accelerator)
        self._check_objective()
        self.teacher = self._prepare_teacher(teacher)
        self.throughput = Throughput(costs, self.model.config.audio_token_id, self.args.peak_tflops)
        self.add_callback(_TrainerHooks(self))

    def _check_objective(self) -> None:
        vocabulary, top_k = self.model.config.text_config.vocab_size, self.args.distill_top_k
        if top_k is not None and top_k > vocabulary:
            raise ValueError(
                f"--distill_top_k {top_k} is more than the {vocabulary} tokens of the LLM; leave it out to learn from "
                "all of them."
            )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("group_by_length", "random") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        grouped = self.args.train_sampling_strategy == "group_by_length"
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.accelerator.num_processes
        self.sampler = EpochSampler(len(dataset), seed, self.row_costs if grouped else None, batch)
        return self.sampler

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.projector_learning_rate is not None:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(self._parameter_groups(), **settings)
        return super().create_optimizer(*args, **kwargs)

    def _parameter_groups(self) -> list[dict]:
        """Return the trainable parameters, grouped by learning rate and weight decay."""
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("projector" in name, name in decayed), []).append(parameter)
        rates = {True: self.args.projector_learning_rate, False: self.args.learning_rate}
        return [
            {"params": parameters, "lr": rates[projector], "weight_decay": self.args.weight_decay * decay}
            for (projector, decay), parameters in groups.items()
        ]

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True  # otherwise, a finished training would do another step
        return None

    def get_batch_samples(self, *args, **kwargs):
        self.throughput.start()  # the time of waiting for data counts, too
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            self.throughput.see(inputs)
        teacher = {name.removeprefix("teacher_"): inputs.pop(name) for name in list(inputs) if "teacher_" in name}
        if teacher or not (return_outputs or self._needs_trl()):
            loss = self._loss_on_labels(model, inputs, teacher, num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss[0] if return_outputs else loss):
            raise FloatingPointError(
                f"the loss is {float(loss[0] if return_outputs else loss)} after {self.state.global_step} steps: lower "
                f"--learning_rate ({self.args.learning_rate:g}), lengthen --warmup_steps, and use --bf16 rather than "
                "--fp16."
            )
        return loss

    def _needs_trl(self) -> bool:
        """Return whether to use TRL's loss. It has other kinds of losses, and its kernel never holds all logits of the
        labelled positions. Without Triton, on a CPU, it would compute the logits of all positions twice."""
        other = self.args.loss_type != "nll" or self.args.label_smoothing_factor or self.compute_loss_func
        return bool(other) or self.accelerator.device.type != "cpu"

    def _loss_on_labels(self, model, inputs, teacher, num_items_in_batch) -> torch.Tensor:
        """Return the loss, from logits at the labelled positions only, scaled as in TRL.

        Args:
            teacher: inputs of the teacher; if empty, the loss is the cross-entropy on the response. `rows` `(batch,)`
                bool marks the rows that the teacher reads, if it does not read all.
        """
        rows = teacher.pop("rows", None)
        labels = inputs["labels"]
        tokens = labels[:, 1:][labels[:, 1:] != -100]
        wanted, likeliest = self._read(model, **teacher) if teacher else (None, None)
        logits = self._ask(model, **inputs)
        if wanted is None:
            loss = response_loss(logits, tokens)
        elif rows is None:
            loss = distillation_loss(logits, wanted, self.args.temperature, likeliest)
        else:
            taught = rows[predicts(labels).nonzero()[:, 0]]  # whether each position belongs to such a row
            loss = distillation_loss(logits[taught], wanted, self.args.temperature, likeliest)
            loss = loss + response_loss(logits[~taught], tokens[~taught])
        count = len(tokens) if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        right = (logits.argmax(-1) == tokens).sum()
        right, seen = self.accelerator.reduce(torch.stack([right, torch.full_like(right, len(tokens))])).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(right / max(1, seen))
        return loss

    def _ask(self, model, labels, **inputs) -> torch.Tensor:
        """Return the logits `(positions, vocabulary)` at the positions that predict a label."""
        return model(**inputs, logits_to_keep=predicts(labels), use_cache=False).logits

    @torch.no_grad()
    def _read(self, model, **inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's logits at the labelled positions, and the tokens that they belong to, if not all."""
        with self._reader(model) as reader:
            logits = self._ask(reader, **inputs)
        if self.args.distill_top_k is None:
            return logits, None
        return most_likely(logits, self.args.distill_top_k, self.args.temperature)

    @contextlib.contextmanager
    def _reader(self, model):
        """Yield the teacher: `self.teacher`, or the model itself without its adapter."""
        if self.teacher is not None:
            yield self.teacher
            return
        unwrapped, training = self.accelerator.unwrap_model(model), model.training
        bare = unwrapped.disable_adapter() if hasattr(unwrapped, "disable_adapter") else contextlib.nullcontext()
        model.eval()
        try:
            with bare:
                yield model
        finally:
            model.train(training)

    def _prepare_teacher(self, teacher):
        if teacher is None:
            return None
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _save(self, output_dir=None, state_dict=None):
        folder = output_dir or self.args.output_dir
        if self.projector_only and folder == self.args.output_dir:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, projector_only=True)
        else:
            with as_before_sharding(self.model):
                super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(folder)

    def create_model_card(self, model_name=None, **kwargs):
        # TRL also calls this at every checkpoint, where the card is only needed if the checkpoint is pushed.
        if self.is_world_process_zero() and (self.args.push_to_hub or not self.is_in_train):
            folder = Path(self.args.output_dir)
            log, following = (read_lines(folder / name) for name in (LOG, FOLLOWING))
            write_trained_card(folder, title=model_name or folder.name, log=log, following=following, **self.card)

    def log(self, logs, start_time=None):
        if self.model.training:
            logs.update(self.throughput.read(self.accelerator))
        super().log(logs, start_time)


def _keep_dtype(model: nn.Module) -> None:
    """Stop accelerate from converting all outputs, including logits, to float32; the losses do so in chunks."""
    wrapper = getattr(model.forward, "__wrapped__", None)
    if isinstance(wrapper, ConvertOutputsToFp32):
        bound = hasattr(model.forward, "__func__")
        model.forward = MethodType(wrapper.model_forward, model) if bound else wrapper.model_forward


class _TrainerHooks(TrainerCallback):
    """Keeps the dtype of the logits, sets the sampler's epoch and stops the throughput's clock."""

    def __init__(self, trainer: LsmTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        for model in (self.trainer.model, self.trainer.teacher):
            if model is not None:
                _keep_dtype(self.trainer.accelerator.unwrap_model(model))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate does not reach a sampler inside two wrappers, as after resuming on several devices
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch + 1e-6))

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # so that queued work counts
        self.trainer.throughput.stop()
