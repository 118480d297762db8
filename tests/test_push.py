"""Pushing to a Hub that speaks the real one's API, with the real client: what is sent, and every failure."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import CommitOperationAdd, constants, hf_api

from tests.conftest import call, make_images
from training import backbone as B
from training import push
from training.recipe import Model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "hub"
    folder.mkdir()
    B.save(B.create(Model("test_resnet"), 16), folder, make_images())
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\nfirst card\n")
    (folder / "report").mkdir()
    (folder / "report" / "stages.png").write_bytes(b"\x89PNG picture")
    (folder / "optimizer.pt").write_bytes(b"pickled, and never sent")
    return folder.parent


def link(run):
    """hub/ of the same files, one of which lies elsewhere."""
    shutil.copytree(run / "elsewhere", run / "hub")
    (run / "hub" / "model.safetensors").unlink()
    (run / "hub" / "model.safetensors").symlink_to(run / "elsewhere" / "model.safetensors")


@pytest.fixture
def run(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(params=["lfs", "xet"])
def either(request, hub, monkeypatch, tmp_path):
    """A Hub that takes large files over LFS, or over Xet."""
    if request.param == "xet":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.xet = str(tmp_path / "cas")
    return hub


def state(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(run, hub):
    """What the Hub is to hold: files, and of one that lies in Xet's storage the sha256."""
    names = ("config.json", "model.safetensors", "README.md", "report/stages.png")
    files = {name: (run / "hub" / name).read_bytes() for name in names}
    if hub.xet:
        files["model.safetensors"] = hashlib.sha256(files["model.safetensors"]).hexdigest().encode()
    return files


def on_hub(hub, ref="main"):
    return {
        name: content
        for name, content in hub.files("org/net", ref).items()
        if name not in (".gitattributes", push.SENT)
    }


def test_a_run_is_pushed_whole_and_without_pickles(hub, run):
    before = state(run)
    done = call(push.main, run, "org/net")
    assert done.returncode == 0, done.stderr
    assert on_hub(hub) == sent(run, hub)
    assert 'timm.create_model("hf-hub:org/net", pretrained=True)' in done.stdout
    assert sum(" commit/" in f" {r}" or "/commit/" in r for r in hub.requests) == 1
    assert state(run) == before
    assert not hub.repos["org/net"].private


def test_pushing_again_sends_nothing_and_a_new_card_replaces_the_old(either, run):
    hub = either
    call(push.main, run, "org/net")
    again = call(push.main, run, "org/net")
    assert (again.returncode, "nothing was sent" in again.stdout) == (0, True)
    (run / "hub" / "README.md").write_text("second card")
    (run / "hub" / "report" / "stages.png").rename(run / "hub" / "report" / "other.png")
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub)["README.md"] == b"second card"
    assert {name for name in on_hub(hub) if name.startswith("report")} == {"report/other.png"}


def test_the_cards_lines_name_the_repository(hub, run):
    card = run / "hub" / "README.md"
    card.write_text('timm.create_model("hf-hub:ORG/NAME")')
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub)["README.md"] == b'timm.create_model("hf-hub:org/net")'
    assert "ORG/NAME" in card.read_text()
    assert "nothing was sent" in call(push.main, run, "org/net").stdout


def test_what_others_put_there_is_not_lost(hub, run):
    """A card that was edited on the Hub, and a picture that no push put there."""
    call(push.main, run, "org/net")
    edit = [CommitOperationAdd("README.md", b"edited by hand"), CommitOperationAdd("report/mine.png", b"mine")]
    hf_api.HfApi().create_commit("org/net", edit, commit_message="by hand")
    (run / "hub" / "README.md").write_text("second card")
    done = call(push.main, run, "org/net")
    assert (done.returncode, done.stderr.count("\n"), "README.md" in done.stderr, "--overwrite" in done.stderr) == (
        2, 1, True, True,
    )  # fmt: skip
    assert on_hub(hub)["README.md"] == b"edited by hand"
    assert call(push.main, run, "org/net", "--create-pr").returncode == 0
    assert on_hub(hub, "refs/pr/1")["README.md"] == b"second card"
    assert on_hub(hub)["README.md"] == b"edited by hand"
    assert call(push.main, run, "org/net", "--overwrite").returncode == 0
    assert on_hub(hub)["README.md"] == b"second card"
    assert on_hub(hub)["report/mine.png"] == b"mine"
    (run / "hub" / "README.md").write_text("third card")  # what a push left may be replaced
    assert call(push.main, run, "org/net").returncode == 0


