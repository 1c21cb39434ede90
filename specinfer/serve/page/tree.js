// One step's token tree, drawn to the right: what was emitted runs straight along the top.

import { chance, h, s, shortName, visible } from "./dom.js";

const HEIGHT = 26;
const PITCH = 40;
const GAP = 28;
const PAD = 12;
const LONGEST = 20; // characters of a label
const SMALLEST = 0.72; // scale below which the tree scrolls instead

const ruler = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  ruler.font = "500 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
  return ruler.measureText(text).width;
}

/** What there is to draw of a step: its nodes with their state, the target's own token the last. */
function drawn(step) {
  const nodes = step.nodes.map((node, index) => ({
    ...node,
    state: index === 0 ? "root" : node.accepted ? "accepted" : "drafted",
  }));
  const last = step.emitted.at(-1);
  if (last?.source === "target") {
    const parent = nodes.findLastIndex((node) => node.accepted);
    const from = Math.max(0, parent);
    nodes.push({ ...last, parent: from, depth: nodes[from].depth + 1, slots: [], accepted: true, state: "target" });
  }
  return nodes;
}

/** Where each node stands: a node's first child in its own row, the others below. */
function layout(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, index) => index && children[node.parent].push(index));
  const isEmitted = (index) => ["accepted", "target"].includes(nodes[index].state);
  children.forEach((list) => list.sort((a, b) => isEmitted(b) - isEmitted(a)));
  const spots = nodes.map(() => ({ x: 0, row: 0 }));
  let numRows = 1;
  const visit = (index) => {
    const text = visible(nodes[index].token) || `#${nodes[index].token_id}`;
    const label = [...text].length > LONGEST ? `${[...text].slice(0, LONGEST - 1).join("")}…` : text;
    Object.assign(spots[index], { label, width: Math.max(28, textWidth(label) + 18) });
    children[index].forEach((child, rank) => {
      spots[child].x = spots[index].x + spots[index].width + GAP;
      spots[child].row = rank ? numRows++ : spots[index].row;
      visit(child);
    });
  };
  visit(0);
  const width = Math.max(...spots.map((spot) => spot.x + spot.width));
  return { spots, width: width + 2 * PAD, height: (numRows - 1) * PITCH + HEIGHT + 2 * PAD };
}

/** What a node is, in words. */
export function describe(node) {
  const words = {
    root: "the last committed token",
    accepted: "accepted",
    drafted: "drafted, not accepted",
    target: "the target’s own token",
  };
  const slots = node.slots.map((slot) => {
    const how = slot.q === 1 && slot.score !== null ? `picked, said ${chance(slot.score)}` : `q ${chance(slot.q)}`;
    return `${slot.source} ${how}`;
  });
  const p = node.state === "root" ? [] : [`p ${chance(node.p)}`];
  return [`“${node.token}”`, words[node.state], ...p, ...slots].join(", ");
}

export class TreeView {
  #nodes = [];
  #order = [];
  #focused = 0;

