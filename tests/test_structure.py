"""docs/structure.md says a sentence about every file, and about no file that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def existing_files() -> set[str]:
    """Every Python and C++ file that holds something, every script, every file of the page."""
    python = [
        path for folder in ("specinfer", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    files = [path for path in python if path.stat().st_size > 0]
    files += (ROOT / "specinfer").rglob("*.cpp")
    files += (ROOT / "specinfer").rglob("*.h")
    for folder in ("scripts", "specinfer/serve/page"):  # what others wrote has a folder of its own
        files += [path for path in (ROOT / folder).iterdir() if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_structure_lists_exactly_the_files_there_are() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, flags=re.MULTILINE)
    names = [name for name, _ in listed]
    assert len(names) == len(set(names)), "a file is listed twice"
    assert existing_files() - set(names) == set(), "files without a sentence in docs/structure.md"
    assert set(names) - existing_files() == set(), "docs/structure.md lists files that are gone"
    assert all(len(sentence) > 10 for _, sentence in listed)


def test_the_pages_link_only_to_what_exists() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (
                f"{page.name} links to {target}"
            )
