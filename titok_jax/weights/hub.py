"""Downloads files from the Hugging Face hub into its cache, and checks cached files."""

import contextlib
import dataclasses
import hashlib
import os
import re
from pathlib import Path

from titok_jax.runtime.outputs import new_file, sha256
from titok_jax.runtime.paths import HUB_PREFIX, cache_folder
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub_answers import watched_download

_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's checksum of a small file, SHA-256 of a large one


class DownloadError(OSError):
    """The hub did not provide a file; the message says what to do.

    Attributes:
      not_held: whether the reason is that the repository does not hold the file.
    """

    def __init__(self, message: str, *, not_held: bool = False):
        super().__init__(message)
        self.not_held = not_held


@dataclasses.dataclass
class Repository:
    """A repository on the hub. All files that one object downloads are of one commit.

    Attributes:
      name: "owner/name".
      revision: branch, tag or commit; None for the default branch. After the first download it is the commit.
      token: access token; None for the one set by `hf auth login` or HF_TOKEN.
    """

    name: str
    revision: str | None = None
    token: str | None = None

    def download(self, file: str) -> Path:
        """Returns the path of a file in the cache. Downloads the file if it is not there. Errors as in `download_file`."""
        path = download_file(self.name, file, revision=self.revision, token=self.token)
        commit = path.parents[file.count("/")].name  # the cache has it at snapshots/COMMIT/FILE
        if re.fullmatch(r"[0-9a-f]{40}", commit):
            self.revision = commit
        return path


def download_file(repository: str, file: str, *, revision: str | None, token: str | None) -> Path:
    """Returns the path of a hub file in the cache. Downloads the file if it is not there.

    Raises:
      DownloadError: the hub does not provide the file, or what it says of the file cannot be right.
    """
    from huggingface_hub import constants, errors

    what = f"{HUB_PREFIX}{repository}/{file}"
    try:
        return Path(watched_download(repository, file, revision=revision, token=token))
    except errors.RevisionNotFoundError:
        message = f"there is no revision {revision!r} of it; give a branch, a tag or a commit of that repository"
    except errors.RemoteEntryNotFoundError:
        message = "the repository does not hold this file; is it a model of another kind?"
        raise DownloadError(f"cannot download {what}: {message}", not_held=True) from None
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

    A file's name in the cache is its checksum: SHA-256, or git's checksum for a small file. An intact file is noted in
    `cache_folder()` with its size and time of change. While these stay the same it is not hashed again.
    """
    blob = _blob(path)
    if blob is None:
        return
    noted = _note(blob)
    if noted is not None and _is_noted(*noted):
        return
    with open(blob, "rb") as file:
        if len(blob.name) == 64:
            checksum = hashlib.file_digest(file, "sha256")
        else:
            checksum = hashlib.sha1(b"blob %d\0" % blob.stat().st_size + file.read())
    if checksum.hexdigest() != blob.name:
        real = os.path.realpath(blob)
        raise WeightsError(f"{path} is damaged: it is not what the hub sent; remove {real} to download it again")
    if noted is not None and noted == _note(blob):  # it did not change while it was hashed
        with contextlib.suppress(OSError):  # the note only saves time
            noted[0].parent.mkdir(parents=True, exist_ok=True)
            with new_file(noted[0], replace=True) as partial:
                partial.write_bytes(noted[1])


def weights_checksum(path: Path) -> str:
    """The SHA-256 of a file of weights. A file in the hub's cache has it as its name. Errors as in `check_download`."""
    blob = _blob(path)
    if blob is None or len(blob.name) != 64:
        return sha256(path)
    check_download(path)
    return blob.name


def _blob(path: Path) -> Path | None:
    """The file of the hub's cache that a path leads to, by the name that is its checksum; None for a file elsewhere.

    The cache may have that name as a link to a file that several repositories share.
    """
    for _ in range(40):  # as many links as Linux follows
        path = Path(os.path.realpath(path.parent)) / path.name
        if path.parent.name == "blobs" and _CHECKSUM.fullmatch(path.name):
            return path
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _note(blob: Path) -> tuple[Path, bytes] | None:
    """The place and the text of the note that a blob, as it is now, was found intact; None if there can be no notes.

    There is one file for each blob, so that processes do not write the same file with different content.
    """
    folder = cache_folder()
    if folder is None:
        return None
    real = os.fsencode(os.path.realpath(blob))
    found = os.stat(real)
    text = b"%d bytes, changed at %d ns, is %s: %s\n" % (found.st_size, found.st_mtime_ns, blob.name.encode(), real)
    return folder / "intact" / hashlib.sha256(real).hexdigest(), text


def _is_noted(place: Path, text: bytes) -> bool:
    try:
        return place.read_bytes() == text
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
