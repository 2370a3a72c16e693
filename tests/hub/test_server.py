"""The tests' Hub does what ``huggingface_hub`` expects of the real one."""

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SMALL, LARGE = b"small", b"\0large\1" * 100


@pytest.fixture
def api(hub):  # noqa: ARG001
    api = HfApi()
    api.create_repo("me/x")
    return api


def _add(path, content):
    return CommitOperationAdd(path, content)


def _read(path, **options):
    with open(huggingface_hub.hf_hub_download("me/x", path, **options), "rb") as file:
        return file.read()


def test_files_come_back_as_they_were(hub, api):
    done = api.create_commit(
        "me/x",
        [_add("a.txt", SMALL), _add("sub/b.safetensors", LARGE)],
        commit_message="both",
    )
    assert _read("a.txt") == SMALL
    assert _read("b.safetensors", subfolder="sub") == LARGE
    assert _read("sub/b.safetensors", revision=done.oid) == LARGE
    assert set(api.list_repo_files("me/x")) == {".gitattributes", "a.txt", "sub/b.safetensors"}
    assert api.model_info("me/x").sha == done.oid
    assert api.get_paths_info("me/x", ["sub/b.safetensors"])[0].lfs.size == len(LARGE)
    assert [size for _, size in hub.uploaded] == [len(LARGE), len(SMALL)]
    assert [commit.title for commit in api.list_repo_commits("me/x")] == ["both", "initial commit"]


def test_known_content_is_not_uploaded_again(hub, api):
    api.create_commit("me/x", [_add("a.safetensors", LARGE)], commit_message="1")
    api.create_commit("me/x", [_add("b.safetensors", LARGE)], commit_message="2")
    copied = CommitOperationCopy("a.safetensors", "c.safetensors")
    gone = CommitOperationDelete("a.safetensors")
    api.create_commit("me/x", [copied, gone], commit_message="3")
    assert len(hub.uploaded) == 1
    assert _read("c.safetensors") == LARGE
    with pytest.raises(EntryNotFoundError):
        _read("a.safetensors")


def test_branches_tags_and_pull_requests(api):
    api.create_tag("me/x", tag="first")
    api.create_branch("me/x", branch="next")
    api.create_commit("me/x", [_add("a", SMALL)], commit_message="a", revision="next")
    done = api.create_commit("me/x", [_add("b", SMALL)], commit_message="b", create_pr=True)
    assert done.pr_revision == "refs/pr/1"
    assert _read("a", revision="next") == _read("b", revision="refs/pr/1") == SMALL
    for revision in (None, "first"):
        with pytest.raises(EntryNotFoundError):
            _read("a", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        _read("a", revision="last")


def test_who_may_do_what(api):
    api.create_repo("me/y", private=True)
    stranger = HfApi(token="hf_of_you")
    assert stranger.whoami()["name"] == "you"
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("me/y")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/y")
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_commit("me/x", [_add("a", SMALL)], commit_message="a")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info("me/x")
    stranger.create_commit("me/x", [_add("a", SMALL)], commit_message="a", create_pr=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/x")


def test_a_commit_on_an_older_state_is_refused(api):
    parent = api.model_info("me/x").sha
    api.create_commit("me/x", [_add("a", SMALL)], commit_message="1", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/x", [_add("a", b"")], commit_message="2", parent_commit=parent)


def test_an_upload_that_breaks_off_can_be_repeated(hub, api):
    hub.failing = 1
    api.create_commit("me/x", [_add("a.safetensors", LARGE)], commit_message="1")
    assert len(hub.uploaded) == 2
    assert _read("a.safetensors") == LARGE
