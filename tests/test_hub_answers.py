"""Whatever answers in place of the hub: an NpllmError, nothing outside the partial folder, nothing
large.  The stub of the hub is that of test_fetch.
"""
# ruff: noqa: ARG001, F811 - fixtures are asked for by their names

import copy
import re
import tracemalloc

import pytest
from test_fetch import (  # noqa: F401
    CHECKPOINT,
    COMMIT,
    SHARD,
    Handler,
    contents,
    get,
    hub,
    server,
    visible,
    weights,
)

from npllm.checkpoints import hub_listing
from npllm.checkpoints.fetch import fetch, find_checkpoint
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

NOT_THE_HUB = "owner/name: what answered is not the hub"


def answer(hub, change):
    """Let the hub describe the repository otherwise."""
    listing = copy.deepcopy(hub.listing())
    change(listing)
    hub.listing = lambda: listing


def entry(listing, name=SHARD):
    return next(e for e in listing["siblings"] if e["rfilename"] == name)


@pytest.mark.parametrize(
    "sha",
    [
        "/../../x",
        "../../victim",
        "..",
        "",
        "main",
        COMMIT[:39],
        COMMIT + "0",
        COMMIT.upper(),
        COMMIT + "\n",
        "\x1b[31m" + COMMIT,
        None,
        5,
        [COMMIT],
        {"a": 1},
        ...,
    ],
    ids=repr,
)
def test_a_commit_that_is_no_hash_writes_nothing(hub, weights, sha):
    victim = weights.parent / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("mine")
    answer(hub, lambda x: x.pop("sha") if sha is ... else x.update(sha=sha))
    with pytest.raises(NpllmOSError, match=NOT_THE_HUB) as caught:
        get()
    assert str(caught.value).isprintable()
    assert visible(weights) == []
    assert contents(victim) == {"config.json": b"mine"}
    assert not hub.asked_for()


CHANGES = {
    "no siblings": lambda x: x.pop("siblings"),
    "null siblings": lambda x: x.update(siblings=None),
    "siblings by name": lambda x: x.update(siblings={"a": 1}),
    "a sibling of null": lambda x: x["siblings"].append(None),
    "a sibling of text": lambda x: x["siblings"].append("config.json"),
    "no name": lambda x: entry(x).pop("rfilename"),
    "a null name": lambda x: entry(x).update(rfilename=None),
    "a name of a number": lambda x: entry(x).update(rfilename=5),
    "no size": lambda x: entry(x).pop("size"),
    "a null size": lambda x: entry(x).update(size=None),
    "a negative size": lambda x: entry(x).update(size=-1),
    "a size of text": lambda x: entry(x).update(size="256000"),
    "a fractional size": lambda x: entry(x).update(size=0.5),
    "a size of true": lambda x: entry(x).update(size=True),
    "a huge size": lambda x: entry(x).update(size=2**70),
    "no hash": lambda x: [entry(x).pop("lfs"), entry(x).pop("blobId")],
    "a null hash": lambda x: entry(x)["lfs"].update(sha256=None),
    "no sha256": lambda x: entry(x)["lfs"].pop("sha256"),
    "a short hash": lambda x: entry(x)["lfs"].update(sha256="ab"),
    "a hash that leads away": lambda x: entry(x)["lfs"].update(sha256="../" * 20),
    "lfs of text": lambda x: entry(x).update(lfs="ab"),
    "lfs of true": lambda x: entry(x).update(lfs=True),
    "a null blob": lambda x: entry(x, "config.json").update(blobId=None),
    "a blob of a number": lambda x: entry(x, "config.json").update(blobId=7),
    "a file twice": lambda x: x["siblings"].append(dict(entry(x))),
    "a file in two cases": lambda x: x["siblings"].append(
        entry(x, "config.json") | {"rfilename": "CONFIG.json"}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_listing_that_cannot_be(hub, weights, change):
    answer(hub, change)
    with pytest.raises(NpllmOSError, match=NOT_THE_HUB):
        get()
    assert visible(weights) == []
    assert not hub.asked_for()


def test_fields_of_files_that_are_not_wanted_do_not_matter(hub):
    answer(hub, lambda x: entry(x, "README.md").update(size=None, blobId=None))
    answer(hub, lambda x: x.update(lastModified=5, tags=None, cardData=[], novelty={}))
    assert contents(get()) == CHECKPOINT


def test_an_empty_file_is_a_file(hub):
    hub.files = hub.files | {"added_tokens.json": b""}
    assert contents(get()) == CHECKPOINT | {"added_tokens.json": b""}


def send(monkeypatch, content, status=200, headers=None):
    """Let the hub answer with other bytes when it is asked for the listing."""

    def respond(self):
        if "/api/" in self.path:
            return self.answer(status, content, {"Content-Type": "text/html"} | (headers or {}))
        return do_get(self)

    do_get = Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", respond)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"{}",
        b"<html>log in</html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"sha": NaN}',
        b'{"sha": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"sha": ' + b"9" * 10_000 + b"}",
        b'{"siblings": [{"rfilename": "\\ud800"}]}',
    ],
    ids=lambda content: content[:20].decode("latin-1"),
)
def test_an_answer_that_is_no_listing(hub, weights, monkeypatch, content):
    send(monkeypatch, content)
    with pytest.raises(NpllmOSError, match=NOT_THE_HUB) as caught:
        get()
    assert str(caught.value).isprintable()
    assert visible(weights) == []


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"errors": 5}', b'{"error": {}}', b"\xff"])
@pytest.mark.parametrize("status", [400, 404, 418, 500, 503])
def test_bodies_of_refusals_are_not_read(hub, monkeypatch, content, status):
    send(monkeypatch, content, status)
    with pytest.raises(NpllmOSError, match=f"HTTP status {status}: try again later"):
        get()


