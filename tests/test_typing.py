"""Types: a user's script is clean under mypy, and editors see every option of `generate`."""

import configparser
import inspect
from pathlib import Path

import pytest
import tiny
import typed_user_script

import npllm

api = pytest.importorskip("mypy.api", reason="mypy comes with the extra dev")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "typed_user_script.py"


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Run mypy on a file as a user does, who has no part of npllm's settings."""
    folder = tmp_path_factory.mktemp("mypy")
    settings = folder / "mypy.ini"
    settings.write_text(f"[mypy]\nmypy_path = {ROOT}\n")
    options = [
        "--disallow-untyped-defs",
        "--check-untyped-defs",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        f"--config-file={settings}",
        f"--cache-dir={folder / 'cache'}",
    ]

    def run(file):
        out, error, code = api.run([*options, str(file)])
        return code, out + error

    return run


@pytest.mark.slow
def test_a_users_script_is_clean(mypy):
    code, out = mypy(SCRIPT)
    assert code == 0, out


@pytest.mark.slow
def test_a_users_mistakes_are_found(mypy, tmp_path):
    """Each in a line of its own; a package without types would let all of them pass."""
    text = SCRIPT.read_text().replace("seed=1", 'seed="one"').replace("top_k=5", "topk=5")
    text = text.replace("n_cached: int", "n_cached: str")
    file = tmp_path / "script.py"
    file.write_text(text)
    code, out = mypy(file)
    assert code == 1
    for words in (
        '"seed" to "generate"',
        'keyword argument "topk"',
        '"int", variable has type "str"',
    ):
        assert words in out, out


def test_the_script_does_what_it_says(tmp_path):
    folder = tiny.write_folder(
        tmp_path, tokenizer=tiny.byte_level(), settings=tiny.SETTINGS, vocab_size=272
    )
    *shapes, status, text = typed_user_script.main(str(folder))
    assert shapes == ["(1, 7)", "(1, 1, 272)", "(1, 1, 272)", "(1, 4, 272)", "(3, 3)", "5"]
    assert status == "within" and isinstance(text, str)


def test_the_package_says_that_it_is_typed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.package_data"]["npllm"] == "py.typed"
    assert (ROOT / "npllm" / "py.typed").is_file()


@pytest.mark.parametrize("name", ["generate", "stream", "beam_search", "next_token_distribution"])
def test_editors_complete_every_option(name):
    parameters = inspect.signature(getattr(npllm.Model, name)).parameters.values()
    assert not [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    assert all(p.annotation is not p.empty for p in parameters if p.name != "self")


def test_stream_takes_what_generate_takes_for_one_prompt():
    generate, stream = (
        dict(inspect.signature(call).parameters)
        for call in (npllm.Model.generate, npllm.Model.stream)
    )
    for name in ("attention_mask", "return_dict_in_generate"):
        assert generate.pop(name)
    assert stream.pop("details") and generate == stream
