"""What a recipe says of vLLM servers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rlprompt.endpoints.addresses import VARIABLE
from rlprompt.endpoints.json_client import ServerAccess
from rlprompt.engines.base import EngineSettings


class VllmSettings(EngineSettings):
    """Running vLLM servers with the recipe's base: they draw, this process learns."""

    type: Literal["vllm"] = "vllm"
    """Engine."""
    urls: tuple[str, ...] = Field(min_length=1, max_length=256)
    """Addresses of the servers up to the version, such as `http://127.0.0.1:8000/v1`, or one as a
    text; queries are dealt out to them in turn. `${NAME}` in one is that environment variable."""
    model: str | None = Field(default=None, min_length=1)
    """The base's name on the servers; null = the only one that they serve."""
    api_key: str | None = None
    """`${NAME}`: the environment variable with the servers' key, which is written nowhere; null =
    they ask for none."""
    plain_http_key: bool = False
    """Allow the key over http:// to another machine, where the network can read it."""
    ca_file: str | None = None
    """PEM file of the authority that signed the servers' certificates, for one of your own."""
    concurrency: int = Field(default=64, ge=1, le=4096)
    """Requests under way at the same time; each asks for all completions of a query."""
    request_timeout: float = Field(default=600.0, gt=0.0)
    """Seconds that one attempt may take."""
    retries: int = Field(default=6, ge=0, le=50)
    """Further attempts, on the next server where there are several, after a lost connection, a
    time-out, or status 408, 409, 425, 429 or 5xx."""
    backoff: float = Field(default=0.5, gt=0.0)
    """Seconds before the first further attempt, doubled each time up to 60, times a random number
    in [0.5, 1]; a server's Retry-After wins."""
    start_timeout: float = Field(default=60.0, ge=0.0)
    """Seconds to wait for servers that do not answer yet when the run starts."""
    largest_gap: float = Field(default=0.1, gt=0.0)
    """The run is refused where log-probabilities of a probe's tokens on a server and here differ by
    more than this on average, in nats: the servers then have another base, or compute too roughly
    to learn from."""
    importance_cap: float | None = Field(default=2.0, ge=1.0)
    """A token's loss is multiplied by its probability here over that which the server drew it with,
    but by no more than this (truncated importance sampling; Yao et al., 2025), for an algorithm
    with a ratio of whole completions by theirs; null = not corrected."""
    adapter_folder: str | None = None
    """Folder that this process writes LoRA adapters into and the servers load them from, under the
    same path on both; null = a temporary one, where all servers are on this machine."""

    @field_validator("urls", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _are_different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named = [url.rstrip("/") for url in value]
        for url in named:
            if named.count(url) > 1:
                raise ValueError(f"urls names {url} twice; name each server once")
        return value

    @field_validator("api_key")
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        if value is not None and VARIABLE.fullmatch(value) is None:
            raise ValueError(
                "api_key must name an environment variable, for a recipe is copied into run "
                "folders and artifacts; write ${NAME}, and null where the servers ask for no key"
            )
        return value

    @property
    def importance_weight_cap(self) -> float | None:
        """`importance_cap`."""
        return self.importance_cap

    @property
    def access(self) -> ServerAccess:
        """How the servers are reached."""
        return ServerAccess(
            urls=self.urls,
            api_key=self.api_key,
            plain_http_key=self.plain_http_key,
            ca_file=self.ca_file,
            concurrency=self.concurrency,
            request_timeout=self.request_timeout,
            retries=self.retries,
            backoff=self.backoff,
        )
