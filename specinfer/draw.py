"""A step's token tree as a picture: lines of text for a terminal, and SVG.

Trees grow to the right. What was emitted runs straight along the top; branches hang below it:

    ·the━·big┯·red━━[·dog]
             └·old──·dog

A drawing holds plain values, so that it outlives the step it was made from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from rich.cells import cell_len
from rich.text import Text

from specinfer.outputs import StepTree

State = Literal["root", "accepted", "drafted", "target"]

LEGEND = "━ accepted   ─ drafted, not accepted   [ ] the target's own token"


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """One token of the picture.

    parent   index into the step's nodes; -1 for the root
    state    "root" the last committed token | "accepted" and emitted | "drafted", not emitted
             | "target" the token that the target added
    sources  the drafters that proposed it
    chance   the verifier's min(1, M[x] / π[x]) where it looked at it, else None
    """

    token_id: int
    text: str
    parent: int
    depth: int
    state: State
    sources: tuple[str, ...] = ()
    chance: float | None = None

    @property
    def is_emitted(self) -> bool:
        """Whether this step wrote it."""
        return self.state in ("accepted", "target")


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """One step of one sequence: nodes, parents before children, the target's own last."""

    nodes: tuple[DrawnNode, ...]

    @property
    def num_drafted(self) -> int:
        """Drafted nodes."""
        return sum(node.state in ("accepted", "drafted") for node in self.nodes)

    @property
    def num_accepted(self) -> int:
        """Drafted nodes that were emitted."""
        return sum(node.state == "accepted" for node in self.nodes)

    @property
    def text(self) -> str:
        """What the step wrote, token by token: a character cut in two is not put together."""
        return "".join(node.text for node in self.nodes if node.is_emitted)

    @property
    def title(self) -> str:
        """What came of the drafting, in words."""
        if not self.num_drafted:
            return "nothing drafted, 1 token"
        num = sum(node.is_emitted for node in self.nodes)
        return f"{self.num_accepted} of {self.num_drafted} drafted tokens accepted, {num} " + (
            "token" if num == 1 else "tokens"
        )

    def children(self, node: int) -> list[int]:
        """The emitted one first, the others as they were drafted."""
        found = [index for index, each in enumerate(self.nodes) if each.parent == node]
        return sorted(found, key=lambda index: not self.nodes[index].is_emitted)


def read_step(step: StepTree, text_of: Callable[[int], str]) -> DrawnStep:
    """Take from a step what there is to draw.

    text_of  a token id's text
    """
    nodes = []
    for number, node in enumerate(step.nodes):
        looked_at = [slot.ratio for slot in node.slots if slot.ratio is not None]
        nodes.append(
            DrawnNode(
                token_id=node.token_id,
                text=text_of(node.token_id),
                parent=node.parent,
                depth=node.depth,
                state="root" if number == 0 else "accepted" if node.accepted else "drafted",
                sources=tuple(dict.fromkeys(slot.source for slot in node.slots)),
                chance=looked_at[-1] if looked_at else None,
            )
        )
    if step.emitted and step.emitted[-1].source == "target":  # else the text ended on the path
        token = step.emitted[-1].token_id
        last = max(number for number, node in enumerate(nodes) if node.state != "drafted")
        nodes.append(DrawnNode(token, text_of(token), last, nodes[last].depth + 1, "target"))
    return DrawnStep(tuple(nodes))


def visible(text: str) -> str:
    """A token's text with spaces and control characters that can be seen."""
    signs = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return "".join(
        signs.get(char, char if char.isprintable() else f"\\x{ord(char):02x}") for char in text
    )


def label(node: DrawnNode) -> str:
    """What stands at the node."""
    text = visible(node.text) or f"#{node.token_id}"
    return f"[{text}]" if node.state == "target" else text


def place(step: DrawnStep, gap: float, width_of: Callable[[str], float]) -> list[tuple[float, int]]:
    """Where each node starts: (x, row). A node's first child stands in its row, gap behind it."""
    spots = [(0.0, 0)] * len(step.nodes)
    num_rows = 0
    stack = [0]
    while stack:
        index = stack.pop()
        parent = step.nodes[index].parent
        children = step.children(index)
        if parent >= 0:
            x, row = spots[parent]
            is_first = step.children(parent)[0] == index
            num_rows += not is_first
            spots[index] = (
                x + width_of(label(step.nodes[parent])) + gap,
                row if is_first else num_rows,
            )
        stack.extend(reversed(children))
    return spots


# --- terminal -------------------------------------------------------------------------------------

