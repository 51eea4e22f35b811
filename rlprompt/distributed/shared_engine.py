"""One engine per rank: each query is completed on one, and every rank gets all completions.

Where there are several prompts, each prompt is drawn under on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from rlprompt.distributed.ranks import Ranks
from rlprompt.engines.base import Engine, Generation, require_prompts
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.prompts.base import Prompt
from rlprompt.types import Completion, Group, Query


class SharedEngine(Engine):
    """An engine that divides queries among ranks.

    The draws of a query depend on its place in the whole list only, so that the completions are
    those of one rank.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        *,
        together: bool = False,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Divide `engine`'s work.

        Args:
            engine: this rank's engine.
            ranks: the ranks that share the work.
            together: whether every rank completes every query, in step with the others: where each
                token gathers weights from all ranks, dividing would save no time and deadlock.
            around: what makes a context that every rank enters for the time of a rollout.
        """
        super().__init__(engine.policy, engine.settings)
        self._engine = engine
        self._ranks = ranks
        self._together = together
        self._around = around

    def supports(self, prompt: Prompt) -> bool:
        """Whether the engine does."""
        return self._engine.supports(prompt)

    def sync(self, prompt: Prompt) -> None:
        """On every rank."""
        self._engine.sync(prompt)

    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw completions; see `Engine.generate`.

        The products are those of this rank's queries: a rank takes them for what it learns from of
        these.

        Raises:
            InputError: raised by any rank's engine.
            RankLostError: another rank has ended or hangs.
        """
        mine = self._mine(queries)
        own = Generation(())

        def draw() -> list[tuple[Completion, ...]]:
            nonlocal own
            if queries[mine]:
                place = first + mine.start
                own = self._engine.generate(
                    queries[mine], num_completions, sampling, seed, progress, place, keep_products
                )
            return [group.completions for group in own.groups]

        with self._around():
            parts = self._ranks.each(draw, "the rollout")
        if self._together:
            drawn = parts[0]
        else:
            # Not the copies that came back: products are known of the completions themselves.
            parts[self._ranks.rank] = [group.completions for group in own.groups]
            drawn = [each for part in parts for each in part]
        groups = (Group(query, each) for query, each in zip(queries, drawn, strict=True))
        return Generation(tuple(groups), own.products)

    def generate_under(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
    ) -> Generation:
        """Draw each query under its own prompt; see `Engine.generate_under`.

        Raises:
            InputError: there is no prompt, or raised by any rank's engine.
            RankLostError: another rank has ended or hangs.
        """
        require_prompts(prompts)
        mine = self._mine(queries)

        def draw() -> list[tuple[Completion, ...]]:
            if not queries[mine]:
                return []
            own = self._engine.generate_under(
                prompts[mine],
                queries[mine],
                num_completions,
                sampling,
                seed,
                progress,
                first + mine.start,
            )
            return [group.completions for group in own.groups]

        with self._around():
            parts = self._ranks.each(draw, "the rollout")
        drawn = parts[0] if self._together else [each for part in parts for each in part]
        groups = (Group(query, each) for query, each in zip(queries, drawn, strict=True))
        return Generation(tuple(groups))

    def _mine(self, queries: Sequence[Query]) -> slice:
        """The queries that this rank completes."""
        return slice(0, len(queries)) if self._together else self._ranks.share(len(queries))

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
    ) -> list[Generation]:
        """Draw under several prompts; see `Engine.generate_each`.

        Each rank draws under some of the prompts, all of them in one batch where its engine can.
        With fewer prompts than ranks, one prompt comes after the other, and queries are divided.

        Raises:
            InputError: there is no prompt, or raised by any rank's engine.
            RankLostError: another rank has ended or hangs.
        """
        require_prompts(prompts)
        if not self._together and len(prompts) < self._ranks.size:
            return super().generate_each(prompts, queries, num_completions, sampling, seed)
        mine = slice(0, len(prompts)) if self._together else self._ranks.share(len(prompts))

        def draw() -> list[list[tuple[Completion, ...]]]:
            drawn = self._engine.generate_each(
                prompts[mine], queries, num_completions, sampling, seed
            )
            return [[group.completions for group in each.groups] for each in drawn]

        with self._around():
            parts = self._ranks.each(draw, "the rollout")
        self._engine.sync(prompts[-1])
        drawn = parts[0] if self._together else [each for part in parts for each in part]
        return [
            Generation(tuple(Group(q, own) for q, own in zip(queries, each, strict=True)))
            for each in drawn
        ]
