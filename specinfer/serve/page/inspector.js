// The right side: one step's tree, what is known of a node, the figures and charts of an answer.

import { stepMs } from "./answer.js";
import { RateChart, StepChart } from "./charts.js";
import { byId, h, short, shortName } from "./dom.js";
import { download, standalone, svgText, toPng } from "./files.js";
import { detail, TreeView } from "./tree.js";

const WAITING = "Each step’s tree of guesses is drawn here while the answer is written.";

export class Inspector {
  #frame = 0;

  /** onStep: told which step of which answer is shown. */
  constructor(sources, onStep) {
    this.sources = sources;
    this.onStep = onStep;
    this.answer = null;
    this.index = -1; // which step is shown
    this.follows = true; // the newest, as they come
    this.tree = new TreeView(byId("tree"), { sources, onLook: (node) => this.#look(node) });
    this.rates = new RateChart(byId("rate-chart"));
    this.counts = new StepChart(byId("accepted-chart"));
    byId("step").addEventListener("input", (event) => this.go(Number(event.target.value) - 1));
    byId("earlier").addEventListener("click", () => this.go(this.index - 1));
    byId("later").addEventListener("click", () => this.go(this.index + 1));
    byId("save-svg").addEventListener("click", () => this.#save("svg"));
    byId("save-png").addEventListener("click", () => this.#save("png"));
    this.clear();
  }

  clear() {
    this.answer = null;
    this.index = -1;
    this.tree.clear(WAITING);
    this.refresh();
  }

  /** Show an answer's newest step, and go on with those that come. */
  open(answer) {
    this.answer = answer;
    this.index = -1;
    this.follows = true;
    this.tree.clear(WAITING);
    this.refresh();
  }

  /** Show one step of an answer. */
  openAt(answer, step) {
    this.answer = answer;
    this.go(step);
  }

  go(index) {
    const last = (this.answer?.steps.length ?? 0) - 1;
    const wanted = Math.max(0, Math.min(last, index));
    if (last < 0 || (wanted === this.index && index !== last)) return;
    this.follows = wanted === last;
    this.index = wanted;
    this.#drawStep();
    this.refresh();
  }

  /** Draw what has changed, at most once per frame. */
  refresh() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  repaint() {
    this.rates.repaint();
    this.counts.repaint();
  }

  #draw() {
    this.#frame = 0;
    const last = (this.answer?.steps.length ?? 0) - 1;
    if (this.follows && last >= 0 && this.index !== last) {
      this.index = last;
      this.#drawStep();
    }
    this.#drawStepper(last);
    this.#drawFigures();
    if (this.answer) {
      this.rates.draw(this.answer);
      this.counts.draw(this.answer);
    } else {
      this.rates.show(null);
      this.counts.show(null);
    }
    this.#drawKeys();
  }

  get step() {
    return this.answer?.steps[this.index];
  }

  #drawStep() {
    this.tree.show(this.step);
    this.#look(null);
    this.onStep(this.answer, this.index);
  }

  #drawStepper(last) {
    const slider = byId("step");
    const isEmpty = last < 0;
    slider.max = Math.max(1, last + 1);
    slider.value = this.index + 1;
    slider.disabled = byId("save-svg").disabled = byId("save-png").disabled = isEmpty;
    byId("earlier").disabled = this.index <= 0;
    byId("later").disabled = this.index >= last;
    const words = isEmpty ? "no step yet" : `step ${this.index + 1} of ${last + 1}`;
    byId("step-words").textContent = words;
    slider.setAttribute("aria-valuetext", isEmpty ? words : `${words}: ${summary(this.step)}`);
    byId("legend").replaceChildren(...this.#legend());
    if (isEmpty) byId("detail").replaceChildren(...hint());
  }

  #legend() {
    const counts = this.answer?.counts() ?? [];
    return counts.map(([source, count]) =>
      h(
        "span",
        { class: `entry ${this.sources.style(source)}` },
        h("span", { class: "swatch", "aria-hidden": "true" }),
        source === "target" ? "target’s own" : shortName(source),
        h("b", {}, String(count)),
      ),
    );
  }

  #look(node) {
    if (!this.step) return;
    const parts = node ? detail(node, this.sources) : stepWords(this.step);
    byId("detail").replaceChildren(...parts);
  }

  #drawFigures() {
    const answer = this.answer;
    const isKnown = (answer?.decoding.length ?? 0) > 0;
    const measured = answer?.plain?.decoding.length ? answer.plain.rate : NaN;
    const against = Number.isNaN(measured) ? (answer?.plainRate ?? NaN) : measured;
    const how = Number.isNaN(measured) ? "plain decoding, estimated" : "plain decoding, measured";
    const tiles = [
      ["tokens per second", isKnown ? short(answer.rate) : "–", "Of the server’s own steps, without the prompt and the network"],
      [`× ${how}`, isKnown ? short(answer.rate / against) : "–", "This rate against the same steps without trees"],
      ["tokens per step", isKnown ? short(answer.tokensPerStep) : "–", "Plain decoding brings exactly 1"],
      [
        "drafts accepted",
        isKnown && answer.numDrafted ? `${Math.round((100 * answer.numAccepted) / answer.numDrafted)} %` : "–",
        "Of all drafted nodes; a tree that guesses widely accepts a smaller share, and more per step",
      ],
    ];
    byId("figures").replaceChildren(
      ...tiles.map(([name, value, title]) => h("div", { class: "tile", title }, h("b", {}, value), h("span", {}, name))),
      isKnown ? timeBar(answer) : "",
    );
  }

  #drawKeys() {
    const key = (style, words) => h("span", {}, h("i", { class: style, "aria-hidden": "true" }), words);
    const hasEstimate = this.answer?.decoding.some((step) => step.plain_ms !== null);
    byId("rate-key").replaceChildren(
      key("line", "this answer"),
      hasEstimate ? key("dashed", "plain, estimated") : "",
      this.answer?.plain ? key("ink", "plain, measured") : "",
    );
    byId("accepted-key").replaceChildren(key("block", "each step"), key("line", "mean"), key("dashed", "plain: 1"));
  }

  async #save(kind) {
    const { step } = this;
    const drawing = standalone(this.tree.svg, this.tree.size, `specinfer · step ${step.step}: ${summary(step)}`);
    const name = `tree-step-${step.step}.${kind}`;
    if (kind === "png") download(name, await toPng(drawing));
    else download(name, new Blob([svgText(drawing)], { type: "image/svg+xml" }));
  }
}

/** What came of a step, in words. */
export function summary(step) {
  const numDrafted = step.nodes.length - 1;
  const numAccepted = step.nodes.filter((node) => node.accepted).length;
  const tokens = `${step.emitted.length} token${step.emitted.length === 1 ? "" : "s"}`;
  return numDrafted ? `${numAccepted} of ${numDrafted} drafted tokens accepted, ${tokens} written` : `nothing drafted, ${tokens} written`;
}

function stepWords(step) {
  const times = [`${short(stepMs(step))} ms`];
  if (step.plain_ms !== null) times.push(`a plain step: ${short(step.plain_ms)} ms`);
  if (step.num_sequences > 1) times.push(`shared by ${step.num_sequences} texts`);
  return [h("div", { class: "what" }, summary(step)), h("div", { class: "faint" }, times.join(" · "))];
}

function hint() {
  const line = (letter, words) => h("div", { class: "bar-row" }, h("var", {}, letter), h("span", { class: "wide faint" }, words));
  return [
    h("div", { class: "what faint" }, "Look at a node for"),
    line("p", "how likely the target holds the token to be"),
    line("q", "how likely its drafter held it to be"),
  ];
}

const PARTS = [
  ["target", "target’s pass", ["target"]],
  ["draft", "drafters’ passes", ["draft"]],
  ["host", "everything else", ["schedule", "grow", "verify", "commit"]],
];

function timeBar(answer) {
  const shares = new Map(answer.timeShares());
  const parts = PARTS.map(([style, words, names]) => [style, words, names.reduce((sum, name) => sum + (shares.get(name) ?? 0), 0)]);
  const bar = h("div", { class: "shares", "aria-hidden": "true" }, parts.map(([style]) => h("span", { class: style })));
  parts.forEach(([, , share], index) => (bar.children[index].style.flexGrow = share));
  const words = parts.map(([style, name, share]) =>
    h("span", {}, h("i", { class: `block ${style}`, "aria-hidden": "true" }), `${name} ${Math.round(100 * share)} %`),
  );
  return h("div", { class: "tile wide" }, bar, h("div", { class: "key" }, words));
}
