"""The learner: a model in training, from its checkpoint folder over optimiser steps to the weights engines take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import batch, learner_state, lora, sharding
from medseg_gym.rl.checkpoint_folder import load_model, saved_names, write_checkpoint
from medseg_gym.rl.config import Common
from medseg_gym.rl.device import device_named
from medseg_gym.rl.forward import micros, scored, scorer_class
from medseg_gym.rl.learner_state import LearnerState
from medseg_gym.rl.loss import Objective, summary, token_losses
from medseg_gym.rl.optimiser import Optimiser
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Row, TokenSequence

if TYPE_CHECKING:
    import torch


class Learner:
    """One rank of it. With `world` ranks each method has to be called on every rank, in the same order.

    What is drawn at random is LoRA's start, from `seed`; there is no dropout, as with it the log-probabilities of an
    update would be another policy's than the one that sampled. On a CPU the same calls give the same bits.
    """

    def __init__(self, config: Common, folder: Path, *, total_steps: int, rank: int = 0, world: int = 1) -> None:
        import torch

        self.config, self.folder, self.rank, self.world = config, Path(folder), rank, world
        self.device = device_of(config.device, rank)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tokens = ChatTokens.from_pretrained(folder)
        self.model = load_model(self.folder)
        if config.lora_rank:
            lora.add_lora(self.model, config)
        self.trained = _freeze(self.model, config)
        _no_dropout(self.model)
        if config.gradient_checkpointing:
            _checkpoint_gradients(self.model)
        self._scorer = self._placed(self.model)
        # After sharding, which replaces them, and kept, as a sharded model shows others while its weights are gathered.
        self._named = dict(self.model.named_parameters())
        self.optimiser = Optimiser({name: self._named[name] for name in self.trained}, config, total_steps)
        self._factors = lora.scalings(self.model)
        self._reference: Any = None
        other = getattr(config, "reference", "")
        if other or (getattr(config, "kl", 0.0) and not config.lora_rank):
            reference = load_model(Path(other) if other else self.folder).requires_grad_(False)
            self._reference = self._placed(reference)

    def step(self, micro: Sequence[Sequence[Row]], objective: Objective) -> dict[str, float]:
        """One optimiser step on micro-batches, of which every rank has as many; a batch's loss is the sum over all.

        Returns loss, grad_norm (before clipping), lr, skipped (1 where loss or gradient were not finite, so that
        nothing was changed), skipped_steps (so far) and the means of `loss.summary`.
        """
        import torch

        self._scorer.train()  # gradients are checkpointed in training mode only
        loss = torch.zeros((), device=self.device)
        sums: dict[str, torch.Tensor] = {}
        for rows in micro:
            part, stats = self._loss(rows, objective)
            (part * self.world).backward()  # FSDP takes the mean over ranks
            loss += part.detach()
            for name, value in stats.items():
                sums[name] = sums[name] + value if name in sums else value
        names = sorted(sums)
        totals = sharding.summed(torch.stack([loss, *(sums[name].float() for name in names)])).tolist()
        taken = self.optimiser.step(totals[0])
        means = summary(dict(zip(names, totals[1:], strict=True))) if names else {"tokens": 0.0}
        return {"loss": totals[0], **taken, "skipped_steps": float(self.optimiser.skipped), **means}

    def _loss(self, rows: Sequence[Row], objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        import torch

        flat = batch.flatten(rows)
        if self.world > 1 and any("visual" in name for name in self.trained):
            # The ranks' gradients are summed for the parameters each has one for, which have to be the same.
            for row in rows:
                if not row.sequence.images:
                    raise BadDataError("a chat without a picture, while ranks train a vision tower; give ranks=1")

        def given(values: NDArray[np.float32] | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values).to(self.device)

        with self._autocast():
            logprobs = scored(
                self._scorer,
                self.tokens,
                [row.sequence for row in rows],
                flat.chosen,
                temperature=objective.temperature,
                banned=objective.kind != "sft",
                device=self.device,
            )
        losses, stats = token_losses(
            objective,
            logprobs,
            advantages=given(flat.advantages),
            engine_logprobs=given(flat.engine_logprobs),
            old=given(flat.old),
            reference=given(flat.reference),
            lengths=flat.lengths,
        )
        weights = given(flat.weights)
        assert weights is not None
        return (weights * losses).sum(), stats

    def logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[np.float32]]:
        """Of each chat (T,): the log-probabilities of its trained tokens under the weights as they are, 0 elsewhere."""
        return self.score(self._micros(sequences), reference=False, temperature=temperature, banned=banned)

    def reference_logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[np.float32]]:
        """The same under the reference policy: `reference`'s checkpoint, else the policy before training."""
        return self.score(self._micros(sequences), reference=True, temperature=temperature, banned=banned)

    def _micros(self, sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
        return micros(sequences, self.config.micro_rows, self.config.micro_tokens)

    def score(
        self, micro: Sequence[Sequence[TokenSequence]], *, reference: bool, temperature: float, banned: bool
    ) -> list[NDArray[np.float32]]:
        """The log-probabilities of micro-batches, of which every rank has as many: a (T,) array a chat, in order."""
        import torch

        scorer: Any = self._scorer
        adapters: AbstractContextManager[None] = nullcontext()
        if reference and self._reference is not None:
            scorer = self._reference
        elif reference:
            if not self.config.lora_rank:
                raise MedSegError("no reference policy is kept: it needs kl > 0, a `reference` or LoRA in the settings")
            adapters = lora.adapters_off(self.model)
        found: list[NDArray[np.float32]] = []
        scorer.eval()
        with torch.no_grad(), self._autocast(), adapters:
            for these in micro:
                chosen = [sequence.loss_mask for sequence in these]
                flat = scored(
                    scorer, self.tokens, these, chosen, temperature=temperature, banned=banned, device=self.device
                )
                parts = np.split(flat.cpu().numpy(), np.cumsum([mask.sum() for mask in chosen])[:-1])
                for mask, values in zip(chosen, parts, strict=True):
                    row = np.zeros(len(mask), np.float32)
                    row[mask] = values
                    found.append(row)
        sharding.reshard(scorer)
        return found

    def weights(self, full: bool) -> dict[str, torch.Tensor]:
        """Float32 copies on the CPU, LoRA merged, named as in the checkpoint that transformers saves.

        Without `full` only those that training changes. Ranks but the first are given nothing.
        """
        named = self._whole(self._parameters(full))
        return saved_names(self.model, lora.merged(named, self._factors)) if self.rank == 0 else {}

    def _parameters(self, full: bool) -> dict[str, torch.Tensor]:
        """By name; without `full` those that are trained and what LoRA merges into."""
        if full:
            return self._named
        changing = {f"{layer}.base_layer.weight" for layer in self._factors} | set(self.trained)
        return {name: value for name, value in self._named.items() if name in changing}

    def save(self, folder: Path) -> None:
        """Writes what `load` needs to go on as if there had been no break, at any number of ranks."""
        import torch

        weights = self._whole(self.optimiser.named)
        moments = self.optimiser.moments(keep=self.rank == 0)
        if self.rank == 0:
            counters = self.optimiser.steps, self.optimiser.skipped
            learner_state.write(folder, LearnerState(weights, moments, torch.get_rng_state(), *counters))

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote. What is not whole, or of other parameters, raises BadDataError before anything is
        changed."""
        import torch

        named = self.optimiser.named
        state = learner_state.read(folder, named)
        with torch.no_grad():
            for name, value in state.weights.items():
                sharding.local(named[name]).copy_(sharding.local(sharding.placed(value, named[name])))
        self.optimiser.load(state)
        torch.set_rng_state(state.rng)

    def _whole(self, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole copies on the CPU, for the first rank; the others only take part."""
        return {
            name: full for name, value in named.items() if (full := sharding.whole(value, self.rank == 0)) is not None
        }

    def export(self, folder: Path) -> None:
        """Writes a checkpoint folder that transformers and vLLM load, LoRA merged, in the dtype it was trained in."""
        weights = self.weights(full=True)
        if self.rank == 0:
            write_checkpoint({name: value.to(self.dtype) for name, value in weights.items()}, self.folder, folder)

    def _placed(self, model: Any) -> Any:
        scorer = scorer_class()(model)
        if self.world == 1:
            return scorer.to(self.device)
        sharding.shard(scorer, self.dtype, self.device)
        return scorer

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def device_of(name: str, rank: int) -> torch.device:
    import torch

    device = device_named(name)
    if device.type == "cuda" and device.index is None:
        if rank >= torch.cuda.device_count():
            raise MedSegError(f"rank {rank} has no GPU: there are {torch.cuda.device_count()}; give fewer ranks")
        device = torch.device("cuda", rank)
    return device


def _freeze(model: Any, config: Common) -> list[str]:
    """The names of what is trained: the adapters, if there are any, else all that no pattern of `freeze` fits."""
    named = dict(model.named_parameters())
    frozen = {name for pattern in config.freeze for name in _fitting(pattern, list(named))}
    trained = [name for name in named if (lora.is_adapter(name) if config.lora_rank else name not in frozen)]
    if not trained:
        raise MedSegError(f"freeze={list(config.freeze)} leaves nothing to train")
    for name, parameter in named.items():
        parameter.requires_grad_(name in set(trained))
    return trained


def _fitting(pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise MedSegError(f"freeze pattern {pattern!r} fits no parameter; they are called such as {names[0]!r}")
    return found


def _checkpoint_gradients(model: Any) -> None:
    """Layers compute their activations anew in the backward pass, instead of keeping them."""
    # transformers before 5.21 knows the older name only, and later ones warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _no_dropout(model: Any) -> None:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
