// The little of markdown that models write, as DOM nodes whose text keeps its place in the source:
// paragraphs, headings, lists, fenced and inline code, bold, italics. No links, no images, no HTML.

import { h } from "./dom.js";

/**
 * Draw text into an element, keeping blocks that have not changed since the last call.
 *
 * leaf  (start, end) → nodes for source characters start … end - 1
 */
export function render(element, text, leaf) {
  const old = element.blocks ?? [];
  const blocks = split(text).map((block, index) => {
    const before = old[index];
    const isSame = before && before.start === block.start && before.end === block.end && before.kind === block.kind;
    // The last two may still change their meaning: a fence that closes, a list that goes on.
    return isSame && index < old.length - 1 ? before : { ...block, node: draw(block, text, leaf) };
  });
  element.blocks = blocks;
  const nodes = blocks.map((block) => block.node);
  nodes.forEach((node, index) => {
    if (element.childNodes[index] !== node) element.insertBefore(node, element.childNodes[index] ?? null);
  });
  while (element.childNodes.length > nodes.length) element.lastChild.remove();
}

const FENCE = /^ {0,3}(```|~~~)/;
const HEADING = /^(#{1,6})\s+/;
const ITEM = /^\s{0,8}(?:[-*+]|\d{1,4}[.)])\s+/;

/** Blocks with their place: {kind, start, end, lines: [[start, end], …]}. */
function split(text) {
  const blocks = [];
  let open = null;
  let start = 0;
  while (start < text.length) {
    const stop = text.indexOf("\n", start);
    const end = stop < 0 ? text.length : stop;
    open = place(blocks, open, text.slice(start, end), [start, end]);
    start = end + 1;
  }
  return blocks;
}

/** Put a line into the open block or a new one; returns the block that is open now. */
function place(blocks, open, line, span) {
  const grow = (block) => {
    block.lines.push(span);
    block.end = span[1];
    return block;
  };
  const begin = (kind) => {
    blocks.push({ kind, start: span[0], end: span[1], lines: [span] });
    return blocks.at(-1);
  };
  const fence = FENCE.exec(line)?.[1];
  if (open?.kind === "code") {
    grow(open);
    if (fence !== open.fence || line.trim() !== fence) return open;
    open.isClosed = true;
    return null;
  }
  if (fence) return Object.assign(begin("code"), { fence });
  if (!line.trim()) return null;
  if (HEADING.test(line)) {
    begin("heading");
    return null;
  }
  const kind = ITEM.test(line) ? "list" : "text";
  return open && (open.kind === kind || open.kind === "list") ? grow(open) : begin(kind);
}

function draw(block, text, leaf) {
  if (block.kind === "code") {
    const lines = block.lines.slice(1, block.isClosed ? -1 : undefined);
    const code = lines.length ? leaf(lines[0][0], lines.at(-1)[1]) : [];
    return h("pre", { tabindex: "0" }, h("code", {}, code));
  }
  if (block.kind === "heading") {
    const [start, end] = block.lines[0];
    const marks = HEADING.exec(text.slice(start, end));
    const level = Math.min(6, marks[1].length + 2);
    return h(`h${level}`, {}, inline(text, start + marks[0].length, end, leaf));
  }
  if (block.kind === "list") return list(block, text, leaf);
  const lines = block.lines.map(([start, end], index) => [index ? h("br") : null, inline(text, start, end, leaf)]);
  return h("p", {}, lines.flat(2));
}

function list(block, text, leaf) {
  const items = [];
  for (const [start, end] of block.lines) {
    const mark = ITEM.exec(text.slice(start, end));
    if (mark || !items.length) items.push([[start + (mark?.[0].length ?? 0), end]]);
    else items.at(-1).push([start, end]);
  }
  const first = text.slice(...block.lines[0]).trim();
  const isOrdered = /^\d/.test(first);
  return h(
    isOrdered ? "ol" : "ul",
    { start: isOrdered ? parseInt(first, 10) : null },
    items.map((spans) =>
      h("li", {}, spans.flatMap(([start, end], index) => [index ? h("br") : null, ...inline(text, start, end, leaf)])),
    ),
  );
}

const MARKS = [
  { open: /^`([^`\n]+)`/, tag: "code", width: 1, isFlat: true },
  { open: /^\*\*(?=\S)([^\n]*?\S)\*\*/, tag: "strong", width: 2 },
  { open: /^\*(?=[^\s*])([^*\n]*?[^\s*])\*(?!\*)/, tag: "em", width: 1 },
];

/** Nodes for one line's characters. */
function inline(text, start, end, leaf) {
  const nodes = [];
  let plain = start;
  let at = start;
  const flush = () => {
    if (plain < at) nodes.push(...leaf(plain, at));
  };
  while (at < end) {
    const rest = "`*".includes(text[at]) ? text.slice(at, end) : "";
    const mark = rest && MARKS.find(({ open }) => open.test(rest));
    if (!mark) {
      at += 1;
      continue;
    }
    flush();
    const inner = at + mark.width;
    const close = inner + mark.open.exec(rest)[1].length;
    nodes.push(h(mark.tag, {}, mark.isFlat ? leaf(inner, close) : inline(text, inner, close, leaf)));
    at = plain = close + mark.width;
  }
  flush();
  return nodes;
}
