"""Reads a dataset from the Hugging Face hub; the one file that imports `datasets`.

Without a network `datasets` retries for half a minute before it gives up, so the hub is tried once
with a short timeout first. `HF_HUB_OFFLINE=1` reads the local cache alone.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rlprompt.data.base import Table
from rlprompt.errors import InputError

CONNECT_SECONDS = 5.0  # per address of the host


def read_hub(dataset_id: str, name: str | None, split: str) -> Table:
    """Read one split of a hub dataset, from the cache when it is there.

    Args:
        dataset_id: `owner/name`.
        name: The configuration of the dataset, None for its only or default one.
        split: The split to read, in the syntax of `datasets` (`train`, `train[:1000]`, ...).

    Returns:
        Its rows, at least one.

    Raises:
        InputError: The hub cannot be reached, or has no such dataset, configuration or split.
    """
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:
        _check_reachable(dataset_id, datasets.config.HF_ENDPOINT)
    try:
        # The scheme keeps `datasets` from taking a folder of that name in the working directory.
        dataset = datasets.load_dataset(f"hf://datasets/{dataset_id}", name, split=split)
        rows = dataset.to_list()
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"the hub dataset '{dataset_id}' (name {name!r}, split '{split}') cannot be read: "
            f"{reason}; check path, name and split"
        ) from error
    if not rows:
        raise InputError(f"the split '{split}' of '{dataset_id}' holds no rows; choose another")
    return Table(label=f"{dataset_id}[{split}]", rows=rows)


def to_dataset(columns: Mapping[str, list[Any]]) -> Any:
    """Columns as a `datasets.Dataset`, for the trainers that ask for one."""
    import datasets

    return datasets.Dataset.from_dict(dict(columns))


def _check_reachable(dataset_id: str, endpoint: str) -> None:
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # any answer at all is a connection
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # `datasets` has its own certificates; it will tell if they fail too
        raise InputError(
            f"the hub dataset '{dataset_id}' cannot be fetched because {endpoint} cannot be "
            f"reached ({reason}); connect to the network, name a local file in path, or set "
            "HF_HUB_OFFLINE=1 if it is in the cache"
        ) from error
