// One answer: its text, who proposed which part of it, its steps, and the figures they give.

const WINDOW = 8; // steps that a running figure looks back on

/** Index of each source by first appearance; the target is none of them. */
export class Sources {
  #names = [];

  /** The style class of a source: its colour is the page's, its place is the chat's. */
  style(source) {
    if (source === "target" || source === null) return "src-target";
    if (!this.#names.includes(source)) this.#names.push(source);
    return `src-${this.#names.indexOf(source) % 6}`;
  }
}

export class Answer {
  #told = []; // tokens of trees whose text has not come yet

  /** model: who answers; parameters: what was asked for, to ask the same again. */
  constructor(model, parameters) {
    this.model = model;
    this.parameters = parameters;
    this.text = "";
    this.runs = []; // {start, end, source, step}: characters of the text; source null: not told
    this.steps = [];
    this.usage = null;
    this.finish = null;
    this.plain = null; // the same request without speculation, an Answer
    this.startedAt = performance.now();
    this.endedAt = null;
  }

  /** Take in one chunk of the stream. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    if (chunk.tree) {
      this.steps.push(chunk.tree);
      const step = this.steps.length - 1;
      this.#told.push(...chunk.tree.emitted.map(({ text, source }) => ({ text, source, step })));
    }
    if (choice?.delta?.content) this.#add(choice.delta.content);
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (chunk.usage) this.usage = chunk.usage;
  }

  end() {
    this.endedAt = performance.now();
  }

  #add(content) {
    // A server may shape the text between tokens and reader: then nobody can say whose it is.
    const isTold = this.#told.map((token) => token.text).join("") === content;
    const pieces = isTold ? this.#told : [{ text: content, source: null, step: this.steps.length - 1 }];
    for (const { text, source, step } of pieces) {
      const start = this.text.length;
      this.text += text;
      if (text) this.runs.push({ start, end: this.text.length, source, step });
    }
    this.#told = [];
  }

  /** How many tokens each source brought: [[source, count], …], the target last. */
  counts() {
    const counts = new Map();
    for (const { emitted } of this.steps) {
      for (const { source } of emitted) counts.set(source, (counts.get(source) ?? 0) + 1);
    }
    return [...counts].sort(([a], [b]) => (a === "target") - (b === "target"));
  }

  get numTokens() {
    return this.steps.reduce((sum, step) => sum + step.emitted.length, 0);
  }

  /** Steps that only decoded: the first one reads the prompt as well. */
  get decoding() {
    return this.steps.slice(1);
  }

  /** Tokens per second of the server's own steps, without the prompt and the network. */
  get rate() {
    return perSecond(this.decoding);
  }

  /** The same without speculation, as the server's measured times have it; NaN where there are none. */
  get plainRate() {
    return plainPerSecond(this.decoding);
  }

  get tokensPerStep() {
    return mean(this.decoding.map((step) => step.emitted.length));
  }

  get numDrafted() {
    return this.steps.reduce((sum, step) => sum + step.nodes.length - 1, 0);
  }

  get numAccepted() {
    return this.steps.reduce((sum, step) => sum + step.nodes.filter((node) => node.accepted).length, 0);
  }

  /** Share of all time by part of the step: [[part, share], …]. */
  timeShares() {
    const sums = new Map();
    for (const step of this.decoding) {
      for (const [part, ms] of Object.entries(step.time_ms)) sums.set(part, (sums.get(part) ?? 0) + ms);
    }
    const total = [...sums.values()].reduce((sum, ms) => sum + ms, 0);
    return total ? [...sums].map(([part, ms]) => [part, ms / total]) : [];
  }

  /** Running tokens per second by tokens written: {x, y, plain}. */
  rateSeries() {
    const x = [];
    const y = [];
    const plain = [];
    let written = this.steps[0]?.emitted.length ?? 0;
    this.decoding.forEach((step, index, steps) => {
      const recent = steps.slice(Math.max(0, index + 1 - WINDOW), index + 1);
      written += step.emitted.length;
      x.push(written);
      y.push(perSecond(recent));
      plain.push(orNull(plainPerSecond(recent)));
    });
    return { x, y, plain };
  }

  /** Tokens of each step, and their running mean: {x, y, mean}. */
  stepSeries() {
    const y = this.decoding.map((step) => step.emitted.length);
    let sum = 0;
    const means = y.map((count, index) => (sum += count) / (index + 1));
    return { x: this.decoding.map((step) => step.step), y, mean: means };
  }

  toObject() {
    const { text, runs, steps, usage, finish, model, parameters } = this;
    const plain = this.plain && this.plain.toObject();
    return { role: "assistant", content: text, model, parameters, finish, usage, runs, steps, plain };
  }

  /** From a saved chat: throws where it is not one. */
  static from(saved) {
    const answer = new Answer(String(saved.model ?? ""), saved.parameters ?? {});
    if (typeof saved.content !== "string") throw new TypeError("an answer has no text");
    answer.text = saved.content;
    answer.runs = checked(saved.runs, (run) => Number.isInteger(run.start) && Number.isInteger(run.end));
    answer.steps = checked(saved.steps, isStep);
    answer.usage = saved.usage ?? null;
    answer.finish = saved.finish ?? null;
    answer.plain = saved.plain ? Answer.from(saved.plain) : null;
    answer.endedAt = answer.startedAt;
    return answer;
  }
}

function checked(list, holds) {
  if (!Array.isArray(list) || !list.every((item) => item && holds(item))) {
    throw new TypeError("an answer's steps are not as this page saves them");
  }
  return list;
}

function isStep(step) {
  return (
    Array.isArray(step.nodes) &&
    step.nodes.length > 0 &&
    step.nodes.every(
      (node, index) =>
        typeof node.token === "string" &&
        Number.isInteger(node.parent) &&
        node.parent < index &&
        Array.isArray(node.slots) &&
        node.slots.every((slot) => typeof slot.source === "string"),
    ) &&
    Array.isArray(step.emitted) &&
    step.emitted.every((token) => typeof token.text === "string" && typeof token.source === "string") &&
    typeof (step.time_ms ?? 0) === "object"
  );
}

/** How long a step took, in milliseconds. */
export function stepMs(step) {
  return Object.values(step.time_ms).reduce((sum, ms) => sum + ms, 0);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function perSecond(steps) {
  const ms = steps.reduce((sum, step) => sum + stepMs(step), 0);
  return (1000 * steps.reduce((sum, step) => sum + step.emitted.length, 0)) / ms;
}

/** A plain step writes one token. */
function plainPerSecond(steps) {
  if (!steps.length || steps.some((step) => step.plain_ms === null)) return NaN;
  return (1000 * steps.length) / steps.reduce((sum, step) => sum + step.plain_ms, 0);
}

const orNull = (value) => (Number.isNaN(value) ? null : value);
