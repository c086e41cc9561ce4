"""The Ray cluster a run uses: one of its own on this machine, or an existing one it joins; and where its actors go."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from medseg_gym.errors import MedSegError

LOCAL = "local"


def connect(cluster: str, *, cpus: int | None = None) -> bool:
    """Joins the cluster, unless this process is in one: "local" starts one here, "auto" or an address joins one.

    True where it was started here, so that whoever asked shuts it down.
    """
    try:
        import ray
    except ImportError:
        raise MedSegError("training on a cluster needs Ray: pip install 'medseg-gym[rl]'") from None
    if ray.is_initialized():
        return False
    environment = {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if cluster == LOCAL:
        settings |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": cpus,
            "runtime_env": {"env_vars": environment},
        }
    else:
        settings |= {"address": cluster}
    try:
        ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MedSegError(
            f'cluster={cluster!r}: {error}; wanted "local", "auto", or the address of a running cluster, '
            'such as "10.0.0.1:6379" (on its head node: ray start --head)'
        ) from None
    return cluster == LOCAL


def shares(cpus: float, gpus: float, **more: Any) -> Mapping[str, Any]:
    """An actor's share of the cluster, for Ray."""
    return {"num_cpus": cpus, **({"num_gpus": gpus} if gpus else {}), **more}
