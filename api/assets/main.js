// The page: the view of the swarm in, each part drawn from it.

import { byId, text, plural } from "/ui/dom.js";
import { follow } from "/ui/source.js";
import { map } from "/ui/map.js";
import { tiles, node } from "/ui/tiles.js";
import { requests, failed } from "/ui/lists.js";
import * as panel from "/ui/panel.js";
import * as chat from "/ui/chat.js";

let view = null;

/** Elements live on while the choice of the model changes. */
const choose = (peer, from) => panel.choose(peer, from, byId("model").value || undefined);

function show(said) {
  view = said;
  draw();
}

function draw() {
  if (!view) return;
  text(byId("swarm-name"), view.swarm);
  document.title = `Shoal · ${view.swarm}`;
  const select = byId("model");
  chat.fillSelect(select, view.models);
  select.hidden = view.models.length === 0;
  const model = view.models.find((it) => it.id === select.value) ?? view.models[0];
  text(byId("model-about"), model ? `${plural(model.n_layer, "layer")} · ${plural(model.holders.length + model.holders_left_out, "holder")}` : "");
  tiles(view, model);
  map(view, model, choose);
  requests(view, choose);
  failed(view, choose);
  node(view);
  chat.models(view);
}

byId("model").addEventListener("change", draw);
byId("find").addEventListener("input", draw);
addEventListener("resize", draw);
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("shoal-theme", root.dataset.theme);
});
panel.begin();
chat.begin();
follow(show);
