"""How a model behind an OpenAI-compatible server is reached, and what may be spent on it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlprompt.endpoints.addresses import VARIABLE
from rlprompt.settings import Settings

_OWN_KEYS = frozenset(
    {"model", "messages", "n", "seed", "stream", "temperature", "top_p", "top_k", "min_p", "stop"}
    | {"max_tokens", "max_completion_tokens", "min_tokens", "stop_token_ids", "logprobs"}
    | {"top_logprobs", "tools"}
)
"""Keys of a request that are written here, or that would change what an answer is."""


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible server: a provider, vLLM, llama.cpp, Ollama, our own."""

    base_url: str
    """Address up to the version, such as `https://api.openai.com/v1`; `${NAME}` in it is that
    environment variable."""
    model: str = Field(min_length=1)
    """The model's name on the server."""
    api_key: str | None = None
    """`${NAME}`: the environment variable with the key, which is sent as a bearer token and written
    nowhere; null = the server asks for none."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at the same time."""
    request_timeout: float = Field(default=120.0, gt=0.0)
    """Seconds that one attempt may take."""
    deadline: float = Field(default=900.0, gt=0.0)
    """Seconds after which no further attempt of a request begins, waits included."""
    retries: int = Field(default=6, ge=0, le=50)
    """Further attempts after a lost connection, a time-out, an answer that cannot be used, or
    status 408, 409, 425, 429 or 5xx."""
    backoff: float = Field(default=0.5, gt=0.0)
    """Seconds before the first further attempt, doubled each time up to 60, times a random number
    in [0.5, 1]; a server's Retry-After wins."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most attempts begun within any minute; null = no limit of ours."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Most tokens within any minute, counted as for the budget; null = no limit of ours."""
    choices_per_request: int = Field(default=1, ge=1, le=128)
    """Completions of one query that are asked for in one request (`n`), which saves prompt tokens;
    above 1 the server must take `n`, and give `logprobs`, by which tokens of each are counted."""
    send_seed: bool = True
    """Send a seed for each request; false for servers that refuse one."""
    sampling_extensions: bool = False
    """The server takes `top_k`, `min_p`, `min_tokens` and `stop_token_ids`, which OpenAI's protocol
    does not have; vLLM does."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the longest completion; newer models of OpenAI take only the second."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of each request, such as a server's own options."""
    template_tokens: int = Field(default=256, ge=0, le=2**20)
    """Tokens that the server's chat template may add to a request, a system message of its own
    included; with the bytes of the texts it bounds what a request can cost."""
    price_in: float | None = Field(default=None, ge=0.0)
    """Price of a million prompt tokens, in the currency of `budget.max_cost`."""
    price_out: float | None = Field(default=None, ge=0.0)
    """Price of a million completion tokens."""
    plain_http_key: bool = False
    """Allow the key over http:// to another machine, where the network can read it."""
    ca_file: str | None = None
    """PEM file of the authority that signed the server's certificate, for one of your own."""
    max_response_mb: float = Field(default=16.0, gt=0.0)
    """Largest answer that is read, in MB."""

    @field_validator("api_key")
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        if value is not None and VARIABLE.fullmatch(value) is None:
            raise ValueError(
                "api_key must name an environment variable, for a recipe is copied into run "
                "folders and artifacts; write ${NAME}, and null where the server asks for no key"
            )
        return value

    @field_validator("extra_body")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _OWN_KEYS:
                raise ValueError(
                    f"extra_body holds {key}, which other settings decide or nothing here can use; "
                    "remove it"
                )
        return value

    @model_validator(mode="after")
    def _prices_are_both(self) -> Self:
        if (self.price_in is None) != (self.price_out is None):
            missing = "price_in" if self.price_in is None else "price_out"
            raise ValueError(f"{missing} is missing beside the other price; give both or none")
        return self

    @property
    def prices(self) -> tuple[Decimal, Decimal]:
        """Price of one prompt token and of one completion token, 0 where none is given."""
        given = (self.price_in or 0.0, self.price_out or 0.0)
        prompt, completion = (Decimal(repr(price)) / 1_000_000 for price in given)
        return prompt, completion


class BudgetSettings(Settings):
    """What a run may spend on models behind servers, for the whole run however often resumed."""

    max_tokens: int | None = Field(default=None, ge=1, le=10**15)
    """Prompt and completion tokens together; null = no limit."""
    max_cost: float | None = Field(default=None, gt=0.0)
    """Money, in the currency of the endpoints' prices; null = no limit."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_tokens is None and self.max_cost is None:
            raise ValueError("budget limits nothing; give max_tokens or max_cost, or remove budget")
        return self
