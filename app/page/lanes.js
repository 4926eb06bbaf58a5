// Requests as lanes over the engine's steps. The canvas draws; a button over each lane is what one
// points at, focuses and hears. Lanes follow each other in rows, so that nothing jumps.

import { amount, byId, duration, make } from "./words.js";

const WINDOW = 30; // seconds
const DELAY = 0.4; // behind the server, so that what is drawn is known
const STRIP = 40, AXIS = 20, ROW = 30, LANE = 26, MOST_ROWS = 24, FEWEST_ROWS = 3;
const GAP = 0.3; // seconds between lanes in a row: the shortest lane is as wide
const FRAME_MS = 50, CALM_MS = 1000;

const list = byId("lane-list"), canvas = byId("canvas"), context = canvas.getContext("2d");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const lanes = new Map(); // by key: { data, row, node, button, told }
let steps = [], rows = FEWEST_ROWS, clock = null, colours = {}, drawn = 0, hidden = 0;

export function startLanes(open) {
  readColours();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(button.dataset.id);
  });
  list.addEventListener("keydown", moveFocus);
  list.addEventListener("focusin", (event) => makeCurrent(event.target));
  requestAnimationFrame(tick);
}

export function showLanes(frame) {
  clock = { server: frame.now, local: performance.now() };
  steps.push(...frame.steps.map(([number, began, ended, sequences, chunkTokens]) =>
    ({ number, began, ended, sequences, chunkTokens })));
  const oldest = frame.now - WINDOW - 1;
  steps = steps.filter((step) => step.ended > oldest);
  const seen = new Set();
  hidden = frame.hidden;
  for (const data of [...frame.lanes].sort((a, b) => a.arrival - b.arrival)) {
    const lane = lanes.get(data.key) ?? add(data);
    if (!lane) {
      hidden += !data.ended;
      continue;
    }
    seen.add(data.key);
    lane.data = data;
    describe(lane);
  }
  for (const [key, lane] of lanes) if (!seen.has(key)) remove(key, lane);
  if (!lanes.size) rows = FEWEST_ROWS;
  byId("lanes-empty").hidden = lanes.size > 0 || steps.length > 0;
  const more = byId("lanes-hidden");
  more.hidden = !hidden;
  if (hidden) more.textContent = `${amount(hidden, "more request")} run or wait.`;
}

function add(data) {
  let row = 0;
  const taken = (lane) => lane.row === row && (lane.data.ended || Infinity) > data.arrival - GAP;
  while ([...lanes.values()].some(taken)) row += 1;
  if (row >= MOST_ROWS) return null;
  rows = Math.max(rows, row + 1);
  const button = make("button", { type: "button", className: "lane", tabIndex: lanes.size ? -1 : 0 });
  button.dataset.id = data.id;
  const node = make("li", {}, button);
  list.append(node);
  const lane = { data, row, node, button, told: "" };
  lanes.set(data.key, lane);
  return lane;
}

function remove(key, lane) {
  const next = lane.node.nextElementSibling ?? lane.node.previousElementSibling;
  const hadFocus = lane.node.contains(document.activeElement), current = lane.button.tabIndex === 0;
  lane.node.remove();
  lanes.delete(key);
  if (next && hadFocus) next.firstElementChild.focus();
  else if (next && current) next.firstElementChild.tabIndex = 0;
}

function describe(lane) {
  const { id, state, tokens, prompt, ended, arrival } = lane.data;
  const short = id.length > 22 ? `${id.slice(0, 20)}…` : id;
  const shown = tokens ? amount(tokens, "token") : amount(prompt, "prompt token");
  const text = `${short}  ${shown}`;
  if (lane.button.textContent !== text) lane.button.textContent = text;
  // Names that change all the time would be read out all the time.
  if (lane.told === state) return;
  lane.told = state;
  const took = ended ? `, took ${duration(ended - arrival)}` : "";
  lane.button.setAttribute("aria-label", `${id}: ${state}, ${amount(prompt, "prompt token")}${took}`);
}

function moveFocus(event) {
  const buttons = [...list.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to === undefined || !buttons.length) return;
  event.preventDefault();
  buttons[Math.min(Math.max(to, 0), buttons.length - 1)].focus();
}

