"""Models on the Hugging Face hub: whether one can be opened, and why not, in one line; and whole models fetched before they are needed."""

from pathlib import Path
from typing import Any

from selma_ray.errors import ModelNotFoundError, first_line

__all__ = ["fetch_model", "fetch_pipeline", "hub_file"]

_WEIGHTLESS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def hub_file(key: str, name: str, filename: str, revision: str | None = None) -> Path:
    """Return the local path of a small file of a hub model, downloaded where HF_HOME does not hold it.

    Raises ModelNotFoundError for a model that is gated, missing, of another kind or out of reach; `key` is the recipe's.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except errors.GatedRepoError:
        reason = (
            "is gated: accept its licence on its page at the hub and set HF_TOKEN to your token, or name another model"
        )
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}; fix {key}'s revision"
    except errors.RepositoryNotFoundError:
        reason = (
            "is not on the hub, or is private; fix the name, set HF_TOKEN to a token that may read it, or give a folder"
        )
    except errors.LocalEntryNotFoundError as error:
        reason = (
            f"is not in HF_HOME, and the hub cannot be reached ({first_line(error)}); run `selma fetch RECIPE` where it can be, or "
            "give a folder"
        )
    except errors.EntryNotFoundError:
        reason = f"holds no {filename}, so it is no model of the kind that is needed; fix the name"
    except (OSError, ValueError) as error:
        reason = f"cannot be opened ({first_line(error)}); fix the name or give a folder"
    raise ModelNotFoundError(f"{key} {name} {reason}")


def fetch_pipeline(name: str, revision: str | None, variant: str | None) -> Path:
    """Download a pipeline's safetensors into HF_HOME and return its folder there."""
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True))


def fetch_model(name: str, revision: str | None) -> Path:
    """Download a model's safetensors, tokenizer and configuration into HF_HOME and return its folder there."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": [*_WEIGHTLESS, "*.safetensors"]}
    return Path(snapshot_download(name, revision=revision, **options))
