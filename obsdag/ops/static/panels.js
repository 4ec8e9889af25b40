// The lists: each is filled from the state of one executor, narrowed to one task if one is chosen.

import { $, bar, el, empty, sync, text } from "./dom.js";
import { ago, clock, count, duration, plural, rate, stateName } from "./format.js";

function traceLink(jaeger, trace, label = "trace") {
  if (!trace) return null;
  if (!jaeger) return el("span", { class: "mono", title: `trace ${trace}` }, `${label} ${trace.slice(0, 8)}`);
  return el("a", { href: `${jaeger}/trace/${encodeURIComponent(trace)}`, target: "_blank", rel: "noopener noreferrer" }, label);
}

const SHOWN = 8;
const whole = new Set(); // lists that a person asked to see to their end

function fill(id, items, none, key, make, update) {
  const list = $(id);
  if (items.length) sync(list, whole.has(id) ? items : items.slice(0, SHOWN), key, make, update);
  else empty(list, none);
  if (list.more === undefined) {
    list.more = el("button", { type: "button", class: "more", onclick: () => toggle(id) });
    list.after(list.more);
  }
  list.more.hidden = items.length <= SHOWN;
  text(list.more, whole.has(id) ? "Fewer" : `${count(items.length - SHOWN)} more`);
  list.again = () => fill(id, items, none, key, make, update);
}

function toggle(id) {
  if (!whole.delete(id)) whole.add(id);
  $(id).again();
}

// A list entry of fixed parts: {name: element}, found again on update.
function entry(parts, ...children) {
  const made = el("li", {}, ...children);
  made.parts = parts;
  return made;
}

const span = (kind) => el("span", { class: kind });

export function tiles(state, history, now) {
  const { counts, capacity } = state;
  const oldest = state.slowest[0];
  const trend = (name) => history.of(name);
  const backlog = state.lanes.new + state.lanes.continuing + state.pending;
  const bad = counts.failed + counts.stalled;
  const shown = [
    { name: "Entering", value: rate(state.rate.entered), note: `${count(counts.entered)} so far`, trend: trend("in") },
    { name: "Finishing", value: rate(state.rate.ended), note: `${count(counts.output)} outputs`, trend: trend("out") },
    { name: "Living", value: count(state.living), note: `of ${count(capacity.live_contexts)} at most`, trend: trend("living") },
    { name: "Queued", value: count(backlog), note: state.serving ? `${count(state.pending)} pending of ${count(capacity.pending)}` : "waiting for a worker", trend: trend("backlog"), level: backlog > 0 && state.workers.busy >= capacity.workers ? "warn" : "" },
    { name: "Workers busy", value: `${count(state.workers.busy)} / ${count(capacity.workers)}`, note: "" },
    { name: "Failed or stalled", value: count(bad), note: bad ? `${count(counts.failed)} failed, ${count(counts.stalled)} stalled` : "none", level: bad ? "bad" : "" },
    { name: "Oldest root", value: oldest ? duration(oldest.age_s) : "\u2013", note: oldest ? `at ${oldest.tasks[0]}` : "nothing is under way" },
    { name: state.runs ? "Running for" : "Last run", value: state.runs ? duration(state.up_s) : state.last_run ? duration(state.last_run.duration_s) : "\u2013", note: state.runs ? (state.serving ? `${count(state.in_flight)} in flight` : "") : state.last_run ? `${state.last_run.outcome}, ${ago(state.last_run.at, now)}` : "none yet" },
  ];
  sync($("tiles"), shown, (each, n) => each.name, makeTile, updateTile);
}

function makeTile(tile) {
  const made = el("div", { class: "tile" }, el("span", {}, tile.name), el("b"), el("small"));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 26");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  if (tile.trend) made.append(svg);
  return made;
}

function updateTile(made, tile) {
  made.className = `tile ${tile.level ?? ""}`;
  text(made.children[1], tile.value);
  text(made.children[2], tile.note);
  if (tile.trend) made.querySelector("path").setAttribute("d", spark(tile.trend));
}

function spark(values) {
  const known = values.map((each) => each ?? 0);
  const top = Math.max(...known, 1e-9);
  if (known.length < 2) return "";
  return "M" + known.map((each, n) => `${((n / (known.length - 1)) * 100).toFixed(1)},${(25 - (each / top) * 23).toFixed(1)}`).join("L");
}

export function where(state) {
  const parts = Object.entries(state.states).map(([name, number]) => [name, number, `${count(number)} ${stateName(name)}`]);
  bar($("where-bar"), parts);
  text($("where-note"), state.living ? `${plural(state.living, "living context")}` : "");
  const shown = parts.filter(([, number]) => number > 0);
  fill("where-legend", shown, "Nothing is under way.", ([name]) => name, ([name]) => el("li", {}, el("i", { class: `s-${name}` }), el("b"), ` ${stateName(name)}`),
    (made, [, number]) => text(made.children[1], count(number)));
}

