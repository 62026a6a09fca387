"""What a key that is none may have been meant for: the names of other trainers, keys of other sections, and slips."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from typing import Any, get_args

from megalite.config.deepspeed.table import TABLE
from megalite.config.section import Section, fields_of
from megalite.config.sections import ModelConfig
from megalite.config.validation import alternatives
from megalite.errors import nearest

_ALIASES: dict[str, str] = {
    "run.dir": "output_dir out_dir save_dir output_folder run_dir exp_dir",
    "run.seed": "random_seed manual_seed data_seed",
    "init_from": "model_name_or_path pretrained_model_name_or_path model_path pretrained checkpoint_path base_model "
    "pretrained_checkpoint finetune_from",
    "resume": "resume_from_checkpoint resume_from load load_checkpoint",
    "model.architecture": "model_type family arch",
    "model.hidden_size": "n_embd d_model dim embed_dim n_embed hidden_dim",
    "model.num_hidden_layers": "num_layers n_layer n_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads num_query_groups n_kv_head kv_heads",
    "model.intermediate_size": "ffn_hidden_size n_inner d_ff ffn_dim mlp_dim",
    "model.max_position_embeddings": "n_positions n_ctx max_positions context_length",
    "model.vocab_size": "vocabulary_size padded_vocab_size n_vocab",
    "model.head_dim": "kv_channels d_head",
    "model.rms_norm_eps": "rmsnorm_eps",
    "model.rope_theta": "rotary_base rope_base",
    "model.initializer_range": "init_std init_method_std",
    "model.hidden_dropout": "dropout resid_pdrop embd_pdrop",
    "model.attention_dropout": "attn_pdrop",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path",
    "data.sequence_length": "seq_length seq_len max_seq_len max_seq_length max_length sequence_len block_size "
    "cutoff_len context_len",
    "data.train": "data_path train_data train_data_path train_file dataset dataset_path datasets",
    "data.valid": "valid_data validation_data eval_data valid_data_path validation_file eval_dataset",
    "data.prefetch": "num_workers dataloader_num_workers prefetch_factor",
    "parallel.tensor": "tp tp_size tp_degree tensor_parallel tensor_parallel_size tensor_model_parallel_size "
    "tensor_parallel_degree model_parallel_size tensor_model_parallel",
    "parallel.pipeline": "pp pp_size pp_degree pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size "
    "pipeline_parallel_degree pipeline_stages num_stages",
    "parallel.data": "dp dp_size dp_degree data_parallel data_parallel_size data_parallel_degree replicas num_replicas",
    "parallel.virtual_stages": "virtual_pipeline_model_parallel_size virtual_pipeline num_virtual_stages",
    "parallel.sequence_parallel": "sp sequence_parallelism",
    "parallel.schedule": "pipeline_schedule",
    "train.steps": "max_steps num_steps total_steps train_iters max_iters iterations iters train_steps n_steps "
    "num_training_steps num_train_steps max_train_steps training_steps",
    "train.global_batch_size": "batch_size train_batch_size global_batch total_batch_size",
    "train.micro_batch_size": "micro_batch microbatch_size per_device_train_batch_size per_device_batch_size "
    "train_micro_batch_size_per_gpu mini_batch_size device_batch_size",
    "train.batch_size_rampup": "rampup_batch_size batch_size_warmup",
    "train.optimizer.lr": "learning_rate lr max_lr peak_lr base_lr",
    "train.optimizer.betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
    "train.optimizer.eps": "adam_eps adam_epsilon epsilon",
    "train.optimizer.weight_decay": "wd",
    "train.schedule": "lr_schedule scheduler lr_scheduler",
    "train.schedule.name": "lr_scheduler_type lr_decay_style",
    "train.schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps",
    "train.schedule.min_lr": "lr_min min_learning_rate final_lr end_lr eta_min",
    "train.schedule.decay_steps": "lr_decay_iters decay_iters cooldown_steps",
    "train.eval_every": "eval_steps eval_interval evaluation_steps val_check_interval validation_interval",
    "train.eval_batches": "eval_iters num_eval_batches limit_val_batches",
    "train.stop_after": "exit_interval stop_at early_stop",
    "train.max_minutes": "max_time time_limit exit_duration_in_mins",
    "train.recompute": "gradient_checkpointing activation_checkpoint recompute_granularity checkpoint_activations "
    "use_activation_checkpointing",
    "train.timeout_seconds": "timeout distributed_timeout_minutes ddp_timeout",
    "train.spike": "loss_spike spike_detection",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_interval ckpt_every checkpoint_every",
    "checkpoint.last": "save_last save_final save_at_end",
    "checkpoint.keep_last": "save_total_limit max_checkpoints num_checkpoints keep_checkpoints",
    "checkpoint.async": "async_save asynchronous",
    "deepspeed": "deepspeed_config ds_config",
    "deepspeed.gradient_clipping": "max_grad_norm clip_grad grad_clip clip_grad_norm gradient_clip_val max_norm",
    "deepspeed.zero_optimization": "zero",
    "deepspeed.zero_optimization.stage": "zero_stage",
}
"""Keys of the run file, and what Hugging Face, Megatron, DeepSpeed, Lightning and nanoGPT call them."""

_NEAR, _NEAR_ELSEWHERE = 0.6, 0.8
"""How alike two words are for one to be offered for the other: within a section, and over the whole run file."""


def guess(name: str, section: type[Section], whole: type[Section]) -> str:
    """Return the hint for a key `name` that `section` of the run file `whole` does not have.

    A name that other trainers have comes first, then the key of that name in another section, then the likeliest slip;
    where nothing is near, the keys that are allowed.
    """
    word = name.lower().replace("-", "_")
    names = _names(whole, issubclass(section, ModelConfig))
    own = fields_of(section)
    if word in names and word not in own:
        return f"; did you mean {alternatives(names[word])}?"
    here = max((_alike(word, key) for key in own), default=0.0)
    there = max(names, key=lambda key: _alike(word, key))
    if _alike(word, there) >= _NEAR_ELSEWHERE and _alike(word, there) > here:
        return f"; did you mean {alternatives(names[there])}?"
    return nearest(name, own)


def _alike(word: str, other: str) -> float:
    matcher = SequenceMatcher(None, other, word)
    return matcher.ratio() if matcher.quick_ratio() >= _NEAR else 0.0


@cache
def _names(whole: type[Section], within_model: bool) -> dict[str, tuple[str, ...]]:
    """Every word that stands for keys, with the keys: aliases before names, names of the run file before the JSON's."""
    places: dict[str, list[str]] = {}
    for path in _paths(whole, (), within_model):
        places.setdefault(path[-1], []).append(".".join(path))
    names = {word: tuple(dict.fromkeys(found)) for word, found in places.items()}
    for key in TABLE:
        names.setdefault(key, (f"deepspeed.{key}",))
    for key, words in _ALIASES.items():
        # A model's own names differ by family, and those of its family are the section's to tell.
        names |= {} if within_model and key.startswith("model.") else dict.fromkeys(words.split(), (key,))
    return names


def _paths(section: type[Section], at: tuple[str, ...], within_model: bool) -> Iterator[tuple[str, ...]]:
    for key, info in fields_of(section).items():
        yield (*at, key)
        for inner in _sections_in(info.annotation):
            # Of a list of sections a key has a number before it, which is not known here.
            if not (within_model and issubclass(inner, ModelConfig)) and not _is_listed(info.annotation):
                yield from _paths(inner, (*at, key), within_model)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _is_listed(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple
