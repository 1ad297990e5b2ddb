"""The package: quick to import, found from every folder, built and installed."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import npllm

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"numpy", "tokenizers", "safetensors", "numba", "jinja2", "click", "matplotlib", "cupy"}
HEAVY |= {"tqdm", "gguf", "huggingface_hub", "threadpoolctl", "hypothesis", "torch", "asyncio"}
PIP = [sys.executable, "-m", "pip"]


def loaded_after(statement):
    """Top-level modules that a statement imports, in a process of its own."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return set(out.stdout.split())


def test_nothing_heavy_is_imported_before_it_is_needed():
    assert HEAVY & loaded_after("import npllm") == set()
    assert HEAVY & loaded_after("import npllm; npllm.ops.softmax") <= {"numpy"}
    assert HEAVY & loaded_after("import npllm.cli") == set()


def test_every_public_name_is_there_and_the_same_each_time():
    for name in npllm.__all__:
        assert getattr(npllm, name) is getattr(npllm, name)
        assert name in dir(npllm)
    assert npllm.models.phi3.forward and npllm.analysis.score.score and npllm.arrays.to_numpy
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        npllm.lod  # noqa: B018


def test_the_names_that_are_imported_late_are_the_public_ones():
    modules = {"beam", "cost", "ops", "packing", "score", "steps"}
    assert set(npllm._PUBLIC) | modules == set(npllm.__all__)


def test_public_names_and_old_paths_lead_to_files():
    package = Path(npllm.__file__).parent
    moved = [new if isinstance(new, tuple) else (new,) for new in npllm._MOVED.values()]
    for path in {*npllm._PUBLIC.values(), *(path for new in moved for path in new)}:
        place = package / path.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), path
        assert path not in npllm._MOVED, path


@pytest.mark.parametrize("name", ["score", "cost", "steps", "packing"])
def test_modules_of_the_analysis_are_there_without_an_import_of_their_own(name):
    code = f"import npllm; print(npllm.analysis.{name}.__name__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == f"npllm.analysis.{name}", out.stderr


def test_python_m_npllm_is_the_command():
    out = subprocess.run(
        [sys.executable, "-m", "npllm", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0 and out.stdout.strip().endswith(npllm.__version__)


def test_a_name_that_is_nearly_right_is_suggested():
    for name in ("SmolLM2-135M-Instruct-", "smollm2-135m-instruc", "all-minilm-l6"):
        with pytest.raises(npllm.NpllmError, match=r"did you mean (smollm2|all-minilm)"):
            npllm.load(name)
    with pytest.raises(npllm.NpllmError) as caught:
        npllm.load("something/else")
    assert "did you mean" not in str(caught.value)


def test_the_ci_file_runs_what_ci_runs():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "- run: .ci/run" in text and (ROOT / ".ci" / "run").is_file()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m build" in script and "twine check --strict" in script


def test_the_citation_names_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {npllm.__version__}\n" in text and "\nlicense: Apache-2.0\n" in text


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_runs_from_another_folder(tmp_path):
    """Built without a network, unpacked, and imported with the checkout out of sight."""
    built = subprocess.run(
        [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "npllm").rglob("*.py")}
    assert sources <= names and "npllm/py.typed" in names
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import npllm; print(npllm.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == str(tmp_path / "site" / "npllm" / "__init__.py"), out.stderr


@pytest.mark.slow
def test_an_editable_install_is_found_beside_a_folder_of_its_name(tmp_path):
    """As after the README's commands, in the parent folder of a clone that is called npllm."""
    clone = tmp_path / "npllm"
    clone.mkdir()
    for name in ("npllm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (clone / name).symlink_to(ROOT / name)
    command = [*PIP, "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", tmp_path / "site", "-e", clone], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    paths = [p.read_text() for p in (tmp_path / "site").glob("*.pth")]
    assert any(str(clone) in text and "import" not in text for text in paths), paths


def test_no_text_names_the_package_of_an_index():
    """On PyPI, npllm is another project: what is installed comes from this folder."""
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for folder, pattern in (("docs", "**/*.md"), ("docs", "**/*.ipynb"), ("npllm", "**/*.py")):
        texts += (ROOT / folder).glob(pattern)
    named = re.compile(r"""pip install (-U |--upgrade )?[\\"']*npllm\b""")
    assert [x.name for x in texts if named.search(x.read_text("utf-8"))] == []
