// The server's side of the page: OpenAI's API, and what goes wrong with it in words.

/** Something to tell the reader: a title, what was said, the HTTP status (0: no answer), OpenAI's code. */
export class ServerError extends Error {
  constructor(title, detail, status = 0, code = null) {
    super(`${title}: ${detail}`);
    Object.assign(this, { name: "ServerError", title, detail, status, code });
  }
}

const TITLES = {
  400: "The server refuses this request",
  401: "The server wants an API key",
  403: "The server does not allow this",
  404: "The server does not know this",
  413: "The request is too large",
  422: "The server refuses this request",
  429: "Too many requests",
  503: "The server is full",
};

const CODES = { context_length_exceeded: "No room in the context" };

async function call(path, { key, ...options } = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server is away", `no answer from ${location.origin}: is it running?`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let detail = text.slice(0, 400) || response.statusText || "it gave no reason";
  let code = null;
  try {
    const body = JSON.parse(text);
    code = body.error?.code ?? null;
    detail = body.error?.message ?? body.message ?? (typeof body.detail === "string" ? body.detail : detail);
  } catch { /* not JSON: its text will do */ }
  const wait = response.headers.get("Retry-After");
  if (wait) detail += ` (try again in ${wait} s)`;
  const title = CODES[code] ?? TITLES[response.status] ?? "The server failed";
  return new ServerError(title, detail, response.status, code);
}

/** The names of the models there are. */
export async function listModels(key) {
  const body = await (await call("v1/models", { key })).json();
  return body.data.map((model) => model.id);
}

/**
 * Stream a chat completion.
 *
 * body     as OpenAI has it; streaming and trees are asked for here
 * onChunk  given each chunk's object
 * throws   ServerError; the fetch's AbortError after signal
 */
export async function streamChat(body, { key, signal, onChunk }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true, include_tree: true } };
  const response = await call("v1/chat/completions", {
    key,
    signal,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
  });
  let isDone = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError("The server failed", chunk.error.message, response.status);
      onChunk(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The answer broke off", "the connection was lost");
  }
  if (!isDone) throw new ServerError("The answer broke off", "the server ended the stream too early");
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}
