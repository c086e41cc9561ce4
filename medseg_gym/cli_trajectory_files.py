"""`medseg-gym trajectories thoughts` and `export`: reasoning text for what was sampled, forms for other trainers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg_gym.cli_serve import tool_options
from medseg_gym.cli_terminal import clean_errors, progress_bars
from medseg_gym.errors import MedSegError, unknown

if TYPE_CHECKING:
    from medseg_gym.trajectories.store import Trajectories
    from medseg_gym.types import Mask

FORMATS = ("sharegpt", "trl", "verl", "minari")
WRITERS = ("template", "teacher")

Folder = Annotated[Path, typer.Argument(help="A folder that `medseg-gym trajectories --out` wrote.")]
DatasetName = Annotated[
    str, typer.Option("--dataset", help="Where the cases are, if not under the name they were sampled by.")
]


def thoughts(
    directory: Folder,
    out: Annotated[Path, typer.Option("--out", help="The folder to write the trajectories with thoughts into.")],
    writer: Annotated[str, typer.Option("--writer", help="template (no model needed) or teacher.")] = "template",
    seed: Annotated[int, typer.Option("--seed", help="Drives the choice of words, and the teacher's sampling.")] = 0,
    base_url: Annotated[str, typer.Option("--base-url", help="The teacher's OpenAI-compatible endpoint.")] = "",
    model: Annotated[str, typer.Option("--model", help="The teacher's name at that endpoint.")] = "",
    tries: Annotated[
        int, typer.Option("--tries", help="How often a thought is asked for until the template's is taken.")
    ] = 3,
    temperature: Annotated[float, typer.Option("--temperature", help="The teacher's.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of one answer of the teacher's.")] = 512,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Requests under way at once.")] = 16,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    dataset: DatasetName = "",
) -> None:
    """Write reasoning before every action, from templates or by a teacher that also sees what is missed and spilled."""
    sys.path.insert(0, "")
    with clean_errors(), progress_bars() as progress:
        from medseg_gym.trajectories.store import Trajectories
        from medseg_gym.trajectories.thoughts import TemplateWriter, ThoughtWriter, write_thoughts

        if writer not in WRITERS:
            raise unknown("writer", writer, WRITERS)
        chosen: ThoughtWriter = TemplateWriter(seed)
        teacher = None
        if writer == "teacher":
            if not base_url or not model:
                raise MedSegError("a teacher needs --base-url and --model; without one take --writer template")
            from medseg_gym.policies.endpoint import EndpointModel
            from medseg_gym.trajectories.teacher import TeacherWriter

            teacher = EndpointModel(
                base_url,
                model,
                temperature=temperature,
                max_tokens=max_tokens,
                concurrency=concurrency,
                api_key_env=api_key_env,
            )
            chosen = TeacherWriter(teacher, targets_of(Trajectories(directory), dataset), seed=seed, tries=tries)
        try:
            count = write_thoughts(directory, out, chosen, lambda done, total: progress("thoughts", done, total))
        finally:
            if teacher is not None:
                teacher.close()
    told = ", ".join(f"{name} {n}" for name, n in sorted(getattr(chosen, "counts", {}).items()))
    print(f"{count} trajectories: {out}" + (f" ({told})" if told else ""))


def export(
    directory: Folder,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="sharegpt (LLaMA-Factory), trl, verl or minari. TRL and Minari load theirs in our tests; the other "
            "two were checked against their published schema, not run.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder; for minari a MINARI_DATASETS_PATH.")],
    protocol: Annotated[str, typer.Option("--protocol", help="Whose words: medsam-agent or ibis.")] = "medsam-agent",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE of the protocol, as history=true; several times.")
    ] = None,
    size: Annotated[int, typer.Option("--size", help="Side of the pictures; for minari of the observations.")] = 512,
    per: Annotated[
        str,
        typer.Option(
            "--per",
            help="chat: a row a chat, all answers trained; turn: a row for each answer to be trained, the last of its "
            "row, so that marked mistakes are only ever context. By itself: turn where something is marked.",
        ),
    ] = "",
    with_thoughts: Annotated[
        bool | None, typer.Option("--thoughts/--no-thoughts", help="Whether thoughts are written; by protocol.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The dataset's: medseg_gym; for minari medseg-v0.")] = "",
    env: Annotated[str, typer.Option("--env", help="minari: whose trajectories, where there are several envs.")] = "",
    dataset: DatasetName = "",
) -> None:
    """Write the kept trajectories for other trainers: chat JSONL, parquet for verl, a Minari dataset."""
    sys.path.insert(0, "")
    with clean_errors():
        from medseg_gym.policies import protocols
        from medseg_gym.trajectories.store import Trajectories

        if form not in FORMATS:
            raise unknown("format", form, FORMATS)
        stored = Trajectories(directory)
        if not len(stored.kept()):
            raise MedSegError(f"no kept trajectories in {directory}; make some with: medseg-gym trajectories")
        if form == "minari":
            from medseg_gym.trajectories.export_minari import export_minari

            print(export_minari(stored, out, env_of(stored, env, dataset, size), name or "medseg-v0"))
            return
        spoken = protocols.make(protocol, **tool_options(option or []))
        if form == "sharegpt":
            from medseg_gym.trajectories.export_sharegpt import export_sharegpt

            named = name or "medseg_gym"
            done = export_sharegpt(stored, out, spoken, size, per=per or None, name=named, thoughts=with_thoughts)
        elif form == "trl":
            from medseg_gym.trajectories.export_trl import export_trl

            done = export_trl(stored, out, spoken, size, per=per or None, thoughts=with_thoughts)
        else:
            from medseg_gym.trajectories.export_verl import export_verl

            targets = targets_of(stored, dataset)
            done = export_verl(stored, out, spoken, size, targets=targets, thoughts=with_thoughts)
        print(done)


def targets_of(stored: Trajectories, dataset: str = "") -> Callable[[str], Mask]:
    """The target of a case's key, from the datasets that the trajectories' settings name, or from `dataset`."""
    from medseg_gym import datasets

    envs = _envs(stored)
    loaded: dict[str, Any] = {}

    def target(key: str) -> Mask:
        name = key.split("/", 1)[0]
        if name not in loaded:
            options: Mapping[str, Any] = next((told["dataset_options"] for told in envs if told["dataset"] == name), {})
            loaded[name] = datasets.load(dataset or name, **options)
        mask: Mask = loaded[name][key].target
        return mask

    return target


def env_of(stored: Trajectories, env: str = "", dataset: str = "", size: int = 256) -> Any:
    """The env that trajectories were sampled in, with the longest horizon that they had."""
    import gymnasium as gym

    kept = stored.kept()
    envs = [told for told in _envs(stored) if not env or told["env"] == env]
    if not envs:
        raise MedSegError(f"no trajectories of env {env!r}; they are of {', '.join(t['env'] for t in _envs(stored))}")
    if len({told["env"] for told in envs}) > 1:
        raise MedSegError(f"trajectories of {', '.join(told['env'] for told in envs)}; choose one with --env")
    told, settings = envs[0], stored.settings
    options = {"dataset_options": told["dataset_options"], "tool_options": told["tool_options"]}
    split = settings.get("split", "train")
    spec = settings["reward"]
    made = told["env"] in gym.registry and not dataset
    pair = {} if made else {"dataset": dataset or told["dataset"], "tool": told["tool"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")  # the infos name the structure
        return gym.make(
            told["env"] if made else "MedSeg-v0",
            **pair,
            **{name: value for name, value in options.items() if value},
            horizon=max(trajectory.episode.horizon for trajectory in kept.records()),
            size=size,
            split=split if split != "all" else "train",
            reward=spec["name"],
            timing=spec["timing"],
            disable_env_checker=True,
        )


def _envs(stored: Trajectories) -> list[Mapping[str, Any]]:
    envs = stored.settings.get("envs")
    if not envs:
        raise MedSegError(
            "the trajectories' settings name no env; take folders of `medseg-gym trajectories` one by one"
        )
    return list(envs)
