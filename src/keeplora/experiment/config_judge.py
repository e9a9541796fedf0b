"""Who rates answers where the score is "judge"."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from keeplora.evaluation.judges import judge_keys
from keeplora.experiment.config_generation import Section

_NEEDED = {"local": ("model",), "openai": ("model", "base_url")}


class JudgeConfig(Section):
    """Who rates answers from 0 to 5; keys of another kind of judge must be left out."""

    kind: Literal["overlap", "exact", "local", "openai"] = Field(
        default="overlap",
        description="shared words, same words, a language model on this machine, or one behind an OpenAI-compatible address",
    )
    model: str | None = Field(
        default=None, min_length=1, description="local: folder or hub name; openai: its name there"
    )
    revision: str | None = Field(default=None, description="local: of a name on the hub")
    device: str = Field(default="auto", description="local: auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(default="auto", description="local")
    batch_size: int = Field(default=16, ge=1, description="local: answers judged at once")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="local: passed to the chat template, e.g. {enable_thinking: false}"
    )
    base_url: str | None = Field(default=None, description="openai: the address, e.g. http://localhost:8000/v1")
    api_key_env: str | None = Field(
        default=None,
        min_length=1,
        description="openai: the environment variable that holds the key, which is never kept",
    )
    timeout: float = Field(default=60.0, gt=0, description="openai: seconds that one request may take")
    retries: int = Field(default=6, ge=0, description="openai: further attempts for one answer")
    concurrency: int = Field(default=8, ge=1, le=256, description="openai: requests under way at once")
    max_wait: float = Field(
        default=300.0, ge=0, description="openai: longest wait in seconds that a server may ask for"
    )
    max_tokens: int = Field(default=128, ge=1, description="local, openai: tokens of the judge's words")
    body: dict[str, Any] = Field(default_factory=dict, description="openai: further entries of the request")

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeConfig:
        known = {"kind", *judge_keys(self.kind)}
        for key in type(self).model_fields:
            if key not in known and getattr(self, key) != type(self).model_fields[key].get_default(
                call_default_factory=True
            ):
                raise PydanticCustomError(
                    "judge", "{key} is no setting of the judge {kind}; leave it out", {"key": key, "kind": self.kind}
                )
        for key in _NEEDED.get(self.kind, ()):
            if getattr(self, key) is None:
                raise PydanticCustomError("judge", "kind: {kind} needs {key}", {"key": key, "kind": self.kind})
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise PydanticCustomError("judge", "base_url must be an address such as http://localhost:8000/v1")
            if parts.username or parts.password or parts.query:
                raise PydanticCustomError(
                    "judge",
                    "base_url must hold no password and no query; put the key into a variable and name it as api_key_env",
                )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What `keeplora.evaluation.judges.make_judge` takes."""
        return {"kind": self.kind} | {key: getattr(self, key) for key in judge_keys(self.kind)}
