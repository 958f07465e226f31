"""Model folders on the Hugging Face Hub: the one place that talks to it.

Address, token, cache and offline mode are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME,
HF_HUB_OFFLINE). Of a repository exactly the files of a model folder are taken, up to a size limit; they are verified
like those of any other folder when they are read.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCardData,
    constants,
    errors,
    get_token,
    snapshot_download,
)
from huggingface_hub.utils import validate_repo_id

from pipeline.inference.model_folder import CARD, CONFIG, PICTURE, WEIGHTS
from pipeline.inference.text import printable
from pipeline.storage.checkpoint_folder import MAX_META_BYTES, META, read_meta

log = logging.getLogger("pipeline")

LIBRARY = "nvae-pipeline"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TIMEOUT = 10.0
"""Seconds for the answer to a question; downloads have the library's own limits."""
UNREACHED = (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
"""What the library raises where the Hub refuses or cannot be reached."""
MAX_WEIGHTS_BYTES = 8 * 2**30
"""Of a model that is taken from the Hub: two billion parameters in float32."""
MAX_OTHER_BYTES = 2**24
"""Of its card, recipe and picture."""
LIMITS = {
    META: MAX_META_BYTES,
    WEIGHTS: MAX_WEIGHTS_BYTES,
    CONFIG: MAX_OTHER_BYTES,
    CARD: MAX_OTHER_BYTES,
    PICTURE: MAX_OTHER_BYTES,
}
"""The files of a model folder, and how many bytes of each are taken."""


class Repository(NamedTuple):
    """A repository of models."""

    name: str
    """OWNER/NAME."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    def __str__(self) -> str:
        return f"hf-hub:{self.name}" + (f"@{self.revision}" if self.revision else "")


def parse_repository(text: str) -> Repository:
    """OWNER/NAME[@REVISION]. Raises ValueError for anything else."""
    name, at, revision = text.partition("@")
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        name = ""
    if name.count("/") != 1 or (at and not re.fullmatch(r"[\w./-]+", revision)) or ".." in text:
        raise ValueError(f"{printable(text)!r}: a model of the Hub is OWNER/NAME, or OWNER/NAME@REVISION")
    return Repository(name, revision or None)


# ------------------------------------------------------------------------------------------------------------- pulling


def pull(repository: Repository) -> tuple[Path, str]:
    """Downloads a model folder into the library's cache. Returns its folder there, and the commit.

    Without a network, or offline, the cached copy is used. Raises ValueError, in one line, for a repository or revision
    that is missing or private, that holds no model folder or one that is too large, and where the Hub is not reached.
    """
    options = {"repo_id": repository.name, "allow_patterns": list(LIMITS), "library_name": LIBRARY}
    with _explained(repository):
        try:
            info = _api().model_info(
                repository.name, revision=repository.revision, files_metadata=True, timeout=TIMEOUT
            )
        except errors.RevisionNotFoundError:
            raise
        except UNREACHED as error:
            return _cached(options, repository, error)
        _check_files(repository, {file.rfilename: file.size for file in info.siblings or ()})
        folder = Path(snapshot_download(**options, revision=repository.revision))
    if folder.name != info.sha:
        raise ValueError(f"{repository}: was changed while it was downloaded; try again")
    return folder, info.sha


def _cached(options: dict[str, Any], repository: Repository, problem: Exception) -> tuple[Path, str]:
    """The folder in the cache, and its commit. Raises ValueError, with the problem, if there is none."""
    try:
        folder = Path(snapshot_download(**options, revision=repository.revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        answered = isinstance(problem, errors.HfHubHTTPError)
        cache = "" if answered else "; there is no copy in the cache"
        raise ValueError(f"{repository}: {_explain(problem)}{cache}") from None
    log.warning("%s: the copy in the cache is used, because %s", repository, _explain(problem))
    return folder, folder.name


def _check_files(repository: Repository, sizes: Mapping[str, int | None]) -> None:
    """Before anything is downloaded."""
    missing = [name for name in (META, WEIGHTS) if name not in sizes]
    if missing:
        raise ValueError(f"{repository}: holds no model of this project: no {' and no '.join(missing)}")
    for name, limit in LIMITS.items():
        size = sizes.get(name, 0)
        if size is None or size > limit:
            raise ValueError(f"{repository}: {name} has {size} bytes; at most {limit} are taken")


# ------------------------------------------------------------------------------------------------------------- pushing


def push(folder: Path, repository: Repository, private: bool = False) -> str:
    """Uploads a model folder in one commit; makes the repository if there is none. Returns the commit.

    Only the files of a model folder are uploaded; a picture that an earlier version had and this one has not is
    deleted. `private`: of a new repository. Raises ValueError, in one line, where this is refused, and for a repository
    that is public or holds something else.
    """
    check_token(repository)
    api = _api()
    with _explained(repository):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        info = api.model_info(repository.name)
        _check_target(repository, {file.rfilename for file in info.siblings or ()}, private and not info.private)
        commit = api.upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            allow_patterns=list(LIMITS),
            delete_patterns=[name for name in LIMITS if not (folder / name).exists()],
            commit_message=f"Model at step {read_meta(folder).step}",
        )
    return commit.oid


def address(repository: Repository) -> str:
    """Of its page."""
    return f"{constants.ENDPOINT}/{repository.name}"


def check_token(repository: Repository) -> None:
    """Raises ValueError where pushing would fail for lack of a token, before anything is done."""
    if not get_token():
        raise ValueError(f"{repository}: no token; {LOGIN}, with a token that may write")


def _check_target(repository: Repository, names: set[str], is_public: bool) -> None:
    if is_public:
        raise ValueError(f"{repository}: is public already; make it private in its settings, or leave out --private")
    if META not in names and names & {WEIGHTS, CARD, CONFIG}:
        raise ValueError(f"{repository}: holds another kind of model, which would be overwritten; name another one")


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turns the library's errors into a ValueError of one line."""
    try:
        yield
    except UNREACHED as error:
        raise ValueError(f"{repository}: {_explain(error)}") from None
    except json.JSONDecodeError:
        raise ValueError(f"{repository}: {constants.ENDPOINT} does not answer as a Hub does; see HF_ENDPOINT") from None


def _explain(error: BaseException | None) -> str:
    """What went wrong, and what to do."""
    match error:
        case errors.GatedRepoError():
            return f"access has to be requested on its page at the Hub; then {LOGIN}"
        case errors.RepositoryNotFoundError():
            hint = "is not visible to your token" if get_token() else f"is private ({LOGIN})"
            return f"there is no such repository, or it {hint}"
        case errors.RevisionNotFoundError():
            return "there is no such revision"
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the Hub refused the token ({error.response.status_code}); {LOGIN}, with one that may do this"
        case errors.HfHubHTTPError():
            return f"the Hub answered with an error ({error.response.status_code} {_line(error.server_message)})"
        case _:
            return f"the Hub cannot be reached ({_line(error)})"


def _api() -> HfApi:
    return HfApi(library_name=LIBRARY)


def _line(text: object) -> str:
    return printable(" ".join(str(text or "").split()))[:200]


# --------------------------------------------------------------------------------------------------------------- cards


def front_matter(model_name: str, results: Sequence[Mapping[str, Any]], **fields: Any) -> str:
    """The YAML at the top of a model card. `results` are the fields of each `huggingface_hub.EvalResult`, and `fields`
    those of `huggingface_hub.ModelCardData`.
    """
    if results:
        fields |= {"model_name": model_name, "eval_results": [EvalResult(**each) for each in results]}
    return ModelCardData(**fields).to_yaml()
