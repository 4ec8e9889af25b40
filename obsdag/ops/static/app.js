// The page: listens to the event stream, keeps what it says, and has it drawn once per event.

import { $, el, sync, text } from "./dom.js";
import { duration } from "./format.js";
import { Graph } from "./graph.js";
import { History } from "./history.js";
import * as panels from "./panels.js";
import { Table } from "./table.js";

const SIGNS = { bad: "\u2715", warn: "!", good: "\u2713", info: "\u00b7" };
const PHASES = { accepting: "good", running: "good", draining: "warn", stopped: "bad", starting: "warn" };
const TROUBLE_S = 60;

let feed = null; // the last full event, kept up to date by ticks
let current = 0; // the executor that is shown
let paused = false;
let heardAt = performance.now();
let chosenTask = null;

const graph = new Graph($("canvas"), $("crumbs"), $("graph-note"), choose);
const table = new Table(choose);

// --- events

function listen() {
  const source = new EventSource("api/events");
  source.addEventListener("full", (event) => take(JSON.parse(event.data), begin));
  source.addEventListener("tick", (event) => take(JSON.parse(event.data), goOn));
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
}

function take(message, how) {
  heardAt = performance.now();
  how(message);
  for (const executor of feed.executors) executor.history.see(executor.state, feed.at);
  if (!paused) draw();
  pulse();
}

function begin(message) {
  const before = feed;
  feed = message;
  feed.executors.forEach((executor, n) => {
    executor.rows = executor.rows.map(named);
    executor.failedAt = new Map();
    executor.history = before?.executors[n]?.history ?? new History();
    for (const each of executor.state.failures) noteFailure(executor, each);
  });
  if (current >= feed.executors.length) current = 0;
  if (feed.executors.length && (before === null || !sameGraph(before.executors[current], feed.executors[current]))) open(current);
}

function sameGraph(a, b) {
  return a !== undefined && JSON.stringify(a.graph) === JSON.stringify(b.graph);
}

function goOn(message) {
  feed.at = message.at;
  message.executors.forEach((change, n) => {
    const executor = feed.executors[n];
    executor.state = change.state;
    for (const [i, row] of Object.entries(change.rows)) {
      const before = executor.rows[i];
      executor.rows[i] = named(row);
      if (executor.rows[i].failed > before.failed) executor.failedAt.set(Number(i), feed.at);
    }
  });
}

function named(row) {
  return Object.fromEntries(feed.columns.map((name, n) => [name, row[n]]));
}

function noteFailure(executor, failure) {
  const i = executor.graph.findIndex((node) => node.id === failure.task);
  if (i >= 0) executor.failedAt.set(i, Math.max(failure.at, executor.failedAt.get(i) ?? 0));
}

// --- drawing

function open(n) {
  current = n;
  const executor = feed.executors[n];
  chosenTask = null;
  graph.open(executor.graph);
  table.open(executor.graph);
  choose(null);
}

function draw() {
  const none = feed.executors.length === 0;
  $("empty").hidden = !none;
  $("main").hidden = none;
  if (none) return;
  const executor = feed.executors[current];
  const { state, rows, history } = executor;
  const task = chosenTask === null ? null : executor.graph[chosenTask].id;
  head(state);
  findings(state.findings);
  panels.tiles(state, history, feed.at);
  panels.where(state);
  if (graph.turned()) graph.layOut();
  graph.fill(rows, (i) => feed.at - (executor.failedAt.get(i) ?? -Infinity) < TROUBLE_S, state.floor_s);
  table.fill(rows, state.floor_s);
  panels.failures(state, feed.at, task, feed.jaeger_url);
  panels.joins(state, task);
  panels.slowest(state, task, feed.jaeger_url);
  panels.workers(state, task);
  panels.flow(state);
  panels.shards(state);
  panels.traces(state, feed.at, feed.jaeger_url);
  panels.events(state, feed.at);
}

