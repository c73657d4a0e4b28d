// One peer: what it says of itself, what was seen of it, and why it is or is not used.

import { byId, el, text, short, range, figure, bytes, time, millis, plural, whole } from "/ui/dom.js";
import { ask, refusal } from "/ui/source.js";
import { definitions } from "/ui/tiles.js";

const REFRESH_MS = 5000;
let shown = null;

/** Opens the panel for a peer; `from` gets the focus back. */
export function choose(peer, from, model) {
  close();
  shown = { peer, from, model, timer: 0 };
  const panel = byId("panel");
  text(byId("panel-title"), `Peer ${short(peer)}`);
  byId("panel-body").replaceChildren(el("p", { class: "dim" }, "looking…"));
  panel.hidden = false;
  byId("panel-close").focus();
  look(shown);
}

export function close() {
  if (!shown) return;
  clearTimeout(shown.timer);
  const { from } = shown;
  shown = null;
  byId("panel").hidden = true;
  if (from?.isConnected) from.focus();
}

export function begin() {
  byId("panel-close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("key-dialog").open) close();
  });
}

async function look(mine) {
  const model = mine.model ? `/${encodeURIComponent(mine.model)}` : "";
  let parts;
  try {
    const response = await ask(`/swarm/peers/${encodeURIComponent(mine.peer)}${model}`);
    parts = response.ok ? detail(await response.json()) : [el("p", {}, await refusal(response))];
  } catch (error) {
    parts = [el("p", {}, `not to be had just now: ${error.message}`)];
  }
  if (shown !== mine) return;
  byId("panel-body").replaceChildren(...parts);
  mine.timer = setTimeout(() => look(mine), REFRESH_MS);
}

const section = (title, ...parts) => el("section", {}, el("h3", {}, title), ...parts);
const spans = (list) => list.map(range).join(", ") || "none";
const ago = (seconds) => (seconds === null || seconds === undefined ? "" : ` · measured ${time(seconds)} ago`);

function detail(peer) {
  const parts = [el("p", { class: "id" }, peer.peer)];
  if (peer.why) parts.push(why(peer.why));
  parts.push(section("Seen from here", seen(peer)));
  if (!peer.alive) return parts;
  for (const held of peer.models) parts.push(section(`Holds of ${held.name || held.model.slice(0, 12)}`, holds(held)));
  if (!peer.models.length) parts.push(section("Holds", el("p", {}, "Nothing now: it is paused, or has just come.")));
  parts.push(section("It says", definitions([
    ["program", peer.agent || "–"],
    ["heard", `${time(peer.heard_s_ago)} ago`],
    ["queue", plural(peer.queue, "frame")],
    ["uplink", peer.uplink_bytes_s === null ? "not measured" : `${bytes(peer.uplink_bytes_s)}/s${ago(peer.uplink_s_ago)}`],
  ])));
  if (peer.neighbours.length) {
    const near = peer.neighbours.slice(0, 12).map((other) => [short(other.peer), millis(other.rtt_ms)]);
    parts.push(section("Its round trips", definitions(near)));
  }
  parts.push(section("Addresses", el("ul", { class: "plain addrs" }, ...peer.addrs.map((addr) => el("li", {}, addr)))));
  return parts;
}

function why(it) {
  const used = it.layers.length > 0;
  const head = used ? `Used for layers ${spans(it.layers)}` : it.stands_by.length ? `Stands by for layers ${spans(it.stands_by)}` : "Not used now";
  const rows = it.parts ? [
    ["network", `${it.parts.network_measured ? "" : "≈ "}${millis(it.parts.network)}`],
    ["queue", millis(it.parts.queue)],
    ["being a hop", millis(it.parts.overhead)],
    ["compute", millis(it.parts.compute)],
  ] : [];
  return section("Why it is or is not used", el("p", { class: "verdict", "data-state": used ? "good" : it.stands_by.length ? "warn" : "" }, head), el("p", {}, it.text), rows.length ? el("p", { class: "dim small" }, "a token, by the planner's figures:") : null, rows.length ? definitions(rows) : null);
}

function seen(peer) {
  const facts = [["connection", peer.unreachable ? "could not be reached" : peer.connected ? "open" : "none"], ["round trip", millis(peer.rtt_ms)]];
  if (peer.seen) {
    facts.push(["failures", `${whole(peer.seen.failures)}, the last ${time(peer.seen.s_ago)} ago`]);
    facts.push(["the last", peer.seen.last]);
    facts.push(["forgiven", peer.seen.left_alone_s ? `left alone for another ${time(peer.seen.left_alone_s)}; one failure less each time it serves` : "asked again when needed; one failure less each time it serves"]);
  } else {
    facts.push(["failures", "none that is not forgiven"]);
  }
  return definitions(facts);
}

function holds(held) {
  return definitions([
    ["serves", spans(held.live)],
    ["will serve", spans(held.intended)],
    ...(held.experts.length ? [["experts", held.experts.join("; ")]] : []),
    ...(held.island.length ? [["experts with", held.island.map(short).join(" ")]] : []),
    ["gives shards of", spans(held.stored)],
    ["speed", `${figure(held.layer_tokens_s)} tokens/s·layer${ago(held.measured_s_ago)}`],
    ["free KV", `${whole(held.free_cells)} positions of one layer`],
    ["context", `${whole(held.n_ctx_max)} at most`],
    ["memory", held.layer_bytes_max === null ? "its layers stay" : `${bytes(held.layer_bytes_max)} for layers`],
    ["numerics", held.numerics],
  ]);
}
