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

// The bar that counts what is selected and hands it out.
class SelectionBar {
  constructor(bar) {
    this.bar = bar;
    this.copyLabel = this.find("copy").textContent;
    const on = (name, act) => this.find(name).addEventListener("click", act);
    on("undo", () => excluded.undo());
    on("select-none", () => excluded.clear());
    on("copy", () => this.copy());
    on("download", () => this.download());
    excluded.watch(() => this.tell());
    bar.hidden = false;
  }

  find(name) {
    return document.getElementById(name);
  }

  tell() {
    const many = excluded.names().length;
    const told = `${many.toLocaleString("en")} ${many === 1 ? "sample" : "samples"} selected`;
    this.find("selection-count").textContent = many ? told : "Nothing selected";
    for (const name of ["select-none", "copy", "download"]) this.find(name).disabled = !many;
    this.find("undo").disabled = !excluded.past.length;
    this.bar.classList.toggle("active", many > 0);
  }

  async copy() {
    const button = this.find("copy");
    try {
      await navigator.clipboard.writeText(excluded.list());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here: download";
    }
    setTimeout(() => { button.textContent = this.copyLabel; }, 2000);
  }

  download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([excluded.list()], { type: "text/plain" }));
    link.download = "exclude.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
