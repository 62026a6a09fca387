"""What tells one order of training samples from another: the same text in the same order has the same digest.

A resumed run goes on at a number of samples. It reads what the uninterrupted run would have read where the digest is
the one that the checkpoint has. Paths, thresholds of warnings, and what becomes of a sample once it is read are no
part of it.
"""

import json
from hashlib import sha256
from typing import Any

from megalite.config import RunConfig
from megalite.data.batch_schedule import BatchSchedule
from megalite.data.order.blend import megatron_source_sizes, whole_weights
from megalite.data.order.streaming import split_documents
from megalite.data.sources import open_source

_KEYS_OF_BEFORE = (
    *("sequence_length", "split", "order", "max_epochs", "reset_attention_mask", "reset_position_ids"),
    *("eod_mask_loss", "fim_rate", "fim_spm_rate", "fim_tokens"),
)


def order_digest(config: RunConfig) -> str:
    """Return a SHA-256 over all that the order of the samples to train on follows from.

    These are the seed, the sequence length, and of each source its content (`fingerprint`), the documents that are
    trained on, and its share. The order `megatron` also follows from the passes over each source, and so from
    ``train.steps``, once there are two or more. Raises UserError where a source is not there.
    """
    data = config.data
    sources = [open_source(source, config) for source in data.train]
    chosen = [split_documents(source.num_units, data.split or (1.0,))[0] for source in sources]
    facts: dict[str, Any] = {
        "seed": config.run.seed,
        "order": data.order,
        "sequence_length": data.sequence_length,
        "sources": [
            [source.fingerprint(), units.start, units.stop] for source, units in zip(sources, chosen, strict=True)
        ],
    }
    weights = [
        float(opened.num_tokens(units)) if source.weight == "auto" else float(source.weight)
        for source, opened, units in zip(data.train, sources, chosen, strict=True)
    ]
    if len(weights) > 1:
        facts["weights"] = whole_weights(weights) if data.order == "streaming" else _shares(weights)
    if data.order == "megatron":
        samples = BatchSchedule(config.train).consumed(config.train.steps)
        sizes = megatron_source_sizes(samples, weights) if len(weights) > 1 else [samples]
        facts["epochs"] = [
            source.epochs(units, size) for source, units, size in zip(sources, chosen, sizes, strict=True)
        ]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def order_digest_of_before(config: RunConfig) -> str:
    """Return the digest that checkpoints had before, which was over settings alone, paths among them."""
    data: dict[str, Any] = config.data.model_dump(mode="json", include=set(_KEYS_OF_BEFORE))
    data["train"] = [source.model_dump(mode="json", include={"prefix", "weight"}) for source in config.data.train]
    return sha256(json.dumps([config.run.seed, data], sort_keys=True).encode()).hexdigest()


def _shares(weights: list[float]) -> list[str]:
    total = sum(weights)
    return [(weight / total).hex() for weight in weights]
