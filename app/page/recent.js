// The requests that ran lately, each with its verdict.

import { KeyNeeded, getJson } from "./api.js";
import { amount, byId, duration, make } from "./words.js";

const LIMIT = 30, QUIET_MS = 1500;
const list = byId("recent"), nodes = new Map();
let asked = 0, seen = "";

export function startRecent(open) {
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(button.dataset.id);
  });
  byId("find").addEventListener("submit", (event) => {
    event.preventDefault();
    open(byId("find-id").value.trim());
  });
}

// Asks again when a request came or went, or one still runs, but not with every frame.
export async function showRecent(frame) {
  const state = frame.lanes.map((lane) => lane.key + lane.state + (lane.ended ? "" : frame.now)).join();
  if (state === seen || performance.now() - asked < QUIET_MS) return;
  asked = performance.now();
  try {
    const { data } = await getJson(`/debug/requests?limit=${LIMIT}`);
    seen = state;
    show(data);
  } catch (error) {
    if (!(error instanceof KeyNeeded)) console.warn(error);
  }
}

function show(entries) {
  byId("recent-empty").hidden = entries.length > 0;
  const kept = new Set(entries.map((entry) => entry.id));
  for (const [id, node] of nodes) {
    if (kept.has(id)) continue;
    node.remove();
    nodes.delete(id);
  }
  entries.forEach((entry, place) => {
    let node = nodes.get(entry.id);
    if (!node) nodes.set(entry.id, node = makeNode(entry.id));
    fill(node, entry);
    // Only what is out of place moves: focus and scrolling stay where they are.
    if (list.children[place] !== node) list.insertBefore(node, list.children[place] ?? null);
  });
}

function makeNode(id) {
  const part = (className) => make("span", { className });
  const button = make("button", { type: "button" }, make("span", { className: "top" }, part("name"), part("time")), part("why"));
  button.dataset.id = id;
  return make("li", {}, button);
}

function fill(node, entry) {
  const text = (name, value) => {
    const element = node.querySelector(`.${name}`);
    if (element.textContent !== value) element.textContent = value;
  };
  const running = entry.state === "ended" ? "" : ` · ${entry.state}`;
  text("name", entry.id);
  text("time", `${duration(entry.seconds)}${running} · ${amount(entry.output_tokens, "token")}`);
  text("why", entry.verdict);
}
