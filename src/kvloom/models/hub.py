"""Models of the Hugging Face hub: only their config, safetensors, tokenizer and template are fetched."""

import json
import re
from pathlib import Path
from typing import Any

from kvloom.errors import CheckpointError, DownloadError, ModelNotFoundError
from kvloom.spec.families import family_of_config
from kvloom.spec.hub import hub_answers

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")

FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is fetched: no pickled weights and no code."""


def is_hub_id(model: str) -> bool:
    """Return whether `model` has the form of a hub id, `owner/name`."""
    return _ID.fullmatch(model) is not None and ".." not in model


def download_model(model: str, revision: str | None) -> Path:
    """Return the local folder of a hub model, from the hub's own cache where it is there.

    The config comes first, so that a model that cannot run is refused before its weights are fetched. `HF_HOME`,
    `HF_HUB_OFFLINE` and `HF_TOKEN` apply; where the hub does not answer, the cache alone is used.
    Raises `ModelNotFoundError`, `DownloadError`, `UnsupportedError`.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    where = f"{model!r}" if revision is None else f"{model!r} at revision {revision!r}"
    try:
        away = not hub_answers(model, "config.json", revision)
        config = Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=away))
        family_of_config(_read(config))
        found = snapshot_download(model, revision=revision, allow_patterns=list(FILES), local_files_only=away)
        return Path(found)
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{where} is gated: accept its terms on its page of the hub, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{where} is not in the local cache and the hub cannot be reached. Check the network and HF_HUB_OFFLINE, "
            "or give a local folder or .gguf file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{where} has no config.json: kvloom reads safetensors models. Of a repository with GGUF files, download "
            "one and give its path"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"no model {where} on the hub, or it is private and HF_TOKEN is not set") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"fetching {where} from the hub failed: {reason}. Try again: the download resumes"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; remove it and try again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value
