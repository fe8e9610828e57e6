"""The tree of keys, and what somebody may have meant who wrote an unknown one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any

from jaxdistill.config.base import SECTIONS
from jaxdistill.config.run import RunConfig

OTHER_WORDS = {
    "run_dir": "output_dir out_dir save_dir output_path",
    "problems.path": "traces_path traces_file dataset_name dataset dataset_path datasets data_path train_file"
    " data_files train_dataset",
    "problems.split": "dataset_split",
    "problems.config": "dataset_config dataset_config_name subset",
    "problems.count": "max_samples num_samples max_examples limit max_train_samples",
    "problems.problem_field": "prompt_field question_field input_field prompt_key",
    "problems.answer_field": "label_field gold_field ground_truth_field answer_key",
    "traces.teacher": "traces_model traces_model_name_or_path teacher_model teacher_model_name_or_path"
    " teacher_name teacher_path",
    "traces.samples": "n num_generations num_return_sequences samples_per_prompt num_rollouts",
    "traces.temperature": "sampling_temperature",
    "traces.max_tokens": "max_new_tokens max_completion_length max_completion_tokens max_response_length",
    "traces.system": "system_prompt system_message",
    "traces.server.urls": "base_url api_base url endpoint",
    "traces.server.model": "served_model_name",
    "traces.server.api_key_env": "api_key openai_api_key",
    "traces.server.in_flight": "num_concurrent max_concurrency concurrency max_concurrent_requests",
    "traces.server.retries": "max_retries num_retries",
    "traces.server.timeout_s": "timeout request_timeout",
    "traces.server.extra": "extra_body sampling_params top_k min_p repetition_penalty reasoning_effort",
    "traces.vllm.max_model_len": "max_model_length",
    "traces.vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "traces.vllm.tensor_parallel_size": "tp tp_size vllm_tensor_parallel_size",
    "data.row_tokens": "data_max_tokens train_max_tokens max_seq_length max_seq_len max_length seq_length"
    " sequence_len sequence_length cutoff_len"
    " block_size model_max_length context_length",
    "data.chat_template": "template prompt_template chat_template_path",
    "data.overlong": "truncation truncate excess_length_strategy",
    "data.topk": "logprobs_topk kd_top_k",
    "data.response": "train_on_inputs train_on_completions completion_only_loss assistant_only_loss",
    "data": "packing sample_packing pack packed",
    "data.workers": "dataset_num_proc num_proc preprocessing_num_workers dataloader_num_workers",
    "student.init": "model_name_or_path model_name model model_id base_model pretrained_model_name_or_path model_path"
    " student_model pretrained",
    "student.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "student.revision": "model_revision",
    "student.lora": "lora peft_config peft lora_config use_peft use_lora adapter finetuning_type",
    "student.lora.rank": "r lora_r lora_rank lora_dim",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.targets": "target_modules lora_target_modules lora_target lora_modules lora_target_linear",
    "student.lora.base_dtype": "load_in_4bit load_in_8bit quantization_bit bnb_4bit_quant_type quantization",
    "train.batch_rows": "per_device_train_batch_size train_batch_size batch_size global_batch_size micro_batch_size"
    " per_device_batch_size",
    "train.micro_batches": "gradient_accumulation_steps grad_accum gradient_accumulation accumulation_steps",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.steps": "max_steps num_steps total_steps num_train_steps max_train_steps",
    "train.optimizer.learning_rate": "lr learning_rate peak_lr max_lr",
    "train.optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "train.optimizer.warmup_share": "warmup_steps warmup_ratio num_warmup_steps warmup",
    "train.optimizer.final_share": "min_lr min_lr_ratio cosine_min_lr_ratio",
    "train.optimizer.weight_decay": "wd",
    "train.optimizer.beta1": "adam_beta1 b1",
    "train.optimizer.beta2": "adam_beta2 b2",
    "train.optimizer.clip_norm": "max_grad_norm gradient_clipping grad_clip max_norm gradient_clip_val clip_grad_norm",
    "train.optimizer.name": "optim optimizer_type optimizer_name",
    "train.compute_dtype": "bf16 fp16 tf32 torch_dtype dtype mixed_precision precision",
    "train.remat": "gradient_checkpointing activation_checkpointing use_gradient_checkpointing",
    "train.attention": "attn_implementation flash_attention use_flash_attention_2 flash_attn attn_impl",
    "train.mesh": "fsdp deepspeed parallelism num_gpus devices",
    "train.mesh.tensor": "tensor_parallel_size tensor_parallel",
    "train.mesh.context": "sequence_parallel_degree context_parallel_size context_parallel",
    "train.checkpoint_every": "save_steps save_interval checkpoint_interval save_strategy",
    "train.keep_checkpoints": "save_total_limit max_to_keep",
    "train.keep_best": "load_best_model_at_end save_best",
    "train.log_every": "logging_steps log_interval log_steps",
    "train.evaluate.every": "eval_steps eval_interval evaluation_strategy eval_strategy",
    "train.evaluate.rows": "val_set_size val_size test_size",
    "train.wandb": "report_to wandb_project use_wandb logger",
    "train.distill": "kd distillation kd_ratio",
    "train.distill.weight": "kd_alpha alpha distill_alpha kd_weight kd_ce_alpha",
    "train.distill.temperature": "kd_temperature distill_temperature",
    "train.distill.parameter": "beta jsd_beta gkd_beta",
    "train.on_policy.fraction": "lmbda lambda on_policy_fraction",
    "train.contrastive": "dpo orpo simpo",
    "export.dtype": "save_dtype export_dtype",
    "export.max_shard_gib": "max_shard_size",
    "export.lora": "merge_lora merge_adapter save_merged",
    "evaluate.max_tokens": "max_gen_toks eval_max_tokens",
    "evaluate.benchmarks": "tasks eval_tasks benchmark",
    "evaluate.problems": "evaluate_dataset evaluate_path eval_dataset eval_file test_file heldout held_out"
    " validation_file",
    "verify.think": "require_thinking",
    "verify.keep_per_problem": "max_per_problem",
}
"""Our key -> what it is called elsewhere: TRL and transformers, axolotl, LLaMA-Factory, torchtune, NeMo, verl,
lm-evaluation-harness, distilabel."""
NOTES = {
    "train.batch_rows": "rows of a whole step, over all devices and micro-batches",
    "train.micro_batches": "a step's `batch_rows` are cut into so many parts",
    "train.optimizer.warmup_share": "a share of the steps",
    "train.optimizer.final_share": "a share of the peak",
    "train.compute_dtype": "float32 or bfloat16",
    "student.lora.base_dtype": "bfloat16, int8 or nf4",
    "train.remat": "full, attention, dots, offload or none",
    "data": "rows are packed, always",
    "data.response": "the loss is on the response alone, always",
    "traces.server.api_key_env": "the name of an environment variable that holds the key",
    "traces.server.extra": "further fields of every request, as extra: {top_k: 20}",
    "train.mesh": "devices along data, fsdp, tensor and context",
    "train.wandb": "the name of a project",
    "evaluate.problems": "a section like `problems`",
}
"""What else one has to know of a key that replaces another trainer's."""


