"""Push: what was exported becomes a repository on the Hugging Face hub, private unless asked otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowvram.errors import ConfigError, first_line
from lowvram.shell import typed

_KEPT = {".gitattributes"}  # what the hub puts into a new repository
_SIGN_IN = "Sign in with a token that may write: hf auth login"


def require_pushable(repo: str | None, *, public: bool = False) -> None:
    """Ask the hub before hours of work what it would refuse after them; nothing is made there.

    Args:
        repo: None: nothing is to be pushed.

    Raises:
        ConfigError: no name of a repository, no token, a hub out of reach, or a repository that holds files
            or is public where a private one was asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if repo is None:
        if public:
            raise ConfigError("--public says how to push.", "Add --push OWNER/NAME, or leave --public out.")
        return
    if get_token() is None:
        raise ConfigError("Pushing needs a token of the Hugging Face hub; there is none.", f"{_SIGN_IN}.")
    with _refusals(repo):
        api = HfApi()
        api.whoami()
        try:
            found = api.model_info(repo)
        except RepositoryNotFoundError:
            return
    files = {file.rfilename for file in found.siblings or []} - _KEPT
    if files:
        raise ConfigError(
            f"The repository '{repo}' holds {len(files)} files already, {min(files)} for one.",
            "Give a new name: --push OWNER/NAME; nothing was changed there.",
        )
    if not public and found.private is False:
        raise ConfigError(
            f"The repository '{repo}' is public.", "Make it private, give another name, or add --public."
        )


def files_of(folder: Path) -> dict[str, Path | bytes]:
    """All files of an exported folder, by the names that they have there."""
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def push(files: Mapping[str, Path | bytes], repo: str, *, public: bool = False, again: str) -> str:
    """Upload in one commit, so that the repository is whole or empty; returns its address.

    Args:
        files: name there -> file, or its content.
        again: how to push what stays here, for the remedy.

    Raises:
        ConfigError: what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _refusals(repo, f"What was written stays here; push it with: {again}"):
        api = HfApi()
        url = api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(url.repo_id, operations, commit_message="Uploaded by lowvram")
    return str(url)


def upload_command(repo: str, path: Path, name: str = "", *, public: bool = False) -> str:
    """What pushes a file or folder by hand; a repository that it makes is as private as one that we make.

    Args:
        name: of a file in the repository, where it is another one there.
    """
    words = ["hf upload", typed(repo), typed(path), *([name] if name else [])]
    return " ".join([*words, *([] if public else ["--private"])])


@contextmanager
def _refusals(repo: str, remedy: str = "") -> Iterator[None]:
    """The hub's refusals in our words; the token is cut out of whatever an error says.

    Args:
        remedy: beside what would repair the cause.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(
            f"'{repo}' is no name of a repository: {error}", f"Give OWNER/NAME. {remedy}"
        ) from None
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed.", f"Unset it. {remedy}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ConfigError(
            f"The hub refuses '{repo}' (HTTP {status}): {_without(get_token(), first_line(error))}",
            f"{_cure(status)} {remedy}".strip(),
        ) from None
    except Exception as error:  # the client's network libraries differ by version, and so do their errors
        said = f"{type(error).__name__}: {_without(get_token(), first_line(error))}"
        raise ConfigError(f"The hub is not reachable: {said}", f"Check the connection. {remedy}") from None


def _cure(status: int) -> str:
    """Of a refusal by the hub: only 401 and 403 are about who asks, from 500 on and with 429 it is busy."""
    if status in (401, 403):
        return f"{_SIGN_IN}."
    return "Try again later." if status == 429 or status >= 500 else "Put right what the hub says."


def _without(token: str | None, text: str) -> str:
    return text.replace(token, "***") if token else text
