// Connects the page: one stream of frames while it is visible, an API key where one is needed.

import { KeyNeeded, apiKey, events, request } from "./api.js";
import { showLanes, startLanes } from "./lanes.js";
import { startPlayground } from "./playground.js";
import { showRecent, startRecent } from "./recent.js";
import { showTiles } from "./tiles.js";
import { openWaterfall, startWaterfall } from "./waterfall.js";
import { announce, byId, say } from "./words.js";

const SHORTEST_WAIT_MS = 500, LONGEST_WAIT_MS = 8000;
let connection = new AbortController(), asking = null;

startWaterfall();
startLanes(openWaterfall);
startRecent(openWaterfall);
startPlayground(openWaterfall, askKey);
startKey();
document.addEventListener("visibilitychange", () => {
  if (document.hidden) connection.abort(); // a page that nobody sees costs the server nothing
});
watch();

async function watch() {
  let wait = SHORTEST_WAIT_MS;
  for (;;) {
    await visible();
    try {
      connection = new AbortController();
      const response = await request("/debug/live", { signal: connection.signal });
      for await (const data of events(response)) {
        const frame = JSON.parse(data);
        if (frame.error) throw new Error(frame.error.message);
        show(frame);
        wait = SHORTEST_WAIT_MS;
      }
      health("bad", "The server has closed the connection");
    } catch (error) {
      if (error instanceof KeyNeeded) {
        health("bad", "An API key is needed");
        await askKey(error);
        continue;
      }
      if (error.name === "AbortError") continue;
      health("bad", error instanceof TypeError ? "The server cannot be reached" : error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, LONGEST_WAIT_MS);
  }
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function show(frame) {
  say("model", frame.model);
  const restarts = frame.restarts ? `, ${frame.restarts} restart${frame.restarts > 1 ? "s" : ""} so far` : "";
  health(frame.failure ? "bad" : "good", frame.failure ?? `serving${restarts}`);
  showTiles(frame);
  showLanes(frame);
  showRecent(frame);
}

function health(state, text) {
  byId("health").dataset.state = state;
  say("health-text", text);
  byId("notice").hidden = state !== "bad";
  say("notice", state === "bad" ? text : "");
}

// -- the API key --------------------------------------------------------------------------------

function startKey() {
  byId("forget-key").hidden = !apiKey.get();
  byId("forget-key").addEventListener("click", () => {
    apiKey.forget();
    location.reload();
  });
  byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
}

// One dialog, whoever asks.
function askKey(error) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-error").textContent = apiKey.get() ? error.message : "";
    apiKey.forget();
    dialog.addEventListener("close", () => {
      apiKey.set(byId("key").value);
      byId("key").value = "";
      byId("forget-key").hidden = false;
      asking = null;
      announce("The key is used now");
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
