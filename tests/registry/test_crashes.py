"""Many writers at once, and writers that are killed: no version is lost, half or doubled."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from rlprompt.artifacts.format import read_artifact_info, save_artifact
from rlprompt.artifacts.identity import content_hash
from rlprompt.prompts.text import TextPrompt
from rlprompt.registry.records import Target
from rlprompt.registry.store import Registry
from tests.fixtures.runs import tiny_policy

WRITERS = 8
EACH = 12
KILLS = 200


def artifacts(folder: Path, count: int) -> list[Path]:
    policy = tiny_policy()
    made = []
    for number in range(count):
        path = folder / f"artifact-{number}"
        text = TextPrompt(f"Text {number}.")
        save_artifact(path, policy, text, name="n", recipe={}, metrics={"number": number})
        made.append(path)
    return made


def child(work: Callable[[], None]) -> int:
    """A forked process that does it; everything is imported already, so that kills hit the work."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def assert_whole(registry: Registry, name: str) -> None:
    versions = registry.versions(name)
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    assert len({version.content for version in versions}) == len(versions)
    for version in versions:
        folder = registry.path(version)
        assert content_hash(folder) == version.content
        read_artifact_info(folder)


def test_eight_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    made = artifacts(tmp_path, 4)
    registry = Registry(tmp_path / "registry")

    def write(writer: int) -> None:
        draw = random.Random(writer)
        own = Registry(registry.folder)
        for step in range(EACH):
            version = own.add(draw.choice(made), "shared")
            own.point("shared", f"alias-{writer}", [Target(version=version.number)], why=str(step))

    pids = [child(lambda writer=writer: write(writer)) for writer in range(WRITERS)]  # type: ignore[misc]
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert ended == [0] * WRITERS
    assert_whole(registry, "shared")
    assert len(registry.versions("shared")) == len(made)
    for writer in range(WRITERS):
        story = registry.history("shared", f"alias-{writer}")
        assert [change.why for change in story] == [str(step) for step in range(EACH)]
        assert all(a.to == b.before for a, b in itertools.pairwise(story))
    assert list((registry.folder / "incoming").iterdir()) == []


def test_killed_writers_leave_a_registry_that_is_whole(tmp_path: Path) -> None:
    made = artifacts(tmp_path, 12)
    registry = Registry(tmp_path / "registry")
    registry.add(made[0], "mine")
    draw = random.Random(0)
    told = tmp_path / "told"
    told.touch()

    def work(seed: int, begun: int) -> None:
        own, choose = Registry(registry.folder), random.Random(seed)
        os.write(begun, b".")
        while True:
            version = own.add(choose.choice(made), "mine")
            own.point("mine", "prod", [Target(version=version.number)], why=str(seed))
            with told.open("a") as file:  # what was promised to have happened
                file.write(f"{version.number}\n")
                file.flush()

    longest = 0.02
    for kill in range(KILLS):
        reading, begun = os.pipe()
        before = len(registry.versions("mine")) + len(registry.history("mine"))
        pid = child(lambda kill=kill, begun=begun: work(kill, begun))  # type: ignore[misc]
        os.read(reading, 1)
        time.sleep(draw.random() * longest)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(begun)
        versions, story = registry.versions("mine"), registry.history("mine", "prod")
        # About half of the writers get something done before their end, however fast the machine.
        longest *= 0.9 if len(versions) + len(story) > before else 1.1
        assert all(a.to == b.before for a, b in itertools.pairwise(story))
        promised = told.read_text().split()
        assert len(story) >= len(promised)
        assert len(versions) >= max((int(number) for number in promised), default=1)
        if kill % 20 == 0:
            assert_whole(registry, "mine")
    assert len(registry.history("mine")) > KILLS / 10
    for path in made:
        registry.add(path, "mine")
    assert_whole(registry, "mine")
    assert len(registry.versions("mine")) == len(made)
    assert list((registry.folder / "incoming").iterdir()) == []
    assert len(list((registry.folder / "objects").iterdir())) == len(made)
