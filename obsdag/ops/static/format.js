// How numbers and times are written: short, and always with their unit.

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "\u2013";
  if (seconds < 0.0001) return `${(seconds * 1e6).toFixed(0)} \u00b5s`;
  if (seconds < 0.01) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(0)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

// A quantile from buckets: of what is below the first bound, only that is known.
export function quantile(seconds, floor) {
  return seconds !== null && seconds !== undefined && seconds <= floor ? `\u2264 ${duration(floor)}` : duration(seconds);
}

export function count(number) {
  if (number < 10_000) return String(number);
  if (number < 1_000_000) return `${(number / 1e3).toFixed(number < 100_000 ? 1 : 0)} k`;
  return `${(number / 1e6).toFixed(number < 1e8 ? 1 : 0)} M`;
}

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "\u2013";
  if (perSecond === 0) return "0/s";
  if (perSecond < 0.1) return `${(perSecond * 60).toFixed(1)}/min`;
  if (perSecond < 10) return `${perSecond.toFixed(1)}/s`;
  return `${count(Math.round(perSecond))}/s`;
}

export function ago(at, now) {
  const seconds = Math.max(0, now - at);
  return seconds < 1 ? "now" : `${duration(seconds)} ago`;
}

export function clock(at) {
  return new Date(at * 1000).toLocaleTimeString([], { hour12: false });
}

export function plural(number, one, many) {
  return `${count(number)} ${number === 1 ? one : (many ?? one + "s")}`;
}

const STATES = {
  running: "running",
  pool_wait: "waits for a thread or process",
  queued: "queued for a worker",
  service_wait: "waits for a service",
  limit_wait: "waits for a limit",
  retry_wait: "waits for a retry",
  room_wait: "waits for room (loop or map)",
  join_wait: "arrived at a join",
  lent: "its children are under way",
  source_wait: "its loop goes on",
  frozen: "frozen",
  discarded: "discarded, kept readable",
};

export function stateName(state) {
  return STATES[state] ?? state;
}
