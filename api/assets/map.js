// The map: one row a peer, layers from left to right, and the routes of running requests as lines through them.
// Many peers with the same layers share a row, which opens.

import { byId, el, svg, text, keyed, short, range, figure, time, millis, plural, whole, inkOf } from "/ui/dom.js";

/** More holders than this are put together. */
const SINGLES_MAX = 40;
/** Rows that are drawn. */
const ROWS_MAX = 200;
/** Routes that are drawn: more are a tangle. */
const ROUTES_MAX = 8;
/** Layers with a cell each in the row of copies; more are put together where they are alike. */
const CELLS_MAX = 48;
/** An advert comes every ten seconds. */
const OLD_S = 25;

const COLUMNS = [
  ["layers", "layers", "by their first layer"],
  ["speed", "tokens/s·layer", "rows a second through one layer, as measured"],
  ["rtt", "RTT", "round trip from here"],
  ["heard", "heard", "age of its advert"],
  ["queue", "queue", "frames that wait for it"],
];
let order = "layers";
const open = new Set();
let redraw = () => {};

/** Draws the map of `model`; `choose` is told which peer was clicked. */
export function map(view, model, choose) {
  redraw = () => map(view, model, choose);
  const root = byId("map");
  if (!model) {
    empty(root, view, choose);
    return;
  }
  if (!root.querySelector(".rows")) build(root);
  const peers = new Map(view.peers.map((peer) => [peer.peer, peer]));
  const rows = rowsOf(model, peers);
  root.style.setProperty("--n", model.n_layer);
  root.classList.toggle("fine", model.n_layer > 48);
  ruler(root.querySelector(".ruler"), model.n_layer);
  copies(root.querySelector(".copies"), model);
  const fastest = Math.max(1, ...model.holders.map((holder) => holder.layer_tokens_s ?? 0));
  keyed(root.querySelector(".rows"), rows.shown, (row) => row.key, create(choose), (element, row) => update(element, row, model, fastest));
  routes(root.querySelector(".routes"), view, model, rows.shown);
  text(root.querySelector(".rest"), rest(rows, model));
  const idle = view.peers.filter((peer) => peer.idle);
  const chips = root.querySelector(".idle");
  chips.hidden = idle.length === 0;
  keyed(chips, idle.slice(0, 24), (peer) => peer.peer, (peer) => chip(peer, choose), () => {});
  for (const button of root.querySelectorAll(".head button")) {
    button.setAttribute("aria-pressed", String(button.dataset.order === order));
  }
}

function empty(root, view, choose) {
  root.keyed = null;
  const words = view.peers.length
    ? `${plural(view.peers.length, "peer")}, and nobody serves a model yet.`
    : "No peers yet.";
  root.replaceChildren(el("div", { class: "empty" },
    el("p", {}, words),
    el("p", { class: "dim" }, "Start a node: `shoal node --model demo`. It appears here by itself."),
    ...view.peers.slice(0, 24).map((peer) => chip(peer, choose))));
}

const chip = (peer, choose) => el("button", { type: "button", class: "chip", title: "it holds nothing now: paused, or just come", onclick: (event) => choose(peer.peer, event.currentTarget) }, short(peer.peer));

function build(root) {
  const sort = ([name, words, title]) => el("button", {
    type: "button", "data-order": name, title: `sort: ${title}`, "aria-pressed": "false",
    onclick: () => { order = name; redraw(); },
  }, words);
  const [layers, ...others] = COLUMNS.map(sort);
  root.replaceChildren(
    el("div", { class: "head line" }, el("span", { class: "who" }, "peer"), el("span", { class: "over" }, layers, el("span", { class: "legend", "aria-hidden": "true" }, el("i", { class: "swatch live" }), "served", el("i", { class: "swatch coming" }), "loading", el("i", { class: "swatch route" }), "a request's route")), ...others, el("span", { class: "chips-head" })),
    el("div", { class: "line ruler-line", "aria-hidden": "true" }, el("span"), el("div", { class: "ruler" })),
    el("div", { class: "line copies-line" }, el("span", { class: "who" }, "copies"), el("div", { class: "copies", role: "img" })),
    el("div", { class: "body" }, el("ol", { class: "rows" }), svg("svg", { class: "routes", preserveAspectRatio: "none", "aria-hidden": "true" })),
    el("p", { class: "rest dim" }),
    el("div", { class: "idle", "data-label": "hold nothing:" }));
}

