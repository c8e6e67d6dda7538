"""Upload of an export to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from dist_adv.errors import RunFailure, UserError
from dist_adv.text import one_line


def check(repository: str) -> None:
    """Raise UserError where there is no such name, or nobody is logged in. Asks no server."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push: {one_line(error)}; write USER/REPO") from None
    if "/" not in repository:
        raise UserError(f"--push: {repository!r} names no user; write USER/REPO")
    if get_token() is None:
        raise UserError(
            "--push: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, repository: str) -> str:
    """Upload an export, and return its address. Raises RunFailure where that cannot be done."""
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (OSError, HTTPError, RuntimeError) as error:  # the last one of Xet's
        raise RunFailure(
            f"{repository}: could not be uploaded ({one_line(error)}); {folder} is whole, and "
            f"`hf upload {repository} {folder}` sends it"
        ) from None
    return str(address)