function makeCurrent(button) {
  for (const other of list.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  button.tabIndex = 0;
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["decode", "slowed", "prefill", "queued", "paused", "panel", "line", "muted", "soft"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

function tick(time) {
  requestAnimationFrame(tick);
  if (time - drawn < (calm.matches ? CALM_MS : FRAME_MS) || !clock) return;
  drawn = time;
  draw(clock.server + (time - clock.local) / 1e3 - DELAY);
}

function draw(now) {
  const width = list.clientWidth, height = STRIP + rows * ROW + AXIS, scale = devicePixelRatio;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const x = (when) => ((when - now) / WINDOW + 1) * width;
  drawAxis(width, height);
  drawStrip(x);
  const slowed = merged(steps.filter((step) => step.chunkTokens), x);
  for (const lane of lanes.values()) drawLane(lane, x, now, slowed, width);
}

function drawAxis(width, height) {
  context.fillStyle = colours.muted;
  context.strokeStyle = colours.line;
  context.font = "12px system-ui, sans-serif";
  context.lineWidth = 1;
  for (let ago = 0; ago <= WINDOW; ago += 5) {
    const at = Math.round((1 - ago / WINDOW) * width) + 0.5;
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, height - AXIS + 3);
    context.stroke();
    if (ago % 10) continue;
    context.textAlign = ago === 0 ? "right" : ago === WINDOW ? "left" : "center";
    context.fillText(ago ? `${ago} s ago` : "now", at, height - 4);
  }
}

function drawStrip(x) {
  const most = Math.max(4, ...steps.map((step) => step.sequences)), room = STRIP - 10;
  for (const step of steps) {
    const left = x(step.began), high = Math.max(2, (step.sequences / most) * room);
    context.fillStyle = step.chunkTokens ? colours.prefill : colours.decode;
    context.fillRect(left, room - high, Math.max(x(step.ended) - left, 0.6), high);
  }
}

// Stretches as [left, right] in pixels, joined where they touch.
function merged(some, x) {
  const stretches = [];
  for (const { began, ended } of some) {
    const left = x(began), right = Math.max(x(ended), left + 1), last = stretches.at(-1);
    if (last && left <= last[1] + 0.5) last[1] = Math.max(last[1], right);
    else stretches.push([left, right]);
  }
  return stretches;
}

function drawLane(lane, x, now, slowed, width) {
  const d = lane.data, end = d.ended || Math.max(now, d.last, d.arrival), top = STRIP + lane.row * ROW;
  const left = x(d.arrival), right = Math.max(Math.min(x(end), width), left + 4);
  lane.node.style.transform = `translate(${Math.max(left, 0).toFixed(1)}px, ${top}px)`;
  lane.node.style.width = `${Math.max(right - Math.max(left, 0), 8).toFixed(1)}px`;
  if (right < 0) return;
  const fill = (colour, from, to) => {
    context.fillStyle = colour;
    context.fillRect(x(from), top, Math.max(x(to) - x(from), 1), LANE);
  };
  context.save();
  context.beginPath();
  context.roundRect(left, top, right - left, LANE, 5);
  context.clip();
  fill(colours.queued, d.arrival, d.scheduled || end);
  if (d.scheduled) fill(colours.prefill, d.scheduled, d.first || end);
  if (d.first) {
    fill(colours.decode, d.first, end);
    context.fillStyle = colours.slowed;
    const from = x(d.first);
    for (const [begin, until] of slowed) {
      if (until > from) context.fillRect(Math.max(begin, from), top, until - Math.max(begin, from), LANE);
    }
  }
  for (const [began, ended, , again] of d.chunks) if (again) fill(colours.prefill, began, ended);
  for (const [, began, ended] of d.pauses) fill(colours.paused, began, ended || end);
  drawStepEdges(d, x, end, top);
  context.restore();
}

// Where steps are wide enough to be told apart.
function drawStepEdges(d, x, end, top) {
  context.fillStyle = colours.panel;
  context.globalAlpha = 0.55;
  let before = -Infinity;
  for (const step of steps) {
    if (step.ended < d.scheduled || step.ended > end || !d.scheduled) continue;
    const at = x(step.ended);
    if (at - before >= 5) context.fillRect(at - 0.5, top, 0.75, LANE);
    before = at;
  }
}
