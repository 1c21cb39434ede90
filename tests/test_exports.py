"""The public names: exactly these, found on first use; `import specinfer` costs nothing."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specinfer
from specinfer import errors

ROOT = Path(__file__).parent.parent
ERRORS = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.SpecInferError)
}
PUBLIC = {
    *("LLM", "AsyncLLM", "SamplingParams", "Speculation"),
    *("RequestOutput", "CompletionOutput", "RequestStats", "Logprob", "StructuredOutputsParams"),
    *ERRORS,
}


def test_all_names_them() -> None:
    assert set(specinfer.__all__) == PUBLIC
    assert set(dir(specinfer)) > PUBLIC
    assert list(specinfer.__all__) == sorted(specinfer.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_can_be_imported(name: str) -> None:
    value = getattr(specinfer, name)
    assert value.__name__ == name
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = specinfer.nothing_like_it


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "tokenizers", "jinja2", "typer", "rich")
    code = f"import sys, specinfer; print(*[name for name in {heavy} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.split() == []


def test_the_first_token_needs_no_compiler_and_no_transformers() -> None:
    """Each takes longer to import than the bundled pair to load and to begin."""
    heavy = ("transformers", "torch._dynamo", "torch._inductor", "sympy", "triton", "fastapi")
    code = (
        "import sys; from specinfer import LLM; "
        "llm = LLM('zoo:parley', drafters='zoo:parley-draft', max_model_len=64); "
        "next(llm.stream('Once upon a time')); "
        f"print(*[name for name in {heavy} if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.split() == []


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]
    assert specinfer.__version__.count(".") == 2
    assert specinfer.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_wheel_names_both_licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0 AND CC-BY-SA-4.0"
    assert all((ROOT / name).is_file() for name in project["license-files"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository: nothing is ignored")
def test_the_wheel_has_all_files_of_the_package() -> None:
    """Hatch leaves out what pyproject.toml excludes and .gitignore names, tracked or not."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    build = tool["hatch"]["build"]
    assert build.keys() == {"targets"}
    assert build["targets"]["wheel"] == {"packages": ["specinfer"]}
    files = [each for each in (ROOT / "specinfer").rglob("*") if each.is_file()]
    files = [each for each in files if "__pycache__" not in each.parts]
    needed = {
        ".py",
        ".typed",
        ".cpp",
        ".h",
        ".json",
        ".safetensors",
        ".html",
        ".css",
        ".js",
        ".svg",
    }
    assert needed <= {each.suffix for each in files}
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(map(str, files)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ignored.returncode == 1, ignored.stdout + ignored.stderr
