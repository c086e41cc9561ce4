"""A whole run of trajectories: cases of several envs by several strategies, in parallel, into one folder, resumable."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym import rewards
from medseg_gym.bench.evaluate import machine, versions
from medseg_gym.bench.rundir import write_whole
from medseg_gym.datasets.base import Dataset, WithStartMasks
from medseg_gym.datasets.instructions import seeded
from medseg_gym.datasets.kinds import Grouped
from medseg_gym.envs.config import whole_number
from medseg_gym.errors import BadDataError, MedSegError, check_keywords
from medseg_gym.rewards import RewardSpec
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.sample import sample
from medseg_gym.trajectories.strategies import Settings
from medseg_gym.trajectories.units import Unit, plan
from medseg_gym.types import Image, Mask

if TYPE_CHECKING:
    from medseg_gym.trajectories.store import TrajectoryWriter

AT_ONCE = 16  # cases asked about in one tool call
OPTIONS = ("dataset", "tool", "structures", "reward", "timing", "dataset_options", "tool_options")
STATISTICS, TIMES = "statistics.json", "times.json"

Progress = Callable[[str, int, int], None]  # (label, trajectories done, all)


@dataclass(frozen=True)
class Job:
    """What all units of a run have in common."""

    strategies: tuple[str, ...]
    settings: Settings
    reward: RewardSpec
    seed: int


@dataclass(frozen=True)
class Done:
    """A unit's trajectories by (key, strategy), their images by key, and by strategy what they cost."""

    trajectories: Mapping[tuple[str, str], Trajectory]
    images: Mapping[str, Image]
    times: Mapping[str, Mapping[str, float]]