/** Rows in order: single peers, or groups of those with the same layers. */
function rowsOf(model, peers) {
  const wanted = byId("find").value.trim().toLowerCase();
  byId("find-label").hidden = model.holders.length <= 12;
  const holders = model.holders
    .filter((holder) => !wanted || holder.peer.toLowerCase().includes(wanted))
    .map((holder) => ({ ...holder, at: peers.get(holder.peer) ?? {} }));
  let rows;
  if (holders.length <= SINGLES_MAX) {
    rows = holders.map((holder) => ({ key: holder.peer, holders: [holder] }));
  } else {
    const groups = new Map();
    for (const holder of holders) {
      const name = JSON.stringify([holder.live, holder.intended]);
      groups.set(name, [...(groups.get(name) ?? []), holder]);
    }
    rows = [...groups].map(([name, members]) => ({ key: members.length > 1 ? name : members[0].peer, holders: members }));
  }
  const first = (row) => row.holders[0].live[0]?.[0] ?? row.holders[0].intended[0]?.[0] ?? Infinity;
  const best = (row, of, none) => Math.min(...row.holders.map((holder) => of(holder) ?? none));
  const by = {
    layers: first,
    speed: (row) => -Math.max(...row.holders.map((holder) => holder.layer_tokens_s ?? 0)),
    rtt: (row) => best(row, (holder) => holder.at.rtt_ms, Infinity),
    heard: (row) => best(row, (holder) => holder.at.heard_s_ago, Infinity),
    queue: (row) => -Math.max(...row.holders.map((holder) => holder.at.queue ?? 0)),
  }[order];
  const keys = new Map(rows.map((row) => [row, by(row)]));
  rows.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    return x === y ? first(a) - first(b) || (a.key < b.key ? -1 : 1) : x - y;
  });
  const shown = rows.flatMap((row) => open.has(row.key) && row.holders.length > 1
    ? [row, ...row.holders.map((holder) => ({ key: holder.peer, holders: [holder], member: true }))]
    : [row]);
  return { shown: shown.slice(0, ROWS_MAX), all: shown.length, found: holders.length };
}

function rest(rows, model) {
  const parts = [];
  if (rows.all > ROWS_MAX) parts.push(`${plural(rows.all - ROWS_MAX, "row")} more: find a peer by the end of its id`);
  if (model.holders_left_out) parts.push(`${plural(model.holders_left_out, "further holder")} counted in the copies`);
  if (rows.found === 0 && model.holders.length) parts.push("no such peer holds this model");
  return parts.join(" · ");
}

const create = (choose) => (row) => {
  const cells = ["speed", "rtt", "heard", "queue", "chips"].map((name) => el("span", { class: `cell ${name}` }));
  const button = el("button", { type: "button", class: "line row" }, el("span", { class: "who" }), el("span", { class: "bar" }), ...cells);
  button.addEventListener("click", () => {
    if (row.holders.length > 1) {
      if (!open.delete(row.key)) open.add(row.key);
      redraw();
    } else {
      choose(row.holders[0].peer, button);
    }
  });
  return el("li", {}, button);
};

function update(element, row, model, fastest) {
  const button = element.firstChild;
  const group = row.holders.length > 1;
  const one = row.holders[0];
  const name = group ? `${whole(row.holders.length)} peers` : short(one.peer);
  text(button.querySelector(".who"), name);
  button.classList.toggle("member", row.member === true);
  button.classList.toggle("group", group);
  if (group) button.setAttribute("aria-expanded", String(open.has(row.key)));
  button.title = group ? "peers with the same layers: click to see each" : one.peer;
  const speeds = row.holders.map((holder) => holder.layer_tokens_s).filter((speed) => speed !== null && speed !== undefined);
  const mean = speeds.length ? speeds.reduce((a, b) => a + b, 0) / speeds.length : null;
  const speed = button.querySelector(".speed");
  text(speed, figure(mean));
  speed.style.setProperty("--part", (mean ?? 0) / fastest);
  speed.title = one.measured_s_ago === null || group ? "" : `measured ${time(one.measured_s_ago)} ago`;
  const low = (of) => row.holders.map(of).filter((value) => Number.isFinite(value)).sort((a, b) => a - b)[0];
  const rtt = low((holder) => holder.at.rtt_ms ?? NaN);
  const heard = low((holder) => holder.at.heard_s_ago ?? NaN);
  text(button.querySelector(".rtt"), rtt === undefined ? "–" : millis(rtt));
  text(button.querySelector(".heard"), heard === undefined ? "–" : time(Math.max(heard, 0.1)));
  button.querySelector(".heard").classList.toggle("old", heard > OLD_S);
  const queue = Math.max(...row.holders.map((holder) => holder.at.queue ?? 0));
  text(button.querySelector(".queue"), String(queue));
  const state = group ? null : stateOf(one);
  const chips = button.querySelector(".chips");
  text(chips, state ?? "");
  chips.title = state ?? "";
  button.dataset.state = state ? "off" : "";
  bar(button.querySelector(".bar"), one, model.n_layer);
  const live = one.live.map(range).join(", ") || "nothing yet";
  button.setAttribute("aria-label", `${group ? name : `peer ${short(one.peer)}`} serves layers ${live}; ${figure(mean)} tokens a second and layer; heard ${heard === undefined ? "never" : time(heard)} ago${state ? `; ${state}` : ""}`);
}

