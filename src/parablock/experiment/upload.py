"""Uploads of exported folders to the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from parablock.errors import StorageError
from parablock.hub import is_reachable
from parablock.printable import as_argument

TOKEN_VARIABLE = "HF_TOKEN"
"""Where the key of an upload is read from, and from nowhere else."""


def check_upload(repository: str) -> None:
    """Check what can be checked before an upload.

    Raises:
        StorageError: The name is no owner/name, there is no key, or the hub is out of reach.
    """
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise StorageError(
            f"{repository!r} is not the name of a repository", remedy="Give OWNER/NAME, such as alice/my-model."
        )
    _key_for(repository)
    if constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        raise StorageError(
            f"the hub at {constants.ENDPOINT} is out of reach",
            cause="HF_HUB_OFFLINE is set." if constants.HF_HUB_OFFLINE else "Nothing answers there.",
            remedy="Export without --push-to-hub, and upload the folder later with: hf upload OWNER/NAME FOLDER",
        )


def _key_for(repository: str) -> str:
    """Return the key without the white space around it, which no header may have."""
    key = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]+", key):
        problem = "is no key: it has characters that keys have not" if key else "is not set"
        raise StorageError(
            f"there is no key for an upload to {repository}: {TOKEN_VARIABLE} {problem}",
            remedy=f"Make one that may write, at huggingface.co/settings/tokens, and set {TOKEN_VARIABLE} to it.",
        )
    return key


def upload_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the files of a folder to a repository, which is made if it is not there; return its address.

    Args:
        folder: What is uploaded, without files whose names begin with a dot.
        repository: owner/name.
        private: Whether a new repository can be read by its owner alone; one that is there stays as it is.

    Raises:
        StorageError: There is no key, or the hub refuses, or breaks off.
    """
    from huggingface_hub import HfApi

    key = _key_for(repository)
    api = HfApi(token=key, library_name="parablock")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by ParaBlock", ignore_patterns=".*"
        )
    except Exception as error:  # of the hub, of the connection, of a proxy: each has its own
        said = " ".join(str(error).replace(key, "…").split())[:300]
        raise StorageError(
            f"the hub did not take {folder} as {repository}: {said}",
            cause="The key may not write there, or the connection broke.",
            remedy=f"The folder is whole. Check the key, then: hf upload {repository} {as_argument(folder)}",
        ) from None  # a traceback would show the key
    return str(address)