// Failures that differ in numbers and ids only are one entry: the newest, and how many there are.
function alike(failures) {
  const found = new Map();
  for (const each of failures) {
    const kind = JSON.stringify([each.task, each.error, each.message.replace(/[0-9a-f-]{8,}|\d+/gi, "#")]);
    if (!found.has(kind)) found.set(kind, { kind, newest: each, times: 0 });
    found.get(kind).times += 1;
  }
  return [...found.values()];
}

export function failures(state, now, task, jaeger) {
  const found = state.failures.filter((each) => !task || each.task === task);
  text($("failures-note"), found.length ? `the newest ${found.length}` : "");
  const make = () => {
    const parts = { name: el("b"), error: span(), times: span("times"), age: span(), said: el("div", { class: "said" }), under: el("div", { class: "under" }) };
    parts.said.addEventListener("click", () => parts.said.classList.toggle("whole"));
    return entry(parts, el("div", { class: "line" }, el("span", {}, parts.name, " ", parts.error, " ", parts.times), parts.age), parts.said, parts.under);
  };
  fill("failures-list", alike(found), "None.", (each) => each.kind, make, ({ parts }, { newest, times }) => {
    text(parts.name, newest.task);
    text(parts.error, newest.error);
    parts.error.className = newest.error === "stalled" ? "stalled" : "error";
    text(parts.times, times > 1 ? `\u00d7 ${times}` : "");
    text(parts.age, ago(newest.at, now));
    parts.age.title = clock(newest.at);
    text(parts.said, newest.message);
    if (parts.under.of === newest.at + newest.context) return;
    parts.under.of = newest.at + newest.context;
    const attempts = newest.attempts > 1 ? el("span", {}, `attempt ${newest.attempts}`) : "";
    parts.under.replaceChildren(el("span", { class: "mono" }, newest.context), attempts, traceLink(jaeger, newest.trace_id) ?? "");
  });
}

export function joins(state, task) {
  const found = state.joins.filter((each) => !task || each.join === task || each.from === task);
  text($("joins-note"), found.length ? `the longest ${found.length}` : "");
  const make = () => {
    const parts = { name: el("b"), age: span(), bar: el("div", { class: "bar", role: "img" }), said: span("said"), id: span("mono") };
    return entry(parts, el("div", { class: "line" }, parts.name, parts.age), parts.said, parts.bar, el("div", { class: "under" }, parts.id));
  };
  fill("joins-list", found, "No join waits.", (each) => `${each.context} ${each.from}`, make, ({ parts }, each) => {
    text(parts.name, each.join ?? `below ${each.from}`);
    text(parts.age, each.waits_s ? `waits for ${duration(each.waits_s)}` : "nothing has arrived");
    text(parts.said, waitsFor(each));
    text(parts.id, `${each.context}, from ${each.from}`);
    const ended = Object.values(each.ended).reduce((sum, number) => sum + number, 0);
    const under = each.living - each.arrived;
    bar(parts.bar, [["join_wait", each.arrived, `${count(each.arrived)} arrived`], ["running", under, `${count(under)} under way`], ["discarded", ended, `${count(ended)} ended before`]]);
  });
}

function waitsFor(each) {
  const found = [];
  const under = each.living - each.arrived;
  const at = Object.entries(each.children_at).map(([name, number]) => `${count(number)} at ${name}`).join(", ");
  if (under > 0) found.push(`${plural(under, "child", "children")} under way${at ? ` (${at})` : ""}`);
  if (each.missing.length) found.push(`the parent's ${each.missing.join(", ")}`);
  if (each.pulling) found.push(`${each.from} to end`);
  return `${count(each.arrived)} arrived; for ${found.join("; for ") || "its turn"}`;
}

export function slowest(state, task, jaeger) {
  const found = state.slowest.filter((each) => !task || each.tasks.includes(task));
  text($("slowest-note"), found.length ? "and where their time went" : "");
  const make = (each) => {
    const parts = { id: span("mono"), age: span(), bar: el("div", { class: "bar", role: "img" }), at: span(), most: span() };
    const link = traceLink(jaeger, each.trace_id);
    return entry(parts, el("div", { class: "line" }, el("span", {}, parts.id, " ", link ?? ""), parts.age), parts.bar, el("div", { class: "under" }, parts.at, parts.most));
  };
  fill("slowest-list", found, "Nothing is under way.", (each) => each.context, make, ({ parts }, each) => {
    text(parts.id, each.context);
    text(parts.age, duration(each.age_s));
    text(parts.at, each.state === "running" ? `runs ${each.tasks.join(", ")}` : `at ${each.tasks[0]}: ${stateName(each.state)}`);
    const shares = Object.entries(each.ledger).sort((a, b) => b[1] - a[1]);
    text(parts.most, shares.slice(0, 3).map(([name, seconds]) => `${duration(seconds)} ${name.replaceAll("_", " ")}`).join(", "));
    bar(parts.bar, shares.map(([name, seconds]) => [name, seconds, `${duration(seconds)} ${stateName(name)}`]));
  });
}

