// A chat that streams, and says how fast it was.

import { KeyNeeded, events, request } from "./api.js";
import { amount, announce, byId, duration, make, rate, say } from "./words.js";

const chat = byId("chat"), form = byId("play"), message = byId("message");
const send = byId("play-send"), stop = byId("play-stop");
let history = [], running = null;

export function startPlayground(open, askKey) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) ask(open, askKey);
  });
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  stop.addEventListener("click", () => running?.abort());
  byId("play-new").addEventListener("click", () => {
    running?.abort();
    history = [];
    chat.replaceChildren();
    say("play-status", "");
    message.focus();
  });
}

async function ask(open, askKey) {
  const text = message.value.trim();
  if (!text) return;
  message.value = "";
  busy(new AbortController());
  add("user", text);
  const asked = history = [...history, { role: "user", content: text }];
  const answer = new Answer(add("assistant", ""), open);
  try {
    await answer.stream(await post(asked, askKey));
    if (history === asked) history = [...asked, { role: "assistant", content: answer.text }];
    say("play-status", "");
    announce(`The answer is complete: ${answer.speed()}`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say("play-status", stopped ? "Stopped." : `That did not work: ${error.message}`);
    answer.end();
    if (history === asked) history = asked.slice(0, -1); // the model should not see half a turn
  } finally {
    busy(null);
  }
}

async function post(messages, askKey) {
  const body = JSON.stringify({
    messages,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: byId("max-tokens").valueAsNumber || null,
    temperature: Number.isNaN(byId("temperature").valueAsNumber) ? null : byId("temperature").valueAsNumber,
  });
  const headers = { "content-type": "application/json" };
  for (;;) {
    try {
      return await request("/v1/chat/completions", { method: "POST", headers, body, signal: running.signal });
    } catch (error) {
      if (!(error instanceof KeyNeeded)) throw error;
      await askKey(error);
    }
  }
}

class Answer {
  constructor(node, open) {
    this.open = open;
    this.node = node;
    this.said = make("span");
    this.thought = make("span", { className: "thinking" });
    node.append(this.thought, this.said);
    this.text = "";
    this.began = performance.now();
    this.first = this.last = this.usage = this.id = null;
  }

  async stream(response) {
    this.id = response.headers.get("x-request-id");
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      this.usage = chunk.usage ?? this.usage;
      const delta = chunk.choices[0]?.delta;
      if (delta) this.take(delta);
    }
    this.end();
  }

  take(delta) {
    if (!delta.content && !delta.reasoning_content) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.text += delta.content ?? "";
    this.thought.append(delta.reasoning_content ?? "");
    this.said.append(delta.content ?? "");
    chat.scrollTop = chat.scrollHeight;
  }

  speed() {
    const tokens = this.usage?.completion_tokens ?? 0, seconds = (this.last - this.first) / 1e3;
    if (this.first === null) return amount(tokens, "token");
    const parts = [`first token after ${duration((this.first - this.began) / 1e3)}`];
    if (tokens) parts.push(amount(tokens, "token"));
    if (tokens > 1 && seconds > 0) parts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
    return parts.join(", ");
  }

  end() {
    if (!this.text && !this.usage && !this.id) return this.node.remove();
    const why = make("button", { type: "button", className: "quiet", textContent: "Where did the time go?" });
    why.addEventListener("click", () => this.open(this.id));
    this.node.append(make("p", { className: "said" }, make("span", { textContent: this.speed() }), this.id ? why : ""));
    chat.scrollTop = chat.scrollHeight;
  }
}

function add(role, text) {
  const node = make("li", { className: role }, make("span", { className: "unseen", textContent: role === "user" ? "You: " : "Model: " }), text);
  chat.append(node);
  chat.scrollTop = chat.scrollHeight;
  return node;
}

function busy(controller) {
  const hadFocus = document.activeElement === stop;
  running = controller;
  send.disabled = controller !== null;
  stop.hidden = controller === null;
  if (hadFocus) message.focus();
}
