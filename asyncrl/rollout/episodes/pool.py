"""Runs a user's episodes in killable processes, for a rollout worker: many side by side in each of its own,
and one in each that others lend."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncrl.errors import ConfigError
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import Child, ChildDied
from asyncrl.reward.processes.shared_child import Interrupted, SharedChild
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.processes import Processes
from asyncrl.rollout.episodes.program import Earned
from asyncrl.rollout.episodes.reuse import computed_again
from asyncrl.rollout.task import RolloutTask

if TYPE_CHECKING:
    from asyncrl.rollout.gateway.server import Gateway

log = logging.getLogger(__name__)

MOST_INTERRUPTIONS = 3
"""After so many an episode is carried out here, wherever else there is room."""

Lend = Callable[[], Awaitable[Child | None]]
"""A process on another machine that is free, for one episode; None where there is none. Ending it gives it
back, and its `Interrupted` says that the machine is gone."""


class EpisodeError(Exception):
    """An episode has failed. kind: in few words, the same for failures of a kind."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class EpisodePool:
    """The episode `spec` in processes, an `Episode` of the worker's.

    text_of: what an episode reads of tokens. timeout_s: an episode may take so long beside its waits for the
    model; then it has failed. One that blocks its process' loop for as long has it killed: the others there
    are carried out again, in another process. So are all when a process dies, each then in one of its own, to
    find out which it was. An episode goes first to whoever will `lend` a process. keeps_contexts: as of
    `computed_again`. gateway: by which programs ask in an episode's name; started and closed with this.
    """

    def __init__(
        self,
        spec: str,
        text_of: Callable[[list[int]], str],
        *,
        processes: int,
        timeout_s: float,
        keeps_contexts: bool = True,
        gateway: Gateway | None = None,
        lend: Lend | None = None,
    ) -> None:
        self._spec = spec
        self._text_of = text_of
        self._most = processes
        self._processes = Processes(spec)
        self._lend = lend
        self._lent = np.zeros(2, int)
        """Episodes that were begun elsewhere, and all, since `drain_metrics`."""
        self._timeout_s = timeout_s
        self._gateway = gateway
        # A process that is lent may still hear of an episode of another worker, which has numbers, too.
        self._numbers = itertools.count(1 + secrets.randbits(48))
        self._shared: list[SharedChild] = []
        self._starting = asyncio.Lock()
        self._alone = asyncio.Semaphore(processes)
        self._lines: dict[int, Line] = {}
        """Of the episodes in progress, by number."""
        self._keeps_contexts = keeps_contexts
        self._computed_again = np.zeros(3)
        """As of `computed_again`, since `drain_metrics`."""

    async def start(self) -> None:
        """Start the processes, which import the episode. Raises `ConfigError`, and leaves none behind."""
        try:
            if self._gateway is not None:
                await self._gateway.start()
            self._shared = list(await asyncio.gather(*(self._spawn() for _ in range(self._most))))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Kill every process and wait until they are gone. Episodes in progress fail."""
        try:
            await self._processes.close()
        finally:
            if self._gateway is not None:
                await self._gateway.close()

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sums and counts since the last call, with the gateway's."""
        (lost, outdated, tokens), self._computed_again = self._computed_again.tolist(), np.zeros(3)
        again = {"": lost + outdated, "/room": lost, "/weights": outdated} if tokens else {}
        own = {f"episodes/computed_again_frac{why}": (n, int(tokens)) for why, n in again.items()}
        (lent, begun), self._lent = self._lent.tolist(), np.zeros(2, int)
        own |= {"episodes/guests_frac": (lent, begun)} if begun else {}
        return own if self._gateway is None else own | self._gateway.drain_metrics()

    async def __call__(self, task: RolloutTask, session: Conversation) -> Earned:
        """Raises `EpisodeError`."""
        alone, interruptions = False, 0
        while True:
            try:
                reply = None
                if not alone and interruptions < MOST_INTERRUPTIONS:
                    reply = await self._play_elsewhere(task, session)
                if reply is None:
                    reply = await (self._play_alone if alone else self._play)(task, session)
            except TimeoutError as error:
                why = f"it took longer than rollout.episode_timeout_s={self._timeout_s:g}, the model apart"
                if where := str(error):
                    why += (
                        f", and blocks the event loop that it shares with others in {where}: use an "
                        "asynchronous client, or `await asyncio.to_thread(...)`"
                    )
                raise EpisodeError("time-out", f"rollout.episode `{self._spec}`: {why}") from None
            except (ConfigError, OSError) as error:
                raise EpisodeError("no process", f"no process could be started for it: {error}") from error
            except ChildDied as death:
                if self._processes.closed:
                    raise _died(death) from None
                log.warning("episode %s is carried out again: %s", self._spec, death)
                alone = not isinstance(death, Interrupted)
                interruptions += not alone
                session.begin_again()
                continue
            if isinstance(reply, wire.Played):
                self._computed_again += computed_again(session.answers, keeps=self._keeps_contexts)
                return reply.earned
            assert isinstance(reply, wire.Raised)
            raise EpisodeError(reply.message.partition(":")[0], f"{reply.message}\n{reply.traceback}".strip())

    async def _play_elsewhere(self, task: RolloutTask, session: Conversation) -> wire.Reply | None:
        """In a process that somebody lends; None where nobody does."""
        if self._lend is None:
            return None
        lent = await self._lend()
        self._lent += [lent is not None, 1]
        return None if lent is None else await self._ask_alone(self._shared_by(lent), task, session)

    async def _play(self, task: RolloutTask, session: Conversation) -> wire.Reply:
        async with self._starting:
            self._shared = [child for child in self._shared if child.alive]
            if len(self._shared) < self._most:
                self._shared.append(await self._spawn())
        return await self._ask(min(self._shared, key=lambda child: child.calls), task, session)

    async def _play_alone(self, task: RolloutTask, session: Conversation) -> wire.Reply:
        with session.standing_back():
            await self._alone.acquire()
        try:
            return await self._ask_alone(await self._spawn(), task, session)
        finally:
            self._alone.release()

    async def _ask_alone(self, child: SharedChild, task: RolloutTask, session: Conversation) -> wire.Reply:
        """In a process that has no other episode. Raises `EpisodeError` where it dies by that."""
        try:
            return await self._ask(child, task, session)
        except Interrupted:
            raise
        except ChildDied as death:
            raise _died(death) from None
        finally:
            child.kill()

    async def _ask(self, child: SharedChild, task: RolloutTask, session: Conversation) -> wire.Reply:
        # A key of its own each time: what an episode that is carried out again has left behind has none.
        with nullcontext() if self._gateway is None else self._gateway.serving(session):
            return await self._ask_served(child, task, session)

    async def _ask_served(self, child: SharedChild, task: RolloutTask, session: Conversation) -> wire.Reply:
        number = next(self._numbers)
        base_url, api_key = session.door or ("", "")
        shown = {
            **{name: getattr(task, name) for name in ("prompt", "prompt_ids", "columns")},
            "row": task.row if task.hint_of is None else task.hint_of,
            **{name: getattr(task, name) for name in ("group_id", "attempt", "purpose")},
            "member": session.index,
        }
        request = wire.frame(wire.Play(number, shown, base_url, api_key))
        line = self._lines[number] = Line(session, self._text_of, partial(self._tell, child, number))
        try:
            return await child.ask(request, number, self._timeout_s)
        finally:
            del self._lines[number]
            line.close()

    def _tell(self, child: Child | SharedChild, number: int, ask: int, answer: Any, error: str) -> None:
        if child.alive:
            child.tell(wire.frame(wire.Told(number, ask, answer, error)))

    def _asked(self, child: Child, asks: wire.Asks) -> None:
        if (line := self._lines.get(asks.number)) is not None:
            line.asked(asks)
            return
        for ask in asks.asks:  # of one that was given up, and asks as it ends
            self._tell(child, asks.number, ask.ask, None, "the policy was asked after its episode had ended")

    def _away_s(self, number: int) -> float:
        line = self._lines.get(number)
        return 0.0 if line is None else line.waited_s

    async def _spawn(self) -> SharedChild:
        """A process that is ready. Raises `ConfigError`, `ChildDied`, or `OSError`."""
        return self._shared_by(await self._processes.spawn())

    def _shared_by(self, child: Child) -> SharedChild:
        return SharedChild(child, on_asks=partial(self._asked, child), away_s=self._away_s)


