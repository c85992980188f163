"""Files and datasets of the Hugging Face Hub: from its cache alone where the Hub does not answer.

huggingface_hub itself retries for half a minute where there is no network.
"""

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config import UserError

PATIENCE = 2.0  # seconds for the Hub's first answer


class HubError(UserError):
    """Why the Hub and its cache gave nothing."""


def file(repo: str, name: str) -> Path:
    """A file of the model `org/name`. Raises HubError."""
    import huggingface_hub

    return _fetch(repo, huggingface_hub.hf_hub_download, repo, name)


def dataset(repo: str) -> Path:
    """The folder of the dataset `org/name`. Raises HubError."""
    import huggingface_hub

    return _fetch(repo, huggingface_hub.snapshot_download, repo_id=repo, repo_type="dataset")


def _fetch(repo: str, download: Callable[..., Any], *args: Any, **options: Any) -> Path:
    from huggingface_hub import constants

    online = constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT)
    if not online:
        options["local_files_only"] = True
    try:
        return Path(download(*args, **options))
    except Exception as error:  # several packages raise many kinds of network errors
        reason = f"{type(error).__name__}: {error}"
        if not online:
            reason = (
                f"no answer from {constants.ENDPOINT}, and its cache lacks {repo} or parts of it"
            )
        raise HubError(reason) from error


def reachable(endpoint: str) -> bool:
    """Whether the Hub answers within PATIENCE. Proxies of the environment are used."""
    answers = []

    def ask():
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except (OSError, http.client.HTTPException) as error:
            # Its certificate is for huggingface_hub to judge, which may know other authorities.
            answers.append(isinstance(getattr(error, "reason", None), ssl.SSLError))

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no limit of its own
    thread.start()
    thread.join(PATIENCE)
    return answers == [True]
