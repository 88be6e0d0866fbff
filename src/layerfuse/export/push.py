"""`layerfuse push`: an exported folder to a hub, or the list of what would go there."""

from pathlib import Path
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
        LayerfuseError: the folder is none of `layerfuse export`, the name is none, or the hub
            refuses; with its reason.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise LayerfuseError(
            f"{folder} lacks {', '.join(missing)}: give a folder that `layerfuse export` wrote"
        )
    if repository.count("/") != 1:
        raise LayerfuseError(f"{repository!r} is no repository; write user/name")
    lines: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            lines.append(f"{path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    lines.append(f"https://huggingface.co/{repository}")
    if dry_run:
        return lines
    # Here, because it takes time to import that a dry run need not spend.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # Any: huggingface_hub types what it gives more widely than it is
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    # OSError: no network
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise LayerfuseError(f"the hub did not take {folder}: {error}") from error
    return lines
