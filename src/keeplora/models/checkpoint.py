"""Reading a saved model's parts, with one clear sentence where something is missing."""

from __future__ import annotations

from typing import Any

from keeplora.errors import KeepLoraError, did_you_mean
from keeplora.files import expand
from keeplora.json_text import read_json

EMBEDDED = "embedded"
STAND_IN = "stand-in"
STAND_IN_VIDEO = "stand-in-video"
OWN = (EMBEDDED, STAND_IN, STAND_IN_VIDEO)
"""Names of the models that come with keeplora."""


def read_config(name: str, source: str, revision: str | None) -> dict[str, Any]:
    """config.json as it stands, before any class is chosen or any code of the model is run."""
    folder = expand(source)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise KeepLoraError(f"{name} is a folder without a config.json, so not a saved model")
        try:
            config = read_json(path)
        except (ValueError, OSError) as error:
            raise KeepLoraError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise KeepLoraError(f"{path} is not a JSON object")
        return config
    if folder.exists():
        raise KeepLoraError(f"{name} is a file; give the folder that holds config.json and the weights")

    from huggingface_hub import errors
    from transformers import PretrainedConfig

    missing = f"no local folder is called {name!r}"
    hint = did_you_mean(name, OWN).split(" (one of")[0].rstrip(";")
    try:
        config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except Exception as error:
        causes = _causes(error)
        if any(isinstance(c, errors.HFValidationError) for c in causes):
            raise KeepLoraError(f"{missing}, and it is not a name on the hub (owner/model) either{hint}") from error
        if any(isinstance(c, errors.GatedRepoError) for c in causes):
            raise KeepLoraError(
                f"{missing}; the hub has it but wants its licence accepted and a login first"
            ) from error
        if any(isinstance(c, errors.RevisionNotFoundError) for c in causes):
            raise KeepLoraError(f"{missing}; the hub has the model but no revision {revision!r} of it") from error
        if any(isinstance(c, errors.RepositoryNotFoundError) for c in causes):
            raise KeepLoraError(f"{missing}, and the hub has no public model of that name{hint}") from error
        unreachable = errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError
        if any(isinstance(c, unreachable) for c in causes):
            raise KeepLoraError(
                f"{missing}, and the hub could not be reached to look there (nor is a copy in its local cache){hint}"
            ) from error
        if isinstance(error, OSError):
            raise KeepLoraError(f"{missing}, and the hub's could not be read: {first_line(error)}") from error
        raise
    if not config:
        raise KeepLoraError(f"{missing}; the hub has {name}, but no config.json in it, so not a saved model")
    return config


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def load_part(name: str, part: str, loader: Any, source: str, options: dict[str, Any]) -> Any:
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise KeepLoraError(f"{name}: its {part} could not be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