function head(state) {
  const name = state.engine && state.engine !== "obsdag" && state.engine !== state.dag ? `${state.engine} / ${state.dag}` : state.dag;
  text($("name"), name);
  const worst = document.querySelector("#findings li.bad") ? "\u2715 " : "";
  if (document.title !== `${worst}${name}`) document.title = `${worst}${name}`;
  $("phase").hidden = false;
  text($("phase"), state.phase);
  $("phase").className = `chip ${PHASES[state.phase] ?? ""}`;
  $("tabs").hidden = feed.executors.length < 2;
  sync($("tabs"), feed.executors.map((each, n) => ({ n, name: each.state.dag })), (each) => each.n,
    (each) => el("button", { type: "button", onclick: () => show(each.n) }),
    (button, each) => {
      text(button, each.name);
      button.setAttribute("aria-current", String(each.n === current));
    });
}

function show(n) {
  if (n >= feed.executors.length || n === current) return;
  open(n);
  draw();
}

function findings(found) {
  sync($("findings"), found, ([, , place], n) => place + found.filter((each) => each[2] === place).indexOf(found[n]),
    ([, , place]) => el("li", {}, el("span", { class: "sign", "aria-hidden": "true" }), place ? el("span", {}, el("a", { href: `#${place}` })) : el("span", {})),
    (made, [level, sentence, place]) => {
      made.className = level;
      text(made.children[0], SIGNS[level]);
      text(place ? made.children[1].firstChild : made.children[1], sentence);
    });
}

function pulse() {
  const silent = (performance.now() - heardAt) / 1000;
  const lost = silent > 3 * (feed?.interval_s ?? 1) + 2;
  document.body.classList.toggle("stale", lost && feed !== null);
  text($("live"), lost ? `no update for ${duration(silent)}: reconnecting` : paused ? "paused" : feed === null ? "connecting" : "live");
  $("live").className = `live ${lost ? "off" : paused || feed === null ? "" : "on"}`;
}

// --- choosing, keys

function choose(index) {
  chosenTask = index;
  graph.select(index);
  table.select(index);
  $("filter").hidden = index === null;
  if (index !== null) text($("filter-name"), feed.executors[current].graph[index].id);
  if (feed !== null && table.rows !== undefined) draw();
}

function pause() {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  text($("pause"), paused ? "Go on" : "Pause");
  if (!paused) draw();
  pulse();
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function kept() {
  try {
    return localStorage.getItem("obsdag-theme");
  } catch {
    return null; // a browser that keeps nothing
  }
}

function dress(theme) {
  document.documentElement.dataset.theme = theme ?? (dark.matches ? "dark" : "light");
}

function turnTheme() {
  const order = dark.matches ? [null, "light", "dark"] : [null, "dark", "light"];
  const next = order[(order.indexOf(kept()) + 1) % 3];
  try {
    if (next === null) localStorage.removeItem("obsdag-theme");
    else localStorage.setItem("obsdag-theme", next);
  } catch {
    // as above: it lasts for this page only
  }
  dress(next);
}

function goTo(id) {
  const place = $(id);
  place.scrollIntoView({ block: "start" });
  place.setAttribute("tabindex", "-1");
  place.focus({ preventScroll: true });
}

const KEYS = {
  "/": () => $("search").focus(),
  f: () => goTo("failures"),
  j: () => goTo("joins"),
  w: () => goTo("workers"),
  g: () => goTo("graph"),
  p: pause,
  t: turnTheme,
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = event.target instanceof HTMLInputElement;
  if (event.key === "Escape") {
    if (typing && event.target.value) return; // the browser empties the field
    if (typing) event.target.blur();
    if (chosenTask !== null) choose(null);
    else graph.up();
  } else if (!typing && KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  } else if (!typing && event.key >= "1" && event.key <= "9" && feed) {
    show(Number(event.key) - 1);
  }
});

$("pause").addEventListener("click", pause);
$("theme").addEventListener("click", turnTheme);
$("help").addEventListener("click", () => $("keys").showModal());
$("filter-off").addEventListener("click", () => choose(null));
dark.addEventListener("change", () => dress(kept()));
dress(kept());
setInterval(pulse, 1000);
listen();
