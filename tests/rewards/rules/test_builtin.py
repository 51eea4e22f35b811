"""Formulas and bad rows of the built-in rules; their examples run in tests/contracts."""

from __future__ import annotations

import math

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards.rules.exact import Exact
from rlprompt.rewards.rules.format import Format
from rlprompt.rewards.rules.keyword import Keyword
from rlprompt.rewards.rules.language import Language
from rlprompt.rewards.rules.length import Length
from rlprompt.rewards.rules.refusal import Refusal, refusal_strength
from rlprompt.rewards.rules.relevance import Relevance, relevance
from rlprompt.rewards.rules.repetition import Repetition
from rlprompt.rewards.rules.sentence import Sentence


def test_length_falls_by_one_over_octaves_per_doubling() -> None:
    rule = Length(min=8, max=16, octaves=4)
    lengths = [0, 2, 4, 8, 16, 32, 64, 256, 1000]
    values = rule(completions=["w " * n for n in lengths], completion_ids=[[]] * len(lengths))
    assert values == pytest.approx([0.0, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.0, 0.0])


def test_length_units() -> None:
    texts, ids = ["ab cd", ""], [[1, 2, 3, 4], [2]]
    assert Length(max=5, min=5, unit="characters")(texts, ids) == [1.0, 0.0]
    assert Length(max=4, min=4, unit="tokens")(texts, ids) == [1.0, 0.0]
    assert Length(max=2, min=2)(texts, ids) == [1.0, 0.0]


def test_repetition_in_words_and_tokens() -> None:
    text = "a b a b a b"
    assert Repetition(ngram=2)([text], [[]]) == pytest.approx([2 / 5])
    assert Repetition(ngram=2, unit="tokens")([text], [[1, 2, 3, 4]]) == [1.0]
    assert Repetition(ngram=1, unit="tokens")(["x"], [[5, 5, 5, 5]]) == [0.25]


def test_sentence_min_words() -> None:
    assert Sentence(min_words=1)(["Yes.", "yes"]) == [1.0, 0.0]
    assert Sentence()(["Yes."]) == [0.0]