_STYLES = {"root": "bold", "accepted": "bold green", "drafted": "dim", "target": "bold cyan"}


def to_text(step: DrawnStep, width: int | None = None) -> list[Text]:
    """The tree as lines for rich; print them with `no_wrap=True`.

    width   columns there are: what was emitted goes on below where they end; None: any number
    """
    first, *more = [_draw(piece) for piece in ([step] if width is None else _fold(step, width))]
    above, lines = first, list(first)
    for piece in more:
        above[0].append(" …", "dim")
        above = [Text("  ", "dim", no_wrap=True, overflow="ellipsis") for _ in piece]
        for line, rest in zip(above, piece, strict=True):
            line.append_text(rest)
        above[0].plain = "…" + above[0].plain[1:]
        lines += above
    return lines


def _fold(step: DrawnStep, width: int) -> list[DrawnStep]:
    """Pieces whose emitted paths fit: each begins with the last node of the one before."""
    spots = place(step, 3, lambda text: float(cell_len(text)))
    path = [index for index, node in enumerate(step.nodes) if index == 0 or node.is_emitted]
    ends = [spots[index][0] + cell_len(label(step.nodes[index])) for index in path]
    fitting = [index for index, end in zip(path[1:], ends[1:], strict=True) if end <= width - 4]
    if ends[-1] <= width - 2 or not fitting:
        return [step]
    cut = fitting[-1]
    below = {cut}
    for index in range(cut + 1, len(step.nodes)):
        if step.nodes[index].parent in below:
            below.add(index)
    above = [index for index in range(len(step.nodes)) if index == cut or index not in below]
    return [_part(step, above), *_fold(_part(step, sorted(below)), width)]


def _part(step: DrawnStep, kept: Sequence[int]) -> DrawnStep:
    """These nodes alone, the first of them the root."""
    number = {index: new for new, index in enumerate(kept)}
    nodes = (step.nodes[index] for index in kept)
    return DrawnStep(tuple(replace(node, parent=number.get(node.parent, -1)) for node in nodes))


def _draw(step: DrawnStep) -> list[Text]:
    spots = place(step, 3, lambda text: float(cell_len(text)))
    columns = [int(x) for x, _ in spots]
    rows = [row for _, row in spots]
    lines: list[dict[int, tuple[str, str]]] = [{} for _ in range(max(rows) + 1)]
    for index, node in enumerate(step.nodes):
        name = label(node)
        lines[rows[index]][columns[index]] = (name, _STYLES[node.state])
        children = step.children(index)
        if not children:
            continue
        middle = columns[index] + cell_len(name) + 1
        is_heavy = step.nodes[children[0]].is_emitted
        if len(children) == 1:
            joint = "━━━" if is_heavy else "───"
        else:
            joint = "━┯━" if is_heavy else "─┬─"
        lines[rows[index]][middle - 1] = (joint, "green" if is_heavy else "dim")
        last = rows[children[-1]]
        for row in range(rows[index] + 1, last + 1):
            lines[row][middle] = ("│", "dim")
        for child in children[1:]:
            lines[rows[child]][middle] = ("└─" if rows[child] == last else "├─", "dim")
    return [_join(line) for line in lines]


