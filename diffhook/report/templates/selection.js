// What the next run is to leave out, by rank; handed out as an exclude list. The last change can be undone.
class Selection {
  constructor(data) {
    this.data = data;
    this.ranks = new Set();
    this.watchers = [];
    this.past = [];
  }

  has(i) {
    return this.ranks.has(i);
  }

  set(ranks, on) {
    const changed = ranks.filter((i) => this.has(i) !== on);
    if (!changed.length) return;
    this.past.push([changed, !on]);
    this.change(changed, on);
  }

  // Selects them, or lets go of them where all are.
  toggle(ranks) {
    this.set(ranks, !ranks.every((i) => this.has(i)));
  }

  clear() {
    this.set([...this.ranks], false);
  }

  undo() {
    const last = this.past.pop();
    if (last) this.change(...last);
  }

  change(ranks, on) {
    for (const i of ranks) this.ranks[on ? "add" : "delete"](i);
    for (const watcher of this.watchers) watcher(ranks);
  }

  watch(watcher) {
    this.watchers.push(watcher);
    watcher([...this.ranks]);
  }

  // As Ranking.excluded: the rows of a sample that stand out by themselves are left out as one.
  names() {
    const own = new Map([...this.ranks].map((i) => [this.data.ids[i], this.data.listed[i]]));
    return [...own].sort(([a], [b]) => a - b).map(([, name]) => name);
  }

  list() {
    return this.names().map((name) => name + "\n").join("");
  }
}
const excluded = new Selection(table);
