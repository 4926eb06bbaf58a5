// The dialog that tells of one request: a line in words, figures, and when what happened.

import { getJson } from "./api.js";
import { amount, byId, count, duration, make } from "./words.js";

const KINDS = {
  queued: "queued", prefill: "prefill", recomputed: "prefill", decode: "decode",
  preempted: "paused", "engine restart": "paused",
};
const REFRESH_MS = 500;
const dialog = byId("waterfall");
let shown = 0; // counts openings: a late answer to an earlier one is dropped

export function startWaterfall() {
  dialog.addEventListener("click", (event) => {
    const id = event.target.closest("[data-id]")?.dataset.id;
    if (id) openWaterfall(id);
    else if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
  dialog.addEventListener("close", () => { shown += 1; });
}

export async function openWaterfall(id) {
  const opening = (shown += 1);
  byId("waterfall-title").textContent = id;
  byId("verdict").textContent = "…";
  for (const part of ["facts", "fall", "notes"]) byId(part).replaceChildren();
  if (!dialog.open) dialog.showModal();
  byId("waterfall-title").focus();
  for (;;) {
    let told;
    try {
      told = await getJson(`/debug/requests/${encodeURIComponent(id)}`);
    } catch (error) {
      if (opening === shown) byId("verdict").textContent = error.message || "an API key is needed";
      return;
    }
    if (opening !== shown) return;
    show(told);
    if (told.state === "ended") return;
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
    if (opening !== shown) return;
  }
}

function show(told) {
  byId("verdict").textContent = told.verdict;
  byId("facts").replaceChildren(...facts(told));
  byId("fall").replaceChildren(...told.spans.map((span) => row(span, told)));
  byId("notes").replaceChildren(...told.sequences.flatMap((sequence, i) => notes(sequence, i, told)));
}

function facts(told) {
  const sum = (name) => told.sequences.reduce((total, sequence) => total + sequence[name], 0);
  const cached = sum("cached_tokens");
  const entries = {
    "State": told.finish ?? told.state,
    "Endpoint": told.path,
    "Prompt": amount(sum("prompt_tokens"), "token") + (cached ? `, ${count(cached)} cached` : ""),
    "Output": amount(sum("output_tokens"), "token"),
    "First token": told.time_to_first_token === null ? "–" : duration(told.time_to_first_token),
    "In all": duration(told.seconds),
  };
  if (told.request_id !== told.id) entries["Request id"] = told.request_id;
  return Object.entries(entries).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
}

function row(span, told) {
  const bar = make("i", { className: KINDS[span.what] ?? "host" });
  bar.style.left = `${Math.min((span.start / told.seconds) * 100, 99.6)}%`;
  bar.style.width = `${Math.min((span.seconds / told.seconds) * 100, 100)}%`;
  const name = make("td", { textContent: label(span, told) });
  const note = [span.step === null ? "" : `step ${count(span.step)}`, span.note].filter(Boolean).join(": ");
  if (note) name.append(make("small", { textContent: note }));
  const track = make("td", { className: "chart" }, make("div", { className: "track" }, bar));
  return make("tr", {}, name, track, make("td", { className: "number", textContent: duration(span.seconds) }));
}

function label(span, told) {
  const choice = span.sequence !== null && told.sequences.length > 1 ? `, choice ${span.sequence}` : "";
  return span.what + choice;
}

function notes(sequence, index, told) {
  const found = [], { queue, decode } = sequence;
  const whose = told.sequences.length > 1 ? `Choice ${index}: ` : "";
  if (queue.behind_requests) {
    const line = make("li", { textContent: `${whose}behind ${amount(queue.behind_requests, "request")} with ${amount(queue.behind_tokens, "prompt token")}: ` });
    for (const name of queue.behind) line.append(requestName(name), " ");
    found.push(line);
  }
  if (queue.steps) {
    found.push(make("li", { textContent: `${whose}while it was queued, ${amount(queue.steps, "step")} computed ${amount(queue.prompt_tokens_computed, "prompt token")} of others, beside ${amount(queue.running, "running sequence")}` }));
  }
  if (decode && decode.tokens > 1) {
    found.push(make("li", { textContent: `${whose}${duration(decode.seconds_per_token)} a token over ${amount(decode.steps, "step")} of ${decode.mean_batch.toFixed(1)} sequences on average${decode.prompt_tokens_beside ? `, with ${amount(decode.prompt_tokens_beside, "prompt token")} computed beside` : ""}` }));
  }
  if (decode?.worst_gap?.why) {
    found.push(make("li", { textContent: `${whose}the longest gap between tokens, ${duration(decode.worst_gap.seconds)}: ${decode.worst_gap.why}` }));
  }
  if (!index && told.client_stalls) {
    found.push(make("li", { textContent: `the client did not read for ${duration(told.client_stalled_seconds)}` }));
  }
  return found;
}

// Names of others' requests are words; one's own can be opened.
function requestName(name) {
  if (name.includes(" ")) return name;
  const button = make("button", { type: "button", className: "quiet", textContent: name });
  button.dataset.id = name;
  return button;
}
