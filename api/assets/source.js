// What the server says: asked with the key of this tab, read as it comes, asked again when it breaks off.

import { byId, text } from "/ui/dom.js";

const KEY = "shoal-key";
/** The server says something every second: who is silent for so long is gone. */
const SILENCE_MS = 8000;
const RETRY_MS = [500, 1000, 2000, 5000];
/** A page that nobody sees stops looking after so long. */
const UNSEEN_MS = 30000;
/** Longest event: that of a very large swarm is a megabyte. */
const EVENT_CHARS_MAX = 16 << 20;

/** Asks with the key, if there is one. */
export function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  return fetch(path, { ...options, headers, cache: "no-store" });
}

/** What went wrong, in the server's words. */
export async function refusal(response) {
  try {
    const said = await response.json();
    return String(said.error.message);
  } catch {
    return `the server said ${response.status}`;
  }
}

/** The events of a response, as [name, data]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    if (rest.length > EVENT_CHARS_MAX) throw new Error("an event without end");
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      let name = "message";
      const data = [];
      for (const line of part.split(/\r?\n/)) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (data.length) yield [name, data.join("\n")];
    }
  }
}

/** Asks the person for a key. */
function askForKey(refused) {
  const dialog = byId("key-dialog");
  if (refused) text(byId("key-why"), "That key was refused. Another one?");
  if (!dialog.open) dialog.showModal();
  byId("key").focus();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = () => {
      sessionStorage.setItem(KEY, byId("key").value.trim());
      byId("key").value = "";
      resolve();
    };
    // Escape would leave a page that shows nothing.
    dialog.oncancel = (event) => event.preventDefault();
  });
}

/** Follows the swarm for as long as somebody sees the page; `show` gets the whole view each time. */
export async function follow(show) {
  let view = null;
  let failures = 0;
  byId("forget").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    location.reload();
  });
  for (;;) {
    await seen();
    const stop = new AbortController();
    const unsee = stopWhenUnseen(stop);
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort(), SILENCE_MS);
    };
    try {
      heard();
      const response = await ask("/swarm/events", { signal: stop.signal });
      if (response.status === 401) {
        clearTimeout(silence);
        state("key", "key needed");
        await askForKey(sessionStorage.getItem(KEY) !== null);
        continue;
      }
      if (!response.ok) throw new Error(await refusal(response));
      byId("forget").hidden = sessionStorage.getItem(KEY) === null;
      for await (const [name, data] of events(response)) {
        heard();
        failures = 0;
        const said = JSON.parse(data);
        view = name === "live" ? { ...view, ...said } : said;
        state("live", "live");
        notice("");
        show(view);
      }
      throw new Error("the server ended");
    } catch (error) {
      clearTimeout(silence);
      if (document.hidden) continue;
      const wait = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
      failures += 1;
      state("lost", "connection lost, retrying");
      if (failures > 1) notice(`Not connected: ${error.message}. What is shown is old; trying again.`);
      await new Promise((resolve) => setTimeout(resolve, wait));
    } finally {
      clearTimeout(silence);
      unsee();
      stop.abort();
    }
  }
}

function state(name, words) {
  const link = byId("link");
  link.dataset.state = name;
  text(link, words);
  document.body.classList.toggle("stale", name === "lost");
}

export function notice(words) {
  text(byId("notice"), words);
  byId("notice").hidden = words === "";
}

function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function stopWhenUnseen(stop) {
  let timer = 0;
  const changed = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(() => stop.abort(), UNSEEN_MS);
  };
  document.addEventListener("visibilitychange", changed);
  return () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", changed);
  };
}
