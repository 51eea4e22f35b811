"""The tensors of a GGUF file, dequantised and written as safetensors.

Memory holds one tensor in full precision and one shard in the precision that is stored, whatever
the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

from rlprompt.files import to_json, write_atomic
from rlprompt.model.gguf.families import Conversion
from rlprompt.reading.gguf_file import GgufError, GgufFile, GgufTensor

SHARD_BYTES = 4 << 30
"""Most that one file of weights has, as long as one tensor fits."""
_PIECE_BYTES = 4 << 20


def require_shapes(
    file: GgufFile, conversion: Conversion, expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not those of the model.

    Args:
        file: the file.
        conversion: names of its tensors in transformers.
        expected: shapes of the model's parameters by name, a tied head left out.

    Raises:
        GgufError: one is missing, or has another shape.
    """
    found = {own: file.tensors[name] for name, own in conversion.names.items()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise GgufError(f"it lacks {len(missing)} tensor(s) of the model, such as {missing[0]}")
    for own, tensor in found.items():
        shape = expected.get(own)
        if shape is None:
            raise GgufError(f"its tensor {tensor.name} is none that its settings ask for")
        if tensor.shape != shape:
            raise GgufError(
                f"its tensor {tensor.name} has the shape {list(tensor.shape)}, and by its settings "
                f"{list(shape)}"
            )


def write_weights(
    file: GgufFile,
    conversion: Conversion,
    dtype: torch.dtype,
    folder: Path,
    progress: Callable[[str], None],
) -> list[str]:
    """Writes the weights as transformers names them, in shards with an index where one is too few.

    Args:
        file: the file.
        conversion: names of its tensors, and what restores them.
        dtype: type to store.
        folder: folder to write to.
        progress: what is told how far it is.

    Returns:
        The storage types of the file, the one with most numbers first.

    Raises:
        GgufError: a tensor is stored in a way that the `gguf` package does not read, or holds what
            is no number.
        OSError: the file cannot be read, or the folder not written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    files: list[_Shard] = []
    held = total = done = next_report = 0
    numbers: dict[str, int] = {}
    whole = sum(tensor.num_bytes for tensor in file.tensors.values())
    for name, own in conversion.names.items():
        tensor = file.tensors[name]
        made = _read(file, tensor, dtype, conversion.restore.get(name))
        if shards[-1] and held + made.nbytes > SHARD_BYTES:
            files.append(_save(shards.pop(), folder, len(files)))
            shards.append({})
            held = 0
        shards[-1][own] = made
        held += made.nbytes
        total += made.nbytes
        numbers[tensor.kind] = numbers.get(tensor.kind, 0) + made.numel()
        done += tensor.num_bytes
        if done * 4 // max(whole, 1) > next_report:
            next_report = done * 4 // max(whole, 1)
            progress(f"dequantised {100 * done // max(whole, 1)}%")
    files.append(_save(shards.pop(), folder, len(files)))
    _name_shards(files, folder, total)
    return sorted(numbers, key=lambda kind: -numbers[kind])


def _read(
    file: GgufFile,
    tensor: GgufTensor,
    dtype: torch.dtype,
    restore: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """One tensor in the type that is stored."""
    # What is restored by arithmetic is a vector, and is rounded once, after that.
    kept = torch.float32 if len(tensor.shape) == 1 else dtype
    made = torch.empty(tensor.shape, dtype=kept)
    flat, place = made.view(-1), 0
    kind = gguf.GGMLQuantizationType[tensor.kind]
    for piece in file.rows(tensor, _PIECE_BYTES):
        stored = np.frombuffer(bytearray(piece), dtype=np.uint8).reshape(1, -1)
        with np.errstate(all="ignore"):  # what is no number is looked for below
            values = torch.from_numpy(np.ascontiguousarray(_numbers(stored, kind, tensor)))
        flat[place : place + values.numel()] = values.view(-1).to(kept)
        place += values.numel()
    if restore is not None:
        made = restore(made)
    made = made.to(dtype).contiguous()
    if not bool(torch.isfinite(made).all()):
        raise GgufError(f"its tensor {tensor.name} holds what is no finite number in {dtype}")
    return made


def _numbers(stored: np.ndarray, kind: gguf.GGMLQuantizationType, tensor: GgufTensor) -> np.ndarray:
    try:
        return dequantize(stored, kind)
    except NotImplementedError as error:
        raise GgufError(
            f"its tensor {tensor.name} is stored as {tensor.kind}, which this version of the "
            "package gguf does not read"
        ) from error


@dataclass(frozen=True)
class _Shard:
    """A file of weights that has no final name yet."""

    path: Path
    names: list[str]


def _save(shard: dict[str, Tensor], folder: Path, number: int) -> _Shard:
    path = folder / f"shard-{number}"
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which hides a shared cache from others
    return _Shard(path, list(shard))


def _name_shards(files: list[_Shard], folder: Path, total: int) -> None:
    """Give the files the names that transformers looks for."""
    if len(files) == 1:
        files[0].path.rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        shard.path.rename(folder / final)
        where |= dict.fromkeys(shard.names, final)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_atomic(folder / "model.safetensors.index.json", to_json(index, indent=2) + "\n")