def section_of(path: list[str]) -> Any:
    """The section at a path of keys; None where there is none."""
    cls: Any = RunConfig
    for part in path:
        if part.isdigit():  # an element of a list of sections
            continue
        field = next((f for f in dataclasses.fields(cls) if f.name == part), None)
        cls = _type_of(field.type if field else None)
        if cls is None:
            return None
    return cls


def known_keys(path: list[str]) -> list[str]:
    cls = section_of(path)
    return [f.name for f in dataclasses.fields(cls)] if cls else []


@cache
def all_keys() -> tuple[str, ...]:
    """Every key with its path, sections too; elements of lists have none."""
    return tuple(_walk(RunConfig, ""))


def hint(path: list[str]) -> str:
    """What was perhaps meant by the unknown key at the end of a path, or else what its section knows.

    `path` may hold keys with dots, as somebody writes who has `--set` in mind.
    """
    path = [part for key in path for part in key.split(".")]
    *parents, last = path
    known = known_keys(parents)
    word = last.lower().replace("-", "_")
    # lora.r is somebody's lora_r; and some words mean one thing here and another there
    meant = _elsewhere("_".join([*parents[-1:], word])) or _elsewhere(word)
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.8)
    if near and not meant:
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    if not meant:
        same = [key for key in all_keys() if key.split(".")[-1] == word]
        meant = sorted(same, key=lambda key: (_far(key, parents), len(key)))[:3]
    if meant:
        return f"did you mean {_or(_first_within(meant, parents))}?"
    if near := difflib.get_close_matches(last, known, n=1, cutoff=0.6):
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    if known:
        return f"{'.'.join(parents) or 'a config'} has {', '.join(sorted(known))}."
    return f"there is no section {'.'.join(parents)}; {hint(parents)}"


def nearest_section(name: str) -> str | None:
    """The section of a run that a name is a slip of the pen for."""
    return next(iter(difflib.get_close_matches(name, known_keys([]), n=1, cutoff=0.8)), None)


def _elsewhere(word: str) -> list[str]:
    return [key for key, words in OTHER_WORDS.items() if word in words.split()]


def _first_within(keys: list[str], parents: list[str]) -> list[str]:
    """Those of the same section alone, where there are any."""
    section = parents[0] if parents else ""
    return [key for key in keys if key.split(".")[0] == section] or keys


def _far(key: str, parents: list[str]) -> int:
    return 0 if parents and key.split(".")[0] == parents[0] else 1


def _or(keys: list[str]) -> str:
    shown = [f"{key} ({NOTES[key]})" if key in NOTES else key for key in keys]
    return " or ".join(shown)


def _walk(cls: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        yield name
        below = _type_of(field.type)
        if below is not None and not str(field.type).startswith("tuple["):
            yield from _walk(below, f"{name}.")


def _type_of(annotation: Any) -> Any:
    name = str(annotation).split("|")[0].strip().removeprefix("tuple[").removesuffix(", ...]")
    return SECTIONS.get(name)