def test_what_another_model_needs_no_more_leaves_and_what_the_last_push_told_may_be_damaged(hub, run):
    (run / "hub" / "recipe.yaml").write_text("of a run")
    call(push.main, run, "org/net")
    (run / "hub" / "recipe.yaml").unlink()  # as a classifier has none
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub) == sent(run, hub)
    for damage in (b"no JSON", b'{"README.md": 5}'):
        edit = [CommitOperationAdd(push.SENT, damage)]
        hf_api.HfApi().create_commit("org/net", edit, commit_message="damage")
        (run / "hub" / "README.md").write_text(f"card after {damage}")
        done = call(push.main, run, "org/net")
        assert (done.returncode, "README.md" in done.stderr, "--overwrite" in done.stderr) == (2, True, True)
        assert call(push.main, run, "org/net", "--overwrite").returncode == 0
        assert on_hub(hub) == sent(run, hub)


def test_without_a_network_by_choice_it_says_so(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = call(push.main, run, "org/net")
    assert (done.returncode, done.stderr.count("\n"), "HF_HUB_OFFLINE is set" in done.stderr) == (1, 1, True)


def test_what_others_push_meanwhile_is_not_replaced(hub, run, monkeypatch):
    call(push.main, run, "org/net")
    looked, edit = push.changed_by_others, [CommitOperationAdd("notes.txt", b"mine")]

    def meanwhile(api, repo, *rest):
        found = looked(api, repo, *rest)
        api.create_commit(repo, edit, commit_message="by hand") if edit else None
        edit.clear()
        return found

    monkeypatch.setattr(push, "changed_by_others", meanwhile)
    (run / "hub" / "README.md").write_text("new")
    done = call(push.main, run, "org/net")
    assert (done.returncode, "changed by somebody else meanwhile" in done.stderr) == (1, True)
    assert call(push.main, run, "org/net").returncode == 0
    assert (on_hub(hub)["README.md"], on_hub(hub)["notes.txt"]) == (b"new", b"mine")


def test_a_cards_code_loads_the_branch_that_it_is_on(hub, run):
    (run / "hub" / "README.md").write_text('"hf-hub:ORG/NAME" from_pretrained("ORG/NAME") pipeline("x", "ORG/NAME")')
    call(push.main, run, "org/net")
    hf_api.HfApi().create_branch("org/net", branch="dev")
    assert call(push.main, run, "org/net", "--revision", "dev").returncode == 0
    assert on_hub(hub, "dev")["README.md"] == (
        b'"hf-hub:org/net@dev" from_pretrained("org/net", revision="dev") pipeline("x", "org/net", revision="dev")'
    )


def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(hub, run):
    done = call(push.main, run, "org/net", "--dry-run")
    assert done.returncode == 0
    for name in sent(run, hub):
        assert name in done.stdout
    assert "optimizer.pt" not in done.stdout
    assert hub.requests == []


def test_private_repositories(hub, run):
    assert call(push.main, run, "org/net", "--private").returncode == 0
    assert hub.repos["org/net"].private
    call(push.main, run, "org/open")
    done = call(push.main, run, "org/open", "--private")
    assert (done.returncode, "is public" in done.stderr) == (2, True)


def test_a_branch_must_be_there(hub, run):
    call(push.main, run, "org/net")
    done = call(push.main, run, "org/net", "--revision", "v2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "org/net has no branch 'v2'" in done.stderr
    hf_api.HfApi().create_branch("org/net", branch="v2")
    (run / "hub" / "README.md").write_text("of v2")
    done = call(push.main, run, "org/net", "--revision", "v2")
    assert (done.returncode, '"hf-hub:org/net@v2"' in done.stdout, "org/net/tree/v2" in done.stdout) == (0, True, True)
    assert on_hub(hub, "v2")["README.md"] == b"of v2"
    assert on_hub(hub)["README.md"] != b"of v2"


def test_a_branch_of_a_repository_that_is_not_there_and_a_name_without_owner_make_nothing(hub, run):
    for arguments, said in ((["org/fresh", "--revision", "v2"], "org/fresh is not there"), (["net"], "ORG/NAME")):
        done = call(push.main, run, *arguments)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True)
    assert hub.repos == {}


def test_a_pull_request_by_a_reader_is_made_once(either, run, monkeypatch):
    hub = either
    call(push.main, run, "org/net")
    monkeypatch.setenv("HF_TOKEN", "read-bob")
    (run / "hub" / "README.md").write_text("bob's card")
    done = call(push.main, run, "org/net", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert "/discussions/1" in done.stdout
    assert '"hf-hub:org/net@refs/pr/1"' in done.stdout
    assert on_hub(hub, "refs/pr/1")["README.md"] == b"bob's card"
    assert on_hub(hub)["README.md"] != b"bob's card"
    again = call(push.main, run, "org/net", "--create-pr")
    assert (again.returncode, "proposes these files already" in again.stdout) == (0, True)
    assert len(hub.repos["org/net"].titles) == 1


def test_a_pull_request_of_what_is_there_already_is_not_made(hub, run):
    call(push.main, run, "org/net")
    done = call(push.main, run, "org/net", "--create-pr")
    assert (done.returncode, "nothing was sent" in done.stdout) == (0, True)
    assert hub.repos["org/net"].titles == []


def test_a_first_push_that_breaks_off_tells_of_the_empty_repository(hub, run):
    hub.fault("PUT /lfs", 403, 99)
    done = call(push.main, run, "org/net")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Nothing was published" in done.stderr
    assert "org/net was made, and is empty" in done.stderr
    assert on_hub(hub) == {}
    hub.faults.clear()
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub) == sent(run, hub)


@pytest.mark.parametrize("options", [[], ["--create-pr"]])
def test_a_hub_that_is_gone_for_good_after_a_commit_leaves_open_what_it_did(hub, run, options):
    call(push.main, run, "org/net")
    (run / "hub" / "README.md").write_text("new card")
    hub.fault("/commit/", "gone")
    done = call(push.main, run, "org/net", *options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "does not tell whether org/net was changed" in done.stderr
    assert on_hub(hub, "refs/pr/1" if options else "main")["README.md"] == b"new card"
    hub.faults.clear()
    assert "nothing was sent" in call(push.main, run, "org/net", *options).stdout


FAILURES = {
    "no token": (None, [], "There is no token"),
    "wrong token": ("of-nobody-known", [], "does not know your token"),
    "read-only token": ("read-bob", [], "may not write to org/net"),
    "server gone before": ("write-alice", [("whoami", "drop", 99)], "cannot be reached"),
    "upload breaks off": ("write-alice", [("PUT /lfs", "drop", 99)], "Nothing was published"),
    "upload refused": ("write-alice", [("PUT /lfs", 403, 99)], "Nothing was published"),
    "commit breaks off": ("write-alice", [("/commit/", "drop", 99)], "Nothing was published"),
    "commit fails": ("write-alice", [("/commit/", 500, 99)], "status 500"),
    "someone else committed": ("write-alice", [("/commit/", 412, 1)], "changed by somebody else meanwhile"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence_publishes_nothing_and_a_second_try_finishes(case, either, run, monkeypatch):
    hub = either
    token, faults, said = FAILURES[case]
    if hub.xet and any("lfs" in match for match, *_ in faults):
        pytest.skip("nothing is sent there")
    call(push.main, run, "org/net")
    published = on_hub(hub)
    (run / "hub" / "README.md").write_text("new card")
    config = json.loads((run / "hub" / "config.json").read_text())
    (run / "hub" / "config.json").write_text(json.dumps({**config, "more": 1}))
    weights = run / "hub" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    before = state(run)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for fault in faults:
        hub.fault(*fault)
    done = call(push.main, run, "org/net")
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert on_hub(hub) == published
    assert state(run) == before
    assert token is None or token not in done.stderr + done.stdout
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "write-alice")
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub) == sent(run, hub)


def test_a_repository_that_is_not_there_and_may_not_be_made(hub, run, monkeypatch):
    done = call(push.main, run, "other/net")
    assert (done.returncode, "may not write to other/net" in done.stderr) == (1, True)
    done = call(push.main, run, "org/none", "--create-pr")
    assert (done.returncode, "org/none is not there" in done.stderr) == (1, True)
    assert hub.repos == {}


@pytest.mark.parametrize("options", [[], ["--create-pr"]])
def test_a_lost_answer_to_a_commit_that_was_made_is_success(either, run, options):
    hub = either
    call(push.main, run, "org/net")
    (run / "hub" / "README.md").write_text("new card")
    hub.fault("/commit/", "lose", 1)
    done = call(push.main, run, "org/net", *options)
    assert done.returncode == 0, done.stderr
    assert "answer was lost" in done.stdout
    assert on_hub(hub, "refs/pr/1" if options else "main")["README.md"] == b"new card"
    assert len(hub.repos["org/net"].titles) == len(options)


def test_an_upload_that_breaks_off_once_is_repeated_by_the_client(hub, run):
    hub.fault("PUT /lfs", "drop", 1)
    assert call(push.main, run, "org/net").returncode == 0
    assert on_hub(hub) == sent(run, hub)


def test_the_same_files_arrive_with_xet_and_without(either, run, tmp_path):
    hub = either
    done = call(push.main, run, "org/net")
    assert done.returncode == 0, done.stderr
    assert on_hub(hub) == sent(run, hub)
    weights = (run / "hub" / "model.safetensors").stat().st_size
    stored = sum(path.stat().st_size for path in (tmp_path / "cas").rglob("*") if path.is_file())
    assert stored > weights / 2 if hub.xet else stored == 0
    assert any("PUT /lfs" in request for request in hub.requests) == (hub.xet is None)


def test_a_server_without_xet_is_one_sentence(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    done = call(push.main, run, "org/net")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be reached, or broke off" in done.stderr
    assert on_hub(hub) == {}


def test_a_card_that_the_hub_refuses_is_told_its_reason(hub, run):
    (run / "hub" / "README.md").write_text("---\nlicense: mine\n---\n")
    done = call(push.main, run, "org/net")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert 'refuses the card: Invalid metadata in README.md. - "license" must be one of' in done.stderr
    assert on_hub(hub) == {}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run), "error: there is no folder"),
        (lambda run: (run / "hub" / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda run: (run / "hub" / "model.safetensors").write_bytes(b"junk"), "is no safetensors file"),
        (lambda run: (run / "hub").rename(run / "elsewhere") and link(run), "is a link"),
        (lambda run: shutil.copytree(run / "hub", run / "seed_0" / "sslpp" / "hub"), "seed_0/sslpp"),
        (lambda run: (run / "hub" / "README.md").unlink(), "has no README.md"),
        (lambda run: (run / "hub" / "README.md").write_bytes(b"\xff"), "README.md is no text in UTF-8"),
        (lambda run: (run / "hub" / "config.json").write_text("{}"), "names no architecture"),
        (lambda run: (run / "hub" / "config.json").write_text("3"), "names no architecture"),
        (lambda run: (run / "hub" / "config.json").write_text('{"archi'), "names no architecture"),
        (lambda run: (run / "hub" / "config.json").write_text('{"architecture": "test_vit"}'), "timm cannot build"),
    ],
)
def test_a_folder_that_was_not_exported_is_refused(hub, run, spoil, said):
    spoil(run)
    done = call(push.main, run, "org/net")
    assert (done.returncode, said in done.stderr) == (2, True)
    assert hub.requests == []
