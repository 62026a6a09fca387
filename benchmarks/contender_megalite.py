"""megalite as a contender: its own Trainer, as ``megalite train`` builds it, over the job's batches."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import yaml
from workload import TIMEOUT, Contender, Job

from megalite.data.order.streaming import Piece


class JobSamples:
    """The job's batches as samples: sample i is row ``i % global_batch_size`` of batch ``i // global_batch_size``."""

    num_samples: int | None = None
    samples_per_epoch = 1 << 60
    has_loss_mask = False

    def __init__(self, job: Job) -> None:
        self.sequence_length = job.sequence_length
        self._job = job
        self._step, self._batch = -1, np.empty(0)

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._row(int(index)) for index in indices])

    def loss_mask(self, indices: np.ndarray) -> None:
        return None

    def pieces(self, index: int) -> list[Piece]:
        return [Piece(Path("job"), index, 0, self.sequence_length + 1)]

    def _row(self, index: int) -> np.ndarray:
        step, row = divmod(index, self._job.global_batch_size)
        if step != self._step:
            self._step, self._batch = step, self._job.batch(step).numpy()
        return self._batch[row]


class Megalite(Contender):
    """megalite's trainer at ZeRO-1."""

    name = "megalite"
    layouts = ("one", "tp2", "pp2", "dp2")
    description = "megalite, ZeRO-1, 1F1B"
    settings: ClassVar[tuple[str, ...]] = ()
    """Of the run file, in place of the job's."""

    def setup(self, rank: int, world_size: int, port: int) -> None:
        from megalite.data.datasets import Datasets
        from megalite.data.indexed.writer import IndexedDatasetWriter
        from megalite.parallel.mesh import joined_mesh, local_device
        from megalite.planning.plan import prepare
        from megalite.training.trainer import Trainer

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.yaml"
            path.write_text(yaml.safe_dump(self.run_file(folder)), encoding="utf-8")
            plan = prepare(path, self.settings, world_size)
            # The trainer asks the run file's dataset what its documents end with, though its samples are the job's.
            writer = IndexedDatasetWriter(Path(folder) / "corpus", np.dtype(np.uint16))
            writer.add_document(np.zeros(2, np.uint16))
            writer.finalize()
            _ = plan.documents  # read while the files are there
        os.environ["LOCAL_RANK"] = str(rank)
        self.stack = ExitStack()
        mesh = self.stack.enter_context(
            joined_mesh(plan.layout, rank, device=local_device(rank), timeout=TIMEOUT, placement=plan.placement)
        )
        self.trainer = Trainer(plan, mesh, Datasets(train=JobSamples(self.job)))
        self.steps = 0
        torch.distributed.barrier()

    def run_file(self, folder: str) -> dict[str, object]:
        """The job as a run file."""
        job = self.job
        return {
            "run": {"dir": folder, "seed": job.seed},
            "model": {
                "architecture": "llama",
                "vocab_size": job.vocab_size,
                "hidden_size": job.hidden_size,
                "num_hidden_layers": job.num_hidden_layers,
                "num_attention_heads": job.num_attention_heads,
                "intermediate_size": job.intermediate_size,
                "max_position_embeddings": job.sequence_length,
                "tie_word_embeddings": job.tie_word_embeddings,
                "rms_norm_eps": job.rms_norm_eps,
                "rope_theta": job.rope_theta,
                "initializer_range": job.initializer_range,
            },
            "data": {"sequence_length": job.sequence_length, "train": [{"prefix": f"{folder}/corpus"}]},
            "parallel": {
                "tensor": self.layout.size("tensor"),
                "pipeline": self.layout.size("pipeline"),
                "data": self.layout.size("data"),
            },
            "train": {
                "steps": 1_000_000,
                "global_batch_size": job.global_batch_size,
                "micro_batch_size": job.micro_batch_size,
                "optimizer": {
                    "name": "adamw",
                    "lr": job.lr,
                    "betas": list(job.betas),
                    "eps": job.eps,
                    "weight_decay": job.weight_decay,
                },
                "schedule": {"name": "constant"},
            },
            "deepspeed": {
                "bf16": {"enabled": job.dtype == "bf16"},
                "zero_optimization": {"stage": 1},
                "gradient_clipping": job.gradient_clipping,
            },
        }

    def step(self) -> float:
        self.steps += 1
        return self.trainer.step(self.steps).loss

    def teardown(self) -> None:
        self.trainer.close()
        self.stack.close()
