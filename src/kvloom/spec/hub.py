"""Whether the Hugging Face hub can be reached, asked once and briefly: its client retries for half a minute."""

HUB_SECONDS = 5
"""Seconds without an answer after which the hub counts as out of reach."""


def hub_answers(repository: str, file: str, revision: str | None = None) -> bool:
    """Return whether the hub answers a request for `file` of `repository`, if only by a refusal.

    False offline (`HF_HUB_OFFLINE`) and without a connection. `HF_ENDPOINT` applies.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision), timeout=HUB_SECONDS)
    except errors.OfflineModeIsEnabled:
        return False
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return True
    except Exception:  # the type depends on the HTTP library of the hub's client
        return False
    return True