def test_format_json_roots_fences_and_constants() -> None:
    texts = ['{"a": 1}', "[1]", "3", '```json\n{"a": 1}\n```', '{"a": NaN}', "1" * 5000]
    assert Format(kind="json")(texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert Format(kind="json", root="array")(texts)[:3] == [0.0, 1.0, 0.0]
    assert Format(kind="json", root="any")(texts)[:3] == [1.0, 1.0, 1.0]
    assert Format(kind="json", allow_fence=True)(texts)[3] == 1.0


def test_format_regex_needs_a_full_match() -> None:
    assert Format(kind="regex", pattern=r"\d+")([" 12 \n", "12a", ""]) == [1.0, 0.0, 0.0]
    assert Format(kind="regex", pattern="a", max_characters=3)(["aaaa"]) == [0.0]


def test_keyword_parts_forbidden_and_density() -> None:
    rule = Keyword(all_of=["sun", "moon"], none_of=["star", "comet"], max_density=0.5)
    filler = "we saw it there today"
    assert rule([f"sun moon {filler}"]) == [1.0]
    assert rule([f"sun {filler}"]) == [0.5]
    assert rule([f"sun moon star {filler}"]) == [0.5]
    assert rule([f"sun moon star comet {filler}"]) == [0.25]
    assert rule(["sun moon"]) == [0.5]
    assert rule(["sunny moonlight"]) == [0.0]
    assert Keyword(any_of=["Sun"], ignore_case=False)(["the sun is up now"]) == [0.0]
    assert Keyword(any_of=[r"su+n"], regex=True)(["the suuun is up now"]) == [1.0]
    assert Keyword(none_of=["star"])(["fine", "star", ""]) == [1.0, 0.5, 0.0]


PROSE = {
    "en": "We went to the market because there was no bread in the house.",
    "de": "Wir gingen auf den Markt, weil es im Haus kein Brot mehr gab.",
    "fr": "Nous sommes allés au marché parce qu'il n'y avait plus de pain dans la maison.",
    "es": "Fuimos al mercado porque no había pan en la casa y los niños tenían hambre.",
    "it": "Siamo andati al mercato perché non c'era più pane nella casa di mia nonna.",
    "pt": "Fomos ao mercado porque não havia mais pão em casa e as crianças tinham fome.",
    "nl": "We gingen naar de markt omdat er geen brood meer in het huis was.",
    "ru": "Мы пошли на рынок, потому что дома не было хлеба.",
    "ar": "ذهبنا إلى السوق لأنه لم يكن هناك خبز في البيت.",
    "ko": "집에 빵이 없어서 우리는 시장에 갔다.",
    "ja": "家にパンがなかったので、私たちは市場に行きました。",
    "zh": "因为家里没有面包所以我们去了市场。",
    "el": "Πήγαμε στην αγορά γιατί δεν υπήρχε ψωμί στο σπίτι.",
    "he": "הלכנו לשוק כי לא היה לחם בבית.",
    "hi": "हम बाज़ार गए क्योंकि घर में रोटी नहीं थी।",
}


@pytest.mark.parametrize("code", PROSE)
def test_prose_scores_highest_in_its_own_language(code: str) -> None:
    rules = {other: Language.model_validate({"language": other}) for other in PROSE}
    values = {other: rule([PROSE[code]])[0] for other, rule in rules.items()}
    assert max(values, key=lambda each: values[each]) == code
    assert values[code] >= 0.5
    assert sorted(values.values())[-2] <= 0.6 * values[code], values


def test_relevance_cannot_score_a_query_without_a_topic() -> None:
    assert Relevance()(prompts=["How are you?"], completions=["Fine."]) == [None]


def test_relevance_grows_with_coverage_and_novelty() -> None:
    query = "How do bees make honey from flower nectar?"  # topic: bee, honey, flower, nectar
    assert relevance(query, "The bees fly far.") == pytest.approx(0.5)
    assert relevance(query, "The bees fly far to a flower.") == pytest.approx(1.0)
    assert relevance(query, "The bees and the honey fly.") == pytest.approx(0.5)
    assert relevance(query, "Bees collect honey, flowers, nectar daily") == pytest.approx(0.5)


def test_exact_none_rows_and_wrong_columns() -> None:
    rule = Exact(column="topic", labels=["science", "computer science"])
    assert rule(["Computer science", "x"], topic=["computer science", None]) == [1.0, None]
    assert rule(["computer science"], topic=["science"]) == [0.0]
    with pytest.raises(InputError, match="no column 'topic'"):
        rule(["x"])
    with pytest.raises(InputError, match="holds 'art', which is none of the labels"):
        rule(["x"], topic=["art"])


def test_exact_without_labels_and_brevity_of_partial_credit() -> None:
    rule = Exact(partial=0.4)
    assert rule(["It is 42."], label=[42]) == pytest.approx([0.4])
    assert rule(["so " * 15 + "42"], label=[42]) == pytest.approx([0.4 * 8 / 16])
    assert rule(["42\nbecause I counted"], label=["42"]) == [1.0]


def test_refusal_rows_and_wrong_columns() -> None:
    rule = Refusal(column="want")
    refusal, answer = "I can't help with that request.", "Put the cake into the hot oven."
    texts = [refusal, answer, refusal, answer, answer]
    want = ["refuse", "refuse", "answer", "answer", None]
    assert rule(texts, want=want) == [1.0, 0.0, 0.0, 1.0, None]
    assert Refusal(want="answer", min_words=14)([answer]) == [0.5]
    with pytest.raises(InputError, match="no column 'want'"):
        rule(texts)
    with pytest.raises(InputError, match="column 'want' holds 'no'"):
        rule(["x"], want=["no"])


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help you with that.",
        "I'm sorry, but I can\u2019t assist with that request.",
        "I\u2019m unable to provide instructions for this.",
        "I am not able to help with building weapons.",
        "Sorry, I must decline. It would hurt someone.",
        "As an AI language model, I cannot write hateful text.",
        "That goes against my guidelines, so no.",
        "I won't be helping with this, it is dangerous.",
        "I will not provide that, but I can help you find support.",
    ],
)
def test_refusals_are_found(text: str) -> None:
    assert refusal_strength(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "You can't mix these two paints.",
        "I can't wait to tell you: use two cups of flour.",
        "If you cannot sleep, try reading a book.",
        "I don't know the exact date, but it was around 1900.",
        "The bank will not provide a loan without a job.",
        "To decline an invitation politely, thank the host first.",
        "Kill the process with `kill PID`.",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert refusal_strength(text) <= 0.35


def test_weak_signs_add_up_and_complying_afterwards_costs() -> None:
    one = refusal_strength("It is illegal to do this in most countries.")
    two = refusal_strength("Sorry. As an AI, I think it is illegal.")
    assert 0.0 < one < two < 1.0
    assert refusal_strength("I can't help with that. Step 1: cut the wire.") == pytest.approx(0.3)
    assert math.isclose(refusal_strength(""), 0.0)
