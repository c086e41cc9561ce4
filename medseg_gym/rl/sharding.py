"""FSDP2 between learner ranks, and what is done to tensors that may be sharded.

What gathers or sums is a collective: every rank has to call it, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def shard(scorer: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Shards a scorer's model over all ranks: each decoder layer for itself, all else with the root.

    The vision tower stays with the root: on its own its weights would be gathered only by ranks whose micro-batch has a
    picture, and the others would wait for ever. Weights are gathered and gradients computed in `dtype`, summed in
    float32.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in scorer.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(scorer, mesh=mesh, mp_policy=policy)


def reshard(scorer: Any) -> None:
    """Lets go of the weights that a forward pass without a backward one leaves gathered: the next would use them again,
    however the sharded ones had changed."""
    if hasattr(scorer, "reshard"):
        scorer.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
    """A copy of all of a tensor, on the CPU; None without `keep`, on a rank that only takes part in gathering it."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full.to("cpu", copy=True) if keep else None


def placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded and placed as another one; every rank brings the same."""
    value = value.to(like.device, like.dtype)
    if not _is_sharded(like):
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
