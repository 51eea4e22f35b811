"""What an alias demands of the versions it points to, checked on the artifact's own files."""

from __future__ import annotations

from pathlib import Path

from rlprompt.artifacts.certificate import read_certificate
from rlprompt.artifacts.format import read_artifact_info
from rlprompt.registry.records import Protection


def fulfilled(folder: Path, protection: Protection) -> list[str]:
    """Each demand that an artifact fulfils, in words.

    Args:
        folder: folder of the artifact.
        protection: what is demanded.

    Raises:
        InputError: the artifact or its certificate is damaged.
    """
    return [words for is_met, words in _checked(folder, protection) if is_met]


def failures(folder: Path, protection: Protection) -> list[str]:
    """Each demand that an artifact does not fulfil, in words.

    Args:
        folder: folder of the artifact.
        protection: what is demanded.

    Raises:
        InputError: the artifact or its certificate is damaged.
    """
    return [words for is_met, words in _checked(folder, protection) if not is_met]


def _checked(folder: Path, protection: Protection) -> list[tuple[bool, str]]:
    found: list[tuple[bool, str]] = []
    if protection.verdict:
        metrics = read_artifact_info(folder).metrics
        if metrics.get("learned") is True:
            found.append((True, f"has the verdict: {metrics.get('verdict')}"))
        else:
            said = metrics.get("verdict") or "its run has given none"
            if metrics.get("verdict") and "learned" not in metrics:
                said = "its run is of an rlprompt that kept the verdict in words only; run it again"
            found.append((False, f"has no verdict of being better than its start ({said})"))
    if protection.certificate is not None:
        found.append(_certified(folder, protection.certificate, protection.reward))
    return found


def _certified(folder: Path, alpha: float, reward: str | None) -> tuple[bool, str]:
    certificate = read_certificate(folder)
    about = "" if reward is None else f" of {reward}"
    if certificate is None:
        return False, f"has no certificate{about}; `rlprompt certify` issues one"
    if reward is not None and reward not in {risk.name for risk in certificate.risks}:
        names = ", ".join(risk.name for risk in certificate.risks)
        return False, f"is certified for {names}, not for {reward}"
    if certificate.alpha > alpha:
        return False, f"is certified for {certificate.alpha:g}, above {alpha:g}"
    return True, f"is certified for {certificate.alpha:g}{'' if reward is None else f' ({reward})'}"