def _join(line: dict[int, tuple[str, str]]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for column in sorted(line):
        text.append(" " * (column - text.cell_len))
        text.append(*line[column])
    return text


# --- SVG ------------------------------------------------------------------------------------------

_CHAR, _HEIGHT, _PITCH, _GAP, _PAD = 7.6, 24, 32, 30, 24
_CSS = """
text { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.page { fill: #ffffff } .title { fill: #1f2328; font-weight: bold } .note { fill: #656d76 }
rect.root { fill: #eaeef2; stroke: #8c959f } rect.accepted { fill: #dafbe1; stroke: #1a7f37 }
rect.drafted { fill: none; stroke: #d0d7de } rect.target { fill: #ddf4ff; stroke: #0969da }
text.root { fill: #1f2328 } text.accepted { fill: #116329 }
text.drafted { fill: #6e7781 } text.target { fill: #0550ae }
path { fill: none; stroke: #d0d7de; stroke-width: 1.25 }
path.accepted { stroke: #1a7f37; stroke-width: 2.5 }
path.target { stroke: #0969da; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } .title { fill: #e6edf3 } .note { fill: #8d96a0 }
rect.root { fill: #21262d; stroke: #6e7681 } rect.accepted { fill: #12361f; stroke: #3fb950 }
rect.drafted { stroke: #3d444d } rect.target { fill: #0c2d6b; stroke: #58a6ff }
text.root { fill: #e6edf3 } text.accepted { fill: #7ee787 }
text.drafted { fill: #8b949e } text.target { fill: #a5d6ff }
path { stroke: #3d444d } path.accepted { stroke: #3fb950 } path.target { stroke: #58a6ff }
}
"""


def to_svg(steps: Sequence[DrawnStep], title: str) -> str:
    """All steps one below the other, as one self-contained picture for light and dark pages."""
    parts: list[str] = []
    title = _one_line(title)
    width, y = _text_width(title), _PAD + 12.0
    parts.append(f'<text class="title" x="{_PAD}" y="{y:g}">{_xml(title)}</text>')
    for number, step in enumerate(steps, start=1):
        y += 36
        head = f"step {number}: {step.title}"
        parts.append(f'<text class="note" x="{_PAD}" y="{y:g}">{_xml(head)}</text>')
        y += 12
        drawn, step_width, step_height = _svg_step(step, y)
        parts += drawn
        width = max(width, step_width, _text_width(head))
        y += step_height
    y += 28
    parts.append(_svg_legend(y))
    width, height = max(width, 520) + 2 * _PAD, y + _HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">\n'
        f"<title>{_xml(title)}</title>\n"
        f'<style>{_CSS}</style>\n<rect class="page" width="100%" height="100%"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _svg_step(step: DrawnStep, top: float) -> tuple[list[str], float, float]:
    """Its elements, and how wide and high they are."""
    spots = place(step, _GAP, _box_width)
    paths, boxes, right = [], [], 0.0
    for node, (x, row) in zip(step.nodes, spots, strict=True):
        y = top + row * _PITCH
        wide = _box_width(label(node))
        right = max(right, x + wide)
        boxes.append(_svg_box(node, x + _PAD, y, wide))
        if node.parent >= 0:
            px, prow = spots[node.parent]
            start = px + _box_width(label(step.nodes[node.parent])) + _PAD
            paths.append(_svg_edge(node.state, start, top + prow * _PITCH, x + _PAD, y))
    return paths + boxes, right, (max(row for _, row in spots)) * _PITCH + _HEIGHT


def _svg_edge(state: State, x0: float, y0: float, x1: float, y1: float) -> str:
    y0, y1, middle = y0 + _HEIGHT / 2, y1 + _HEIGHT / 2, (x0 + x1) / 2
    return (
        f'<path class="{state}" d="M{x0:.1f} {y0:g} C{middle:.1f} {y0:g} {middle:.1f} {y1:g} '
        f'{x1:.1f} {y1:g}"/>'
    )


def _svg_box(node: DrawnNode, x: float, y: float, wide: float) -> str:
    name = label(node)
    return (
        f"<g><title>{_xml(_describe(node))}</title>"
        f'<rect class="{node.state}" x="{x:.1f}" y="{y:g}" width="{wide:.1f}" '
        f'height="{_HEIGHT}" rx="6"/><text class="{node.state}" '
        f'x="{x + (wide - _text_width(name)) / 2:.1f}" y="{y + 16:g}" '
        f'textLength="{_text_width(name):.1f}" lengthAdjust="spacingAndGlyphs">'
        f"{_xml(name)}</text></g>"
    )


def _svg_legend(y: float) -> str:
    entries = (("accepted", "accepted", 0), ("drafted", "drafted, not accepted", 105))
    words = [*entries, ("target", "the target's own token", 310)]
    return "".join(
        f'<rect class="{state}" x="{_PAD + x}" y="{y - 11:g}" width="14" height="14" rx="4"/>'
        f'<text class="note" x="{_PAD + x + 20}" y="{y:g}">{_xml(text)}</text>'
        for state, text, x in words
    )


def _describe(node: DrawnNode) -> str:
    """What the picture says of a node under the pointer."""
    if node.state == "root":
        return f"token {node.token_id}: the last committed token"
    if node.state == "target":
        return f"token {node.token_id}: the target's own"
    chance = "" if node.chance is None else f", accepted with chance {node.chance:.2f}"
    return f"token {node.token_id}, depth {node.depth}, from {', '.join(node.sources)}{chance}"


def _one_line(title: str, limit: int = 100) -> str:
    """On one line, of bearable length, without what XML does not allow."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(title.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _text_width(text: str) -> float:
    return _CHAR * cell_len(text)


def _box_width(text: str) -> float:
    return max(_text_width(text) + 14, 24.0)


def _xml(text: str) -> str:
    return escape(text, quote=True)
