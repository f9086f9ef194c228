"""Digests of files: the Hub's client checks no more than the size of what it downloads."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import tqdm

# What takes less than a second shows no bar.
BAR: dict[str, Any] = dict(leave=False, delay=1.0)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, with a progress bar for a large one."""
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, desc=f"hashing {path.name}", unit="B", unit_scale=True, **BAR) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def check_download(hub_id: str, filename: str | None = None, cache_dir: str | Path | None = None) -> None:
    """Compare weights in the Hub's cache with the digest that the Hub gave for them, the name of the cached file.

    Args:
        hub_id: Repository ``owner/name`` or ``owner/name@revision``.
        filename: Name of the file there; those that timm looks for if None.
        cache_dir: The cache, if it is not the client's own.

    Raises:
        RuntimeError: If a file is not what the Hub says.
    """
    repo_id, _, revision = hub_id.partition("@")
    for name in [filename] if filename else ["model.safetensors", "pytorch_model.bin"]:
        path = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
        if not isinstance(path, str):
            continue
        blob = Path(path).resolve()
        # Only large files have their SHA-256 for a name; without links (Windows) none has.
        if re.fullmatch("[0-9a-f]{64}", blob.name) and (found := sha256(blob)) != blob.name:
            raise RuntimeError(
                f"{name} of {hub_id} is damaged: its sha256 is {found}, that on the Hub {blob.name}; delete {blob} and "
                "load the model again"
            )
