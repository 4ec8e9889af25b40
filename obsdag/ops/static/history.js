// What the page has seen of one executor over time, for its small curves.

const MOST = 150;

export class History {
  constructor() {
    this.points = [];
  }

  see(state, now) {
    const recent = this.points.at(-1);
    if (recent !== undefined && now - recent.at < 0.5) return;
    const { lanes, pending, living, rate } = state;
    this.points.push({ at: now, in: rate.entered, out: rate.ended, living, backlog: lanes.new + lanes.continuing + pending });
    if (this.points.length > MOST) this.points.shift();
  }

  of(name) {
    return this.points.map((each) => each[name]);
  }
}
