"""Networks that were trained on pixels, as policies: a picture in, a coarse action out, in plain torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.envs.coarse import CoarseCodec
from medseg_gym.envs.spaces import VERBS, ActionCodec
from medseg_gym.envs.wrappers import standardised
from medseg_gym.errors import BadDataError, InvalidActionError
from medseg_gym.frames import Grid
from medseg_gym.policies.base import spelled
from medseg_gym.render import Overlay
from medseg_gym.types import Decision, Image, Stop, View

FOLDER = Path(__file__).parent / "pixel_weights"
SHIPPED = {  # name: file and its sha256
    "PPO-SB3": ("ppo_sb3.safetensors", "49e9aaf645de556b53baf12d32c777382bb288ae3c45828d80695bb82a108664"),
    "PPO-RLlib": ("ppo_rllib.safetensors", "ec3fc4492b57860f09759086df2128201e9ece4e600ab171405b6170a4f3de8b"),
}
MOST_BYTES = 64 * 2**20  # of a weights file


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """What a network sees and does, stored beside its weights."""

    structure: str  # the one it was trained on; a picture does not name another
    size: int  # side of the picture
    strides: tuple[int, ...]  # of its convolutions, which have no padding
    turns: int  # of its training episodes; a policy stops after as many
    verbs: tuple[str, ...]
    cells: int
    sizes: tuple[float, ...]
    trained: str = ""  # with what, for people


class PixelNet:
    """A standardised picture, convolutions, a hidden layer, an output for each choice of each number; ReLU between.

    weights: conv{i}.weight (out, in, k, k) and .bias, hidden.weight (out, in) over (channel, row, column) and .bias,
    actions.weight (sum of choices, hidden) and .bias; float32.
    """

    def __init__(self, spec: PixelSpec, weights: Mapping[str, Any]) -> None:
        names = [*(f"conv{i}" for i in range(len(spec.strides))), "hidden", "actions"]
        wanted = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        if set(weights) != wanted:
            raise BadDataError(f"weights {sorted(weights)}; wanted {sorted(wanted)}")
        self.spec, self.weights = spec, dict(weights)
        self.codec = CoarseCodec(spec.verbs, spec.cells, spec.sizes)
        self.choices = self.codec.space.nvec.tolist()  # type: ignore[union-attr]
        if len(weights["actions.bias"]) != sum(self.choices):
            raise BadDataError(
                f"{len(weights['actions.bias'])} outputs; wanted {sum(self.choices)}, for {self.choices}"
            )

    def logits(self, pictures: NDArray[np.uint8]) -> Any:
        """(N, sum of choices) float32 tensor from (N, S, S, 3) pictures."""
        import torch
        from torch.nn import functional as f

        w = self.weights
        with torch.inference_mode():
            x = torch.from_numpy(standardised(pictures)).permute(0, 3, 1, 2)
            for i, stride in enumerate(self.spec.strides):
                x = f.relu(f.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], stride))
            x = f.relu(f.linear(x.flatten(1), w["hidden.weight"], w["hidden.bias"]))
            return f.linear(x, w["actions.weight"], w["actions.bias"])

    def actions(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The likeliest (N, 4) coarse actions; of equal ones the first."""
        parts = self.logits(pictures).split(self.choices, dim=1)
        return np.stack([part.argmax(1).numpy() for part in parts], 1)

    def save(self, path: str | Path) -> str:
        """Writes weights and spec as safetensors; the file's sha256."""
        from safetensors.torch import save

        data = save(
            {k: v.detach().contiguous() for k, v in self.weights.items()}, {"spec": json.dumps(asdict(self.spec))}
        )
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
        return hashlib.sha256(data).hexdigest()

    @staticmethod
    def load(path: str | Path, sha256: str | None = None) -> PixelNet:
        """The network of a file; what is none, or has another checksum than is wanted, raises BadDataError."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            if Path(path).stat().st_size > MOST_BYTES:
                raise BadDataError(f"{path} is larger than {MOST_BYTES} bytes: no network on pixels")
            data = Path(path).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if sha256 is not None and found != sha256:
                raise BadDataError(f"{path} has the sha256 {found}; wanted {sha256}: install medseg-gym again")
            length = int.from_bytes(data[:8], "little")
            stored = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["spec"])
            weights = load(data)
            lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
            spec = PixelSpec(**{f.name: {**stored, **lists}[f.name] for f in fields(PixelSpec)})
        except OSError as error:
            raise BadDataError(
                f"no weights at {path}: {error.strerror}; train some: python baselines/sb3_ppo.py"
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadDataError(f"{path} holds no network on pixels ({type(error).__name__}: {error})") from error
        return PixelNet(spec, weights)


class PixelPolicy:
    """Plays a network's likeliest action on the picture the env would show it. It knows one structure only.

    `weights` is a file that the baselines `sb3_ppo.py` and `rllib_ppo.py` wrote, or a ready PixelNet.
    """

    def __init__(
        self, weights: str | Path | PixelNet, verbs: Sequence[str] = VERBS, *, name: str | None = None
    ) -> None:
        self.net = weights if isinstance(weights, PixelNet) else PixelNet.load(weights)
        self.name = name or spelled("PPO", {"weights": weights}, {"weights": None})
        lacking = [verb for verb in (*self.net.spec.verbs, "stop") if verb not in verbs]
        if lacking:
            raise InvalidActionError(f"{self.name} needs the verb {lacking[0]!r}; the env allows {', '.join(verbs)}")
        self._codec = ActionCodec(VERBS)
        self._last: Overlay | None = None
        self._image: Image | None = None

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        decisions = [Decision(Stop())] * len(views)
        going = [i for i, view in enumerate(views) if view.turn < self.net.spec.turns]
        if going:
            actions = self.net.actions(np.stack([self.picture(views[i]) for i in going]))
            for i, action in zip(going, actions, strict=True):
                decisions[i] = Decision(self._typed(action, views[i]))
        return decisions

    def picture(self, view: View) -> NDArray[np.uint8]:
        """The env's image observation of a view, (S, S, 3)."""
        if self._last is None or self._image is not view.image:
            self._last, self._image = Overlay(view.image, self.net.spec.size), view.image
        return self._last.draw(view.mask)

    def _typed(self, action: NDArray[np.int64], view: View) -> Any:
        height, width = view.mask.shape
        return self._codec.decode(self.net.codec.vector(action), Grid(height, width))


def sb3(verbs: Sequence[str] = VERBS) -> PixelPolicy:
    """The network that `baselines/sb3_ppo.py` trained, from the package."""
    return _shipped("PPO-SB3", verbs)


def rllib(verbs: Sequence[str] = VERBS) -> PixelPolicy:
    """The network that `baselines/rllib_ppo.py` trained, from the package."""
    return _shipped("PPO-RLlib", verbs)


def _shipped(name: str, verbs: Sequence[str]) -> PixelPolicy:
    file, sha256 = SHIPPED[name]
    return PixelPolicy(PixelNet.load(FOLDER / file, sha256), verbs, name=name)
