// What a person should know first: the engine's state as a few sentences, the worst first.

import { ago, count, duration, plural, rate } from "./format.js";

const RECENT_S = 60;

// One executor over time, as far as this page has seen it. now: seconds, of the server's clock.
export class Story {
  constructor() {
    this.ended = null;
    this.endedAt = null;
    this.saturatedSince = null;
    this.rejected = null;
    this.rejectedAt = null;
    this.history = [];
  }

  see(state, now) {
    const counts = state.counts;
    const ended = Object.entries(counts).reduce((sum, [name, number]) => sum + (name === "entered" ? 0 : number), 0);
    if (this.ended === null || ended !== this.ended || !state.living) this.endedAt = now;
    this.ended = ended;
    const backlog = state.lanes.new + state.lanes.continuing + state.pending;
    const full = state.workers.busy >= state.capacity.workers && backlog > 0;
    this.saturatedSince = full ? (this.saturatedSince ?? now) : null;
    const rejected = Object.values(state.rejected).reduce((sum, each) => sum + each, 0);
    if (this.rejected !== null && rejected > this.rejected) this.rejectedAt = now;
    this.rejected = rejected;
    const recent = this.history.at(-1);
    if (recent === undefined || now - recent.at >= 0.5)
      this.history.push({ at: now, in: state.rate.entered, out: state.rate.ended, living: state.living, pending: backlog, failed: counts.failed + counts.stalled });
    if (this.history.length > 150) this.history.shift();
  }

  // [level (bad, warn, good, info), sentence, id of the panel that tells more]
  findings(state, now) {
    const found = [...blocked(state), ...trouble(state, now), ...this.pressure(state, now), ...joins(state), ...events(state, now)];
    const quiet = now - this.endedAt;
    if (state.living && quiet >= 30 && !found.some(([level]) => level === "bad"))
      found.push(["warn", `Nothing has finished for ${duration(quiet)}, and ${plural(state.living, "context lives", "contexts live")}`, "slowest"]);
    const rank = { bad: 0, warn: 1, info: 2 };
    found.sort((a, b) => rank[a[0]] - rank[b[0]]);
    if (!found.some(([level]) => level !== "info")) found.unshift(["good", well(state), null]);
    return found;
  }

  pressure(state, now) {
    const found = [];
    if (this.rejectedAt !== null && now - this.rejectedAt < RECENT_S)
      found.push(["bad", `Work is turned away: ${Object.entries(state.rejected).map(([why, number]) => `${count(number)} ${why.replaceAll("_", " ")}`).join(", ")} so far`, "flow"]);
    if (this.saturatedSince !== null && now - this.saturatedSince >= 10)
      found.push(["warn", `All ${state.capacity.workers} workers have been busy for ${duration(now - this.saturatedSince)}, with ${count(state.lanes.new + state.lanes.continuing + state.pending)} contexts queued`, "workers"]);
    for (const limit of state.limits)
      if (limit.waiting > 0) found.push(["info", `${plural(limit.waiting, "context waits", "contexts wait")} for the limit ${limit.name}`, "flow"]);
    return found;
  }
}

function blocked(state) {
  if (!state.blocked) return [];
  const by = state.blocked.task ? `by task ${state.blocked.task}` : "by something outside of the tasks";
  return [["bad", `The event loop has been blocked for ${duration(state.blocked.for_s)} ${by}: nothing else can run`, "events"]];
}

function trouble(state, now) {
  const found = [];
  if (state.unaccounted)
    found.push(["bad", `${count(Math.abs(state.unaccounted))} contexts are unaccounted for: a bug of obsdag, please report it`, "where"]);
  const recent = state.failures.filter((each) => now - each.at < RECENT_S);
  const stalled = recent.filter((each) => each.error === "stalled");
  const failed = recent.filter((each) => each.error !== "stalled");
  const atLeast = recent.length >= 50 ? "at least " : "";
  if (stalled.length)
    found.push(["bad", `${atLeast}${plural(stalled.length, "context has", "contexts have")} stalled within a minute, the last at ${stalled[0].task}`, "failures"]);
  if (failed.length)
    found.push(["bad", `${atLeast}${plural(failed.length, "context")} failed within a minute, the last at ${failed[0].task}: ${failed[0].error}`, "failures"]);
  const older = state.counts.failed + state.counts.stalled;
  if (!recent.length && older)
    found.push(["info", `${plural(older, "context has", "contexts have")} failed or stalled before${state.failures.length ? `, the last ${ago(state.failures[0].at, now)}` : ""}`, "failures"]);
  if (state.phase === "draining")
    found.push(["warn", `Draining: nothing more is accepted, ${plural(state.in_flight, "submission")} in flight`, "slowest"]);
  if (state.phase === "stopped") found.push(["warn", "Stopped: nothing is accepted", null]);
  return found;
}

function joins(state) {
  const longest = state.joins[0];
  if (longest === undefined || longest.waits_s < 30) return [];
  return [["warn", `A join has waited for ${duration(longest.waits_s)}: ${longest.join ?? "?"} of ${longest.context}`, "joins"]];
}

function events(state, now) {
  const rare = state.events.filter((each) => now - each.at < 600 && each.event !== "phase" && each.event !== "drained");
  if (!rare.length || state.blocked) return [];
  return [["warn", `${rare[0].event} ${ago(rare[0].at, now)}: ${rare[0].text}`, "events"]];
}

function well(state) {
  if (!state.runs) return state.last_run ? `Idle. The last run ended as ${state.last_run.outcome} after ${duration(state.last_run.duration_s)}` : "Idle: nothing has run yet";
  if (!state.living) return "All well: nothing is under way";
  return `All well: ${plural(state.living, "context")} under way, ${rate(state.rate.ended)} finish`;
}
