"""Which rows of a dataset fit the base with prompt and completion, told before weights are read.

Only rows that could be too long are turned into tokens: no tokenizer in use makes more tokens of a
text than the text has bytes. Of a training query under `augment` some of the ways to ask it are
measured; should the run meet a longer one that does not fit, it refuses it then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from rlprompt.data.augment import samples
from rlprompt.data.base import QuerySplit
from rlprompt.data.load import SIDES, without
from rlprompt.errors import InputError
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.outline import Outline
from rlprompt.prompts.base import PromptSettings
from rlprompt.recipe.schema import Recipe, TextReference
from rlprompt.rollout.sources import given_text
from rlprompt.types import Query

logger = logging.getLogger(__name__)

_SPARE_TOKENS = 16
"""Per turn, for what a template writes only between turns."""


def fitting(split: QuerySplit, recipe: Recipe, base: Outline) -> QuerySplit:
    """The queries that fit; see `DataSettings.too_long` for the others.

    Args:
        split: all queries.
        recipe: recipe that says what is drawn, under which prompts.
        base: base that they must fit.

    Raises:
        InputError: one does not fit and is not to be skipped, or none is left.
    """
    measure = _Measure(recipe, base)
    needed = dict(measure.too_long(split))
    if not needed:
        return split
    queries = {query.index: query for side in split.sides.values() for query in side}
    first = next(iter(needed))
    if recipe.data.too_long == "refuse":
        more = f" (so are {len(needed) - 1} more rows)" if len(needed) > 1 else ""
        shorten = "shorten it or a situation of augment" if recipe.augment else "shorten it"
        raise InputError(
            f"{queries[first].place or f'query {first}'} is too long{more}: with prompt and "
            f"completion it needs {needed[first]} positions, and {base.id} has "
            f"{base.max_positions}; {shorten}, lower sampling.max_tokens, or set data.too_long: "
            "skip"
        )
    kept = without(split, needed.keys())
    for side, before in split.sides.items():
        if before and not kept.sides[side]:
            which = "training" if side == "train" else SIDES[side]
            raise InputError(
                f"every {which} query is longer than the {base.max_positions} positions of "
                f"{base.id} with prompt and completion; shorten them, or lower sampling.max_tokens"
            )
    logger.warning(
        "data.too_long is skip: left out %d of %d queries, which need more than the %d positions "
        "of %s, the first of them %s",
        len(needed),
        len(queries),
        base.max_positions,
        base.id,
        queries[first].place or f"query {first}",
    )
    return kept


class _Measure:
    """Counts the positions of queries under the prompts of a recipe."""

    def __init__(self, recipe: Recipe, base: Outline) -> None:
        self.recipe, self.base = recipe, base
        self._prompt = self._prompt_tokens()

    def too_long(self, split: QuerySplit) -> Iterator[tuple[int, int]]:
        """Index of each query that does not fit, and the positions that it needs."""
        slot = self.base.slot
        around = max(self._prompt, len(slot.none_head_ids))
        turn = len(slot.tail_ids([{"role": "user", "content": "x"}])) + _SPARE_TOKENS
        for side, queries in split.sides.items():
            is_training = side == "train"
            for query in queries:
                answers = self._answers(query, is_training)
                room = around + max((len(text.encode()) for text in answers), default=0)
                room += _SPARE_TOKENS + self._drawn(is_training)
                exact = 0
                for asked in self._ways(query, is_training):
                    texts = [message["content"] for message in asked.messages]
                    beside = _beside(asked)
                    most = room + turn * len(texts)
                    most += sum(len(text.encode()) + _SPARE_TOKENS for text in beside)
                    most += sum(len(text.encode()) for text in texts)
                    if most > self.base.max_positions:
                        exact = max(exact, self._positions(asked, answers, is_training))
                if exact > self.base.max_positions:
                    yield query.index, exact

    def _ways(self, query: Query, is_training: bool) -> Iterator[Query]:
        """A query as it is, and as it may be asked in training."""
        yield query
        if is_training:
            yield from samples(self.recipe.augment, query)

    def _positions(self, query: Query, answers: Sequence[str], is_training: bool) -> int:
        slot, messages = self.base.slot, query.messages
        beside = sum(len(slot.slot_ids(text)) for text in _beside(query))
        under = self._prompt + beside + len(slot.tail_ids(messages))
        without_prompt = len(slot.none_head_ids) + len(slot.none_tail_ids(messages))
        given = max((len(slot.completion_ids(text)) for text in answers), default=0)
        return max(under, without_prompt) + max(given, self._drawn(is_training))

    def _drawn(self, is_training: bool) -> int:
        """Tokens of a drawn completion; 0 where training is given its completions."""
        given = is_training and bool(self.recipe.algorithm.answer_columns)
        return 0 if given else self.recipe.sampling.max_tokens

    def _answers(self, query: Query, is_training: bool) -> list[str]:
        columns = self.recipe.algorithm.answer_columns if self.recipe.search is None else ()
        columns = columns if is_training else columns[:1]
        return [given_text(query, column) for column in columns]

    def _prompt_tokens(self) -> int:
        """Head and the longest prompt that queries are asked under."""
        recipe, slot = self.recipe, self.base.slot
        evaluation = recipe.evaluation
        texts = [evaluation.handwritten, *evaluation.texts, recipe.algorithm.teacher_text]
        if isinstance(recipe.reference, TextReference):
            texts.append(recipe.reference.text)
        longest = max(len(slot.slot_ids(text)) for text in ("", *filter(None, texts)))
        return len(slot.head_ids) + max(longest, _slot_tokens(recipe.prompt, slot))


def _beside(query: Query) -> list[str]:
    """Other system text that a query is asked under."""
    around = query.around
    return [] if around is None else [text for text in (around.before, around.after) if text]


def _slot_tokens(prompt: PromptSettings, slot: ChatSlot) -> int:
    """Positions that a prompt's settings ask for; of an artifact nothing is known yet."""
    parts = getattr(prompt, "parts", None)
    if parts:
        return sum(_slot_tokens(part, slot) for part in parts)
    length = getattr(prompt, "num_virtual_tokens", None)
    text = getattr(prompt, "text", None) or getattr(prompt, "init_text", None)
    return int(length) if length is not None else len(slot.slot_ids(text or ""))
