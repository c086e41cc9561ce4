"""The settings of training: one flat record for SFT, one for GRPO, read from TOML, a preset below what a file says."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from medseg_gym.errors import MedSegError, UnknownNameError, check_keywords, unknown

PLACEMENTS = ("disaggregated", "colocated")


DTYPES, SCHEDULES = ("bfloat16", "float32"), ("constant", "linear", "cosine")
ONES = ("ranks", "micro_rows", "micro_tokens", "slots", "workers", "keep", "save_every", "batch", "validate_cases")
RANGES = (  # names, least, most
    ((*ONES, "max_new_tokens", "max_chat_tokens"), 1, math.inf),
    (("seed", "lora_rank", "lr", "weight_decay", "grad_clip", "validate_every", "validate_temperature"), 0, math.inf),
    (("validate_questions",), 0, math.inf),
    (("warmup",), 0, 1),
    (("betas",), 0, 1 - 1e-9),
)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both trainers take."""

    # what is trained
    model: str  # a local checkpoint folder of the Qwen-VL family; or "tiny", a random one made in the output folder
    out: str  # the run's folder: settings, logs, checkpoints, gallery
    seed: int = 0
    # where it acts
    env: str = ""  # an env id; SFT needs one for its validation only
    env_options: Mapping[str, Any] = field(default_factory=dict)  # keywords of gym.make: horizon, reward, structures
    protocol: str = "medsam-agent"
    protocol_options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 512  # side of the pictures
    # questions beside masks
    questions: str = ""  # a prepared set, a folder or JSONL file, or "Phantom:task=..."; "" none
    question_share: float = 0.5  # of what is drawn, where there are questions
    validate_questions: int = 64  # asked in a validation, of validate_split
    slots: int = 32  # episodes under way at once, in all env workers together
    workers: int = 1  # env workers
    # the model's part
    freeze: tuple[str, ...] = ("*visual*",)  # patterns of parameter names that are not trained
    lora_rank: int = 0  # 0 trains all that is not frozen
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dtype: str = "bfloat16"  # of the forward pass; master weights and optimiser are float32
    gradient_checkpointing: bool = True
    device: str = ""  # "cpu", "cuda"; "" takes a GPU where there is one
    ranks: int = 1  # learner processes, FSDP2 between them
    micro_rows: int = 4  # most chats in a forward pass
    micro_tokens: int = 16384  # most tokens in a forward pass, padding counted
    # the optimiser: AdamW
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: str = "constant"  # or "linear", "cosine": what follows the warmup
    warmup: float = 0.0  # share of all steps
    # long runs
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    keep: int = 2  # checkpoints kept
    validate_every: int = 100  # steps between validations by episodes in the env; 0 never
    validate_cases: int = 64
    validate_split: str = "val"
    validate_temperature: float = 0.0
    max_new_tokens: int = 256  # of one answer
    max_chat_tokens: int = 12288  # of one chat
    wandb: str = ""  # a project's name, where W&B is installed

    def __post_init__(self) -> None:
        """MedSegError for numbers that no run can have, before anything is loaded."""
        for names, least, most in RANGES:
            for name in names:
                value = getattr(self, name, least)
                for number in value if isinstance(value, tuple) else (value,):
                    if not least <= number <= most:
                        said = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
                        raise MedSegError(f"{name}={value!r}; wanted {said}")
        if self.questions and not 0 < self.question_share < 1:
            raise MedSegError(f"question_share={self.question_share!r}; wanted a share between 0 and 1")
        for name, known in (("dtype", DTYPES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Common):
    """Supervised training on trajectories."""

    data: str  # a trajectory file or folder
    batch: int = 64  # chats a step
    epochs: float = 1.0
    steps: int = 0  # 0: as many as the epochs give


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Common):
    """Group relative policy optimisation in the env."""

    env: str
    iterations: int = 1000  # each one optimiser step
    split: str = "train"
    keys_file: str = ""  # a file of case keys, one a line (the hard set); "" all cases of the split
    prompts: int = 8  # P groups an iteration
    rollouts: int = 8  # G members a group
    temperature: float = 1.0
    lr: float = 1e-6
    weight_decay: float = 0.01
    engine: str = "hf"
    # objective
    std: bool = False  # divide advantages by the group's standard deviation
    normaliser: str = "constant"  # "constant", "token" or "sequence": what the summed loss is divided by
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0  # bound of the loss at negative advantages, such as 3; 0 is off
    kl: float = 0.0  # weight of the KL term against the reference policy
    kl_ratio: bool = False  # weigh the KL term with the ratio, which makes its gradient unbiased (DeepSeek-V3.2)
    reference: str = ""  # its checkpoint folder; "" the policy before training
    importance: str = "token"  # correction between engine and learner: "token", "sequence", "none", "ignore" (rl/loss)
    importance_cap: float = 2.0  # truncation of its weights; "token_mask", "sequence_mask": above it they are 0
    ratio: str = "token"  # new over old probability: each token's, or "sequence": one a chat (GSPO)
    surrogate: str = "clip"  # or "cispo", "sapo", "vespo": how the ratio is bounded
    credit: str = "episode"  # or "turn": a turn's advantage is of the rewards from it on
    filter: bool = True  # drop groups whose rewards are all equal, and draw others
    resample: int = 2  # most rounds of drawing others
    staleness: int = 0  # 1: groups are played while the iteration before is learned, by the weights before its step
    curriculum: str = "none"  # or "difficulty": cases the policy neither always nor never solves come more often
    solved: float = 0.8  # the last IoU from which an episode counts as solved, for the curriculum
    # long runs
    gallery_every: int = 50  # iterations between galleries of sampled episodes; 0 never
    patience: int = 0  # validations without a better mean IoU before the run ends; 0 never
    stop_reward: float = 0.0  # ends the run when the mean training reward is above it; 0 never
    # where the parts live; what is trained does not hang on it
    cluster: str = ""  # "" all in this process; Ray: "local" starts a cluster here, "auto" or an address joins one
    engines: int = 1  # policy engines; an episode stays with one
    engine_options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the engine: max_batch; vLLM's own
    weights_folder: str = ""  # where new weights are left for engines, such as /dev/shm/run; "" sends them to each
    tool_actors: int = 0  # tools shared by all env workers; 0: each has its own
    placement: str = "disaggregated"  # or "colocated": engines and learner ranks share GPUs, one of each a bundle
    worker_cpus: float = 1.0  # of the cluster, for each env worker, and so on; a GPU may be shared: 0.5
    engine_cpus: float = 1.0
    engine_gpus: float = 0.0
    learner_cpus: float = 1.0
    learner_gpus: float = 0.0
    tool_cpus: float = 1.0
    tool_gpus: float = 0.0
    call_timeout: float = 1800.0  # seconds after which a call of an actor is taken for lost
    patience_s: float = 900.0  # seconds an actor may take to find its place and to load


