"""`layerfuse push`: an exported folder to a hub, or the list of what would go there."""

from pathlib import Path
from shlex import quote
from typing import Any

from layerfuse.errors import LayerfuseError

NEEDED = ("config.json", "README.md")
"""files that every folder of `layerfuse export` has"""


def push(
    folder: Path, repository: str, *, private: bool = True, dry_run: bool = False
) -> list[str]:
    """Upload a folder that `layerfuse export` wrote.

    Args:
        folder: the exported folder.
        repository: its name on the hub, as `user/name`.
        private: whether a repository that is new is seen by its owner alone.
        dry_run: only list the files; needs neither network nor account.

    Returns:
        A line for each file, with its size, and the address where it is or would be.

    Raises:
        LayerfuseError: the folder is none of `layerfuse export`, or of `--to gguf`, the name is
            none, or the hub refuses; with its reason.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing and any(folder.glob("*.gguf")):
        raise LayerfuseError(
            f"{folder} holds an export `--to gguf`, and layerfuse pushes those `--to llava` and "
            f"`--to hub`: send it by `hf upload {repository} {quote(str(folder))} --private`"
        )
    if missing:
        raise LayerfuseError(
            f"{folder} lacks {', '.join(missing)}: give a folder that `layerfuse export` wrote"
        )
    _refuse_other_names(repository)
    files: list[str] = []
    lines: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # what file managers and uploads that broke off leave behind
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            files.append(name)
            lines.append(f"{name}  {path.stat().st_size:,} bytes")
    lines.append(f"https://huggingface.co/{repository}")
    if not dry_run:
        _upload(folder, repository, files, private)
    return lines


def _refuse_other_names(repository: str) -> None:
    """Raise LayerfuseError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "it has no user"
    if repository.count("/") == 1:
        try:
            validate_repo_id(repository)
            return
        except HFValidationError as error:
            reason = str(error)
    raise LayerfuseError(f"{repository!r} is no repository ({reason}); write user/name")


def _upload(folder: Path, repository: str, files: list[str], private: bool) -> None:
    """Send files to a hub.

    Raises:
        LayerfuseError: it does not take them; with its reason.
    """
    # Here, because it takes time to import that a dry run need not spend.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # Any: huggingface_hub types what it gives more widely than it is
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        # those that were listed, no others
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
    # OSError: no network
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise LayerfuseError(f"the hub did not take {folder}: {error}") from error
