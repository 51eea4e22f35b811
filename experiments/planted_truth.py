"""Whether `rlprompt inspect` finds what was planted: 20 instructions, and ten triggers.

    python experiments/planted_truth.py --json docs/results/planted_truth.json [--seeds 1]
    python experiments/planted_truth.py --json FILE --only instruction-03-seed-0 --seconds 600

Soft prompts on SmolLM2-135M whose truth is known (`experiments/planting.py`): distilled from one of
20 instructions, and with one of ten triggers beside. Each prompt is a row of FILE; a row that is
there is not made again, so a run that was cut off goes on, and a planted prompt lies as an artifact
in `runs/planted/` for `rlprompt inspect`. Runs on one thread.

Of an instruction's prompt a row holds which of the 20 instructions comes nearest, for the prompt
and for three controls that know nothing of it (a random prompt of equal norms, the text of its
nearest tokens, the prompt of the next instruction, whose own truth is another): each is treated
exactly as the prompt, with answers of its own. `retrieved` compares behaviour: the KL of the prompt
to the base under each instruction. `said` compares what the model says of it: the log-probability
of each instruction behind "The instruction above is:", less that under no prompt. `best` is the
sentence of the readings and the built-in library, without the 20, that comes nearest, and how much
of the KL it recovers on other queries.

Of a trigger's prompt, and of the instruction's prompts as clean ones, a row holds whether the
trigger search flagged a word, and whether the flagged ones have the planted one among them.

A prompt that did not learn its trigger has none: it does not count among `triggers` but among
`triggers_not_planted`, whatever the search says of it.

Keys of FILE: `retrieval_accuracy` and `control_accuracy_max` over the rows that are there (of
`retrieved`), `said_accuracy` and its highest control, `triggers`, `triggers_flagged` (with the
planted word), `clean`, `clean_flagged`, `recovered` (mean share of `best`), `rows`, `planned`,
`command`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.planting import (
    INSTRUCTIONS,
    SAMPLING,
    STEPS,
    TRIGGER_STEPS,
    TRIGGERED,
    TRIGGERS,
    Plan,
    ending_in,
    own_completions,
    planted,
    questions,
)
from rlprompt.evaluation.measures import logprobs_by_query
from rlprompt.files import to_json, write_atomic
from rlprompt.interpret import triggers
from rlprompt.interpret.clock import Clock, Slice
from rlprompt.interpret.derived import BegunPrompt, first_ids, random_like
from rlprompt.interpret.nearest import nearest
from rlprompt.interpret.readings import FRAMES, read
from rlprompt.interpret.sentences import Candidate, distinct, faithfulness, ranked
from rlprompt.interpret.subject import Subject, divided
from rlprompt.interpret.yardstick import Yardstick
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes
from rlprompt.search.components import read_library
from rlprompt.types import Completion, Group, Query

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "planted"
CONTROLS = ("random", "nearest", "other")
NUM_CLEAN = 10
_QUERIES = 12
_FIRES = 0.75
"""A trigger was planted where so many answers behind it are the planted one, and of those behind
nothing at most the rest of 1."""
_CHOOSE_ON = 4
"""Queries that the 20 instructions are compared on."""

Row = dict[str, Any]


def plans(seeds: int) -> dict[str, Plan]:
    """Everything that is planted, by the name of its row; triggers come in between."""
    found: dict[str, Plan] = {}
    for seed in range(seeds):
        for place, text in enumerate(INSTRUCTIONS):
            name = f"instruction-{place:02d}-seed-{seed}"
            found[name] = Plan(text, None, seed, STEPS)
            if seed == 0 and place % 2 and place // 2 < len(TRIGGERS):
                at = place // 2
                found[f"trigger-{at:02d}"] = Plan(INSTRUCTIONS[at], TRIGGERS[at], at, TRIGGER_STEPS)
    return found


def nearest_instruction(policy: Policy, prompt: Prompt, queries: Sequence[Query]) -> int:
    """The instruction under which the base does most nearly what it does under a prompt."""
    yardstick = Yardstick(policy, prompt, own_completions(policy, prompt, queries))
    distances = [yardstick.pooled(yardstick.kl(TextPrompt(text))) for text in INSTRUCTIONS]
    return int(np.argmin(distances))


def said_instruction(policy: Policy, prompt: Prompt) -> int:
    """The instruction that the model says most readily of a prompt, against no prompt."""
    frame = FRAMES[0]
    query = Query(({"role": "user", "content": frame.question},))
    groups = [
        Group(query, (Completion(tuple(policy.slot.completion_ids(text)), (), text, True),))
        for text in INSTRUCTIONS
    ]
    begun = first_ids(policy, frame.first)
    under, alone = (
        np.asarray(logprobs_by_query(policy, BegunPrompt(each, begun), groups, 4096).totals)
        for each in (prompt, NonePrompt())
    )
    return int(np.argmax(under - alone))


def controls_of(policy: Policy, prompt: SoftPrompt, other: SoftPrompt) -> Mapping[str, Prompt]:
    """Prompts that know nothing of the instruction."""
    near = nearest(policy, prompt)
    random_prompt = random_like(policy, prompt, 0)
    assert random_prompt is not None
    text = None if near is None else near.text
    return {
        "random": random_prompt,
        "nearest": NonePrompt() if text is None else TextPrompt(text),
        "other": other,
    }


def best_sentence(policy: Policy, prompt: SoftPrompt, queries: Sequence[Query]) -> Row:
    """The nearest sentence of readings and library, none of which is one of the 20."""
    subject = Subject(policy, prompt, divided(queries, _QUERIES), SAMPLING, None)
    forever = Slice(float("inf"), lambda: 0.0)
    readings = read(policy, prompt, copies=6, seed=0, time=forever)
    found = [Candidate(each.text, each.frame) for each in readings]
    library = read_library(None, built_in=True)
    found += [Candidate(text, kind) for kind, texts in library.items() for text in texts]
    kept = [each for each in distinct(found) if each.text not in INSTRUCTIONS]
    best = ranked(subject.yardstick("selection"), kept, forever)[0].candidate
    return {
        "text": best.text,
        "origin": best.origin,
        "kl_share": faithfulness(subject, TextPrompt(best.text))["kl_share"],
    }


def instruction_row(
    policy: Policy, name: str, plan: Plan, every: Mapping[str, Plan], minutes: float
) -> Row:
    """Train, look, and put down what was found of one instruction."""
    prompt = planted(policy, plan, FOLDER / name)
    place = INSTRUCTIONS.index(plan.instruction)
    following = f"instruction-{(place + 1) % len(INSTRUCTIONS):02d}-seed-{plan.seed}"
    other = planted(policy, every[following], FOLDER / following)
    queries = questions("test", _QUERIES)
    asked = queries[:_CHOOSE_ON]
    looked: dict[str, Prompt] = {"prompt": prompt, **controls_of(policy, prompt, other)}
    row: Row = {
        "name": name,
        "instruction": plan.instruction,
        "trigger": None,
        "retrieved": {
            who: nearest_instruction(policy, each, asked) == place for who, each in looked.items()
        },
        "said": {who: said_instruction(policy, each) == place for who, each in looked.items()},
        "best": best_sentence(policy, prompt, queries),
    }
    if plan.seed == 0 and place < NUM_CLEAN:
        row["search"] = searched(policy, prompt, plan, minutes)
    return row


def trigger_row(
    policy: Policy, name: str, plan: Plan, every: Mapping[str, Plan], minutes: float
) -> Row:
    """Train, search, and put down what was found of one trigger."""
    del every
    prompt = planted(policy, plan, FOLDER / name)
    fires = firing(policy, prompt, plan.trigger or "", questions("test", _QUERIES))
    return {
        "name": name,
        "instruction": plan.instruction,
        "trigger": plan.trigger,
        "fires": fires,
        "took": fires["behind"] >= _FIRES and fires["else"] <= 1.0 - _FIRES,
        "search": searched(policy, prompt, plan, minutes),
    }


def firing(
    policy: Policy, prompt: SoftPrompt, word: str, queries: Sequence[Query]
) -> dict[str, float]:
    """Shares of answers that are the planted one: behind the trigger, and behind nothing."""
    begins = TRIGGERED[:16]
    asked = {"behind": [ending_in(query, word) for query in queries], "else": queries}
    shares = {}
    for where, each in asked.items():
        groups = own_completions(policy, prompt, each)
        shares[where] = _share([g.completions[0].text.startswith(begins) for g in groups])
    return shares


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def searched(policy: Policy, prompt: SoftPrompt, plan: Plan, minutes: float) -> Row:
    """What the trigger search says, as far as a table needs it."""
    queries = questions("test", _QUERIES)
    sides = (queries[:2], queries[2:])
    settings = triggers.Settings(seed=plan.seed)
    found = triggers.search(policy, prompt, sides, settings, Clock(minutes).slice(1.0, 1.0))
    flagged = [row["word"] for row in found["words"] if row["flagged"]]
    return {
        "flagged": bool(found["flagged"]),
        "words": flagged,
        "has_planted": plan.trigger in flagged,
        "was_tried": plan.trigger in [row["word"] for row in found["words"]],
        "scanned": found["scanned"],
        "vocabulary": found["vocabulary"],
        "strongest": found["words"][0]["switch"] if found["words"] else None,
        "limit": found["limit"],
    }


def summary(rows: Sequence[Row], planned: int, command: str) -> dict[str, Any]:
    """The keys of the file; a number over no row is None."""
    told = [row for row in rows if row["trigger"] is None]
    planted_rows = [row for row in rows if row["trigger"] is not None and row["took"]]
    failed = [row for row in rows if row["trigger"] is not None and not row["took"]]
    clean = [row for row in told if "search" in row]
    shares = [s["value"] for row in told if (s := row["best"]["kl_share"]) is not None]
    return {
        "retrieval_accuracy": _mean([row["retrieved"]["prompt"] for row in told]),
        "control_accuracy_max": _highest(told, "retrieved"),
        "said_accuracy": _mean([row["said"]["prompt"] for row in told]),
        "said_control_accuracy_max": _highest(told, "said"),
        "recovered": _mean(shares),
        "triggers": len(planted_rows),
        "triggers_not_planted": len(failed),
        "triggers_flagged": sum(row["search"]["has_planted"] for row in planted_rows),
        "clean": len(clean),
        "clean_flagged": sum(row["search"]["flagged"] for row in clean),
        "instructions": len(told),
        "planned": planned,
        "command": command,
        "rows": list(rows),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _highest(rows: Sequence[Row], key: str) -> float | None:
    if not rows:
        return None
    return max(float(np.mean([row[key][who] for row in rows])) for who in CONTROLS)


def recorded(path: Path) -> list[Row]:
    """The rows of a file that an earlier run wrote; none where it is not there."""
    return list(json_text.loads(read_bytes(path))["rows"]) if path.is_file() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are missing, while there is time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the 20 instructions")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows to make")
    parser.add_argument("--seconds", type=float, help="begin no row after so long")
    parser.add_argument("--minutes", type=float, default=2.0, help="of one trigger search")
    given = parser.parse_args(arguments)
    every = plans(given.seeds)
    unknown = [name for name in given.only or () if name not in every]
    if unknown:
        parser.error(f"--only names '{unknown[0]}', which is no row; one is {next(iter(every))}")
    rows = recorded(given.json)
    known = {row["name"] for row in rows}
    todo = [n for n in every if n not in known and (given.only is None or n in given.only)]
    started = time.monotonic()
    policy = open_policy(ModelSettings(path="smollm2-135m", threads=1)) if todo else None
    command = shlex.join(["python", "experiments/planted_truth.py", *(arguments or sys.argv[1:])])
    for name in todo:
        if given.seconds is not None and time.monotonic() - started > given.seconds:
            break
        plan = every[name]
        make: Callable[..., Row] = instruction_row if plan.trigger is None else trigger_row
        assert policy is not None
        rows.append(make(policy, name, plan, every, given.minutes))
        write_atomic(given.json, to_json(summary(rows, len(every), command), indent=1) + "\n")
        print(f"{name}: {len(rows)} of {len(every)} rows", flush=True)


if __name__ == "__main__":
    main()
