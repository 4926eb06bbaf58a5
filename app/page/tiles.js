// The figures on top of the page.

import { amount, byId, count, duration, percent, rate, say } from "./words.js";

const POINTS = 120; // of the sparkline, one a frame
const outputs = [];

export function showTiles(frame) {
  say("running", count(frame.running));
  say("waiting", count(frame.waiting));
  showPercentiles("ttft", frame.time_to_first_token);
  showPercentiles("itl", frame.inter_token);
  showCache(frame.blocks);
  if (frame.rates) showRates(frame.rates);
}

function showPercentiles(name, found) {
  for (const p of ["p50", "p95", "p99"]) say(`${name}-${p}`, found ? duration(found[p]) : "–");
}

function showCache({ total, used, cached }) {
  if (!total) return;
  say("kv-used", percent(used / total));
  say("kv-blocks", `of ${amount(total, "block")}`);
  say("kv-text", `${count(cached)} cached · ${count(total - used - cached)} free`);
  byId("kv-bar-used").style.width = `${(used / total) * 100}%`;
  byId("kv-bar-cached").style.width = `${(cached / total) * 100}%`;
}

function showRates(rates) {
  say("output-rate", rate(rates.output_tokens));
  say("time-model", percent(rates.model));
  say("time-text", `${percent(rates.host)} scheduling · ${percent(rates.idle)} idle`);
  say("time-steps", `${rate(rates.steps)} steps/s`);
  byId("time-bar-model").style.width = `${rates.model * 100}%`;
  byId("time-bar-host").style.width = `${rates.host * 100}%`;
  outputs.push(rates.output_tokens);
  if (outputs.length > POINTS) outputs.shift();
  drawSpark();
}

function drawSpark() {
  const most = Math.max(...outputs, 1);
  const at = (value, i) => `${(120 - outputs.length + i + 1).toFixed(1)} ${(27 - (value / most) * 24).toFixed(1)}`;
  const line = outputs.map((value, i) => `L${at(value, i)}`).join("");
  const begin = 120 - outputs.length + 1;
  byId("spark").firstElementChild.setAttribute("d", `M${begin} 29${line}L121 29Z`);
}
