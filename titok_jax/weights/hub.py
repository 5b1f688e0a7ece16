"""Downloads files from the Hugging Face hub into its cache, and checks cached files."""

import hashlib
import os
import re
from pathlib import Path

from titok_jax.runtime.paths import HUB_PREFIX
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub_answers import watched_download


class DownloadError(OSError):
    """The hub did not provide a file; the message says what to do."""


def download_file(repository: str, file: str, *, revision: str | None, token: str | None) -> Path:
    """Returns the path of a hub file in the cache. Downloads the file if it is not there."""
    from huggingface_hub import constants, errors

    what = f"{HUB_PREFIX}{repository}/{file}"
    try:
        return Path(watched_download(repository, file, revision=revision, token=token))
    except errors.RevisionNotFoundError:
        message = f"there is no revision {revision!r} of it; give a branch, a tag or a commit of that repository"
    except errors.RemoteEntryNotFoundError:
        message = "the repository does not hold this file; is it a model of another kind?"
    except errors.RepositoryNotFoundError as error:
        status = error.response.status_code
        message = (
            f"the hub denies it (status {status}): the repository does not exist, or your token does not give access; check "
            "the name, and log in with `hf auth login` or set HF_TOKEN"
        )
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            message = f"it is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; unset it to download"
        else:
            reason = error.__cause__ or error
            message = f"{constants.ENDPOINT} does not give it ({_first_line(reason)}) and it is not in the cache"
    except Exception as error:  # from libraries: HTTP statuses, broken connections, full disks, bad repository names
        message = _first_line(error)
    raise DownloadError(f"cannot download {what}: {message}")


def check_download(path: Path) -> None:
    """Raises WeightsError if a file in the hub's cache is damaged. Files elsewhere pass without a check.

    A file's name in the cache is its checksum: SHA-256, or git's checksum for a small file.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    with open(blob, "rb") as file:
        if len(blob.name) == 64:
            checksum = hashlib.file_digest(file, "sha256")
        else:
            checksum = hashlib.sha1(b"blob %d\0" % blob.stat().st_size + file.read())
    if checksum.hexdigest() != blob.name:
        raise WeightsError(f"{path} is damaged: it is not what the hub sent; remove {blob} to download it again")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
