"""README.md says what is true: its examples run, its commands exist, its file map is complete."""

import ast
import pydoc
import re
from pathlib import Path

import numpy as np
import optional
import pytest

cli = optional.module("npllm.cli.commands")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
FILE_MAP = re.findall(
    r"^\| `([^`]+)` \|", README.split("## Where things are", 1)[1].split("\n## ", 1)[0], re.M
)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))


@pytest.mark.weights
def test_python_examples_run(default_model, capsys):
    """One after the other, as they are printed."""
    names = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    out = capsys.readouterr().out
    five_lines, _, rest = out.partition(" Paris\n Paris")
    assert rest and "Paris" in five_lines, "what the comment says is what is printed"
    assert out.count("Paris") >= 3
    assert (names["hidden"].shape, names["logits"].shape) == ((1, 5, 576), (1, 5, 49152)), (
        "the shapes in the comments"
    )
    assert names["weights"].shape == (9, 7, 7)
    assert names["model"].ops.rms_norm is names["my_rms_norm"]
    ids = np.array([default_model.tokenizer.encode("The capital of France is")])
    assert np.array_equal(names["model"](ids).argmax(-1), default_model(ids).argmax(-1))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    assert "npllm" in SHELL


def test_commands_of_the_readme_exist():
    """Wherever it stands: in the table, in the text, in a shell block; the table has all of them."""
    named = re.findall(r"^npllm ([a-z]+)|&& npllm ([a-z]+)|`npllm ([a-z]+)", README, re.M)
    named = {next(filter(None, groups)) for groups in named}
    table = set(re.findall(r"^\| `npllm ([a-z]+)", README, re.M))
    assert named <= set(cli.main.commands)
    assert table == set(cli.main.commands)


TOPICS = [
    "Pipeline",
    "Tokenizer and embedding",
    "Autoregression",
    "Forward pass",
    "Logits and distribution",
    "Module tree",
    "Decoding: greedy, temperature, top-k, top-p",
    "Parallel streams and context length",
    "KV cache",
    "Block",
    "Feed-forward network as memory",
    "Attention step by step",
    "Heads: every head of a layer",
    "Local and sparse attention, alternating with full",
    "MHA, GQA and MQA",
    "FlashAttention",
    "Pre-norm, RMSNorm and SwiGLU against post-norm, LayerNorm and ReLU",
    "Positions: RoPE as rotation matrices",
    "Packing",
    "Encoder-decoder",
    "Encoder-only models",
    "Other heads: language model, classifier, tagger",
]


def chapter_rows():
    """The rows of the table of the chapter: (cell of the topic, of the functions, of the command or
    example).
    """
    section = README.split("## The chapter, section by section", 1)[1].split("\n## ", 1)[0]
    return [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in section.splitlines()
        if line.startswith("| [")
    ]


def test_the_chapter_has_a_row_and_a_section_for_every_topic():
    """In the order of the page; each row links to its section, as its heading is written in a link."""
    page = (ROOT / "docs" / "chapter.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", page, re.M) == TOPICS
    links = [
        f"docs/chapter.md#{re.sub('[^a-z0-9 -]', '', topic.lower()).replace(' ', '-')}"
        for topic in TOPICS
    ]
    rows = chapter_rows()
    assert [topic for topic, _, _ in rows] == [
        f"[{topic}]({link})" for topic, link in zip(TOPICS, links, strict=True)
    ]
    assert {
        last
        for (_, _, last), link in zip(rows, links, strict=True)
        if "`" not in last and link not in last
    } == set()


def test_functions_of_the_chapter_exist_and_stand_in_their_section():
    sections = re.split(
        r"^## ", (ROOT / "docs" / "chapter.md").read_text(encoding="utf-8"), flags=re.M
    )[1:]
    for (topic, functions, _), section in zip(chapter_rows(), sections, strict=True):
        names = re.findall(r"`([\w.]+)`", functions)
        assert names, topic
        for name in names:
            assert callable(pydoc.locate(name)), name
            assert f"`{name}`" in section, f"{name} is not in the section of {topic}"


def test_commands_of_the_chapter_are_those_of_its_page():
    """There tests/test_docs.py runs them."""
    sections = re.split(
        r"^## ", (ROOT / "docs" / "chapter.md").read_text(encoding="utf-8"), flags=re.M
    )[1:]
    for (topic, _, last), section in zip(chapter_rows(), sections, strict=True):
        assert last.startswith("[") != ("```sh" in section), (
            f"{topic}: a command on the page is in the table"
        )
        for command in re.findall(r"`([^`]+)`", last):
            assert command in section.splitlines(), command


def test_options_of_the_readme_exist():
    """`-m` chooses a model everywhere, `--json` prints what a program can read, `-h` explains."""
    options = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in cli.main.commands.items()
    }
    assert {name for name, flags in options.items() if "-m" not in flags} == {
        "fetch",
        "list",
        "doctor",
        "masks",
        "diagnose",
        "probes",
        "check",
        "mutants",
    }
    assert {name for name, flags in options.items() if "--json" not in flags} == {
        "fetch",
        "chat",
        "masks",
        "serve",
    }


def test_file_map_names_what_exists():
    assert len(FILE_MAP) == len(set(FILE_MAP))
    for name in FILE_MAP:
        assert list(ROOT.glob(name)), f"{name} is in the file map and not in the repository"


def test_file_map_names_every_module():
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "npllm").rglob("*.py")}
    folders = tuple(name for name in FILE_MAP if name.endswith("/"))  # named as a whole
    assert {
        name
        for name in modules - set(FILE_MAP)
        if not name.endswith("__init__.py") and not name.startswith(folders)
    } == set()


# A set of operations is an Ops, which the package defines that offers the function.
def test_files_import_only_from_those_above():
    """As the file map says, also inside functions."""
    order = {name: at for at, name in enumerate(FILE_MAP)}
    wrong = []
    for name, at in order.items():
        if name.endswith(".py"):
            wrong += [
                f"{name} imports {other}"
                for other in imports(ROOT / name)
                if order.get(other, -1) >= at
            ]
    assert wrong == []


def imports(path):
    """Files of npllm that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: a relative import, which is not looked at here"
            )
            found = [
                file_of(f"{node.module}.{name.name}") or file_of(node.module) for name in node.names
            ]
        elif isinstance(node, ast.Import):
            found = [file_of(name.name) for name in node.names]
        else:
            found = []
        yield from filter(None, found)


def file_of(module):
    """The file of npllm that a module is; None for what is none of its modules."""
    file = module.replace(".", "/")
    return next(
        (
            f
            for f in (f"{file}.py", f"{file}/__init__.py")
            if f.startswith("npllm/") and (ROOT / f).is_file()
        ),
        None,
    )


def test_imports_are_seen_wherever_they_stand(tmp_path):
    (tmp_path / "a.py").write_text(
        "import npllm.cache, json\ndef f():\n    from npllm.ops import mask, softmax\n    import npllm.model as m\n"
    )
    assert sorted(imports(tmp_path / "a.py")) == [
        "npllm/cache/__init__.py",
        "npllm/model.py",
        "npllm/ops/__init__.py",
        "npllm/ops/mask/__init__.py",
    ]


def test_files_that_the_file_map_mentions_in_passing_exist():
    rows = re.findall(r"^\| `(scripts|tests)/` \| (.*) \|", README, re.M)
    for folder, text in rows:
        for name in re.findall(r"`([\w.]+(?:/|\.\w+))`", text):
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"


def test_links_and_scripts_of_the_readme_exist():
    paths = re.findall(r"python (scripts/\w+\.py)", README) + re.findall(
        r"\]\((?!http)([^)#]+)\)", README
    )
    for name in paths:
        assert (ROOT / name).exists(), name
