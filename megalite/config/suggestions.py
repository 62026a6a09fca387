"""What a key that is none may have been meant for: the names of other trainers, keys of other sections, and slips."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from typing import Any

from megalite.config.deepspeed.table import TABLE
from megalite.config.sections import run_sections_in
from megalite.errors import nearest
from megalite.model.config import ModelConfig
from megalite.settings.section import Section, fields_of
from megalite.settings.validation import Fault, Key, alternatives

_ALIASES: dict[str, str] = {
    "run.dir": "output_dir out_dir save_dir output_folder run_dir exp_dir save checkpoint_dir ckpt_dir "
    "save_path logdir log_dir",
    "run.seed": "random_seed manual_seed data_seed rng_seed",
    "init_from": "model_name_or_path pretrained_model_name_or_path model_path pretrained checkpoint_path base_model "
    "pretrained_checkpoint finetune_from",
    "resume": "resume_from_checkpoint resume_from load load_checkpoint",
    "model.architecture": "model_type family arch",
    "model.hidden_size": "n_embd d_model dim embed_dim n_embed hidden_dim hidden",
    "model.num_hidden_layers": "num_layers n_layer n_layers layers depth num_blocks n_blocks",
    "model.num_attention_heads": "n_head n_heads num_heads heads attention_heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads num_query_groups n_kv_head kv_heads",
    "model.intermediate_size": "ffn_hidden_size n_inner d_ff ffn_dim mlp_dim feed_forward_size feedforward_size ff_dim",
    "model.max_position_embeddings": "n_positions n_ctx max_positions context_length max_seq_position max_position",
    "model.vocab_size": "vocabulary_size padded_vocab_size n_vocab",
    "model.head_dim": "kv_channels d_head",
    "model.rms_norm_eps": "rmsnorm_eps norm_eps norm_epsilon layernorm_epsilon",
    "model.layer_norm_epsilon": "norm_eps norm_epsilon layernorm_epsilon",
    "model.layer_norm_eps": "norm_eps norm_epsilon layernorm_epsilon",
    "model.rope_theta": "rotary_base rope_base rotary_theta rotary_emb_base",
    "model.rotary_pct": "rotary_percent partial_rotary_factor",
    "model.tie_word_embeddings": "tie_embeddings tie_weights tied_embeddings weight_tying tied_weights",
    "model.initializer_range": "init_std init_method_std",
    "model.hidden_dropout": "dropout resid_pdrop embd_pdrop",
    "model.attention_dropout": "attn_pdrop attn_dropout",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path vocab_file "
    "tokenizer_file tokenizer_dir",
    "data.sequence_length": "seq_length seq_len max_seq_len max_seq_length max_length sequence_len block_size "
    "cutoff_len context_len ctx_len context_size context_window model_max_length",
    "data.train": "data_path train_data train_data_path train_file dataset dataset_path datasets train_files "
    "training_data train_dataset data_prefix",
    "data.valid": "valid_data validation_data eval_data valid_data_path validation_file eval_dataset",
    "data.prefetch": "num_workers dataloader_num_workers prefetch_factor",
    "parallel.tensor": "tp tp_size tp_degree tensor_parallel tensor_parallel_size tensor_model_parallel_size "
    "tensor_parallel_degree model_parallel_size tensor_model_parallel tensor_model_parallel_degree "
    "model_parallel",
    "parallel.pipeline": "pp pp_size pp_degree pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size "
    "pipeline_parallel_degree pipeline_stages num_stages",
    "parallel.data": "dp dp_size dp_degree data_parallel data_parallel_size data_parallel_degree replicas num_replicas",
    "parallel.virtual_stages": "virtual_pipeline_model_parallel_size virtual_pipeline num_virtual_stages "
    "virtual_pipeline_parallel_size",
    "parallel.sequence_parallel": "sp sequence_parallelism",
    "parallel.schedule": "pipeline_schedule",
    "train.steps": "max_steps num_steps total_steps train_iters max_iters iterations iters train_steps n_steps "
    "num_training_steps num_train_steps max_train_steps training_steps total_iters max_iterations",
    "train.global_batch_size": "batch_size train_batch_size global_batch total_batch_size gbs global_bsz",
    "train.micro_batch_size": "micro_batch microbatch_size per_device_train_batch_size per_device_batch_size "
    "train_micro_batch_size_per_gpu mini_batch_size device_batch_size mbs batch_size device_train_batch_size "
    "per_gpu_train_batch_size per_gpu_batch_size",
    "train.precision": "dtype torch_dtype params_dtype model_dtype mixed_precision bf16 fp16 half_precision",
    "train.batch_size_rampup": "rampup_batch_size batch_size_warmup",
    "train.optimizer.lr": "learning_rate max_lr peak_lr base_lr initial_lr",
    "train.optimizer": "optim optimizer_name",
    "train.optimizer.betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
    "train.optimizer.eps": "adam_eps adam_epsilon epsilon",
    "train.optimizer.weight_decay": "wd",
    "train.schedule": "lr_schedule scheduler lr_scheduler",
    "train.schedule.name": "lr_scheduler_type lr_decay_style",
    "train.schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps "
    "warmup_ratio warmup_fraction lr_warmup_fraction warmup_num_steps",
    "train.schedule.min_lr": "lr_min min_learning_rate final_lr end_lr eta_min",
    "train.schedule.decay_steps": "lr_decay_iters decay_iters cooldown_steps lr_wsd_decay_iters",
    "train.log_every": "logging_steps log_interval log_steps log_every_n_steps logging_interval",
    "train.eval_every": "eval_steps eval_interval evaluation_steps val_check_interval validation_interval "
    "eval_freq val_interval evaluation_interval",
    "train.eval_batches": "eval_iters num_eval_batches limit_val_batches",
    "train.stop_after": "exit_interval stop_at early_stop",
    "train.max_minutes": "max_time time_limit exit_duration_in_mins time_limit_minutes",
    "train.recompute": "gradient_checkpointing activation_checkpoint recompute_granularity "
    "checkpoint_activations use_activation_checkpointing recompute_activations recompute_method "
    "activation_recompute",
    "train.timeout_seconds": "timeout distributed_timeout_minutes ddp_timeout",
    "train.spike": "loss_spike spike_detection",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_interval ckpt_every checkpoint_every "
    "save_freq checkpointing_steps save_every_n_steps",
    "checkpoint.last": "save_last save_final save_at_end",
    "checkpoint.keep_last": "save_total_limit max_checkpoints num_checkpoints keep_checkpoints",
    "checkpoint.async": "async_save asynchronous",
    "deepspeed": "deepspeed_config ds_config deepspeed_config_file",
    "deepspeed.bf16": "bf16",
    "deepspeed.fp16": "fp16",
    "deepspeed.gradient_clipping": "max_grad_norm clip_grad grad_clip clip_grad_norm gradient_clip_val max_norm",
    "deepspeed.gradient_accumulation_steps": "gradient_accumulation accumulate_grad_batches "
    "grad_accumulation_steps grad_accum_steps gas",
    "deepspeed.zero_optimization": "zero",
    "deepspeed.zero_optimization.stage": "zero_stage sharding_stage",
}
"""Keys of the run file, and what Hugging Face, Megatron, DeepSpeed, Lightning and nanoGPT call them.

