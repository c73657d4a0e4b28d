// A chat: the conversation lives in this page and nowhere else.

import { byId, el, text, short, figure, plural, time } from "/ui/dom.js";
import { ask, events, refusal } from "/ui/source.js";

let messages = [];
let running = null;

export function begin() {
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("chat-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  byId("chat-stop").addEventListener("click", () => running?.abort());
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    byId("chat-log").replaceChildren(hint());
    byId("chat-text").focus();
  });
  byId("chat-log").replaceChildren(hint());
}

const hint = () => el("p", { class: "dim hint" }, "Ask the swarm something. Your machines answer together; the map shows the way it takes.");

/** Models that can be asked: those that are whole. */
export function models(view) {
  const select = byId("chat-model");
  const whole = view.models.filter((model) => model.complete);
  fillSelect(select, whole);
  byId("chat-send").disabled = whole.length === 0 || running !== null;
  byId("chat-text").placeholder = whole.length ? "Ask the swarm…" : "No model is whole yet.";
}

/** Options of a select, kept while they are the same; ids are what counts. */
export function fillSelect(select, list) {
  const said = JSON.stringify(list.map((model) => [model.id, model.name]));
  if (select.said === said) return;
  select.said = said;
  const chosen = select.value;
  select.replaceChildren(...list.map((model) => el("option", { value: model.id }, model.name || model.id.slice(0, 12))));
  if (list.some((model) => model.id === chosen)) select.value = chosen;
}

function bubble(who, words) {
  const log = byId("chat-log");
  log.querySelector(".hint")?.remove();
  const said = el("div", { class: "said" }, words);
  const about = el("div", { class: "about dim small" });
  log.append(el("div", { class: `bubble ${who}` }, el("span", { class: "sr" }, who === "user" ? "You: " : "Model: "), said, about));
  log.scrollTop = log.scrollHeight;
  return { said, about };
}

async function send() {
  const box = byId("chat-text");
  const words = box.value.trim();
  const model = byId("chat-model").value;
  if (!words || running || !model) return;
  box.value = "";
  messages.push({ role: "user", content: words });
  bubble("user", words);
  const mine = bubble("assistant", "");
  running = new AbortController();
  buttons();
  let answer = "";
  try {
    answer = await stream(model, mine, (sofar) => { answer = sofar; });
  } catch (error) {
    const stopped = error.name === "AbortError";
    mine.about.textContent = stopped ? "stopped" : error.message;
    mine.about.classList.toggle("bad", !stopped);
  }
  if (answer) messages.push({ role: "assistant", content: answer });
  else messages.pop();
  running = null;
  buttons();
}

function buttons() {
  byId("chat-stop").hidden = running === null;
  byId("chat-send").hidden = running !== null;
  byId("chat-send").disabled = false;
}

async function stream(model, mine, keep) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } }),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  let answer = "";
  let facts = null;
  let tokens = 0;
  const log = byId("chat-log");
  for await (const [, data] of events(response)) {
    if (data === "[DONE]") break;
    const part = JSON.parse(data);
    if (part.error) throw new Error(String(part.error.message));
    answer += part.choices?.[0]?.delta?.content ?? "";
    keep(answer);
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    text(mine.said, answer);
    if (atEnd) log.scrollTop = log.scrollHeight;
    facts = part.x_shoal ?? facts;
    tokens = part.usage?.completion_tokens ?? tokens;
  }
  if (facts) about(mine.about, facts, tokens);
  log.scrollTop = log.scrollHeight;
  return answer;
}

function about(element, facts, tokens) {
  const route = facts.route.map((hop) => `${short(hop.peer)} ${hop.layers}`).join(" → ");
  const lines = [
    `${plural(tokens, "token")} at ${figure(facts.tokens_per_s)}/s · first after ${time((facts.timings.open_ms + facts.timings.prompt_ms) / 1000)} · privacy ${facts.privacy}`,
    route,
  ];
  if (facts.recoveries.length) lines.push(`${plural(facts.recoveries.length, "hop")} lost on the way and got over`);
  element.replaceChildren(...lines.map((line) => el("div", {}, line)));
}