def test_a_listing_without_end_is_cut_off(hub, monkeypatch):
    monkeypatch.setattr(hub_listing, "LARGEST_JSON", 1000)
    send(monkeypatch, b'{"a": "' + b"x" * 100_000)
    with pytest.raises(NpllmOSError, match="the hub's answer has more than 1000 bytes"):
        get()


def test_redirections_without_end(hub, monkeypatch):
    send(monkeypatch, b"", 302, {"Location": "/api/models/owner/name"})
    with pytest.raises(NpllmOSError, match="the hub cannot be reached"):
        get()


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://", "//[", "ftp://x", "a\\b:c"])
def test_redirections_to_nowhere(hub, weights, monkeypatch, place):
    send(monkeypatch, b"", 302, {"Location": place})
    with pytest.raises(NpllmOSError):
        get()
    assert visible(weights) == []


# --- bodies


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_body_longer_than_announced_is_cut_off(hub, weights, name):
    hub.served[name] = hub.files[name] + b"x" * 2**24
    tracemalloc.start()
    with pytest.raises(
        NpllmOSError, match=f"{name}: the hub sends more than the {len(hub.files[name]):,} bytes"
    ):
        get()
    tracemalloc.stop()
    left = contents(weights / f"owner--name.partial-{COMMIT[:12]}")
    assert all(
        len(data) <= len(CHECKPOINT[file.removesuffix(".part")]) for file, data in left.items()
    )
    assert find_checkpoint("owner/name") is None
    hub.served.clear()
    assert contents(get()) == CHECKPOINT


def test_a_longer_rest_is_cut_off_as_well(hub):
    hub.drops[SHARD] = [100_000]
    hub.served[SHARD] = hub.files[SHARD] + b"x"
    with pytest.raises(NpllmOSError, match="the hub sends more than the 256,000 bytes"):
        get()


# --- names and tokens


@pytest.mark.parametrize("token", ["hf_ü", "hf x", "hf\nx", "", "\x1b"])
def test_a_token_that_no_header_can_hold_is_not_shown(hub, token):
    with pytest.raises(NpllmValueError, match="visible ASCII characters") as caught:
        get(token=token)
    assert not token or token not in str(caught.value)
    assert not hub.requests


def test_a_long_name_is_asked_for(hub):
    with pytest.raises(NpllmOSError, match="is not on the hub, or is private"):
        fetch("owner/" + "n" * 110, progress=False)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://[", "ftp://x", "http://\x01"])
def test_an_endpoint_that_is_none(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(NpllmError, match=r"(HF_ENDPOINT must be|the hub cannot be reached)"):
        get()


def test_a_mirror_below_a_path(hub, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    assert contents(get()) == CHECKPOINT
    assert all(re.match("/(api|owner|cdn)/", path) for _, path, _, _ in hub.requests)
