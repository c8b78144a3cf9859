// All samples of the ranking, by rank, and which of them are asked for. Whoever narrows them down sets a mask
// under a name of its own; whoever shows them watches.
const table = JSON.parse(document.getElementById("samples")?.textContent ?? "null");

class Filters {
  constructor(count) {
    this.count = count;
    this.masks = new Map();
    this.failed = new Uint8Array(count); // how many masks leave a sample out
    this.watchers = [];
  }

  // A mask has a 1 for each sample that stays; null: all do.
  set(name, mask) {
    if (mask) this.masks.set(name, mask);
    else if (!this.masks.delete(name)) return;
    this.failed.fill(0);
    for (const each of this.masks.values()) {
      for (let i = 0; i < this.count; i++) this.failed[i] += 1 - each[i];
    }
    for (const watcher of this.watchers) watcher();
  }

  fits(i) {
    return this.failed[i] === 0;
  }

  // Whether the other masks keep it.
  fitsBut(i, name) {
    const own = this.masks.get(name);
    return this.failed[i] === (own && !own[i] ? 1 : 0);
  }

  watch(watcher) {
    this.watchers.push(watcher);
    watcher();
  }
}
const filters = table && new Filters(table.ids.length);
