// Elements and words. Text from peers only ever becomes text: nothing here makes markup of a string.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Sets text where it differs: what stays is not read out again. */
export function text(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

/** Makes the children of `parent` those of `items`, keeping elements by key: focus stays where it is. */
export function keyed(parent, items, key, create, update) {
  const known = parent.keyed ?? (parent.keyed = new Map());
  const wanted = new Set();
  let before = null;
  for (const item of items) {
    const name = key(item);
    wanted.add(name);
    let child = known.get(name);
    if (!child) {
      child = create(item);
      known.set(name, child);
    }
    update(child, item);
    const next = before ? before.nextSibling : parent.firstChild;
    if (child !== next) parent.insertBefore(child, next);
    before = child;
  }
  for (const [name, child] of known) {
    if (wanted.has(name)) continue;
    child.remove();
    known.delete(name);
  }
}

/** The end of a peer's id: the first twelve characters are the same for all. */
export const short = (peer) => (peer.length > 7 ? `…${peer.slice(-6)}` : peer);

export const range = ([start, end]) => `${start}..${end}`;

export const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

const grouped = new Intl.NumberFormat("en");
export const whole = (n) => grouped.format(Math.round(n));

/** Three digits. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value >= 99.95) return whole(value);
  return value >= 9.995 ? value.toFixed(1) : String(Number(value.toFixed(2)));
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit + 1 < units.length) {
    n /= 1024;
    unit += 1;
  }
  return `${figure(n)} ${units[unit]}`;
}

/** A time in words, short. */
export function time(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.0995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

export const millis = (ms) => (ms === null || ms === undefined ? "–" : `${figure(ms)} ms`);

/** Colours of requests, the same in the map and in the list. */
export const inkOf = (id) => `ink-${id % 6}`;