def run(
    env: str | Sequence[str],
    strategies: str | Sequence[str],
    *,
    out: str | Path,
    cases: int | None = None,
    split: str = "train",
    seed: int = 0,
    workers: int = 1,
    at_once: int = AT_ONCE,
    settings: Settings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Tries every case by every strategy and writes trajectories-*.h5, statistics.json and times.json into `out`.

    Cases are a seeded choice of the split (bench.cases), None takes all; split "all" is the three together. What `out`
    holds already is gone on with if its settings are the same. A case's trajectory hangs on its key and the seed alone,
    not on what is tried beside it, nor in which process. Several workers are processes that load dataset and tool by
    name: a script calls this below `if __name__ == "__main__"` then. `options` are the env's: structures=, reward=,
    timing=, dataset_options=, tool_options=; dataset= and tool= for "MedSeg-v0". Returns the statistics.
    """
    from medseg_gym.trajectories.statistics import statistics
    from medseg_gym.trajectories.store import Trajectories, TrajectoryWriter

    envs = [env] if isinstance(env, str) else list(dict.fromkeys(env))
    wanted = (strategies,) if isinstance(strategies, str) else tuple(dict.fromkeys(strategies))
    if not envs or not wanted:
        raise MedSegError("nothing to do; give at least one env and one strategy")
    workers, at_once = whole_number("workers", workers, 1, 256), whole_number("at_once", at_once, 1, 10_000)
    seed = whole_number("seed", seed, 0, 2**63 - 1)
    check_keywords("trajectories", options, OPTIONS)
    job = Job(
        strategies=wanted,
        settings=settings if isinstance(settings, Settings) else Settings.of(settings or {}),
        reward=rewards.resolve(options.get("reward", "shaped"), options.get("timing")),
        seed=seed,
    )
    units: list[Unit] = []
    described: list[dict[str, Any]] = []
    for name in envs:
        more, told = plan(name, wanted, options, split=split, cases=cases, seed=seed, at_once=at_once)
        units += more
        described.append(told)
    named = all(isinstance(u.source.dataset, str) and isinstance(u.source.tool, str) for u in units)
    if workers > 1 and not named:
        raise MedSegError("worker processes load datasets and tools by name; give names, or workers=1")
    identity = _identity(job, described, split, cases)
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MedSegError(f"cannot make {path}: {error.strerror or error}; choose another --out") from None
    with TrajectoryWriter(path, identity) as writer:
        times = _read_times(path)
        try:
            _fill(writer, units, job, workers, times, progress)
        finally:
            _write(path / TIMES, {"machine": machine(), "rows": list(times.values())})
    stored = Trajectories(path)
    record = {"schema": 1, "settings": identity, "versions": versions(), **statistics(stored.records(), described)}
    stored.close()
    _write(path / STATISTICS, record)
    return record


def outline_unit(unit: Unit, job: Job) -> Done:
    """The trajectories of a unit's cases; what a worker process runs."""
    data, tool = unit.source.load()
    samples = [data[key] for _, key in unit.cases]
    starts = [data.start_mask(key) if isinstance(data, WithStartMasks) else None for _, key in unit.cases]
    found: dict[tuple[str, str], Trajectory] = {}
    times: dict[str, dict[str, float]] = {}
    for strategy in job.strategies:
        encodes, clock = tool.counters()["encodes"], time.perf_counter()
        made = sample(
            tool,
            samples,
            strategy,
            job.settings,
            [seeded(job.seed, strategy, key) for _, key in unit.cases],
            starts=starts,
            others=[_Others(data, key) for _, key in unit.cases],
            reward=job.reward,
            env=unit.source.env,
            seed=job.seed,
            cases=[number for number, _ in unit.cases],
        )
        times[strategy] = {
            "cases": len(made),
            "tool_calls": sum(trajectory.tries for trajectory in made),
            "seconds": time.perf_counter() - clock,
            "encodes": tool.counters()["encodes"] - encodes,
        }
        found.update({(t.episode.key, strategy): t for t in made})
    return Done(found, {one.key: one.image for one in samples}, times)


@dataclass(frozen=True)
class _Others:
    """The targets of the other structures in a case's image; none where the dataset does not tell them."""

    data: Dataset
    key: str

    def __call__(self) -> list[Mask]:
        if not isinstance(self.data, Grouped):
            return []
        return [self.data[other].target for other in self.data.siblings(self.key).values() if other != self.key]


def _fill(
    writer: TrajectoryWriter,
    units: Sequence[Unit],
    job: Job,
    workers: int,
    times: dict[tuple[str, str], dict[str, Any]],
    progress: Progress | None,
) -> None:
    """Adds what is missing, in order; what is there is the beginning of that order, or BadDataError."""
    orders = [unit.order(job.strategies) for unit in units]
    there = [(head.key, head.strategy) for head in writer.stored.heads]
    total = sum(map(len, orders))
    if there != [entry for order in orders for entry in order][: len(there)]:
        raise BadDataError(f"{writer.folder}: its trajectories are not the beginning of this run; choose another --out")
    left, todo, done = len(there), [], 0
    for unit, order in zip(units, orders, strict=True):
        if left < len(order):
            todo.append((unit, order[left:]))
        left = max(0, left - len(order))
    done = len(there)
    if progress:
        progress("trajectories", done, total)
    made = _played([unit for unit, _ in todo], job, workers)
    for (unit, order), result in zip(todo, made, strict=True):
        for key, strategy in order:
            image = result.images[key]
            image.flags.writeable = False  # from a process it comes writable; hashes are kept of what is not
            writer.add(result.trajectories[key, strategy], image)
        for strategy, spent in result.times.items():
            _count(times, unit.source.env, strategy, spent)
        done += len(order)
        if progress:
            progress("trajectories", done, total)


def _played(units: Sequence[Unit], job: Job, workers: int) -> Iterator[Done]:
    """Every unit's result, in order; a few units ahead are under way, no more."""
    if workers == 1:
        yield from (outline_unit(unit, job) for unit in units)
        return
    import multiprocessing

    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_settle_in, initargs=(workers,)
    ) as pool:
        ahead: deque[Future[Done]] = deque()
        try:
            for unit in units:
                ahead.append(pool.submit(outline_unit, unit, job))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise MedSegError("a worker process died, perhaps for memory; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _settle_in(workers: int) -> None:
    """In a worker: ^C is the parent's to answer, a killed parent takes it along, and the cores are shared."""
    import multiprocessing
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    import cv2

    threads = max(1, (os.cpu_count() or 1) // workers)
    cv2.setNumThreads(threads)
    try:
        import torch
    except ModuleNotFoundError:  # the classical tools need none
        return
    torch.set_num_threads(threads)


def _leave_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _identity(job: Job, described: Sequence[Mapping[str, Any]], split: str, cases: int | None) -> dict[str, Any]:
    """All that decides the trajectories, as JSON holds it; two runs of equal identity give equal trajectories."""
    from medseg_gym import __version__

    record = {
        "version": __version__,
        "split": split,
        "seed": job.seed,
        "cases": cases,
        "strategies": job.strategies,
        "settings": asdict(job.settings),
        "reward": rewards.describe(job.reward),
        "envs": list(described),
    }
    try:
        return dict(json.loads(json.dumps(record)))
    except TypeError as error:
        raise MedSegError(f"the options of a run are stored as JSON: {error}") from None


def _read_times(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The times of the part that was there before; none where they cannot be read, as nothing hangs on them."""
    try:
        rows = json.loads((path / TIMES).read_text(encoding="utf-8"))["rows"]
        return {(row["env"], row["strategy"]): dict(row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _count(times: dict[tuple[str, str], dict[str, Any]], env: str, strategy: str, spent: Mapping[str, float]) -> None:
    row = times.setdefault((env, strategy), {"env": env, "strategy": strategy})
    for name, value in spent.items():
        row[name] = row.get(name, 0) + value
    row["cases_per_second"] = row["cases"] / max(row["seconds"], 1e-9)
    row["ms_per_tool_call"] = 1000 * row["seconds"] / max(row["tool_calls"], 1)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