function stateOf({ at, live }) {
  if (at.leaving) return "leaving";
  if (at.unreachable) return "unreachable";
  if (at.left_alone_s > 0) return `left alone ${time(at.left_alone_s)}`;
  if (live.length === 0) return "loading";
  return null;
}

function bar(element, holder, layers) {
  const said = JSON.stringify([holder.live, holder.intended, layers]);
  if (element.said === said) return;
  element.said = said;
  const block = (kind) => (span) => {
    const piece = el("span", { class: `span ${kind}` }, kind === "live" ? range(span) : "");
    piece.style.left = `${(100 * span[0]) / layers}%`;
    piece.style.width = `${(100 * (span[1] - span[0])) / layers}%`;
    return piece;
  };
  element.replaceChildren(...holder.intended.map(block("coming")), ...holder.live.map(block("live")));
}

function ruler(element, layers) {
  if (element.layers === layers) return;
  element.layers = layers;
  const step = [1, 2, 4, 8, 10, 16, 20, 32, 50, 64, 100, 128].find((each) => layers / each <= 16) ?? 128;
  const marks = [];
  for (let layer = 0; layer < layers; layer += step) {
    const mark = el("span", {}, String(layer));
    mark.style.left = `${(100 * layer) / layers}%`;
    marks.push(mark);
  }
  element.replaceChildren(...marks);
}

/** Layers that follow each other and have as many copies, unless there are few. */
function copies(element, model) {
  const said = JSON.stringify(model.copies);
  if (element.said === said) return;
  element.said = said;
  const runs = [];
  model.copies.forEach((n, layer) => {
    const lastRun = runs[runs.length - 1];
    if (lastRun && lastRun.n === n && model.n_layer > CELLS_MAX) lastRun.end = layer + 1;
    else runs.push({ n, start: layer, end: layer + 1 });
  });
  element.replaceChildren(...runs.map(({ n, start, end }) => {
    const cell = el("span", { "data-copies": n === 0 ? "none" : n === 1 ? "one" : "more", title: `${end - start === 1 ? `layer ${start}` : `layers ${start}..${end}`}: ${n === 0 ? "nobody" : plural(n, "holder")}` }, n > 999 ? "999+" : String(n));
    cell.style.left = `${(100 * start) / model.n_layer}%`;
    cell.style.width = `${(100 * (end - start)) / model.n_layer}%`;
    return cell;
  }));
  const least = Math.min(...model.copies);
  const gaps = model.gaps.map(range).join(", ");
  element.setAttribute("aria-label", model.complete ? `every layer has ${least} holders or more` : `nobody holds layers ${gaps}`);
}

/** Lines along the rows of a route's peers, and down or up where the next one takes over. */
function routes(picture, view, model, rows) {
  const at = new Map();
  rows.forEach((row, index) => row.holders.forEach((holder) => {
    if (!at.has(holder.peer) || row.member) at.set(holder.peer, index);
  }));
  const drawn = view.requests.filter((request) => request.model_id === model.id && request.route.length).slice(0, ROUTES_MAX);
  const height = byId("map").querySelector(".rows").clientHeight;
  const step = rows.length ? height / rows.length : 0;
  picture.setAttribute("viewBox", `0 0 1000 ${Math.max(height, 1)}`);
  picture.style.height = `${height}px`;
  const lines = drawn.map((request, nth) => {
    // From the lower edge of the bars upwards: what is written in them stays readable.
    const shift = 7.5 - nth * Math.min(4, 15 / drawn.length);
    const points = [];
    for (const hop of request.route) {
      const row = at.get(hop.peer);
      if (row === undefined) continue;
      const y = (row + 0.5) * step + shift;
      points.push([(1000 * hop.layers[0]) / model.n_layer, y], [(1000 * hop.layers[1]) / model.n_layer, y]);
    }
    const path = points.map(([x, y], i) => `${i ? "L" : "M"}${Math.min(Math.max(x, 2), 998).toFixed(1)} ${y.toFixed(1)}`).join("");
    const stands = request.stage === "answers" && request.last_token_s_ago < 1.5 ? "" : " still";
    return { id: request.id, path, kind: `${inkOf(request.id)}${stands}${request.lost ? " lost" : ""}` };
  });
  keyed(picture, lines, (line) => line.id, () => svg("g", {}, svg("path", { class: "halo" }), svg("path", { class: "route" })), (element, line) => {
    for (const path of element.children) path.setAttribute("d", line.path);
    element.setAttribute("class", line.kind);
  });
}
