"""A batch of answers from a transformers model: prefill, then token by token with a cache of keys and values.

Positions are explicit (a row's multimodal rope is its own and outlives other rows' images), rows are padded on the
left, and a row that has ended is carried along, so what a row gives hangs on who is in the batch, not on who ends when.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from medseg_gym.rl.engines.base import GenRequest, GenResult
from medseg_gym.rl.engines.checks import spans
from medseg_gym.rl.sampling import generator, gumbel
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Finish, ImageRef

if TYPE_CHECKING:
    import torch


PATCHES = 2**16  # most patches the vision tower is given at once: 64 pictures of 512x512
KEPT = 2**30  # most bytes of patches that are kept: 170 pictures of 512x512


class Decoder:
    """Decodes batches with one model. Of earlier batches it remembers pictures' patches only, which weights and company
    leave alone, so no result hangs on what came before."""

    def __init__(self, model: Any, tokens: ChatTokens) -> None:
        self.model, self.tokens = model, tokens
        self.counters = {"image_encodes": 0.0, "completion_tokens": 0.0}  # these as they are sampled
        self._patches: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._kept = 0  # their bytes

    def decode(
        self, requests: Sequence[GenRequest], gate: Callable[[], int | None], queued: float = 0.0
    ) -> list[GenResult]:
        """One result a request. `gate` is called before every token; it gives the weights' version, None to abort."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            rows = [_Row(request) for request in requests]
            sampler = _Sampler(requests, self.model.lm_head.weight.shape[0], self.model.device)
            if (version := gate()) is not None:
                # A group's members ask about the same chat at first: it is read once, and its keys and values copied.
                chats = [(request.ids, tuple(image.sha for image in request.images)) for request in requests]
                unique = list(dict.fromkeys(chats))
                first = [requests[chats.index(chat)] for chat in unique]
                out, mask, position = self._prefill(first)
                which = torch.tensor([unique.index(chat) for chat in chats], device=self.model.device)
                cache, logits = out.past_key_values, out.logits[:, -1]
                if len(unique) < len(chats):
                    cache.batch_select_indices(which)
                    logits, mask, position = logits[which], mask[which], position[which]
            prefilled = time.perf_counter()
            while version is not None:
                ended = [row.ended for row in rows]
                self.counters["completion_tokens"] += ended.count(False)
                chosen, logprobs = sampler.draw(logits, ended)
                for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
                    row.take(token, logprob, version)
                if all(row.ended for row in rows):
                    break
                if (version := gate()) is None:
                    break
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                out = self.model(
                    input_ids=chosen[:, None],
                    attention_mask=mask,
                    position_ids=position.expand(3, len(rows)).unsqueeze(-1),
                    past_key_values=cache,
                    use_cache=True,
                )
                position = position + 1
                cache, logits = out.past_key_values, out.logits[:, -1]
        done = time.perf_counter()
        timing = {"queue_s": queued, "prefill_s": prefilled - begun, "decode_s": done - prefilled}
        return [row.result(timing) for row in rows]

    def _prefill(self, requests: Sequence[GenRequest]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The model's output over the prompts, their attention mask (B, T), and the next token's position (B,)."""
        import torch

        longest = max(len(request.ids) for request in requests)
        ids = torch.full((len(requests), longest), self.tokens.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, longest - len(request.ids) :] = 1
        kinds = (ids == self.tokens.image_pad).long()
        ids, mask, kinds = (tensor.to(self.model.device) for tensor in (ids, mask, kinds))
        grids, tower = self._see([image for request in requests for image in request.images])
        positions, deltas = self.model.model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=mask)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_token_type_ids=kinds,
            mm_encoder_outputs=tower,
            use_cache=True,
            logits_to_keep=1,
        )
        return out, mask, mask.sum(1) + deltas[:, 0]

    def _see(self, images: Sequence[ImageRef]) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
        """The pictures' grids (N, 3) and what the vision tower makes of them, equal pictures being encoded once."""
        import torch

        if not images:
            return None, None
        unique = {image.sha: image for image in images}
        read = [self._read(image) for image in unique.values()]
        patches, grids = torch.cat([patch for patch, _ in read]), torch.stack([grid for _, grid in read])
        self.counters["image_encodes"] += len(unique)
        sizes = grids.prod(1).tolist()
        parts: list[Any] = []
        for group in _chunks(sizes, PATCHES):
            many = sum(sizes[i] for i in group)
            some, patches = patches[:many], patches[many:]
            given = some.to(self.model.device), grids[group].to(self.model.device)
            parts.append(self.model.get_image_features(*given, return_dict=True))
        place = {sha: i for i, sha in enumerate(unique)}
        which = [place[image.sha] for image in images]
        seen = parts[0]
        pooled = [picture for part in parts for picture in part.pooler_output]
        seen.pooler_output = tuple(pooled[i] for i in which)
        if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL's, a list of pictures a level
            levels = zip(*(part.deepstack_features for part in parts), strict=True)
            deep = [[picture for part in level for picture in part] for level in levels]
            seen.deepstack_features = [tuple(level[i] for i in which) for level in deep]
        return grids[which].to(self.model.device), {"image": seen}

    def _read(self, image: ImageRef) -> tuple[torch.Tensor, torch.Tensor]:
        """A picture's patches (N, D) and grid (3,). A chat shows its pictures again every turn, and to cut one of
        512x512 takes 25 ms, so the last ones are kept."""
        if (found := self._patches.pop(image.sha, None)) is None:
            pixels = self.tokens.processor(images=[image.pixels], return_tensors="pt")
            found = pixels["pixel_values"], pixels["image_grid_thw"][0]
            self._kept += found[0].nbytes
        self._patches[image.sha] = found
        while self._kept > KEPT:
            self._kept -= self._patches.popitem(last=False)[1][0].nbytes
        return found


class _Row:
    """An answer as it grows."""

    def __init__(self, request: GenRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.stopped = False

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.ids) == self.request.max_tokens

    def take(self, token: int, logprob: float, version: int) -> None:
        if self.ended:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        self.stopped = token in self.request.stop_ids

    def result(self, timing: dict[str, float]) -> GenResult:
        finish: Finish = "stop" if self.stopped else "length" if self.ended else "abort"
        return GenResult(tuple(self.ids), tuple(self.logprobs), finish, spans(self.versions), timing)


class _Sampler:
    """Draws every row's next token with the row's own noise, temperature and banned ids."""

    def __init__(self, requests: Sequence[GenRequest], vocabulary: int, device: Any) -> None:
        import torch

        self.device = device
        self.random = [generator(request.seed) if request.temperature else None for request in requests]
        # A row at temperature 0 takes the largest score, and its log-probabilities are those at temperature 1.
        self.temperature = torch.tensor([[request.temperature or 1.0] for request in requests], device=device)
        self.banned = torch.zeros((len(requests), vocabulary), dtype=torch.bool)
        for row, request in enumerate(requests):
            self.banned[row, [i for i in request.banned_ids if i < vocabulary]] = True
        self.banned = self.banned.to(device)

    def draw(self, logits: torch.Tensor, ended: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) ids and their log-probabilities, float32, for (B, V) logits; what ended rows get is of no account."""
        import torch

        noise = torch.zeros(logits.shape, dtype=torch.float64)
        for row, random in enumerate(self.random):
            if random is not None and not ended[row]:
                noise[row] = gumbel(random, logits.shape[1])
        scores = logits.float().masked_fill(self.banned, -torch.inf) / self.temperature
        chosen = (scores + noise.to(scores)).argmax(-1)
        logprobs = scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        return chosen, logprobs


def _chunks(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Runs of indices whose sizes add up to at most `most`; a larger one stands alone."""
    groups: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    return groups
