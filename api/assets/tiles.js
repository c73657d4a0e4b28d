// The swarm at a glance: is every layer covered, who is there, how fast, what went wrong.

import { byId, el, svg, text, figure, plural, range, whole, bytes, keyed } from "/ui/dom.js";

/** Seconds of the curve of tokens a second. */
const CURVE_S = 120;
const curve = [];
let last = null;

/** Draws the tiles; `model` is the one that the map shows. */
export function tiles(view, model) {
  measure(view);
  const all = [coverage(model), peers(view), answering(view), speed(), trouble(view)];
  keyed(byId("tiles"), all, (tile) => tile.name, create, update);
}

function create(tile) {
  const words = el("div", { class: "tile-words" }, el("span", { class: "tile-name" }, tile.name), el("strong"), el("span", { class: "dim" }));
  return el("div", { class: "tile" }, words, tile.curve ? svg("svg", { class: "curve", viewBox: "0 0 120 40", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { class: "area" }), svg("path", { class: "line" })) : null);
}

function update(element, tile) {
  element.dataset.state = tile.state ?? "";
  text(element.querySelector("strong"), tile.big);
  text(element.querySelector(".dim"), tile.small);
  if (tile.curve) draw(element.querySelector("svg"));
}

function coverage(model) {
  const name = "Coverage";
  if (!model) return { name, big: "no model", small: "nobody serves one yet", state: "warn" };
  const least = Math.min(...model.copies);
  if (model.complete) {
    return {
      name,
      big: `${whole(model.n_layer)} of ${plural(model.n_layer, "layer")}`,
      small: least === 1 ? "one machine lost would leave a gap" : `each held by ${whole(least)} or more`,
      state: least === 1 ? "warn" : "good",
    };
  }
  const missing = model.copies.filter((n) => n === 0).length;
  const gaps = model.gaps.slice(0, 3).map(range).join(", ");
  return {
    name,
    big: `${plural(missing, "layer")} missing`,
    small: `nobody holds ${gaps}${model.gaps.length > 3 ? " …" : ""}`,
    state: "bad",
  };
}

function peers(view) {
  const all = view.peers.length + view.peers_left_out;
  const connected = view.peers.filter((peer) => peer.connected).length;
  const idle = view.peers.filter((peer) => peer.idle).length;
  const off = view.peers.filter((peer) => peer.left_alone_s > 0 || peer.unreachable).length;
  const parts = [`${whole(connected)} connected`];
  if (idle) parts.push(`${whole(idle)} idle`);
  if (off) parts.push(`${whole(off)} avoided`);
  return { name: "Peers", big: whole(all), small: parts.join(" · "), state: all === 0 ? "warn" : off ? "warn" : "good" };
}

function answering(view) {
  const { answered, failed, hung_up } = view.totals;
  const parts = [`${whole(answered)} answered`];
  if (hung_up) parts.push(`${whole(hung_up)} stopped`);
  if (failed) parts.push(`${whole(failed)} failed`);
  const running = view.requests.length + view.requests_left_out;
  return { name: "Requests now", big: whole(running), small: parts.join(" · "), state: running ? "good" : "" };
}

function speed() {
  const now = curve.length ? curve[curve.length - 1] : 0;
  const best = Math.max(0, ...curve);
  return { name: "Tokens/s", big: figure(now), small: `most ${figure(best)} in 2 min`, curve: true };
}

function trouble(view) {
  const { stalls, recoveries } = view.totals;
  const now = view.requests.filter((request) => request.stage === "reroutes" || request.stage === "waits").length;
  return {
    name: "Stalls · failovers",
    big: `${whole(stalls)} · ${whole(recoveries)}`,
    small: now ? `${plural(now, "request")} rerouting now` : "since this server started",
    state: now ? "bad" : stalls ? "warn" : "",
  };
}

/** Tokens since the last look, as a speed. */
function measure(view) {
  const [at, tokens] = [view.at_ms, view.totals.tokens];
  if (last && at > last.at && tokens >= last.tokens) {
    curve.push(((tokens - last.tokens) * 1000) / (at - last.at));
    if (curve.length > CURVE_S) curve.shift();
  }
  if (!last || at !== last.at) last = { at, tokens };
}

function draw(picture) {
  const top = Math.max(1, ...curve);
  const points = curve.map((value, i) => `${120 - (curve.length - 1 - i)} ${(38 - (34 * value) / top).toFixed(1)}`);
  const line = points.length ? `M${points.join("L")}` : "";
  picture.querySelector(".line").setAttribute("d", line);
  picture.querySelector(".area").setAttribute("d", line && `${line}L120 40L${120 - (curve.length - 1)} 40Z`);
}

/** What was moved in the last seconds: the server looks at its node every other second. */
const MOVED_MS = 6000;
let moved = [];

/** What the node of this machine does. */
export function node(view) {
  const root = byId("node");
  const it = view.node;
  if (!it) {
    moved = [];
    root.replaceChildren(el("p", { class: "dim" }, "No node runs in this server's home. `shoal node --model NAME` serves layers from here."));
    return;
  }
  moved = moved.filter((look) => look.peer === it.peer && view.at_ms - look.at < MOVED_MS);
  moved.push({ peer: it.peer, at: view.at_ms, down: it.fetched_bytes, up: it.given_bytes });
  const seconds = Math.max(1, (view.at_ms - moved[0].at) / 1000);
  const down = Math.max(0, it.fetched_bytes - moved[0].down) / seconds;
  const up = Math.max(0, it.given_bytes - moved[0].up) / seconds;
  const disk = it.disk_bytes === null ? "–" : bytes(it.disk_bytes) + (it.disk_bytes_max ? ` of ${bytes(it.disk_bytes_max)}` : "");
  const facts = [
    ["state", `${it.state} · ${plural(it.sessions, "session")}`],
    ["KV", `${bytes(it.kv_bytes)} of ${bytes(it.kv_bytes_max)}`],
    ["weights", bytes(it.tensor_bytes)],
    ["fetched", `${bytes(it.fetched_bytes)} · ${bytes(down)}/s · ${plural(it.shards_done, "shard")}`],
    ["given", `${bytes(it.given_bytes)} · ${bytes(up)}/s${it.upload_bytes_s_max ? ` of ${bytes(it.upload_bytes_s_max)}/s` : ""}`],
    ["on disk", disk],
  ];
  const bars = it.coming.slice(0, 8).map((shard) =>
    el("div", { class: "arriving" },
      el("span", {}, shard.kind || "shard"),
      el("progress", { max: shard.bytes || 1, value: shard.fetched_bytes, "aria-label": `${shard.kind || "shard"}, fetched` }),
      el("span", { class: "num" }, `${bytes(shard.fetched_bytes)} of ${bytes(shard.bytes)}`)));
  root.replaceChildren(definitions(facts), ...bars);
}

/** Names and what they stand for. */
export function definitions(facts) {
  return el("dl", {}, ...facts.flatMap(([name, words]) => [el("dt", {}, name), el("dd", {}, words)]));
}