export function workers(state, task) {
  const { busy, doing } = state.workers;
  const found = doing.filter((each) => !task || each.tasks.includes(task));
  text($("workers-note"), `${count(busy)} of ${count(state.capacity.workers)} busy${found.length < busy && !task ? `, the longest ${found.length}` : ""}`);
  const make = () => {
    const parts = { what: span(), age: span() };
    return entry(parts, el("div", { class: "line" }, parts.what, parts.age));
  };
  fill("workers-list", found, busy ? "None at this task." : "All are idle.", (each) => `${each.run} ${each.n}`, make, ({ parts }, each) => {
    const what = each.tasks.length ? each.tasks.join(", ") : "between tasks";
    if (parts.what.said !== `${each.n}${what}${each.context}`) {
      parts.what.said = `${each.n}${what}${each.context}`;
      parts.what.replaceChildren(el("span", { class: "mono number" }, String(each.n)), el("b", {}, what), " ", el("span", { class: "mono" }, each.context));
    }
    text(parts.age, duration(each.for_s));
  });
}

export function flow(state) {
  const { lanes, timers, limits, pools, capacity } = state;
  const pairs = [
    ["Lane: going on", count(lanes.continuing)], ["Lane: new", count(lanes.new)], ["Lane: next of a loop", count(lanes.loop)],
    ...(state.serving ? [["Pending", `${count(state.pending)} of ${count(capacity.pending)}`, state.pending >= capacity.pending && capacity.pending > 0]] : []),
    ...(state.serving ? [["Results nobody has fetched", count(state.unfetched)]] : []),
    ["Timers", timers.armed ? `${count(timers.armed)} armed${timers.next_in_s === null ? "" : `, next in ${duration(timers.next_in_s)}`}` : "none"],
    ...limits.map((each) => [`Limit: ${each.name}`, limitSaid(each), each.waiting > 0]),
    ...pools.map((each) => [`Pool: ${each.pool}`, `${count(each.busy)} of ${count(each.size)} busy, ${count(each.queued)} queued${each.abandoned ? `, ${count(each.abandoned)} abandoned` : ""}`, each.abandoned > 0]),
    ...Object.entries(state.rejected).map(([why, number]) => [`Turned away: ${why.replaceAll("_", " ")}`, count(number), true]),
  ];
  sync($("flow-list"), pairs, ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd")), (made, [, value, warn]) => {
    text(made.children[1], value);
    made.children[1].className = warn ? "warn" : "";
  });
}

function limitSaid(each) {
  const used = each.in_use === null || each.in_use === undefined ? "" : `${count(each.in_use)} of ${count(each.capacity)} in use, `;
  const next = each.waiting && each.next_in_s !== null ? `, next in ${duration(each.next_in_s)}` : "";
  return `${used}${count(each.waiting)} waiting${next}`;
}

export function shards(state) {
  $("shards").hidden = !state.shards;
  if (!state.shards) return;
  text($("shards-note"), `${plural(state.shards.length, "engine")} on a cluster`);
  const make = () => {
    const parts = { name: el("b"), said: span(), target: span("mono") };
    return entry(parts, el("div", { class: "line" }, el("span", {}, parts.name, " ", parts.said), parts.target));
  };
  fill("shards-list", state.shards, "None has started yet.", (each) => each.name, make, ({ parts }, each) => {
    text(parts.name, each.name);
    const ahead = each.ahead ? `, ${count(each.ahead)} of them waiting there` : "";
    text(parts.said, each.phase === "running" ? `${plural(each.roots, "root")}${ahead}` : each.phase);
    text(parts.target, each.target);
  });
}

export function traces(state, now, jaeger) {
  text($("traces-note"), state.traces.length && !jaeger ? "links need jaeger_url" : "");
  fill("traces-list", state.traces, "None kept yet.", (each) => each.trace_id, (each) => {
    const parts = { age: span() };
    const outcome = el("span", { class: each.outcome === "failed" ? "error" : each.outcome === "stalled" ? "stalled" : "" }, each.outcome);
    return entry(parts, el("div", { class: "line" }, el("span", {}, traceLink(jaeger, each.trace_id, each.trace_id.slice(0, 16)), " ", outcome, ` after ${duration(each.seconds)}`), parts.age));
  }, ({ parts }, each) => text(parts.age, ago(each.at, now)));
}

export function events(state, now) {
  fill("events-list", state.events, "None.", (each) => `${each.at}${each.text}`, (each) => {
    const parts = { age: el("span", { title: clock(each.at) }) };
    const detail = each.detail ? el("div", { class: "under mono" }, each.detail) : "";
    return entry(parts, el("div", { class: "line" }, el("span", {}, el("b", {}, each.event), ` ${each.text}`), parts.age), detail);
  }, ({ parts }, each) => text(parts.age, ago(each.at, now)));
}
