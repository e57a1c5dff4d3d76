"""Hub: whether the model hub gives a model's files now, found out with one short request."""

from __future__ import annotations

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

_NOT_REACHABLE = "the hub is not reachable"
_NO_SERVICE = (408, 429)  # too slow, too many requests; like 5xx they say nothing of the model


@dataclass(frozen=True)
class Refusal:
    """Why the hub gives no files: `reason` for everybody, `detail` for those who look into it."""

    reason: str
    detail: str
    needs_access: bool = False

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def refusal(name: str) -> Refusal | None:
    """Why the hub will not give the files of `name` now; None when it will, or says that there are none.

    The hub's client tries for half a minute before it gives up, and a connection that a firewall swallows is
    tried once per address: here all is over after $HF_HUB_ETAG_TIMEOUT seconds (10 unless set).
    """
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    answers: SimpleQueue[Refusal | None] = SimpleQueue()
    Thread(target=lambda: answers.put(_ask(name, HF_HUB_ETAG_TIMEOUT)), daemon=True).start()
    try:
        return answers.get(timeout=HF_HUB_ETAG_TIMEOUT)
    except Empty:
        return Refusal(_NOT_REACHABLE, f"no answer within {HF_HUB_ETAG_TIMEOUT} seconds")


def _ask(name: str, timeout_seconds: float) -> Refusal | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        found = get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=timeout_seconds)
    except HFValidationError:
        return None  # no hub id at all: transformers says why
    except OfflineModeIsEnabled:
        return Refusal("HF_HUB_OFFLINE is set", "")
    except HfHubHTTPError as error:
        return _meaning(error)
    except Exception as error:  # the client's network libraries differ by version, and so do their errors
        return Refusal(_NOT_REACHABLE, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if found.commit_hash is None:  # every answer of the hub names one
        return Refusal(_NOT_REACHABLE, "something else answers in its place: a firewall or a login page?")
    return None


def _meaning(error: Exception) -> Refusal | None:
    """None for an answer that is about the model: there is none of that name, or no config.json in it."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError for the client
        return Refusal("the hub asks for access to this model", f"HTTP {status}", needs_access=True)
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return None
    if status in (401, 403):
        return Refusal("the hub denies access", f"HTTP {status}", needs_access=True)
    if status in _NO_SERVICE or status >= 500:
        return Refusal("the hub does not serve requests now", f"HTTP {status}")
    return None
