// The page: settings, the conversation, and what keys and buttons do.

import { Answer, Sources } from "./answer.js";
import { addUser, AnswerView, clearMessages, comparisonTable, errorBox, welcome } from "./chat.js";
import { listModels, streamChat } from "./client.js";
import { byId } from "./dom.js";
import { download } from "./files.js";
import { Inspector } from "./inspector.js";

const RETRY_MS = 2000; // between questions to a server that is away
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed", "speculation", "shape"];

let turns = []; // {role: "user", content} | {role: "assistant", answer, view, messages}
let running = null; // AbortController of the stream that runs
const sources = new Sources();
const inspector = new Inspector(sources, (answer, index) => turns.forEach((turn) => turn.view?.mark(answer, index)));

const say = (words) => (byId("announcer").textContent = words);

// --- the server -----------------------------------------------------------------------------------

async function askModels() {
  const select = byId("model");
  try {
    const models = await listModels(byId("api-key").value);
    const before = select.value;
    select.replaceChildren(...models.map((name) => new Option(name, name)));
    if (models.includes(before)) select.value = before;
    select.disabled = models.length < 2;
    serverIs("ready", "the server is ready");
  } catch (error) {
    select.replaceChildren(new Option(error.status === 401 ? "needs an API key" : "no answer"));
    select.disabled = true;
    serverIs("away", error.message);
    if (error.status !== 401) setTimeout(askModels, RETRY_MS);
  }
}

function serverIs(state, words) {
  byId("server").dataset.state = state;
  byId("server").title = words;
  if (byId("server-words").textContent !== words) byId("server-words").textContent = words;
}

// --- settings -------------------------------------------------------------------------------------

/** What the settings ask for, as fields of the request; empty ones are left to the server. */
function parameters() {
  const asked = {};
  const number = (id, name = id) => {
    const field = byId(id);
    if (field.value !== "") asked[name] = Number(field.value);
  };
  number("temperature");
  number("top_p");
  number("max_tokens", "max_completion_tokens");
  number("seed");
  const tree = byId("speculation").value;
  if (tree) asked.speculation = { tree: tree === "shape" ? byId("shape").value.trim() : tree };
  return asked;
}

function keepSettings() {
  for (const id of KEPT) localStorage.setItem(`specinfer.${id}`, byId(id).value);
  sessionStorage.setItem("specinfer.key", byId("api-key").value);
  byId("shape-field").hidden = byId("speculation").value !== "shape";
}

function readSettings() {
  for (const id of KEPT) {
    const kept = localStorage.getItem(`specinfer.${id}`);
    if (kept !== null) byId(id).value = kept;
  }
  byId("api-key").value = sessionStorage.getItem("specinfer.key") ?? "";
  keepSettings();
}

// --- the conversation -----------------------------------------------------------------------------

