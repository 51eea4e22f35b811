"""Versions, aliases and what they demand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rlprompt.artifacts.format import save_artifact
from rlprompt.artifacts.identity import content_hash
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.registry.records import Protection, Target
from rlprompt.registry.store import Registry, chosen
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.runs import tiny_policy


def artifact(folder: Path, text: str = "Be brief.", **metrics: object) -> Path:
    save_artifact(
        folder, tiny_policy(), TextPrompt(text), name="brief", recipe={"seed": 0}, metrics=metrics
    )
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """With three versions of `brief`."""
    made = Registry(tmp_path / "registry")
    for number, text in enumerate(("Be brief.", "Be very brief.", "One word."), start=1):
        assert made.add(artifact(tmp_path / str(number), text), "brief").number == number
    return made


def point(registry: Registry, alias: str, *numbers: int, **options: object) -> None:
    share = 1.0 / len(numbers) if numbers else 1.0
    registry.point("brief", alias, [Target(version=n, share=share) for n in numbers], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompt_comes_back_as_it_went_in(kind: str, tmp_path: Path) -> None:
    policy = tiny_policy()
    prompt = make(kind, policy, noise=0.1)
    save_artifact(tmp_path / "a", policy, prompt, name="n", recipe={}, metrics={})
    registry = Registry(tmp_path / "registry")
    folder = registry.path(registry.add(tmp_path / "a", "mine"))
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "a")
            assert (folder / name).read_bytes() == path.read_bytes()


def test_a_signature_goes_with_the_files_that_were_signed(tmp_path: Path) -> None:
    registry, folder = Registry(tmp_path / "registry"), artifact(tmp_path / "a")
    first = registry.add(folder, "brief")
    signature = {
        "content": content_hash(folder),
        "created": "now",
        "public_key": "",
        "signature": "",
    }
    (folder / "signature.json").write_text(json.dumps(signature))
    signed = registry.add(folder, "brief")
    assert (signed.number, signed.prompt) == (2, first.prompt)
    assert (registry.path(signed) / "signature.json").is_file()
    (folder / "README.md").write_text("another card")
    with pytest.raises(InputError, match="are not those that were signed"):
        registry.add(folder, "brief")
    assert len(registry.versions("brief")) == 2


def test_equal_content_is_one_version_and_another_card_is_another(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = registry.add(artifact(tmp_path / "a"), "brief", message="one", tags=["x", "x"])
    assert registry.add(tmp_path / "a", "brief", message="again") == first
    assert first.tags == ("x",)
    second = registry.add(artifact(tmp_path / "b", reward=0.5), "brief")
    assert (second.number, second.prompt) == (2, first.prompt)
    assert second.content != first.content


def test_what_is_added_later_does_not_change_a_version(registry: Registry, tmp_path: Path) -> None:
    before = registry.versions("brief")
    artifact(tmp_path / "1", "Changed.")  # the folder that version 1 was copied from
    assert registry.versions("brief") == before
    assert "Be brief." in (registry.path(before[0]) / "prompt.json").read_text()


def test_an_object_that_was_touched_is_refused_and_mended_by_adding(
    registry: Registry, tmp_path: Path
) -> None:
    version = registry.version("brief", 1)
    (registry.folder / "objects" / version.content / "README.md").write_text("other")
    with pytest.raises(InputError, match=r"files of version 1 in .* are not those"):
        registry.path(version)
    assert registry.add(tmp_path / "1", "brief") == version
    registry.path(version)


@pytest.mark.parametrize("name", ["", "A", "..", "a/b", "a b", "-a", "a" * 65, "a\n", "prod@x"])
def test_names_that_are_no_names(name: str, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        registry.add(tmp_path / "1", name)
    with pytest.raises(InputError, match="cannot be used"):
        registry.point("brief", name, [Target(version=1)])
    with pytest.raises(InputError, match="cannot be used"):
        registry.add(tmp_path / "1", "brief", tags=[name])


def test_links_and_strangers_are_no_artifacts(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not an artifact"):
        registry.add(tmp_path / "empty", "brief")
    (tmp_path / "1" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="no regular file"):
        registry.add(tmp_path / "1", "brief")
    assert len(registry.versions("brief")) == 3


def test_there_is_no_latest(registry: Registry) -> None:
    for reference in ("brief", "brief:", "brief:latest", "brief:0x1"):
        with pytest.raises(InputError, match="names no version"):
            registry.resolve(reference)
    with pytest.raises(InputError, match="has no version 4; it has 1 to 3"):
        registry.resolve("brief:4")
    with pytest.raises(InputError, match="has no alias 'prod'; it has none"):
        registry.resolve("brief@prod")
    with pytest.raises(InputError, match="has no prompt 'other'; it has brief"):
        registry.resolve("other:1")
    assert registry.resolve("brief:2")[1].number == 2


def test_an_alias_remembers_what_it_pointed_to(registry: Registry) -> None:
    point(registry, "prod", 1, why="first", by="ann")
    point(registry, "prod", 2, why="better", by="bob")
    point(registry, "prod", 3)
    assert registry.resolve("brief@prod")[1].number == 3
    assert registry.roll_back("brief", "prod").to == (Target(version=2),)
    assert registry.roll_back("brief", "prod", why="worse").to == (Target(version=1),)
    with pytest.raises(InputError, match="has pointed to nothing before"):
        registry.roll_back("brief", "prod")
    point(registry, "prod", 3)
    assert registry.roll_back("brief", "prod").to == (Target(version=1),)
    story = [(c.by, [t.version for t in c.to], c.is_rollback) for c in registry.history("brief")]
    assert story[:2] == [("ann", [1], False), ("bob", [2], False)]
    assert [to for _, to, _ in story] == [[1], [2], [3], [2], [1], [3], [1]]
    assert [back for *_, back in story] == [False] * 3 + [True] * 2 + [False, True]


def test_a_removed_alias_is_gone_and_its_history_is_not(registry: Registry) -> None:
    point(registry, "prod", 1)
    point(registry, "prod")
    assert registry.aliases("brief") == {}
    assert len(registry.history("brief", "prod")) == 2
    with pytest.raises(InputError, match="cannot be removed"):
        point(registry, "prod")
    assert registry.roll_back("brief", "prod").to == (Target(version=1),)


def test_shares_send_keys_where_they_say(registry: Registry) -> None:
    targets = [Target(version=1, share=0.9), Target(version=3, share=0.1)]
    registry.point("brief", "prod", targets)
    keys = [f"user-{number}" for number in range(5000)]
    met = Counter(chosen(targets, key).version for key in keys)
    assert 0.08 < met[3] / len(keys) < 0.12
    assert all(
        registry.resolve("brief@prod", key) == registry.resolve("brief@prod", key)
        for key in keys[:20]
    )
    for wrong in ([0.5, 0.4], [0.5, 0.6]):
        with pytest.raises(InputError, match="sum to"):
            registry.point(
                "brief",
                "prod",
                [Target(version=v, share=s) for v, s in zip((1, 2), wrong, strict=True)],
            )
    with pytest.raises(InputError, match="version twice"):
        registry.point("brief", "prod", [Target(version=1, share=0.5)] * 2)
    with pytest.raises(InputError, match="has no version 9"):
        registry.point("brief", "prod", [Target(version=9)])


def test_a_protected_alias_takes_only_what_was_shown(registry: Registry, tmp_path: Path) -> None:
    registry.protect("brief", "prod", Protection(verdict=True))
    for told in ({}, {"learned": None}, {"learned": "true"}, {"verdict": "No better."}):
        number = registry.add(artifact(tmp_path / "x", "X", **told), "brief").number
        with pytest.raises(InputError, match=r"protected: version \d+ has no verdict"):
            point(registry, "prod", number)
    shown = registry.add(
        artifact(tmp_path / "y", "Y", learned=True, verdict="Better by 0.2."), "brief"
    )
    point(registry, "prod", shown.number)
    assert "Better by 0.2." in registry.history("brief")[-1].passed[0]
    with pytest.raises(InputError, match="needs a reason"):
        point(registry, "prod", 1, force=True)
    point(registry, "prod", 1, force=True, why="the model changed tonight")
    assert registry.history("brief")[-1].forced
    point(registry, "staging", 2)  # another alias demands nothing
    registry.protect("brief", "prod", Protection())
    point(registry, "prod", 2)


def test_a_certificate_is_demanded_by_rate_and_reward(registry: Registry) -> None:
    registry.protect("brief", "prod", Protection(certificate=0.1, reward="toxicity"))
    with pytest.raises(InputError, match="has no certificate of toxicity"):
        point(registry, "prod", 1)


def test_a_torn_line_never_happened(registry: Registry) -> None:
    point(registry, "prod", 1)
    path = registry.folder / "prompts" / "brief" / "aliases.jsonl"
    whole = path.read_bytes()
    for torn in (whole[:-9], whole[:-1]):  # the second is valid JSON without its line feed
        path.write_bytes(whole + torn)
        assert len(registry.history("brief")) == 1
    point(registry, "prod", 2)
    assert [c.to[0].version for c in registry.history("brief")] == [1, 2]


def test_damage_is_told_with_its_line(registry: Registry) -> None:
    path = registry.folder / "prompts" / "brief" / "versions.jsonl"
    path.write_text('{"number": 0}\n' + path.read_text())
    with pytest.raises(InputError, match=r"versions.jsonl' line 1 is damaged \(number"):
        registry.versions("brief")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        Registry(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        Registry(tmp_path / "file" / "below").add(artifact(tmp_path / "a"), "brief")