def _died(death: ChildDied) -> EpisodeError:
    return EpisodeError("process died", f"its process died ({death})")


class Line:
    """The worker's end of an episode's way to the model. tell: sends an answer, or an error."""

    def __init__(
        self,
        session: Conversation,
        text_of: Callable[[list[int]], str],
        tell: Callable[[int, Any, str], None],
    ) -> None:
        self.session = session
        self._text_of = text_of
        self._tell = tell
        self._open: dict[int, asyncio.Task[None]] = {}
        self._waited_before_s = session.waited.total_s

    @property
    def waited_s(self) -> float:
        """For the model; not what it waited for when the episode was carried out before."""
        return self.session.waited.total_s - self._waited_before_s

    def asked(self, asks: wire.Asks) -> None:
        for number in asks.withdrawn:
            if number in self._open:
                self._open[number].cancel()
        for ask in asks.asks:
            task = self._open[ask.ask] = asyncio.create_task(self._answer(ask))
            task.add_done_callback(partial(self._answered, ask.ask))

    def close(self) -> None:
        for task in self._open.values():
            task.cancel()

    def _answered(self, number: int, _: asyncio.Task[None]) -> None:
        del self._open[number]

    async def _answer(self, ask: wire.Ask) -> None:
        try:
            answer = await getattr(self, f"_{ask.what}")(**ask.arguments)
        except Exception as error:  # noqa: BLE001 - the session keeps the engine's; the episode is told
            self._tell(ask.ask, None, f"{type(error).__name__}: {error}")
        else:
            self._tell(ask.ask, answer, "")

    async def _chat(self, *, messages: Any, tools: Any, **options: Any) -> dict[str, Any]:
        reply = await self.session.chat(messages, tools or None, **options)
        return {
            "message": reply.message,
            "prompt_ids": reply.prompt_ids.tolist(),
            "token_ids": reply.completion.token_ids.tolist(),
            "finish_reason": reply.finish_reason,
        }

    async def _generate(self, **options: Any) -> dict[str, Any]:
        completion = await self.session.generate(**options)
        ids: list[int] = completion.token_ids.tolist()
        return {
            "token_ids": ids,
            "logprobs": completion.logprobs.tolist(),
            "text": self._text_of(ids),
            "finish_reason": completion.finish_reason.value,
        }

    async def _tokenise(self, text: str) -> list[int]:
        return self.session.format.encode(text)
