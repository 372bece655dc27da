"""Checkpoints from the Hugging Face hub: the files that a model needs, in one form of the weights, and no others.

What has arrived whole is kept: the same command, started again, goes on with what is missing. A token is taken from where the hub's own tools
look for it: HF_TOKEN, or what `hf auth login` stored.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, errors, snapshot_download

from llama_jax.errors import UserError

ASSETS = re.compile(
    r"config\.json|generation_config\.json|params\.json|tokenizer\.model|tokenizer[\w.-]*\.json|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.jinja"
)
# Forms of the weights, the best first: one is fetched. Within a form, shards with their index come before a single file.
WEIGHTS = (
    re.compile(r"model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors"),
    re.compile(r"model\.safetensors"),
    re.compile(r"pytorch_model\.bin\.index\.json|pytorch_model-\d+-of-\d+\.bin"),
    re.compile(r"pytorch_model\.bin"),
    re.compile(r"consolidated\.\d+\.pth"),
)
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf"}


class RemoteFile(NamedTuple):
    """A file of a repository on the hub."""

    name: str
    nbytes: int


class RemoteFiles(NamedTuple):
    """What is to be fetched, from one commit."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.nbytes for file in self.files)


def find_files(repo_id: str, revision: str = "main", endpoint: str | None = None) -> RemoteFiles:
    """The files of a repository that a model needs: configuration, tokenizer, and the weights in one form.

    Raises UserError if the hub cannot be reached or does not give access, and if the repository holds no weights that can be read.
    """
    with _explained(repo_id, revision, endpoint):
        info = HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if climbing := [name for name in sizes if name.startswith("/") or "\\" in name or ".." in name.split("/")]:
        raise UserError(
            f"{repo_id} lists the file {climbing[0]!r}, which would be written outside of the folder; do not use it"
        )
    weights = _weights(sizes)
    if not weights:
        others = [name for name in sizes if Path(name).suffix in _WEIGHT_SUFFIXES]
        raise UserError(
            f"{repo_id} holds no model*.safetensors, pytorch_model*.bin or consolidated.*.pth at revision {revision} "
            f"(but {', '.join(others[:5]) or 'no weights at all'}); name a repository of the model in one of these forms"
        )
    names = sorted([*filter(ASSETS.fullmatch, sizes), *weights])
    return RemoteFiles(repo_id, info.sha, tuple(RemoteFile(name, sizes[name]) for name in names))


def download(
    repo_id: str,
    out: str | Path | None = None,
    revision: str = "main",
    files: RemoteFiles | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetches a checkpoint into a folder, by default one named after the repository, and returns the folder.

    `files` is what `find_files` found, where that was asked before. Raises UserError as find_files does, if the folder holds other weights,
    and for files that did not arrive whole.
    """
    folder = Path(out or repo_id.rpartition("/")[2])
    files = files or find_files(repo_id, revision, endpoint)
    _check_folder(folder, files)
    with _explained(repo_id, revision, endpoint):
        snapshot_download(
            repo_id,
            revision=files.commit,
            local_dir=folder,
            allow_patterns=[file.name for file in files.files],
            endpoint=endpoint,
        )
    for name, nbytes in files.files:
        present = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if present != nbytes:
            raise UserError(
                f"{folder / name} has {present} bytes, and the hub's has {nbytes}; remove it and start the same command again"
            )
    return folder


def _weights(names: Iterable[str]) -> list[str]:
    """The files of the best form of which there is more than an index."""
    for form in WEIGHTS:
        found = [name for name in names if form.fullmatch(name)]
        if any(Path(name).suffix in _WEIGHT_SUFFIXES for name in found):
            return found
    return []


def _check_folder(folder: Path, files: RemoteFiles) -> None:
    """Weights of another model, or in another form, would be taken for a part of this one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name another folder with --out")
    wanted = {file.name for file in files.files}
    present = {path.name for path in folder.glob("*") if path.suffix in _WEIGHT_SUFFIXES} if folder.is_dir() else set()
    if other := sorted(present - wanted):
        raise UserError(f"{folder} holds other weights, {other[0]}; name another folder with --out")


@contextmanager
def _explained(repo_id: str, revision: str, endpoint: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into a message with the remedy."""
    try:
        yield
    except Exception as error:
        # The library says of every refused file that it could not be located, and keeps the answer as the cause.
        refused = isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
            error.__cause__, errors.HfHubHTTPError
        )
        message = _explain(error.__cause__ if refused else error, repo_id, revision, endpoint or constants.ENDPOINT)
        if message is None:
            raise
        raise UserError(message) from error


def _explain(error: BaseException, repo_id: str, revision: str, hub: str) -> str | None:
    """What happened and what to do, or None for what is not the hub's."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    offline = (
        f"cannot reach {hub} for {repo_id} ({why}); check the connection (HTTPS_PROXY, HF_ENDPOINT, HF_HUB_OFFLINE)"
    )
    match error:
        case errors.HFValidationError():
            return f"{repo_id!r} is no id on the hub; ids look like meta-llama/Llama-2-7b-hf"
        case errors.GatedRepoError():
            return f"{repo_id} is gated: accept its licence at {hub}/{repo_id}, wait until access is granted, then {log_in}"
        case errors.RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}; its branches are at {hub}/{repo_id}/tree/main"
        case errors.RepositoryNotFoundError():
            return f"{hub} shows no repository {repo_id}; check the id. If it is private, {log_in} that may read it"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            remedy = log_in if status in (401, 403) else "start the same command again later"
            return f"{hub} answered {status} for {repo_id} ({why}); {remedy}"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return offline
        case OSError() if error.errno is None:  # with a number it is the system's, such as a full disk
            return f"{repo_id} did not arrive whole ({why}); start the same command again"
    # The transport's errors share no class with the library's, and the transport's own name changed with its versions.
    return offline if type(error).__module__.startswith("httpx") else None
