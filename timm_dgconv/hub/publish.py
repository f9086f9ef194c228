"""Publish a converted folder on the Hub."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from timm_dgconv import __version__
from timm_dgconv.hub.checkpoint import CONFIG, WEIGHTS
from timm_dgconv.hub.convert import File, convert, list_files, reload, sha256
from timm_dgconv.hub.errors import hub_errors, one_line


def publish(
    source: str,
    repo_id: str,
    model_name: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> tuple[list[File], str, str, str | None]:
    """Upload a converted folder to the Hub, download it again and compare the SHA-256 of the files.

    The arguments are those of ``timm-dgconv publish``. A dry run prepares everything and uploads nothing.

    Returns:
        The files, the name of the model, the Hub id, and the address, which is None for a dry run.

    Raises:
        ValueError: If the source cannot be converted, the folder cannot be loaded, or the repository name is not valid.
        RuntimeError: If the Hub refuses, or returns other files than were uploaded.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"--repo {repo_id!r} is not an OWNER/NAME")
    if not Path(source).is_dir() and model_name is None:
        raise ValueError(f"{source} is not a folder; use a folder that timm-dgconv convert wrote, or --model ARCH.TAG")
    api = HfApi(library_name="timm-dgconv", library_version=__version__)
    if not dry_run:
        with hub_errors():
            api.whoami()  # fail before the conversion if there is no token or no connection
    branch = None if revision == "main" else revision
    hub_id = repo_id if branch is None else f"{repo_id}@{branch}"
    with tempfile.TemporaryDirectory() as work:
        folder = Path(source)
        if folder.is_dir():
            model_name = _check_folder(folder, model_name)
        else:
            assert model_name is not None
            folder = Path(work, "converted")
            convert(source, model_name, folder)
        files = list_files(folder)
        if dry_run:
            return files, model_name, hub_id, None
        with hub_errors():
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            is_private = api.model_info(repo_id).private
        if private and not is_private:
            raise RuntimeError(
                f"{repo_id} exists and is public, nothing was uploaded; make it private in its settings, use another "
                "--repo, or leave out --private"
            )
        with hub_errors():
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            names = [file.name for file in files]
            message = f"{model_name}, with timm-dgconv {__version__}"
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=branch, allow_patterns=names, commit_message=message
            )
            cache = Path(work, "cache")
            copies = [hf_hub_download(repo_id, name, revision=commit.oid, cache_dir=cache) for name in names]
        for file, copy in zip(files, copies, strict=True):
            if (digest := sha256(Path(copy))) != file.sha256:
                raise RuntimeError(
                    f"the Hub returns another {file.name} than was uploaded to {repo_id}: sha256 {digest} instead of "
                    f"{file.sha256}; delete the file there and publish again"
                )
    return files, model_name, hub_id, str(url)


def _check_folder(folder: Path, model_name: str | None) -> str:
    """Return the name of the model in a converted folder.

    Raises:
        ValueError: If timm cannot load the folder, or it has another model.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; use a folder that timm-dgconv convert wrote")
    try:
        cfg: Any = reload(folder).pretrained_cfg
        found = f"{cfg['architecture']}.{cfg['tag']}"
    except Exception as error:  # users edit the files
        raise ValueError(f"timm cannot load {folder}: {one_line(error)}") from error
    if model_name not in (None, found):
        raise ValueError(f"{folder} is {found}, not {model_name}; leave out --model, or convert it again")
    return found
