// Requests that run and that ended, and peers that failed.

import { byId, el, text, keyed, short, range, figure, time, millis, plural, whole, inkOf } from "/ui/dom.js";

const STAGES = {
  begins: "reads the request",
  opens: "waits for a place",
  prompt: "computes the prompt",
  answers: "answers",
  reroutes: "lost a hop, reroutes",
  waits: "waits for a route",
};
const OUTCOMES = { answered: "answered", "hung-up": "stopped", failed: "failed" };
/** Requests that are shown. */
const RUNNING_MAX = 24;
const FINISHED_MAX = 12;
const FAILED_MAX = 12;

/** Both lists of requests. */
export function requests(view, choose) {
  const running = view.requests.length + view.requests_left_out;
  text(byId("requests-about"), running ? `${plural(running, "request")} running` : "none running");
  keyed(byId("requests"), view.requests.slice(0, RUNNING_MAX), (request) => request.id, () => create(choose), (element, request) => update(element, request, choose));
  const table = byId("finished");
  table.hidden = view.finished.length === 0;
  keyed(table.tBodies[0], view.finished.slice(0, FINISHED_MAX), (ended) => ended.id, row, (element, ended) => text(element.firstChild, `${time(ended.s_ago)} ago`));
}

function create() {
  return el("li", { class: "request" },
    el("div", { class: "request-line" },
      el("strong", { class: "model" }), el("span", { class: "stage" }), el("span", { class: "grow" }),
      el("span", { class: "num speed" }), el("span", { class: "num count" }), el("span", { class: "num last" })),
    el("div", { class: "hops" }),
    el("ul", { class: "plain losses" }));
}

function update(element, request, choose) {
  const troubled = request.stage === "reroutes" || request.stage === "waits";
  element.className = `request ${inkOf(request.id)}`;
  element.dataset.state = troubled ? "bad" : request.last_token_s_ago > 1.5 && request.tokens ? "warn" : "";
  const set = (name, words) => text(element.querySelector(`.${name}`), words);
  set("model", `#${request.id} ${request.model || "…"}`);
  set("stage", STAGES[request.stage] ?? request.stage);
  set("speed", `${figure(request.tokens_per_s)} tokens/s`);
  set("count", `${plural(request.tokens, "token")} · position ${whole(request.pos)}`);
  set("last", request.tokens ? `last token ${time(request.last_token_s_ago)} ago` : `${time(request.age_s)} so far`);
  const stands = new Map(request.standbys.map((hop) => [range(hop.layers), hop.peer]));
  const hops = element.querySelector(".hops");
  const said = JSON.stringify([request.route, request.standbys]);
  if (hops.said !== said) {
    hops.said = said;
    hops.replaceChildren(...request.route.map((hop) => {
      const standby = stands.get(range(hop.layers));
      return el("button", { type: "button", class: "chip", title: standby ? `${short(standby)} stands by` : "nobody stands by", onclick: (event) => choose(hop.peer, event.currentTarget) },
        el("b", {}, range(hop.layers)), ` ${short(hop.peer)}`, standby ? el("span", { class: "dim" }, ` +${short(standby)}`) : null);
    }));
  }
  const losses = request.recoveries.slice(-3).map((loss) => `at ${whole(loss.pos)}: ${loss.lost} · new route after ${millis(loss.took_ms)}`);
  if (request.lost) losses.push(request.lost);
  if (request.stalls) losses.push(`stood still ${plural(request.stalls, "time")}, ${time(request.longest_gap_s)} at longest`);
  keyed(element.querySelector(".losses"), losses, (words) => words, (words) => el("li", {}, words), () => {});
}

function row(ended) {
  const cell = (words, kind) => el("td", kind ? { class: kind } : {}, words);
  const hops = ended.route.map((hop) => `${short(hop.peer)} ${range(hop.layers)}`);
  const route = cell(ended.route.length ? plural(ended.route.length, "hop") : "–", "dim");
  route.title = hops.join(" → ");
  const how = cell(OUTCOMES[ended.outcome] ?? ended.outcome, `how ${ended.outcome}`);
  if (ended.why) how.title = ended.why;
  return el("tr", {}, cell(""), cell(ended.model || "–"), how,
    cell(whole(ended.prompt_tokens), "num"), cell(whole(ended.tokens), "num"), cell(ended.tokens ? figure(ended.tokens_per_s) : "–", "num"),
    cell(millis(ended.first_token_ms), "num"), cell(whole(ended.stalls), "num"), cell(whole(ended.recoveries), "num"), route);
}

/** Who failed this server, and whether it is asked again. */
export function failed(view, choose) {
  const list = byId("failed");
  const all = view.failed.slice(0, FAILED_MAX);
  const items = all.length ? all : [null];
  keyed(list, items, (it) => it?.peer ?? "", (it) => {
    if (!it) return el("li", { class: "dim" }, "None that is not forgiven.");
    return el("li", {}, el("button", { type: "button", class: "chip", onclick: (event) => choose(it.peer, event.currentTarget) }, short(it.peer)), el("span", { class: "state" }), el("div", { class: "dim small why" }));
  }, (element, it) => {
    if (!it) return;
    const state = it.left_alone_s ? `left alone for ${time(it.left_alone_s)}` : "asked again when needed";
    text(element.querySelector(".state"), ` ${plural(it.failures, "failure")} · ${state}`);
    text(element.querySelector(".why"), `${time(it.s_ago)} ago: ${it.last}`);
  });
}
