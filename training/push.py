"""python -m training.push runs/NAME ORG/NAME: publish a run's hub/ folder on the Hugging Face Hub, in one commit."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .card import REPOSITORY
from .command import Parser, guarded
from .files import Failed, Refused, read_json, read_text, sha256_file

NEEDED = ("config.json", "model.safetensors", "README.md")
BESIDE = ("recipe.yaml", "records.jsonl")  # what the card links
SENT = ".sent.json"  # in the repository: what the last push put there, [git's sha1, sha256] by name
MADE = ("hub", "best")  # what a run, and a fine-tuning, leave to publish
TITLE = "SSL++ backbone"
Files = dict[str, Path | bytes]


def command() -> Parser:
    parser = Parser(
        prog="python -m training.push",
        description="Publish a run's hub/ or best/: config.json, model.safetensors, the card and its figures.",
        usage="%(prog)s RUN ORG/NAME [--dry-run] [--OPTION ...]",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="Run folder, runs/NAME, or one in it that has a card: hub/, best/ or last/.")
    parser.add_argument("repo", help="ORG/NAME on the Hub; made if it is not there.")
    parser.add_argument("--private", action="store_true", help="Make the repository private.")
    parser.add_argument("--revision", metavar="BRANCH", help="Branch to push to; main without it. It must be there.")
    parser.add_argument("--create-pr", action="store_true", help="Open a pull request instead of pushing.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what others changed in the repository.")
    parser.add_argument("--dry-run", action="store_true", help="Show what would be sent, and send nothing.")
    return parser


def main(arguments: Sequence[str]) -> None:
    given = command().read(arguments)
    try:
        validate_repo_id(given.repo)
    except HFValidationError as error:
        raise Refused(f"{given.repo!r} is no name of a repository: {error}") from None
    if given.repo.count("/") != 1:
        raise Refused(f"{given.repo!r} is no name of a repository: it needs an owner, ORG/NAME.")
    if given.create_pr and given.revision not in (None, "main"):
        raise Refused("--create-pr goes to main; leave --revision out.")
    if given.create_pr and given.private:
        raise Refused("--create-pr proposes files to a repository that is there; --private is for a new one.")
    files = collect(Path(given.run), given.repo, None if given.revision == "main" else given.revision)
    if given.dry_run:
        for name, file in files.items():
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            print(f"{size:>12,} bytes  {name}")
        print(f"{len(files)} files would be sent to {given.repo}" + (f"@{given.revision}" if given.revision else ""))
        return
    print(push(files, given.repo, given.private, given.revision, given.create_pr, given.overwrite))


def collect(run: Path, repo: str, revision: str | None = None) -> Files:
    """The files to publish, by their name in the repository; nothing pickled, nothing else that lies there.

    The card's lines of code name the repository, and the branch.

    Raises:
        Refused: the folder is not one that was exported.
    """
    if not run.is_dir():
        raise Refused(f"there is no folder {run}.")
    folder = next((run / name for name in MADE if (run / name).is_dir()), run)
    if runs := sorted(run.glob("seed_*/sslpp/hub")):
        raise Refused(f"{run} is a comparison; what it made is published by naming {runs[0].parent}.")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise Refused(f"{folder} has no {name}; what training leaves in hub/, and training.finetune in best/, has.")
    try:
        read_json(folder / "config.json", "architecture")
    except Failed as error:
        text = f"{folder / 'config.json'} names no architecture, so that timm could not load it."
        raise Refused(text) from error
    try:
        with safe_open(folder / "model.safetensors", framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise Refused(f"{folder / 'model.safetensors'} is no safetensors file: {error}.") from error
    _check_loads(folder)
    more = [path for name in BESIDE if (path := folder / name).is_file()]
    pictures = sorted((folder / "report").glob("*.png"))
    told = (*(folder / name for name in NEEDED), *more, *pictures)
    files: Files = {str(path.relative_to(folder)): path for path in told}
    if links := [path for path in files.values() if path.is_symlink()]:
        raise Refused(f"{links[0]} is a link; put the file itself there, so that what is published is what you see.")
    card = read_text(folder / "README.md")
    if revision:
        card = card.replace(f"hf-hub:{REPOSITORY}", f"hf-hub:{REPOSITORY}@{revision}")
        card = card.replace(f'"{REPOSITORY}")', f'"{REPOSITORY}", revision="{revision}")')
    files["README.md"] = card.replace(REPOSITORY, repo).encode()
    files[SENT] = json.dumps({name: [git_sha1(file), sha256(file)] for name, file in files.items()}, indent=1).encode()
    return files


def _check_loads(folder: Path) -> None:
    """Refuse a model that nobody could load from the Hub.

    Raises:
        Refused: saying why.
    """
    from . import backbone as B  # once all is there that the rest of this module can tell
    from .recipe import Model

    try:
        B.create(Model(f"local-dir:{folder}", pretrained=True), None, head=True)
    except Refused as error:
        raise Refused(str(error).removeprefix("model.name: ")) from error


def changed_by_others(api: HfApi, repo: str, revision: str | None, names: Collection[str]) -> list[str]:
    """Which of the files of a repository are not as the last push left them."""
    if not names:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            told = read_json(Path(api.hf_hub_download(repo, SENT, revision=revision, cache_dir=scratch)))
            ours = {name: hashes for name, hashes in told.items() if isinstance(hashes, list)}
        except (EntryNotFoundError, Failed):  # none, or one that tells nothing
            ours = {}
    there = api.get_paths_info(repo, list(names), revision=revision)
    return [f.path for f in there if (f.lfs.sha256 if f.lfs else f.blob_id) not in ours.get(f.path, ())]


def push(files: Files, repo: str, private: bool, revision: str | None, create_pr: bool, overwrite: bool = False) -> str:
    """Send files in one commit; what to tell the user.

    A push that finds everything there already sends nothing, so that doing it again after any failure ends well.

    Raises:
        Failed: in one sentence, without the token.
        Refused: it would replace what others put there.
    """
    api, made = HfApi(), False
    try:
        name = api.whoami()["name"]
        # No permission check: with exist_ok it also succeeds for what may not be written. The commit will tell.
        if not (create_pr or api.repo_exists(repo)):
            if revision not in (None, "main"):
                raise Refused(
                    f"{repo} is not there, and so has no branch {revision!r}; push it without --revision first."
                )
            api.create_repo(repo, private=private, exist_ok=True)
            made = True
        info = api.model_info(repo)
        if private and not info.private:
            raise Refused(f"{repo} is public; make it private in its settings, or choose another name.")
        if same(api, repo, revision, files):
            return f"{repo} has these files already; nothing was sent."
        looked_at = api.model_info(repo, revision=revision)
        there = {s.rfilename for s in looked_at.siblings or []}
        foreign = changed_by_others(api, repo, revision, (there & files.keys()) - {SENT})
        if foreign and not (overwrite or create_pr):
            raise Refused(
                f"{repo} has {', '.join(foreign)} from somebody else, or changed since the last push; --overwrite "
                "replaces that, --create-pr proposes these files instead. Nothing was sent."
            )
        unsent = [f for f in there - files.keys() if f.startswith("report/") or f in BESIDE]
        stale = sorted(set(unsent) - set(changed_by_others(api, repo, revision, unsent)))
        operations = [CommitOperationAdd(f, path) for f, path in files.items()]
        operations += [CommitOperationDelete(f) for f in stale]
        if create_pr and (found := open_request(api, repo, files)):
            return f"{found} proposes these files already; nothing was sent."
        try:
            parent = None if create_pr else looked_at.sha  # what others push meanwhile is not replaced unseen
            told = {"commit_message": TITLE, "revision": revision, "create_pr": create_pr, "parent_commit": parent}
            done = api.create_commit(repo, operations, **told)
        except Exception:
            # The answer may be lost although the commit was made: what the repository holds decides.
            try:
                there = open_request(api, repo, files) if create_pr else same(api, repo, revision, files)
            except Exception:
                raise Failed(
                    f"The Hub broke off, and does not tell whether {repo} was changed; the same command finds out, and "
                    "finishes."
                ) from None
            if there:
                return f"sent to {there if create_pr else f'{api.endpoint}/{repo}'} (its answer was lost on the way)."
            raise
    except (Refused, Failed):
        raise
    except Exception as error:  # the Hub's clients raise errors of four libraries and of Python's own
        raise Failed(explain(error, repo, revision) + f" {repo} was made, and is empty." * made) from None
    at = done.pr_revision if create_pr else revision if revision != "main" else None
    url = done.pr_url if create_pr else f"{api.endpoint}/{repo}" + (f"/tree/{at}" if at else "")
    model = f"{repo}@{at}" if at else repo
    return f'sent to {url} as {name}; load it with timm.create_model("hf-hub:{model}", pretrained=True)'


def same(api: HfApi, repo: str, revision: str | None, files: Files) -> bool:
    """Whether a repository holds exactly these contents under these names."""
    try:
        found = {item.path: item for item in api.get_paths_info(repo, list(files), revision=revision)}
    except RepositoryNotFoundError:
        return False
    return all(
        name in found
        and (sha256(file) == found[name].lfs.sha256 if found[name].lfs else git_sha1(file) == found[name].blob_id)
        for name, file in files.items()
    )


def open_request(api: HfApi, repo: str, files: Files) -> str | None:
    """The pull request of ours that proposes exactly these files, if one is open."""
    for request in api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"):
        if request.title == TITLE and same(api, repo, request.git_reference, files):
            return request.url
    return None


def sha256(file: Path | bytes) -> str:
    """What the Hub calls a large file's content."""
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256_file(file)


