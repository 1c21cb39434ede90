"""How tests/data was selected: deterministic, from the full sets named in tests/data/SOURCES.md.

    python scripts/make_test_data.py --source DIR

DIR holds chat_test.jsonl.xz (`{"source", "messages"}` a line, disjoint from the training set of the
bundled pair) and prompts/*.jsonl. Nothing else needs this script: its output is in the repository.
"""

import argparse
import json
import lzma
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
PER_SOURCE = 60
PER_PROMPT_FILE = 40


def select_conversations(lines: list[str]) -> list[dict[str, Any]]:
    """The first 60 of each source with distinct first turns, dealt out source by source."""
    by_source: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        row = json.loads(line)
        by_source[row["source"]].setdefault(row["messages"][0]["content"], row)
    columns = [list(by_source[source].values())[:PER_SOURCE] for source in sorted(by_source)]
    return [row for deal in zip_longest(*columns) for row in deal if row is not None]


def select_prompts(lines: list[str]) -> list[dict[str, Any]]:
    """The first 40; where there are categories, dealt out category by category."""
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        by_category[row.get("category", "")].append(row)
    deals = zip_longest(*by_category.values())
    return [row for deal in deals for row in deal if row is not None][:PER_PROMPT_FILE]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(DATA)}: {len(rows)} lines, {len(text.encode())} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    source: Path = parser.parse_args().source
    with lzma.open(source / "chat_test.jsonl.xz", "rt", encoding="utf-8") as file:
        write(DATA / "conversations.jsonl", select_conversations(list(file)))
    for path in sorted((source / "prompts").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        write(DATA / "prompts" / path.name, select_prompts(lines))


if __name__ == "__main__":
    main()
