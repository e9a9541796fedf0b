"""Reading a saved model's parts, with one clear sentence where something is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
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


@contextlib.contextmanager
def told_as(what: str) -> Iterator[None]:
    """Whatever transformers and what lies below it raise on the files of a model's folder, as one sentence."""
    try:
        yield
    except KeepLoraError:
        raise
    except Exception as error:
        raise KeepLoraError(f"{what}: {first_line(error)}") from error


_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weights_options(name: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` for reading weights: safetensors alone, since a pickle can name any function and have it called.

    Raises:
        KeepLoraError: the folder has pickled weights and no others, an index that names other files, or an adapter.
    """
    folder = expand(source)
    if (folder / "adapter_config.json").exists():
        raise KeepLoraError(f"{name} is an adapter, or has one in it; name the folder of the whole model")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with told_as(f"{index} cannot be used"):
            shards = set(read_json(index)["weight_map"].values())
            if odd := [
                str(s) for s in shards if not (isinstance(s, str) and s.endswith(".safetensors") and s == Path(s).name)
            ]:
                raise ValueError(f"it names {odd[0]!r}, which is no .safetensors file in the folder")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise KeepLoraError(
            f"{name}: its weights are pickled ({pickled[0]}), and reading a pickle can run any code; if you trust it, "
            "convert it once with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    # Of a model on the hub that has only pickles, transformers takes the conversion by the hub's own bot, and only from "main".
    return options | {"use_safetensors": True, "revision": options.get("revision") or "main"}


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def load_part(name: str, part: str, loader: Any, source: str, options: dict[str, Any]) -> Any:
    with told_as(f"{name}: its {part} could not be loaded"):
        return loader.from_pretrained(source, **options)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
