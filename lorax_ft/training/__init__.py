"""Training: objectives, optimizers, sharding, the step, checkpoints and the loop."""

from lorax_ft.training.allocation import AllocationState, allocate_budget
from lorax_ft.training.checkpoints import Identity, Snapshot, Store, open_store
from lorax_ft.training.loop import Batches, FitResult, fit
from lorax_ft.training.objectives import OBJECTIVES, Objective
from lorax_ft.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    trainable_labels,
    trainable_only,
)
from lorax_ft.training.paging import PagedOptimizer, start_optimizer
from lorax_ft.training.processes import (
    ProcessesConfig,
    check_same,
    check_shared,
    is_first,
    together,
)
from lorax_ft.training.progress import Progress, TrainConfig
from lorax_ft.training.sharding import (
    RULES,
    MeshConfig,
    Rule,
    gathered,
    idle_devices,
    make_mesh,
    replicate,
    shard,
    shard_batch,
    shardings,
    shardings_of,
)
from lorax_ft.training.shares import Share, gather, share_of
from lorax_ft.training.step import make_eval_step, make_train_step

__all__ = [
    "OBJECTIVES",
    "RULES",
    "AllocationState",
    "Batches",
    "FitResult",
    "Identity",
    "MeshConfig",
    "Objective",
    "OptimizerConfig",
    "PagedOptimizer",
    "ProcessesConfig",
    "Progress",
    "Rule",
    "Share",
    "Snapshot",
    "Store",
    "TrainConfig",
    "allocate_budget",
    "build_optimizer",
    "check_same",
    "check_shared",
    "fit",
    "gather",
    "gathered",
    "idle_devices",
    "is_first",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "open_store",
    "replicate",
    "shard",
    "shard_batch",
    "shardings",
    "shardings_of",
    "share_of",
    "start_optimizer",
    "together",
    "trainable_labels",
    "trainable_only",
]
