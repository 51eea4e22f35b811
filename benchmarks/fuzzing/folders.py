"""Artifacts, checkpoints and model folders: inputs that are folders of files."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fuzzing.judge import Case
from benchmarks.fuzzing.mutate import STRANGE, mutated_bytes, mutated_tree
from rlprompt.artifacts.card import card
from rlprompt.artifacts.format import check_files, load_artifact, save_artifact
from rlprompt.artifacts.identity import SIGNATURE, content_hash, prompt_hash
from rlprompt.artifacts.migration import migrate_artifact
from rlprompt.artifacts.snippet import loading_example
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.files.folder import check_folder
from rlprompt.model.load import read_config, read_tokenizer
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.make import make_prompt
from rlprompt.prompts.prefix import PrefixSettings
from rlprompt.prompts.sequence import SequenceSettings
from rlprompt.prompts.soft import SoftSettings
from rlprompt.prompts.text import TextSettings
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import load_recipe
from rlprompt.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.fixtures.tiny import save_tiny, tiny_base

_TENSOR = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}
_REPRESENTATIONS: dict[str, Any] = {
    "soft": SoftSettings(num_virtual_tokens=4),
    "prefix": PrefixSettings(),
    "adapter": AdapterSettings(),
    "text": TextSettings(text="hi there"),
    "sequence": SequenceSettings(
        parts=(SoftSettings(num_virtual_tokens=3), TextSettings(text="hello"), SoftSettings())
    ),
}


def _tensors(header: Any, content: bytes = b"", claimed: int | None = None) -> bytes:
    """A safetensors file with any header, and any length that it claims for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + content


def _typed(dtype: str, size: int, content: bytes = b"\0") -> bytes:
    entry = {"dtype": dtype, "shape": [4, 64], "data_offsets": [0, size]}
    return _tensors({"embeddings": entry}, content * (size // len(content)))


def _shaped(shape: list[int], size: int = 1024) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    return _tensors({"embeddings": entry}, b"\0" * min(size, 1 << 20))


_TWICE = json.dumps({"embeddings": _TENSOR})[:-1] + ", " + json.dumps({"embeddings": _TENSOR})[1:]
INVALID_TENSORS: dict[str, bytes] = {
    "nothing": b"",
    "four bytes": b"\0" * 4,
    "a header of 2^63": _tensors({"embeddings": _TENSOR}, b"\0" * 1024, 2**63),
    "a header of 10 GB": _tensors({"embeddings": _TENSOR}, b"\0" * 1024, 10 << 30),
    "a tensor of 10 GB": _shaped([40_000_000, 64], 10_240_000_000),
    "a shape that overflows": _shaped([2**62, 64]),
    "a negative shape": _shaped([-4, 64]),
    "no rows": _shaped([0, 64], 0),
    "one axis": _shaped([256]),
    "another width": _shaped([8, 32]),
    "int64": _typed("I64", 2048),
    "bool": _typed("BOOL", 256, b"\1"),
    "complex": _typed("C64", 2048),
    "float8": _typed("F8_E4M3", 256),
    "float4": _typed("F4", 128),
    "NaN": _typed("F32", 1024, b"\xff"),
    "3e38": _typed("F32", 1024, struct.pack("<f", 3e38)),
    "1e300": _typed("F64", 2048, struct.pack("<d", 1e300)),
    "another name": _tensors({"../../x": _TENSOR}, b"\0" * 1024),
    "one more tensor": _tensors(
        {
            "embeddings": _TENSOR,
            "more": {"dtype": "F32", "shape": [1], "data_offsets": [1024, 1028]},
        },
        b"\0" * 1028,
    ),
    "a deep header": _tensors(b"[" * 100_000),
    "a name twice": _tensors(_TWICE.encode(), b"\0" * 1024),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}
INVALID_JSON: dict[str, bytes] = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"schema_version": 2, "details": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    "5000 digits": b'{"schema_version":' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "nothing": b"",
    "a list as version": b'{"schema_version":[1]}',
    "a float as version": b'{"schema_version":1.0}',
    "UTF-16": b"\xff\xfe{\0}\0",
}


def _written(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


_REPLACEMENTS: dict[str, Callable[[Path], None]] = {
    "pipe": _piped,
    "device": _linked,
    "folder": _as_folder,
}


class _Copies:
    """Fresh copies of folders, in one place."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def of(self, source: Path) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(source, self.place)
        return self.place

    def case(
        self,
        label: str,
        source: Path,
        change: Callable[[Path], object],
        read: Callable[[Path], object],
        invalid: bool = False,
    ) -> Case:
        """A copy is changed, then read."""

        def run() -> None:
            folder = self.of(source)
            change(folder)
            read(folder)

        return Case(label, run, invalid)


def _changed_json(folder: Path, name: str, draw: random.Random, keys: tuple[str, ...]) -> bytes:
    tree = json.loads((folder / name).read_text())
    return json.dumps(mutated_tree(tree, draw, STRANGE, keys)).encode()


def artifacts(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Artifacts of every representation, with other bytes in them."""
    base = tiny_base()
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer))
    for kind, settings in _REPRESENTATIONS.items():
        (folder / kind).mkdir()
        prompt = make_prompt(settings, policy, 0, None)  # type: ignore[arg-type]
        recipe = {"model": {"path": "x"}}
        save_artifact(folder / kind, policy, prompt, name="n", recipe=recipe, metrics={})
    copies = _Copies(folder / "copy")
    made = partial(copies.case, read=lambda place: load_artifact(place, policy))
    for kind, label, change in _wrong_artifacts(folder):
        yield made(f"{kind}: {label}", folder / kind, change, invalid=True)
    _save_signed_and_old(folder, policy)
    yield from _wrong_files(folder, copies)
    alone = partial(copies.case, read=_read_files)
    while True:
        kind = draw.choice([*_REPRESENTATIONS, "signed", "old"])
        name = draw.choice(_files(folder / kind))
        original = (folder / kind / name).read_bytes()
        if name.endswith(".json") and draw.random() < 0.7:
            content = _changed_json(folder / kind, name, draw, ("parts", "kind", "r", "__class__"))
        elif draw.random() < 0.5 and len(original) > 8:
            content = mutated_bytes(original, draw, 8 + struct.unpack("<Q", original[:8])[0] % 4096)
        else:
            content = mutated_bytes(original, draw)
        change = partial(_put, name, content)
        case = made if kind in _REPRESENTATIONS else alone
        yield case(f"{kind}/{name}: {content[:120]!r}", folder / kind, change)


def _wrong_files(folder: Path, copies: _Copies) -> Iterator[Case]:
    """What must be refused where an artifact's files are read without a base."""
    made = partial(copies.case, read=_read_files)
    for label, content in INVALID_JSON.items():
        change = partial(_put, SIGNATURE, content)
        yield made(f"{SIGNATURE}: {label}", folder / "signed", change, invalid=True)
    for name in _files(folder / "signed"):
        for how, replace in _REPLACEMENTS.items():
            change = partial(_at, name, replace)
            yield made(f"{name} as a {how}, read alone", folder / "signed", change, invalid=True)
    yield made("a pickle", folder / "old", partial(_put, "x.bin", b"\x80\x04."), invalid=True)


def _save_signed_and_old(folder: Path, policy: Policy) -> None:
    """One artifact that is signed, and one of version 2."""
    for name in ("signed", "old"):
        prompt = make_prompt(_REPRESENTATIONS["sequence"], policy, 0, None)  # type: ignore[arg-type]
        save_artifact(folder / name, policy, prompt, name="n", recipe={}, metrics={})
    content = json.loads((folder / "old" / "prompt.json").read_text())
    old = {key: value for key, value in content.items() if key != "system_role"}
    (folder / "old" / "prompt.json").write_text(json.dumps({**old, "schema_version": 2}))
    signature = {"content": content_hash(folder / "signed"), "created": "now"}
    signature |= {"public_key": "A" * 44, "signature": "A" * 88}
    (folder / "signed" / SIGNATURE).write_text(json.dumps(signature))


def _read_files(folder: Path) -> None:
    """All that reads an artifact's files alone."""
    info = check_files(folder)
    content_hash(folder)
    prompt_hash(folder)
    card(info.model_dump())
    ast.parse(loading_example(info.model_dump()) or "")
    if not (folder / SIGNATURE).exists():
        migrate_artifact(folder)


def _wrong_artifacts(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Representation, label and change of what must be refused."""
    for label, content in INVALID_TENSORS.items():
        yield "soft", label, partial(_put, "prompt.safetensors", content)
    for label, content in INVALID_JSON.items():
        yield "soft", label, partial(_put, "prompt.json", content)
    config = "adapter/adapter_config.json"
    without_rank = json.loads((folder / "adapter" / config).read_text())
    del without_rank["r"]
    yield "adapter", "without r", partial(_put, config, json.dumps(without_rank).encode())
    for kind in _REPRESENTATIONS:
        for name in _files(folder / kind):
            for how, replace in _REPLACEMENTS.items():
                yield kind, f"{name} as a {how}", partial(_at, name, replace)


def _files(folder: Path) -> list[str]:
    """Relative paths of what an artifact is read from."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
    return [str(path.relative_to(folder)) for path in found]


def _at(name: str, replace: Callable[[Path], None], folder: Path) -> None:
    replace(folder / name)


def checkpoints(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Checkpoints of a run, read and restored; most of them without the digest of their content."""
    tree = {
        "name": "x",
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "prompt": {"num_virtual_tokens": 3, "init_text": "Be nice."},
        "algorithm": {"group_size": 2},
        "sampling": {"max_tokens": 8},
        "data": {"rows": ["rain", "sun", "land", "men", "she"], "heldout": 1},
        "rewards": [{"path": "builtin:length", "options": {"max": 4}}],
        "training": {"queries_per_step": 2},
        "tracking": {"trackers": ["jsonl"]},
    }
    save_tiny(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = build_single_run(load_recipe(folder / "recipe.yaml"), folder, folder / "out")
    identity = {"data": "d", "base": "b"}
    save_checkpoint(folder / "good", run.state.checkpoint(identity), keep=1)
    copies = _Copies(folder / "copy")
    step, name = folder / "good" / "step_000000", "step_000000"

    def restored(place: Path) -> None:
        run.state.restore(load_checkpoint(place), identity)

    def case(label: str, change: Callable[[Path], object], invalid: bool) -> Case:
        return copies.case(
            label, folder / "good", lambda place: change(place / name), restored, invalid
        )

    for file in ("state.json", "tensors.safetensors"):
        for how, replace in _REPLACEMENTS.items():
            yield case(f"{file} as a {how}", partial(_at, file, replace), True)
    for label, content in INVALID_JSON.items():
        yield case(f"state: {label}", partial(_put, "state.json", content), True)
    for label, content in INVALID_TENSORS.items():
        yield case(f"tensors: {label}", partial(_put, "tensors.safetensors", content), True)
    state = json.loads((step / "state.json").read_text())
    while True:
        if draw.random() < 0.3:
            content = mutated_bytes((step / "tensors.safetensors").read_bytes(), draw, 4096)
            yield case("bits of tensors", partial(_put, "tensors.safetensors", content), True)
            continue
        kept = dict(state) if draw.random() < 0.3 else {**state, "digest": None}
        changed = mutated_tree(kept, draw)
        content = json.dumps(changed).encode()
        damaged = "digest" in changed and changed["digest"] == state["digest"] and changed != kept
        change = partial(_put, "state.json", content)
        yield case(f"state: {_difference(kept, changed)}", change, damaged)


def _put(name: str, content: bytes, folder: Path) -> None:
    _written(folder / name, content)


def _difference(before: dict[str, Any], after: Any) -> str:
    if not isinstance(after, dict):
        return repr(after)[:100]
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(f"{key}={str(after.get(key))[:60]}" for key in keys)


def models(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Model folders up to the reading of weights."""
    save_tiny(folder / "model")
    copies = _Copies(folder / "copy")
    names = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")

    def read(place: Path) -> None:
        check_folder(place, trust_remote_code=False)
        read_config(place, trust_remote_code=False)
        read_tokenizer(place, trust_remote_code=False)

    made = partial(copies.case, source=folder / "model", read=read)
    adapter = partial(_put, "adapter_config.json", b"{}")
    yield made("a stray adapter", change=adapter, invalid=True)
    nested = b'{"model_type": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001
    yield made("a nested config", change=partial(_put, "config.json", nested), invalid=True)
    for file in ("config.json", "model.safetensors", "tokenizer_config.json"):
        for how, replace in _REPLACEMENTS.items():
            if (file, how) != ("tokenizer_config.json", "folder"):
                change = partial(_at, file, replace)
                yield made(f"{file} as a {how}", change=change, invalid=True)
    float8 = partial(_put, "model.safetensors", _typed("F8_E4M3", 256))
    yield made("weights in float8", change=float8, invalid=True)
    present = [name for name in names if (folder / "model" / name).is_file()]
    while True:
        name = draw.choice(present)
        if draw.random() < 0.6:
            content = _changed_json(folder / "model", name, draw, ("auto_map", "rope_parameters"))
        else:
            content = mutated_bytes((folder / "model" / name).read_bytes(), draw)
        yield made(f"{name}: {content[:150]!r}", change=partial(_put, name, content))
