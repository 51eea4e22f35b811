"""Signatures: of these files, by this key, and of nothing else."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlprompt.artifacts import signature
from rlprompt.artifacts.format import load_artifact, save_artifact
from rlprompt.artifacts.identity import content_hash, prompt_hash
from rlprompt.artifacts.signature import read_signature, sign_artifact, verify_signature
from rlprompt.errors import InputError
from tests.fixtures.artifacts import save_kind
from tests.fixtures.runs import tiny_policy

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
FORMATS = ("PEM", "OpenSSH")
if ed25519:  # else skipped above
    from tests.fixtures.keys import key_pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_kind(tmp_path / "a", tiny_policy(), "soft")


@pytest.mark.parametrize("form", FORMATS)
def test_a_signed_artifact_is_proven_and_loaded(folder: Path, tmp_path: Path, form: str) -> None:
    private, public = key_pair(tmp_path, form)
    content, prompt = content_hash(folder), prompt_hash(folder)
    done = sign_artifact(folder, private)
    assert done.content == content and prompt_hash(folder) == prompt
    assert content_hash(folder, without=("signature.json",)) == content
    assert verify_signature(folder, public) == read_signature(folder) == done
    load_artifact(folder, tiny_policy())
    assert sign_artifact(folder, private).content == content  # signing again signs the same


def test_the_signature_is_ed25519_of_three_lines(folder: Path, tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path)
    done = sign_artifact(folder, private)
    message = f"rlprompt artifact signature 1\n{content_hash(folder, ('signature.json',))}\n"
    key = ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(done.public_key))
    key.verify(base64.b64decode(done.signature), f"{message}{done.created}\n".encode())


def changed_file(folder: Path) -> None:
    (folder / "README.md").write_text("buy gold")


def extra_file(folder: Path) -> None:
    (folder / "more.json").write_text("{}")


def lost_file(folder: Path) -> None:
    (folder / "README.md").unlink()


@pytest.mark.parametrize("change", [changed_file, extra_file, lost_file])
def test_files_that_changed_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    private, public = key_pair(tmp_path)
    sign_artifact(folder, private)
    change(folder)
    for refuses in (
        lambda: read_signature(folder),
        lambda: verify_signature(folder, public),
        lambda: load_artifact(folder, tiny_policy()),
    ):
        with pytest.raises(InputError, match=r"are not those that were signed .*copy the artifact"):
            refuses()


def test_another_key_did_not_sign_it(folder: Path, tmp_path: Path) -> None:
    sign_artifact(folder, key_pair(tmp_path)[0])
    _, other = key_pair(tmp_path, name="other")
    with pytest.raises(InputError, match=r"not with that of .*other.pub.*do not trust it"):
        verify_signature(folder, other)


def test_a_key_that_is_only_claimed_is_found_out(folder: Path, tmp_path: Path) -> None:
    """Who swaps the public key, the time or the hash has no signature for it."""
    done = sign_artifact(folder, key_pair(tmp_path)[0])
    _, other = key_pair(tmp_path, name="other")
    loaded: Any = serialization.load_pem_public_key(other.read_bytes())
    theirs = base64.b64encode(loaded.public_bytes_raw()).decode()
    path = folder / "signature.json"
    path.write_text(json.dumps({**done.model_dump(), "public_key": theirs}))
    with pytest.raises(InputError, match="was not made with the key"):
        verify_signature(folder, other)
    path.write_text(json.dumps({**done.model_dump(), "created": "yesterday"}))
    with pytest.raises(InputError, match="was not made with the key"):
        verify_signature(folder, tmp_path / "key.pub")
    path.write_text(json.dumps({**done.model_dump(), "signature": "no base64!"}))
    with pytest.raises(InputError, match="was not made with the key"):
        verify_signature(folder, tmp_path / "key.pub")


def test_unsigned_is_said(folder: Path, tmp_path: Path) -> None:
    assert read_signature(folder) is None
    with pytest.raises(InputError, match="is not signed"):
        verify_signature(folder, key_pair(tmp_path)[1])


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema_version": 2}', '{"a":' * 99, "\0", '{"content": "x"}']
)
def test_a_damaged_signature_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "signature.json").write_text(content)
    with pytest.raises(InputError, match=r"signature.json' is damaged") as caught:
        load_artifact(folder, tiny_policy())
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "signature.json")
    with pytest.raises(InputError, match="named pipe"):
        load_artifact(folder, tiny_policy())


def test_keys_of_other_kinds_are_refused(folder: Path, tmp_path: Path) -> None:
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    bad = tmp_path / "bad"
    pem = serialization.Encoding.PEM
    pkcs8 = serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"secret")
    own = ed25519.Ed25519PrivateKey.generate()
    for content in (
        other.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        own.private_bytes(pem, pkcs8, locked),
        b"nothing",
        b"",
        b"ssh-ed25519 AAAA",
    ):
        bad.write_bytes(content)
        for use in (sign_artifact, verify_signature):
            with pytest.raises(InputError, match=r"is no Ed25519 .* key that can be used"):
                use(folder, bad)
    with pytest.raises(InputError, match="No such file"):
        sign_artifact(folder, tmp_path / "absent")
    assert not (folder / "signature.json").exists()


def test_what_is_saved_or_certified_anew_is_unsigned(folder: Path, tmp_path: Path) -> None:
    sign_artifact(folder, key_pair(tmp_path)[0])
    policy = tiny_policy()
    save_artifact(folder, policy, policy.prompt, name="n", recipe={}, metrics={})
    assert read_signature(folder) is None


def test_a_missing_package_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    private, _ = key_pair(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"rlprompt\[signing\]"):
        signature.sign_artifact(folder, private)