PRESETS = "medseg_gym.rl.presets"
C = TypeVar("C", bound=Common)


def read(kind: type[C], file: str | Path | None = None, **given: Any) -> C:
    """The settings of a TOML file, its `preset` below it and `given` above it. Unknown or misfitting ones raise."""
    said: dict[str, Any] = {}
    if file is not None:
        said = _toml(Path(file))
    said.update(given)
    preset = said.pop("preset", "")
    values = {**(_preset(kind, preset) if preset else {}), **said}
    known = [f.name for f in fields(kind)]
    try:
        check_keywords(kind.__name__, values, known)
    except UnknownNameError as error:
        raise UnknownNameError(f"{file or 'settings'}: {error}") from None
    hints = get_type_hints(kind)
    values = {name: _fitting(name, value, hints[name]) for name, value in values.items()}
    missing = [f.name for f in fields(kind) if f.name not in values and not _has_default(f)]
    if missing:
        raise MedSegError(f"{file or 'settings'}: {', '.join(missing)} not given")
    return kind(**values)


def presets(kind: type[Common]) -> list[str]:
    """The names of the presets that come along, without their kind: "paper" is the file grpo-paper.toml."""
    start = f"{kind.__name__.removesuffix('Config').lower()}-"
    files = [entry.name for entry in resources.files(PRESETS).iterdir()]
    return sorted(name.removesuffix(".toml").removeprefix(start) for name in files if name.startswith(start))


def _preset(kind: type[Common], name: str) -> dict[str, Any]:
    if name not in presets(kind):
        raise unknown("preset", name, presets(kind))
    file = f"{kind.__name__.removesuffix('Config').lower()}-{name}.toml"
    return tomllib.loads((resources.files(PRESETS) / file).read_text(encoding="utf-8"))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MedSegError(f"cannot read {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MedSegError(f"{path} is not TOML: {error}") from None


def _fitting(name: str, value: Any, wanted: Any) -> Any:
    """The value as its field's type has it: whole numbers serve as numbers, lists as tuples."""
    if wanted is float and type(value) is int:
        return float(value)
    if getattr(wanted, "__origin__", None) is tuple and isinstance(value, list | tuple):
        kinds = wanted.__args__
        inner = kinds[0]
        if (len(kinds) == 2 and kinds[1] is Ellipsis) or len(kinds) == len(value):
            return tuple(_fitting(name, item, inner) for item in value)
    kind = getattr(wanted, "__origin__", wanted)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise MedSegError(f"{name}={value!r}; wanted {getattr(wanted, '__name__', wanted)}")


def _has_default(entry: Any) -> bool:
    from dataclasses import MISSING

    return entry.default is not MISSING or entry.default_factory is not MISSING