A word that means more than one key to them, such as ``batch_size``, stands beside each.
"""

_NEAR, _NEAR_ELSEWHERE = 0.6, 0.8
"""How alike two words are for one to be offered for the other: within a section, and over the whole run file."""


def unknown_key(key: Key, value: object, section: type[Section], whole: type[Section]) -> Fault:
    """Return the fault of a key that `section` of the run file `whole` does not have, with the likeliest key.

    `key` is where it stands, `value` what stands there. A name that other trainers have comes first, then the key of
    that name in another section, then the likeliest slip; where nothing is near, the keys that are allowed. Where the
    key is meant for a section, as in ``optimizer.lr=1``, the whole path of what stands within it is offered.
    """
    meant = _meant(str(key[-1]), tuple(map(str, key[:-1])), section, whole)
    inner = _only_path(value)
    if inner:
        known = known_keys(whole)
        within = [path for path in (".".join((one, *inner)) for one in meant) if path in known]
        within = within or list(_names(whole, None).get(_word(inner[-1]), ()))
        if within:
            return Fault((*key, *inner), f" is not a key; did you mean {alternatives(within)}?")
    if meant:
        return Fault(key, f" is not a key; did you mean {alternatives(_those_that_hold(meant, value, whole))}?")
    return Fault(key, f" is not a key{nearest(str(key[-1]), fields_of(section))}")


def _meant(name: str, at: tuple[str, ...], section: type[Section], whole: type[Section]) -> Sequence[str]:
    """Return the full paths of the keys that a name in a section at `at` may stand for, none where nothing is near."""
    word, own = _word(name), fields_of(section)
    names = _names(whole, section if issubclass(section, ModelConfig) else None)
    if word in names and word not in own:
        return names[word]
    here = max((_alike(word, key) for key in own), default=0.0)
    there = max(names, key=lambda key: _alike(word, key))
    if _alike(word, there) >= _NEAR_ELSEWHERE and _alike(word, there) > here:
        return names[there]
    return [".".join((*at, close)) for close in get_close_matches(name, sorted(own), n=1, cutoff=_NEAR)]


def _word(name: str) -> str:
    return name.lower().replace("-", "_")


def _only_path(value: object) -> tuple[str, ...]:
    """Return the keys on the way into sections of one key each: ``{a: {b: 1}}`` has a, b."""
    path: list[str] = []
    while isinstance(value, Mapping) and len(value) == 1:
        ((key, value),) = value.items()
        path.append(str(key))
    return tuple(path)


def _those_that_hold(meant: Sequence[str], value: object, whole: type[Section]) -> Sequence[str]:
    """Return those of the sections that have every key of the value; all of them where none has."""
    known = known_keys(whole)
    keys = list(value) if isinstance(value, Mapping) else []
    return [one for one in meant if all(f"{one}.{key}" in known for key in keys)] or meant


def _alike(word: str, other: str) -> float:
    matcher = SequenceMatcher(None, other, word)
    return matcher.ratio() if matcher.quick_ratio() >= _NEAR else 0.0


@cache
def _names(whole: type[Section], model: type[ModelConfig] | None) -> dict[str, tuple[str, ...]]:
    """Every word that stands for keys, with the keys: aliases before names, names of the run file before the JSON's.

    Within a `model` its own names come first, and differ by family: of the aliases those of its keys count.
    """
    places: dict[str, list[str]] = {}
    for path in _paths(whole, (), model is not None):
        places.setdefault(path[-1], []).append(".".join(path))
    for key in TABLE:
        places.setdefault(key, [f"deepspeed.{key}"])
    aliases: dict[str, list[str]] = {}
    for key, words in _ALIASES.items():
        if model is None or not key.startswith("model.") or key.removeprefix("model.") in fields_of(model):
            for word in words.split():
                aliases.setdefault(word, []).append(key)
    return {word: tuple(dict.fromkeys(found)) for word, found in (places | aliases).items()}


@cache
def known_keys(whole: type[Section]) -> frozenset[str]:
    """Every key of the run file and of the DeepSpeed JSON, by its full path."""
    return frozenset(".".join(path) for path in (*_paths(whole, (), False), *_json_paths(TABLE, ("deepspeed",))))


def _json_paths(rules: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, rule in rules.items():
        yield (*at, key)
        if isinstance(rule, Mapping):
            yield from _json_paths(rule, (*at, key))


def _paths(section: type[Section], at: tuple[str, ...], within_model: bool) -> Iterator[tuple[str, ...]]:
    for key, info in fields_of(section).items():
        yield (*at, key)
        for inner in run_sections_in(info.annotation):
            # Of a list of sections a key has a number before it, which is not known here.
            if not (within_model and issubclass(inner, ModelConfig)) and not _is_listed(info.annotation):
                yield from _paths(inner, (*at, key), within_model)


def _is_listed(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple
