// The conversation as it is seen: messages, tokens coloured by who proposed them, errors.

import { byId, h, short } from "./dom.js";
import { render } from "./markdown.js";

const messages = () => byId("messages");

/** Keep the end in sight, unless the reader has scrolled up. */
export function keepingEnd(act) {
  const box = messages();
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  act();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

export function clearMessages(...content) {
  messages().replaceChildren(...content);
}

export function addUser(text) {
  const body = h("div", { class: "body plain-text" }, text);
  keepingEnd(() => messages().append(h("article", { class: "message user", "aria-label": "You" }, body)));
  messages().scrollTop = messages().scrollHeight;
}

/** An error as a message; actions: [words, function] each. */
export function errorBox(error, actions = []) {
  return h(
    "div",
    { class: "error", role: "alert" },
    h("strong", {}, error.title ?? "This page failed"),
    error.status ? h("span", { class: "faint" }, ` ${error.status}`) : null,
    h("p", {}, error.detail ?? String(error.message ?? error)),
    actions.length
      ? h("div", { class: "actions small" }, actions.map(([words, act]) => h("button", { type: "button", onclick: act }, words)))
      : null,
  );
}

export class AnswerView {
  #frame = 0;

  /** on: {look(step), again(), compare(), restart()}, what the reader can do; restart: null in the first turn. */
  constructor(answer, sources, on) {
    Object.assign(this, { answer, sources, on });
    this.body = h("div", { class: "body" });
    this.figures = h("span", { class: "faint" });
    const button = (words, act, title) => h("button", { type: "button", onclick: act, title }, words);
    this.compareButton = button("Compare with plain", on.compare, "Ask the same again with speculation off");
    this.actions = h(
      "span",
      { class: "actions small" },
      button("Copy", () => this.#copy(), "Copy the answer"),
      button("Again", on.again, "Another answer in its place"),
      this.compareButton,
    );
    this.aside = h("div", { class: "aside" });
    const foot = h("footer", {}, this.figures, this.actions, this.aside);
    this.element = h("article", { class: "message assistant", "aria-label": "Answer" }, this.body, foot);
    this.body.addEventListener("click", (event) => this.#pick(event.target));
    keepingEnd(() => messages().append(this.element));
    this.refresh();
  }

  /** Draw what has changed, at most once per frame. */
  refresh() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.#frame = 0;
    const { answer } = this;
    const isRunning = answer.endedAt === null;
    this.element.setAttribute("aria-busy", isRunning);
    keepingEnd(() => {
      render(this.body, answer.text, (start, end) => this.#leaves(start, end));
      this.body.classList.toggle("waiting", isRunning && !answer.text);
      this.#drawFoot(isRunning);
    });
  }

  /** Say under the answer what went wrong, and offer what helps. */
  fail(error) {
    this.draw();
    const isFull = error.code === "context_length_exceeded" && this.on.restart;
    const restart = isFull ? [["New chat", this.on.restart]] : [];
    this.setAside(errorBox(error, [...restart, ["Try again", this.on.again]])); // with fewer tokens it may fit
  }

  /** Characters start … end - 1 as spans, one per token. */
  #leaves(start, end) {
    const { runs, text } = this.answer;
    const nodes = [];
    for (let index = firstFrom(runs, start); index < runs.length && runs[index].start < end; index += 1) {
      const run = runs[index];
      const piece = text.slice(Math.max(start, run.start), Math.min(end, run.end));
      const style = run.source === null ? "src-none" : this.sources.style(run.source);
      const isFirst = index === 0 || runs[index - 1].step !== run.step;
      nodes.push(h("span", { class: `tok ${style}${isFirst ? " first" : ""}`, "data-step": run.step }, piece));
    }
    return nodes;
  }

  #pick(target) {
    const token = target.closest?.(".tok");
    if (token && !getSelection().toString()) this.on.look(Number(token.dataset.step));
  }

  /** Underline the tokens of the step that is shown. */
  mark(answer, index) {
    for (const token of this.body.querySelectorAll(".tok.shown")) token.classList.remove("shown");
    if (answer !== this.answer || (answer.endedAt === null && index === answer.steps.length - 1)) return;
    for (const token of this.body.querySelectorAll(`.tok[data-step="${index}"]`)) token.classList.add("shown");
  }

  #drawFoot(isRunning) {
    const { answer } = this;
    const figures = [];
    if (answer.steps.length > 1) {
      figures.push(`${answer.numTokens} tokens`, `${short(answer.rate)} per second`, `${short(answer.tokensPerStep)} per step`);
    }
    if (answer.finish === "length") figures.push("cut at the token limit");
    if (answer.finish === "stopped") figures.push("stopped");
    this.figures.textContent = figures.join(" · ");
    this.actions.hidden = isRunning || (!answer.text && !answer.steps.length); // refused: nothing to copy
  }

  /** What stands under the answer: a comparison, an error, or nothing; isComparing: one is on its way. */
  setAside(content, isComparing = false) {
    this.compareButton.textContent = isComparing ? "Comparing…" : "Compare with plain";
    keepingEnd(() => this.aside.replaceChildren(...(content ? [content] : [])));
  }

  async #copy() {
    await navigator.clipboard.writeText(this.answer.text);
    byId("announcer").textContent = "Copied";
  }
}

/** The first run that ends behind a character: runs are in order. */
function firstFrom(runs, start) {
  let [low, high] = [0, runs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (runs[middle].end <= start) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Two runs of one request, side by side. */
export function comparisonTable(answer, plain) {
  const seconds = (each) => ((each.endedAt - each.startedAt) / 1000).toFixed(2);
  const rows = [
    ["", "this answer", "plain"],
    ["tokens", answer.numTokens, plain.numTokens],
    ["tokens per step", short(answer.tokensPerStep), short(plain.tokensPerStep)],
    ["tokens per second", short(answer.rate), short(plain.rate)],
    ["seconds, as seen here", seconds(answer), seconds(plain)],
  ];
  const isFixed = answer.parameters.temperature === 0 || answer.parameters.seed !== undefined;
  const same = answer.text === plain.text;
  const verdict = same
    ? "The same text, character for character."
    : isFixed
      ? "The texts differ."
      : "Sampled without a seed: another text of the same law.";
  return h(
    "div",
    { class: "comparison" },
    h(
      "table",
      {},
      rows.map(([name, ...values], index) =>
        h("tr", {}, h(index ? "th" : "td", index ? { scope: "row" } : {}, name), values.map((value) => h(index ? "td" : "th", {}, String(value)))),
      ),
    ),
    h("p", {}, h("b", {}, `${short(answer.rate / plain.rate)} × the speed. `), verdict),
  );
}

/** What is seen before the first message. */
export function welcome(ask) {
  const prompts = ["Tell me a story about a dog.", "Please book a table for two.", "How do I list files?"];
  return h(
    "div",
    { class: "welcome" },
    h("h2", {}, "Ask, and watch the tree."),
    h(
      "p",
      {},
      "Small drafters guess a tree of continuations, the model scores the whole tree in one pass and keeps the path it would have written itself. Faster, and the words stay the model’s own.",
    ),
    h("div", { class: "prompts" }, prompts.map((prompt) => h("button", { type: "button", onclick: () => ask(prompt) }, prompt))),
  );
}
