"""LoRA by peft, put into the model itself: names stay the model's, and merging happens beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl.config import Common

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
LANGUAGE = "model.language_model."


def add_lora(model: Any, config: Common) -> None:
    """Puts an adapter of `lora_rank` on every linear layer of the language model that `lora_targets` names.

    The adapters are random from `seed` and start as the identity. A target that is nowhere in the model raises.
    """
    import torch

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MedSegError("LoRA needs peft: pip install 'medseg-gym[rl]'") from None
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE) and isinstance(module, torch.nn.Linear)
    ]
    there = {name.rpartition(".")[2] for name in linear}
    for target in config.lora_targets:
        if target not in there:
            raise unknown("LoRA target", target, there)
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # it divides, so any number does
        target_modules=[name for name in linear if name.rpartition(".")[2] in config.lora_targets],
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def scalings(model: Any) -> dict[str, float]:
    """Of every adapted layer, by its name in the model: what the product of its two matrices is multiplied by."""
    return {name: module.scaling[ADAPTER] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged(parameters: Mapping[str, torch.Tensor], factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The parameters as they are called and what they weigh without adapters; those given are left as they are."""
    whole: dict[str, torch.Tensor] = {}
    for name, value in parameters.items():
        layer, base, what = name.partition(".base_layer.")
        if is_adapter(name):
            continue
        if base and what == "weight":
            down, up = (parameters[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            value = value + factors[layer] * (up @ down)
        whole[f"{layer}.{what}" if base else name] = value
    return whole


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within, the model is as if no adapter had been added."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
