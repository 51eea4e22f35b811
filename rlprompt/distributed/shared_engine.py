"""One engine per rank: each completion is drawn on one, and every rank gets all of them.

A query is completed on one rank, or on several where there are fewer queries than ranks. Where
there are several prompts, each prompt is drawn under on one rank.
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

    def objection(self, prompt: Prompt) -> str:
        """The engine's."""
        return self._engine.objection(prompt)

    def rehearse(self, prompt: Prompt) -> None:
        """On every rank."""
        self._engine.rehearse(prompt)

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

        Where there are fewer queries than ranks, several draw for one query, each some of its
        completions. The products are those of what this rank has drawn: it takes them for what it
        learns from of these.

        Raises:
            InputError: raised by any rank's engine.
            RankLostError: another rank has ended or hangs.
        """
        ranks, own = self._ranks, Generation(())

        def draw() -> list[tuple[Completion, ...]]:
            nonlocal own
            own = self._own_part(
                queries, num_completions, sampling, seed, progress, first, keep_products
            )
            return [group.completions for group in own.groups]

        with self._around():
            if self._together:
                drawn = ranks.same(draw, "the rollout")
            else:
                parts = ranks.each(draw, "the rollout")
                # Not the copies that came back: products are known of the completions themselves.
                parts[ranks.rank] = [group.completions for group in own.groups]
                drawn = [each for part in parts for each in part]
        if len(drawn) != len(queries):  # pieces of groups, in order
            flat = [completion for each in drawn for completion in each]
            starts = range(0, len(flat), num_completions)
            drawn = [tuple(flat[start : start + num_completions]) for start in starts]
        groups = (Group(query, each) for query, each in zip(queries, drawn, strict=True))
        return Generation(tuple(groups), own.products)

    def _own_part(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None,
        first: int,
        keep_products: bool,
    ) -> Generation:
        """What this rank draws: all, whole groups, or a run of completions of one group."""
        engine, count = self._engine, len(queries)
        if 0 < count < self._ranks.size and not self._together:
            group, chosen = self._ranks.piece(count, num_completions)
            if not chosen:
                return Generation(())
            return engine.generate_some(
                queries[group],
                chosen,
                num_completions,
                sampling,
                seed,
                progress,
                first + group,
                keep_products,
            )
        mine = self._mine(queries)
        if not queries[mine]:
            return Generation(())
        place = first + mine.start
        return engine.generate(
            queries[mine], num_completions, sampling, seed, progress, place, keep_products
        )

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
            if self._together:
                drawn = self._ranks.same(draw, "the rollout")
            else:
                parts = self._ranks.each(draw, "the rollout")
                drawn = [each for part in parts for each in part]
        groups = (Group(query, each) for query, each in zip(queries, drawn, strict=True))
        return Generation(tuple(groups))

    def _mine(self, queries: Sequence[Query]) -> slice:
        """The queries that this rank completes, where none is shared."""
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
            if self._together:
                drawn = self._ranks.same(draw, "the rollout")
            else:
                parts = self._ranks.each(draw, "the rollout")
                drawn = [each for part in parts for each in part]
        self._engine.sync(prompts[-1])
        return [
            Generation(tuple(Group(q, own) for q, own in zip(queries, each, strict=True)))
            for each in drawn
        ]
