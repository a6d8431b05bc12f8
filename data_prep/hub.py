"""Folders that a recipe names: a path, or `hub:owner/name[@revision]`, a repository of the Hugging Face hub; and files
of data sets there, `hub:datasets/owner/name@COMMIT/data/*.parquet`, or a whole one, `hub:datasets/owner/name@COMMIT`.

Downloading is a step of its own (`python -m pipeline fetch`), because compute nodes often have no internet; everything
else only looks into the local cache.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

PREFIX = "hub:"
LFS = b"version https://git-lfs"
_DATA = re.compile(
    r"hub:datasets/(?P<name>[\w.-]+(/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})(/(?P<files>[^#]+))?(?P<part>#.+)?"
)
_SMALL = ("*.json", "*.model", "*.txt")  # settings, tokenizers, and their notes
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that a repository has


def refuse_pointer(path: Path) -> None:
    """Tell a file of a repository that was cloned without its large files.

    Raises:
        ValueError: the file only says where the real one is.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its repository")


def local_folder(name: str, setting: str = "") -> Path:
    """The folder that `name` stands for; nothing is downloaded.

    Args:
        setting: the recipe's field that names it, for the error.

    Raises:
        FileNotFoundError: a repository that has not been fetched.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    from huggingface_hub import snapshot_download  # late: most recipes name plain folders
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = _parts(name)
    try:
        # named, so that what fetch left out is not missed here
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[*_SMALL, _WEIGHTS[0]], local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{f'{setting} {name}'.strip()} is not (or not wholly) in the local cache: run `python -m pipeline fetch` "
            f"with this recipe on a machine with internet"
        ) from None


def fetch(name: str) -> Path:
    """Download a model repository (settings, tokenizer, one kind of weights) into the cache; the folder it lies in.

    Raises:
        ValueError: no such repository or revision, or the hub cannot be reached.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    repository, revision = _parts(name)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        kinds = [kind for kind in _WEIGHTS if any(fnmatch(file, kind) for file in files)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*_SMALL, *kinds[:1]]))
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        _raise_own(error)
        raise ValueError(_unreached(name, error)) from error


def names_data(name: str) -> bool:
    """Whether a name of an input means the hub."""
    return name.startswith(PREFIX)


def data_files(name: str, download: bool = False) -> list[tuple[str, Path]]:
    """(name, file in the cache) of the files that the name of a data set's files stands for, sorted; of a whole data
    set its folder.

    Raises:
        ValueError: the name has no commit or no files, or cannot be downloaded.
        FileNotFoundError: not fetched, or no such files.
    """
    match = _DATA.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name}: write {PREFIX}datasets/OWNER/NAME@COMMIT with all 40 digits of a commit, and if not the whole "
            f"set is meant, files such as /data/train-*.parquet, or its part such as #train or #CONFIGURATION/train"
        )
    from huggingface_hub import errors, snapshot_download

    repository, commit, pattern = match["name"], match["commit"], match["files"]
    try:
        snapshot = snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[pattern] if pattern else None,
            local_files_only=not download,
        )
    except (errors.LocalEntryNotFoundError, errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        if download:
            _raise_own(error)
            raise ValueError(_unreached(name, error)) from error
        snapshot = ""
    folder = Path(snapshot)
    paths = sorted(path for path in folder.glob(pattern) if path.is_file()) if snapshot and pattern else []
    if snapshot and not pattern:
        return [(name, folder)]
    if not paths:
        raise FileNotFoundError(
            f"{name} is not in the local cache: run `python -m pipeline fetch` with this recipe where there is internet"
        )
    base = f"{PREFIX}datasets/{repository}@{commit}"
    return [(f"{base}/{path.relative_to(folder)}", path) for path in paths]


def _raise_own(error: Exception) -> None:
    """Raise an error of this machine, such as a full disk, as it is: those of the network have no number."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _unreached(name: str, error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    told = " ".join(str(error).split())
    advice = "" if isinstance(error, HfHubHTTPError) else "; is there internet, or HTTPS_PROXY set?"
    return f"{name} cannot be fetched: {told}{advice}"


def _parts(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(
            f"{name!r} does not name a repository: write {PREFIX}owner/name or {PREFIX}owner/name@revision"
        )
    return repository, revision or None
