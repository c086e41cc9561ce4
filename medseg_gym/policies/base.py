"""The Policy protocol, and `make`: a policy from a name with options, a class, an entry point or a ready object."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import numpy as np

from medseg_gym.errors import MedSegError, UnknownNameError, check_keywords, unknown
from medseg_gym.types import Decision, View

GROUP = "medseg_gym.policies"  # the entry point group of other packages' policies
_PROVIDED = ("dataset", "verbs")  # what `make` takes from the env for a constructor that asks for it
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

BUILTIN: dict[str, str] = {
    name: f"medseg_gym.policies.scripted:{name}"
    for name in ("Random", "CentreClick", "BoxOnce", "OracleClicks", "OracleBoxThenClicks", "XuClicks")
}
TRAINED: dict[str, str] = {  # networks on pixels; "PPO:weights=FILE" is one of your own
    "PPO": "medseg_gym.policies.pixels:PixelPolicy",
    "PPO-SB3": "medseg_gym.policies.pixels:sb3",
    "PPO-RLlib": "medseg_gym.policies.pixels:rllib",
}
SPOKEN: dict[str, str] = {
    "TextOracle": "medseg_gym.policies.text_oracle:TextOracle",
    "vlm": "medseg_gym.policies.vlm:served",
    "vlm-local": "medseg_gym.policies.vlm:local",
}


@runtime_checkable
class Policy(Protocol):
    """Decides what to do next from what it may see; a view and its generator are all it uses."""

    name: str  # for the records; where `make` can build it, the spec that builds it again

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        """One decision for each view, in order, drawing only from the generator beside it."""
        ...


@runtime_checkable
class LaterPolicy(Policy, Protocol):
    """A policy that answers in its own time, such as a served language model; `act` waits for all answers."""

    def submit(self, view: View, rng: np.random.Generator) -> Future[Decision]:
        """The decision to come. What it needs of the generator it draws before it returns."""
        ...


def make(spec: str | Policy | Callable[..., Policy], env: Any = None, **options: Any) -> Policy:
    """The policy of a spec, for an env (single or vector; what it lends is dataset and verbs).

    A spec is `Name`, `Name:key=value,key=value`, the same with `package.module:Class` as the name, the name of an
    entry point of the group "medseg_gym.policies", a class, or a ready Policy, which is returned as it is. Values are
    read as whole number, number, true, false, none, else text. The constructor is called with `options` and with
    those of `dataset` (privileged: it holds the targets) and `verbs` that it has parameters for; where there is no
    env, these two can be given among `options`.
    """
    if not isinstance(spec, str) and not inspect.isclass(spec) and isinstance(spec, Policy):
        if options:
            raise UnknownNameError(f"{spec.name} is a ready policy; it takes no options, {', '.join(options)} came")
        return spec
    name, written = _parse(spec) if isinstance(spec, str) else (getattr(spec, "__name__", repr(spec)), {})
    if twice := sorted(written.keys() & options.keys()):
        raise UnknownNameError(f"option {twice[0]!r} came both in the spec {spec!r} and as a keyword; give it once")
    build = _find(name) if isinstance(spec, str) else spec
    if not callable(build):
        if isinstance(build, Policy) and not written and not options:
            return build
        raise UnknownNameError(f"{name} is neither a Policy class nor, without options, a ready Policy: {build!r}")
    policy = build(**_arguments(name, build, env, {**written, **options}))
    if not isinstance(policy, Policy):
        raise UnknownNameError(f"{name} made {policy!r}; wanted an object with `name` and `act(views, rngs)`")
    return policy


def names() -> list[str]:
    """The names `make` knows: built-in ones, then entry points."""
    own = [*BUILTIN, *TRAINED, *SPOKEN]
    return [*own, *sorted(point.name for point in metadata.entry_points(group=GROUP) if point.name not in own)]


def spelled(name: str, options: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The spec of a name and its options, leaving out those at their default: "OracleClicks:jitter=5"."""
    parts = [f"{key}={_write(value)}" for key, value in options.items() if value != defaults[key]]
    return f"{name}:{','.join(parts)}" if parts else name


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of `Name:key=value,...` or `package.module:Class:key=value,...`; the options may be absent."""
    name, _, rest = spec.partition(":")
    if rest and "=" not in rest.partition(":")[0]:  # package.module:Class
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or not value or key in options:
            raise UnknownNameError(f"policy {spec!r}: {part!r} is no new key=value; wanted Name:key=value,key=value")
        options[key] = _read(value)
    return name.strip(), options


def _read(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _write(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _find(name: str) -> Any:
    if ":" in name:
        return _load(name)
    if own := {**BUILTIN, **TRAINED, **SPOKEN}.get(name):
        return _load(own)
    found = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not found:
        raise unknown("policy", name, names())
    try:
        return found[0].load()
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(f"policy {name!r} is the entry point {found[0].value!r}: {error}") from error


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(f"policy {path!r}: {error}; wanted an importable package.module:Class") from error
    except Exception as error:  # whatever the module does when it is imported
        raise MedSegError(f"policy {path!r}: importing {module} raised {type(error).__name__}: {error}") from error


def _arguments(name: str, build: Callable[..., Any], env: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The constructor's keyword arguments: the options, and what it asks for and the env lends."""
    parameters = inspect.signature(build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_keywords(f"policy {name}", options, dict.fromkeys([*parameters, *_PROVIDED]))
        options = {key: value for key, value in options.items() if key in parameters}
    lent: dict[str, Any] = {}
    if env is not None:
        source = env.unwrapped
        lent = {key: getattr(source, key) for key in _PROVIDED if key in parameters and hasattr(source, key)}
    arguments = {**lent, **options}
    for key, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in _STARRED
        if not optional and key not in arguments:
            hint = "give make an env or dataset=" if key == "dataset" else f"give {key}="
            raise MedSegError(f"policy {name} needs {key!r}: {hint}")
    return arguments
