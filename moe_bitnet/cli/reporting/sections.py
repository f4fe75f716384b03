"""What each step of the demo leaves in the run folder: the field names are the JSON keys.

Sizes are bytes, times seconds, losses nats per token. Read by :mod:`record`.
"""

import math
from dataclasses import dataclass

from cluster.training.shards import ShardSummary
from cluster.training.summary import TrainingSummary


@dataclass(frozen=True)
class TrainingPoint:
    """One training line of ``metrics.jsonl``; ``tokens`` counts from the start.

    Loads are multiples of the even share, one a layer; lines of older runs end after ``elapsed_s``.
    """

    step: int
    tokens: int
    loss: float
    load_balance_loss: float
    router_z_loss: float
    learning_rate: float
    tokens_per_s: float
    expert_load_cv: float
    elapsed_s: float
    gradient_norm: float = math.nan
    dispatch_bytes: float = 0.0
    expert_load_min: tuple[float, ...] = ()
    expert_load_max: tuple[float, ...] = ()
    num_idle_experts: int = 0


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation line of ``metrics.jsonl``; ``expert_load`` is each expert's share of its layer's visits."""

    step: int
    tokens: int
    validation_loss: float
    validation_ppl: float
    elapsed_s: float
    expert_load: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class TrainingSection:
    """One trained model; ``summary`` is ``None`` while training has not finished."""

    summary: TrainingSummary | None
    points: tuple[TrainingPoint, ...]
    evaluations: tuple[EvaluationPoint, ...]


@dataclass(frozen=True)
class PackedLayout:
    """The packed model in one layout."""

    layout: str
    file_bytes: int
    expert_bytes: int
    bits_per_expert_weight: float


@dataclass(frozen=True)
class PackSection:
    """``pack.json``: the model on disk, packed and as FP16, and what packing changed in the logits."""

    layouts: tuple[PackedLayout, ...]
    fp16_file_bytes: int
    fp16_expert_bytes: int
    max_abs_logit_difference: float
    max_abs_logit: float


@dataclass(frozen=True)
class Device:
    """A device that experts may be placed on; ``reserved_bytes`` of its memory are not for experts."""

    name: str
    memory_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Fit:
    """How many devices one format needs; ``expert_bytes`` is one expert, ``total_bytes`` the whole model."""

    num_devices: int
    lower_bound: int
    expert_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class PlaceSection:
    """``place.json``: the experts of both formats on the same devices."""

    devices: tuple[Device, ...]
    float16: Fit
    ternary: Fit
    layout: str


@dataclass(frozen=True)
class TrafficRun:
    """One generation run and the bytes that crossed a boundary between devices."""

    name: str
    num_devices: int
    dispatch: str
    combine: str
    num_tokens: int
    dispatch_bytes: int
    combine_bytes: int
    metadata_bytes: int
    header_bytes: int
    bytes_per_token: float
    formula_bytes_per_token: float
    seconds: float
    tokens_equal_single_process: bool


@dataclass(frozen=True)
class GenerateSection:
    """``generate.json``: generation with remote experts."""

    prompt: str
    text: str
    num_new_tokens: int
    tokens_equal_single_process: bool
    runs: tuple[TrafficRun, ...]


@dataclass(frozen=True)
class CacheFormat:
    """What one cache format holds within the budget."""

    format: str
    effective_bits: float
    num_tokens: int
    allocated_bytes: int
    bytes_per_token: float
    ppl_common: float
    ppl_all: float


@dataclass(frozen=True)
class ContextSection:
    """``context.json``: the longest context within one byte budget."""

    budget_bytes: int
    model: str
    trained_seq_len: int
    common_num_tokens: int
    formats: tuple[CacheFormat, ...]


@dataclass(frozen=True)
class MachineSection:
    """``machine.json``: where and when the demo ran."""

    cpu: str
    num_cores: int
    memory_bytes: int
    python: str
    versions: dict[str, str]
    commit: str
    date: str
    demo_s: float
    steps_s: dict[str, float]


@dataclass(frozen=True)
class Results:
    """All sections of a run; one that is ``None`` belongs to a step that was not run."""

    name: str
    data: ShardSummary | None = None
    ternary: TrainingSection | None = None
    twin: TrainingSection | None = None
    pack: PackSection | None = None
    place: PlaceSection | None = None
    generate: GenerateSection | None = None
    context: ContextSection | None = None
    machine: MachineSection | None = None