  /** sources: of `answer.js`; onLook: told of the node under the pointer or focus, null for none. */
  constructor(container, { sources, onLook }) {
    this.container = container;
    this.sources = sources;
    this.onLook = onLook;
    this.svg = null;
    this.container.append(
      h("p", { class: "empty" }, "Each step’s tree of guesses is drawn here while the answer is written."),
    );
    new ResizeObserver(() => this.#fit()).observe(container);
    container.addEventListener("pointerover", (event) => this.#look(event.target));
    container.addEventListener("pointerleave", () => this.onLook(null));
    container.addEventListener("focusin", (event) => this.#look(event.target));
    container.addEventListener("focusout", () => this.onLook(null));
    container.addEventListener("keydown", (event) => this.#move(event));
  }

  clear(words) {
    this.svg = null;
    this.#nodes = [];
    this.container.replaceChildren(h("p", { class: "empty" }, words));
  }

  show(step) {
    const hadFocus = this.container.contains(document.activeElement);
    this.#nodes = drawn(step);
    const { spots, width, height } = layout(this.#nodes);
    this.#focused = 0;
    this.#order = spots.map((_, index) => index).sort((a, b) => spots[a].row - spots[b].row || spots[a].x - spots[b].x);
    const label = `Token tree of step ${step.step}`;
    this.size = [width, height];
    this.svg = s(
      "svg",
      { role: "group", "aria-label": label, viewBox: `0 0 ${width} ${height}` },
      this.#nodes.map((node, index) => index && this.#edge(node, spots[node.parent], spots[index])).filter(Boolean),
      this.#nodes.map((node, index) => this.#chip(node, index, spots[index])),
    );
    this.container.replaceChildren(this.svg);
    this.#fit();
    if (hadFocus) this.#focus(0);
  }

  #edge(node, from, to) {
    const [x0, y0] = [PAD + from.x + from.width, PAD + from.row * PITCH + HEIGHT / 2];
    const [x1, y1] = [PAD + to.x, PAD + to.row * PITCH + HEIGHT / 2];
    const middle = x0 + GAP / 2;
    const path = `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`;
    return s("path", { class: `edge ${node.state} ${this.#style(node)}`, d: path });
  }

  #chip(node, index, { x, row, width, label }) {
    const [left, top] = [PAD + x, PAD + row * PITCH];
    const isDrafted = node.state !== "root";
    const bar = { y: top + HEIGHT + 3, x: left + 4, height: 3, rx: 1.5 };
    return s(
      "g",
      {
        class: `node ${node.state} ${this.#style(node)}`,
        "data-index": index,
        tabindex: index ? -1 : 0,
        role: "img",
        "aria-label": describe(node),
      },
      s("rect", { class: "hit", x: left - 3, y: top - 4, width: width + 6, height: HEIGHT + 14 }),
      s("rect", { class: "chip", x: left, y: top, width, height: HEIGHT, rx: 7 }),
      s("text", { x: left + width / 2, y: top + 17, "text-anchor": "middle" }, label),
      isDrafted ? s("rect", { class: "track", ...bar, width: width - 8 }) : null,
      isDrafted ? s("rect", { class: "share", ...bar, width: Math.max(0, (width - 8) * node.p) }) : null,
    );
  }

  #style(node) {
    return this.sources.style(node.state === "target" || !node.slots.length ? "target" : node.slots[0].source);
  }

  /** As large as it is, smaller where it would not fit, but never too small to read. */
  #fit() {
    if (!this.svg) return;
    const [width, height] = this.size;
    const scale = Math.max(SMALLEST, Math.min(1, (this.container.clientWidth - 2) / width));
    this.svg.setAttribute("width", width * scale);
    this.svg.setAttribute("height", height * scale);
  }

  #look(target) {
    const group = target.closest?.("g.node");
    this.onLook(group ? this.#nodes[Number(group.dataset.index)] : null);
  }

  #move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !this.svg) return;
    event.preventDefault();
    const place = this.#order.indexOf(this.#focused) + step;
    if (place >= 0 && place < this.#order.length) this.#focus(this.#order[place]);
  }

  #focus(index) {
    const group = (number) => this.svg.querySelector(`g.node[data-index="${number}"]`);
    group(this.#focused).setAttribute("tabindex", -1);
    this.#focused = index;
    group(index).setAttribute("tabindex", 0);
    group(index).focus();
  }
}

/** Everything about one node, or about a step where no node is looked at. */
export function detail(node, sources) {
  const bars = [];
  if (node.state !== "root") bars.push(bar("p", "target", node.p, "src-target", "how likely the target held it to be"));
  for (const slot of node.slots) {
    const isPick = slot.q === 1;
    const value = isPick ? slot.score : slot.q;
    const said = isPick ? "picked; how likely its drafter held it to be" : "the probability it was drawn with";
    const name = `${shortName(slot.source)}${isPick ? ", picked" : ""}`;
    bars.push(bar("q", name, value, sources.style(slot.source), said, slot.ratio));
  }
  const state = { root: "last committed", accepted: "accepted", drafted: "not accepted", target: "the target’s own" };
  return [
    h(
      "div",
      { class: "what" },
      h("code", {}, visible(node.token) || `#${node.token_id}`),
      h("span", { class: `state ${node.state}` }, state[node.state]),
      h("span", { class: "faint" }, `token ${node.token_id}, depth ${node.depth}`),
    ),
    h("div", { class: "bars" }, bars),
  ];
}

function bar(letter, name, value, style, title, ratio) {
  const meter = h("span", { class: "meter" }, h("span", { class: "level" }));
  meter.firstChild.style.width = `${100 * (value ?? 0)}%`;
  const chanceWords = ratio === null || ratio === undefined ? null : h("span", { class: "faint" }, `accept ${chance(ratio)}`);
  return h(
    "div",
    { class: `bar-row ${style}`, title },
    h("var", {}, letter),
    h("span", { class: "value" }, chance(value)),
    meter,
    h("span", { class: "name" }, name),
    chanceWords,
  );
}