function conversation(upTo = turns.length) {
  const system = byId("system").value.trim();
  const said = turns
    .slice(0, upTo)
    .filter((turn) => turn.role === "user" || turn.answer.text)
    .map((turn) => ({ role: turn.role, content: turn.content ?? turn.answer.text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

async function ask(text) {
  if (running || !text.trim()) return;
  const wrong = byId("parameters").querySelector(":invalid");
  if (wrong) {
    show("settings");
    wrong.reportValidity();
    return;
  }
  if (!turns.length) clearMessages();
  turns.push({ role: "user", content: text });
  addUser(text);
  byId("prompt").value = "";
  grow();
  await answer();
}

/** Answer the conversation as it stands. */
async function answer() {
  const turn = { role: "assistant", answer: new Answer(byId("model").value, parameters()) };
  turn.messages = conversation();
  turn.view = view(turn);
  turns.push(turn);
  inspector.open(turn.answer);
  setRunning(new AbortController());
  say("Answering");
  try {
    await stream(turn.answer, turn.messages, () => {
      turn.view.refresh();
      if (inspector.answer === turn.answer) inspector.refresh();
    });
    say(`The answer is complete: ${turn.answer.text}`);
    turn.view.draw();
  } catch (error) {
    end(turn, error);
  } finally {
    setRunning(null);
    inspector.refresh();
  }
}

function end(turn, error) {
  if (error.name === "AbortError") {
    turn.answer.finish = "stopped";
    turn.view.draw();
    say("Stopped");
  } else {
    turn.view.fail(error);
    if (error.status === 0) askModels();
  }
}

function view(turn) {
  return new AnswerView(turn.answer, sources, {
    look: (step) => {
      inspector.openAt(turn.answer, step);
      if (matchMedia("(max-width: 899px)").matches) show("tree");
    },
    again: () => again(turn),
    compare: () => compare(turn),
    restart: turns.length > 1 ? restart : null,
  });
}

/** The request's stream into an answer. */
async function stream(into, messages, onChange) {
  try {
    await streamChat(
      { model: into.model, messages, ...into.parameters },
      {
        key: byId("api-key").value,
        signal: running.signal,
        onChunk: (chunk) => {
          into.take(chunk);
          onChange();
        },
      },
    );
  } finally {
    into.end();
    onChange();
  }
}

/** Ask for another answer in the place of this one: what came after it goes. */
async function again(turn) {
  if (running) return;
  for (const gone of turns.splice(turns.indexOf(turn))) removeFrom(gone);
  await answer();
}

function removeFrom(turn) {
  if (turn.view) turn.view.element.remove();
  else byId("messages").querySelectorAll(".message.user").item(turns.filter((each) => each.role === "user").length)?.remove();
}

/** The same request with speculation off, beside it. */
async function compare(turn) {
  if (running) return;
  const plain = new Answer(turn.answer.model, { ...turn.answer.parameters, speculation: { tree: "off" } });
  turn.view.setAside(null, true);
  turn.answer.plain = plain;
  inspector.openAt(turn.answer, turn.answer.steps.length - 1);
  setRunning(new AbortController());
  let found = null;
  try {
    await stream(plain, turn.messages, () => inspector.refresh());
    found = comparisonTable(turn.answer, plain);
    say("Compared with plain decoding");
  } catch (error) {
    turn.answer.plain = null;
    if (error.name !== "AbortError") found = errorBox(error);
  } finally {
    turn.view.setAside(found);
    setRunning(null);
    inspector.refresh();
  }
}

function setRunning(controller) {
  running = controller;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  byId("new-chat").disabled = byId("open-chat").disabled = controller !== null;
  if (hadFocus) (controller ? byId("stop") : byId("prompt")).focus();
}

/** A new chat that begins with what was asked last: this one has no room for it. */
function restart() {
  if (running) return;
  const asked = turns.findLast((turn) => turn.role === "user")?.content ?? "";
  clear();
  byId("prompt").value = asked;
  grow();
  byId("prompt").focus();
}

function clear() {
  turns = [];
  clearMessages(welcome(ask));
  inspector.clear();
}

// --- files ----------------------------------------------------------------------------------------

function saveChat() {
  const chat = {
    format: "specinfer-chat",
    version: 1,
    system: byId("system").value,
    turns: turns.map((turn) => (turn.role === "user" ? { role: "user", content: turn.content } : { ...turn.answer.toObject(), messages: turn.messages })),
  };
  download("chat.json", new Blob([JSON.stringify(chat, null, 1)], { type: "application/json" }));
}

async function openChat(file) {
  try {
    const chat = JSON.parse(await file.text());
    if (chat.format !== "specinfer-chat" || chat.version !== 1) throw new TypeError("it is no chat that this page saved");
    const opened = chat.turns.map((turn) =>
      turn.role === "user"
        ? { role: "user", content: String(turn.content) }
        : { role: "assistant", answer: Answer.from(turn), messages: turn.messages ?? [] },
    );
    clear();
    clearMessages();
    byId("system").value = String(chat.system ?? "");
    for (const turn of opened) {
      if (turn.role === "user") addUser(turn.content);
      else turn.view = view(turn);
      turns.push(turn);
    }
    const last = opened.filter((turn) => turn.answer).at(-1);
    if (last) inspector.open(last.answer);
  } catch (error) {
    byId("messages").append(errorBox({ title: "This file cannot be opened", detail: error.message }));
  }
}

// --- keys, buttons, panes -------------------------------------------------------------------------

function show(pane) {
  document.body.dataset.pane = pane;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", button.dataset.show === pane);
  }
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  localStorage.setItem("specinfer.theme", theme);
  byId("theme").setAttribute("aria-label", `Theme: ${theme === "system" ? "as the system" : theme}`);
  byId("theme").title = byId("theme").getAttribute("aria-label");
  inspector.repaint();
}

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "system";
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  // From the system's own to the other one first: a button that changes nothing seems broken.
  const order = isDark ? ["system", "light", "dark"] : ["system", "dark", "light"];
  setTheme(order[(order.indexOf(now) + 1) % THEMES.length]);
}

/** The message box is as high as its text, up to a third of the window. */
function grow() {
  const box = byId("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`;
}

function onKey(event) {
  if (event.key === "Escape" && running) {
    running.abort();
    return;
  }
  const isTyping = event.target.closest?.("input, textarea, select");
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move && !isTyping && !event.altKey && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    inspector.go(inspector.index + move);
  }
}

function start() {
  readSettings();
  setTheme(document.documentElement.dataset.theme ?? "system");
  byId("parameters").addEventListener("input", keepSettings);
  byId("parameters").addEventListener("submit", (event) => event.preventDefault());
  byId("api-key").addEventListener("change", askModels);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(byId("prompt").value);
  });
  byId("prompt").addEventListener("input", grow);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask(byId("prompt").value);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new-chat").addEventListener("click", clear);
  byId("save-chat").addEventListener("click", saveChat);
  byId("open-chat").addEventListener("click", () => byId("chat-file").click());
  byId("chat-file").addEventListener("change", (event) => {
    if (event.target.files[0]) openChat(event.target.files[0]);
    event.target.value = "";
  });
  byId("theme").addEventListener("click", nextTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => inspector.repaint());
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => show(button.dataset.show));
  }
  document.addEventListener("keydown", onKey);
  clear();
  askModels();
}

start();
