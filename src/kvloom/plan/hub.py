"""The hub's part of a plan: one small file of a repository, from the hub's cache where it is there."""

import os
from pathlib import Path

from kvloom.errors import DownloadError, ModelNotFoundError
from kvloom.plan.source import Fetch
from kvloom.spec.hub import hub_answers


def hub_fetch() -> Fetch | None:
    """Return what fetches a file from the hub, or None when `HF_HUB_OFFLINE` is set."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")
    return None if offline else _fetch


def _fetch(repository: str, file: str) -> Path:
    """Return the path of one small file of a hub repository, from the hub's cache where it is there."""
    from huggingface_hub import errors, hf_hub_download

    away = (
        f"{repository!r} is in neither the catalogue nor the local cache, and the hub cannot be reached; "
        "give a folder, a config.json or a .gguf file"
    )
    try:
        if not hub_answers(repository, file):
            raise DownloadError(away)
        return Path(hf_hub_download(repository, file))
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(away) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"the hub has no {file} of {repository!r}, or it needs HF_TOKEN") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise DownloadError(f"fetching {file} of {repository!r} failed: {error}") from error
