"""play: groups of episodes over env workers and a policy engine, every slot in its own time, the same at any timing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from medseg_gym.errors import MedSegError, ToolUnavailableError
from medseg_gym.rl.engines.base import GenResult, PolicyEngine
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.member import Member
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import ImageRef, Rollout
from medseg_gym.rl.worker import EnvWorker, LostError, Observed, UnplacedError
from medseg_gym.types import Episode

__all__ = ["TRIES", "Job", "Settings", "Watch", "play"]

TRIES = 3  # of an episode that fails in the env, and of an answer that is aborted
LOSSES = 5  # of workers over one job; more, and it is taken to be what kills them
Watch = Callable[[Mapping[str, float]], None]


async def play(
    jobs: Sequence[Job],
    workers: Sequence[EnvWorker],
    engine: PolicyEngine,
    tokens: ChatTokens,
    settings: Settings,
    *,
    watch: Watch | None = None,
) -> AsyncIterator[list[Rollout]]:
    """The Rollouts of each job, in the members' order, as soon as all of them are there; jobs in any order.

    What is played is a function of jobs, settings and weights alone. An engine in lockstep is asked by all members of a
    job that still play together; otherwise every slot goes on by itself. An episode that fails in the env is played
    again with the same seeds (in lockstep the whole job is, so that batches are made up as if nothing had happened), an
    aborted answer is asked for again; after three tries the member is dropped. Where a chat has no room for what the
    env shows and an answer, that is left out whole and the episode ends as at its horizon. Errors of the engine, and a
    tool that is gone, are raised. What a worker had under way when it was lost is played again, by it when it is there
    again or by others. `watch` is told the seconds and tokens of every turn.
    """
    most = max((job.episodes for job in jobs), default=0)
    if not workers or any(worker.slots < most for worker in workers):
        slots = ", ".join(str(worker.slots) for worker in workers) or "no worker"
        raise MedSegError(f"a group of {most} episodes needs as many slots in every worker; there are {slots}")
    if any(job.episodes < 1 or not (job.key or job.keys) for job in jobs):
        raise MedSegError("a job needs a key, or keys, and at least one member")
    playing = _Playing(jobs, engine, tokens, settings, watch, most if engine.lockstep else 1)
    try:
        for worker in workers:
            playing.start(playing.feed(worker, len(workers)))
        for _ in jobs:
            done = await playing.done.get()
            if isinstance(done, BaseException):
                raise done
            yield done
    finally:
        await playing.stop()


@dataclass(slots=True, eq=False)
class _Work:
    """Members of a job that are to be played, and the group they come into."""

    job: Job
    members: Sequence[int]
    group: dict[int, Rollout]
    losses: int = 0  # how often a worker was lost over it


class _Playing:
    """The state of one `play`: what waits, what runs, what is done."""

    def __init__(
        self,
        jobs: Sequence[Job],
        engine: PolicyEngine,
        tokens: ChatTokens,
        settings: Settings,
        watch: Watch | None,
        together: int,
    ) -> None:
        self.engine, self.tokens, self.settings, self.watch = engine, tokens, settings, watch
        self.together = together  # slots that have to be free before a job begins
        self.waiting: asyncio.Queue[_Work] = asyncio.Queue()
        for job in jobs:
            self.waiting.put_nowait(_Work(job, range(job.episodes), {}))
        self.absent = 0  # workers that are not there and are no longer waited for
        self.done: asyncio.Queue[list[Rollout] | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._images: WeakValueDictionary[str, ImageRef] = WeakValueDictionary()

    # scheduling

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.done.put_nowait(error)

    async def feed(self, worker: EnvWorker, workers: int) -> None:
        """Begins jobs on a worker as its slots come free, while it is there; ends where it cannot be had."""
        free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(worker.slots):
            free.put_nowait(slot)
        while True:
            slots = [await free.get() for _ in range(self.together)]
            try:
                await _there(worker)  # before a job is taken, which others could play
            except UnplacedError:
                self.absent += 1
                if self.absent == workers:
                    raise
                return
            work = await self.waiting.get()
            if self.engine.lockstep:
                for slot in slots[len(work.members) :]:
                    free.put_nowait(slot)
                self.start(self._play(work, worker, slots[: len(work.members)], free))
                continue
            for member in work.members:
                slot = slots.pop() if slots else await free.get()
                self.start(self._play(_Work(work.job, [member], work.group, work.losses), worker, [slot], free))

    async def _play(self, work: _Work, worker: EnvWorker, slots: Sequence[int], free: asyncio.Queue[int]) -> None:
        """Plays some of a job's members in lockstep; whoever has the group's last hands the group over."""
        job, group = work.job, work.group
        played: list[Rollout] = []
        try:
            for _ in range(TRIES):
                played = await self._try(job, work.members, worker, slots)
                if not any(map(_failed, played)):
                    break
        except LostError as error:
            work.losses += 1
            if work.losses == LOSSES:
                raise MedSegError(f"{LOSSES} workers were lost over {job.place(work.members[0])[2]}: {error}") from None
            self.waiting.put_nowait(work)
            return
        finally:
            for slot in slots:
                free.put_nowait(slot)
        for member, rollout in zip(work.members, played, strict=True):
            why = f"the env failed {TRIES} times: {rollout.episode.error}"
            group[member] = replace(rollout, dropped=why) if _failed(rollout) else rollout
        if len(group) == job.episodes:
            self.done.put_nowait([group[member] for member in range(job.episodes)])

    # playing

    async def _try(self, job: Job, members: Sequence[int], worker: EnvWorker, slots: Sequence[int]) -> list[Rollout]:
        """One try at some members: each turn, those that still play ask together and are stepped together."""
        everyone = {
            slot: Member(self.tokens, self._intern, self.settings, job.place(member), worker.history)
            for slot, member in zip(slots, members, strict=True)
        }
        begun = await asyncio.gather(*(_begin(worker, slot, m.key, job.seed) for slot, m in everyone.items()))
        unread = {slot: error for slot, error in zip(slots, begun, strict=True) if isinstance(error, MedSegError)}
        shown = {slot: seen for slot, seen in zip(slots, begun, strict=True) if isinstance(seen, Observed)}
        dropped: dict[int, str] = {}
        while shown:
            full = [slot for slot, seen in shown.items() if not everyone[slot].observe(seen)]
            await asyncio.gather(*(worker.truncate(slot) for slot in full))
            answers = await self._ask({slot: everyone[slot] for slot in shown if slot not in full})
            for slot, (result, _) in answers.items():
                if result.finish == "abort":
                    dropped[slot] = f"turn {everyone[slot].turn}: the answer was aborted {TRIES} times"
            going = [slot for slot in answers if slot not in dropped]
            stepped = await asyncio.gather(
                *(self._turn(worker, slot, everyone[slot], *answers[slot]) for slot in going)
            )
            shown = {slot: seen for slot, seen in zip(going, stepped, strict=True) if seen.ended is None}
        played = [slot for slot in slots if slot not in unread]
        episodes = await asyncio.gather(*(worker.episode(slot, everyone[slot].group, job.seed) for slot in played))
        records = dict(zip(played, episodes, strict=True))
        records |= {slot: _unread(everyone[slot], job.seed, error) for slot, error in unread.items()}
        return [member.rollout(records[slot], dropped.get(slot, "")) for slot, member in everyone.items()]

    async def _ask(self, members: Mapping[int, Member]) -> dict[int, tuple[GenResult, float]]:
        """Each slot's answer and how long it took; what is aborted is asked for again."""
        begun = time.perf_counter()
        answers: dict[int, tuple[GenResult, float]] = {}
        for attempt in range(TRIES):
            slots = [slot for slot in members if slot not in answers or answers[slot][0].finish == "abort"]
            if not slots:
                break
            requests = [members[slot].request(attempt) for slot in slots]
            if self.engine.lockstep:
                results = await self.engine.generate_together(requests)
            else:
                results = [await self.engine.generate(request) for request in requests]  # it is one
            waited = time.perf_counter() - begun
            answers.update({slot: (result, waited) for slot, result in zip(slots, results, strict=True)})
        return answers

    async def _turn(self, worker: EnvWorker, slot: int, member: Member, result: GenResult, waited: float) -> Observed:
        """Executes an answer."""
        before = dict(member.spent)
        prompt = member.length
        text = member.answer(result)
        begun = time.perf_counter()
        observed = await worker.step(slot, text, cut_off=result.finish == "length")
        worker_s = time.perf_counter() - begun
        member.spend({**result.timing, "generate_s": waited})
        member.spend({"worker_s": worker_s, **_of_worker(observed)})
        if self.watch is not None:
            seconds = {name: after - before[name] for name, after in member.spent.items()}
            self.watch({**seconds, "prompt_tokens": prompt, "tokens": len(result.ids)})
        return observed

    def _intern(self, image: ImageRef) -> ImageRef:
        """The picture, or the one that is there already and equals it."""
        return self._images.setdefault(image.sha, image)


async def _there(worker: EnvWorker) -> None:
    """Waits for a worker that lives elsewhere; those of this process are there."""
    if (alive := getattr(worker, "alive", None)) is not None:
        await alive()


async def _begin(worker: EnvWorker, slot: int, key: str, seed: int) -> Observed | MedSegError:
    """Begins a case; what is wrong with it where it cannot be read."""
    try:
        return await worker.reset(slot, key, seed)
    except (ToolUnavailableError, LostError):  # every other case would fail too
        raise
    except MedSegError as error:
        return error


def _of_worker(observed: Observed) -> dict[str, float]:
    return {name: seconds for name, seconds in observed.timing.items() if name in ("env_s", "render_s")}


def _failed(rollout: Rollout) -> bool:
    return rollout.episode.ended == "failed" and not rollout.dropped


def _unread(member: Member, seed: int, error: MedSegError) -> Episode:
    """The record of a case that could not even be read."""
    return Episode(
        env="",
        tool="",
        policy="",
        case=member.group,
        key=member.key,
        structure="",
        instruction="",
        patient="",
        seed=seed,
        horizon=0,
        reward="",
        turns=(),
        iou=(0.0,),
        dice=(0.0,),
        ended="failed",
        error=f"case: {error}",
    )