def git_sha1(file: Path | bytes) -> str:
    """What git, and so the Hub, calls a small file's content."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def explain(error: Exception, repo: str, revision: str | None) -> str:
    """One sentence for what a client raised, without the token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    again = "Nothing was published; the same command tries again."
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set, so that nothing can be sent; unset it."
    elif isinstance(error, LocalTokenNotFoundError):
        text = "There is no token of the Hub; run `hf auth login`, or set HF_TOKEN."
    elif isinstance(error, RevisionNotFoundError):
        text = f"{repo} has no branch {revision!r}; make it first, or leave --revision out."
    elif isinstance(error, RepositoryNotFoundError):
        text = f"{repo} is not there, or your token may not see it."
    elif status == 401:
        text = "The Hub does not know your token; run `hf auth login` again, or set HF_TOKEN anew."
    elif status == 403:
        text = f"Your token may not write to {repo}; it needs the role write, and you a place in {repo.split('/')[0]}."
    elif status == 412:
        text = f"{repo} was changed by somebody else meanwhile. Nothing was published; the same command looks again."
    elif status is not None:
        text = f"The Hub answered with status {status}: {_first_line(error)} {again}"
    elif isinstance(error, ValueError) and isinstance(error.__cause__, HfHubHTTPError):
        text = f"The Hub refuses the card: {_first_line(error)}. Nothing was published."
    elif isinstance(error.__cause__, HfHubHTTPError):
        text = f"The Hub refused an upload with status {error.__cause__.response.status_code}. {again}"
    else:
        cause = error.__cause__ or error
        text = f"The Hub cannot be reached, or broke off ({type(cause).__name__}: {_first_line(cause)}). {again}"
    token = get_token()
    return text.replace(token, "***") if token else text


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
