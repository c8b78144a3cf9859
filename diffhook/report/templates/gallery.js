// Shows the samples that the filters leave: one by one in an order, or side by side with what they are compared to.
class Gallery {
  constructor(data, pager, tiles, views) {
    Object.assign(this, { data, pager, tiles, views, all: [...data.ids.keys()], last: -1, shifted: false });
    this.controls = document.getElementById("gallery-controls");
    this.sheet = document.getElementById("gallery");
    this.sizes = { large: pager.size, small: 4 * pager.size };
    this.orders = [this.all, ...data.keys, data.ids]; // as the menu names them
    this.words = this.all.map((i) => (data.reasons[i] ?? []).flat().join(" ").toLowerCase());
    this.found = this.all;
    this.listen();
    this.controls.hidden = false;
    this.narrow();
    this.turnSize();
    filters.watch(() => this.follow());
  }

  listen() {
    const { controls, sheet } = this;
    const act = { order: () => this.show(), tiles: () => this.turnSize() };
    controls.addEventListener("input", ({ target }) => (act[target.name] ?? (() => this.narrow()))());
    controls.addEventListener("submit", (event) => event.preventDefault());
    for (const name of ["pointerdown", "keydown"]) {
      sheet.addEventListener(name, (event) => { this.shifted = event.shiftKey; });
    }
    sheet.addEventListener("change", ({ target }) => this.choose(this.tiles.rank(target), target.checked));
    sheet.addEventListener("click", (event) => event.target.matches(".look") && this.open(event.target));
    sheet.addEventListener("dblclick", (event) => event.target.closest("label") && this.open(event.target));
    document.getElementById("select-all").addEventListener("click", () => excluded.set(this.found, true));
    document.getElementById("keep-one").addEventListener("click", () => excluded.set(this.view.spare(this.items), true));
  }

  // With Shift, all from the last one on.
  choose(i, on) {
    const from = this.found.indexOf(this.last), to = this.found.indexOf(i);
    const range = this.shifted && from >= 0 && to >= 0;
    excluded.set(range ? this.found.slice(Math.min(from, to), Math.max(from, to) + 1) : [i], on);
    this.last = i;
  }

  open(element) {
    const i = this.tiles.rank(element);
    if (i !== undefined) detail.open(i);
  }

  // Names are searched before words: reasons name other samples.
  search(find) {
    const { ids, listed } = this.data, id = find.replace(/^#/, "");
    const called = (i) => String(ids[i]) === id || (listed[i] !== ids[i] && String(listed[i]).toLowerCase().includes(find));
    return this.mask(this.all.some(called) ? called : (i) => this.words[i].includes(find));
  }

  mask(keep) {
    return Uint8Array.from(this.all, (i) => (keep(i) ? 1 : 0));
  }

  narrow() {
    const find = this.controls.find.value.trim().toLowerCase();
    filters.set("find", find ? this.search(find) : null);
    filters.set("chosen", this.controls.chosen.checked ? this.mask((i) => excluded.has(i)) : null);
  }

  // Who asks for copies or for labels alone sees them side by side, and anything else one by one.
  follow() {
    const facet = facets.get("reason");
    const kinds = facet ? facet.chosen.map((value) => facet.values[value].textContent) : [];
    const asked = Object.keys(this.views).find((name) => kinds.length && kinds.every((kind) => this.views[name].kinds.has(kind)));
    if (asked !== this.asked) this.controls.order.value = asked ?? "0";
    this.asked = asked;
    this.show();
  }

  sorted() {
    const keys = this.orders[Number(this.controls.order.value)];
    const found = this.all.filter((i) => filters.fits(i));
    return keys === this.all ? found : found.sort((a, b) => (keys[a] ?? Infinity) - (keys[b] ?? Infinity) || a - b);
  }

  show() {
    const name = this.controls.order.value;
    this.view = this.views[name];
    this.items = this.view ? this.view.items() : this.sorted();
    this.found = this.view ? this.items.flatMap((item) => this.view.ranks(item)) : this.items;
    for (const each of Object.keys(this.views)) this.sheet.classList.toggle(each, each === name);
    this.pager.show(this.items, (item) => (this.view ?? this.tiles).of(item), this.view?.noun);
    this.tell();
  }

  tell() {
    const button = (name, hidden, text) => Object.assign(document.getElementById(name), { hidden, textContent: text });
    const spare = this.view?.spare ? this.view.spare(this.items).length : 0;
    button("select-all", Boolean(this.view?.spare), `Select all found (${this.found.length.toLocaleString("en")})`);
    button("keep-one", !this.view?.spare, `Keep one of each (select ${spare.toLocaleString("en")})`);
    document.getElementById("gallery-empty").hidden = this.found.length > 0;
  }

  turnSize() {
    const size = this.controls.tiles.value;
    this.sheet.classList.toggle("dense", size === "small");
    this.pager.resize(this.sizes[size]);
  }
}

const sheet = document.getElementById("atlas");
const atlas = sheet ? sheet.decode().then(() => sheet, () => null) : Promise.resolve(null);
const blank = (name) => document.getElementById(name);
let tiles = null, gallery = null;
if (table) {
  const pager = pagers.get("gallery"), first = pager.items;
  tiles = new Tiles(table, first, blank("tile"), atlas);
  excluded.set([...first.keys()].filter((i) => tiles.of(i).querySelector("input").checked), true); // kept over a reload
  const views = {};
  if (table.groups.length) views.groups = new Groups(table, tiles, blank("group"));
  if (table.doubts) views.doubts = new Doubts(table.doubts, tiles, blank("doubt"));
  gallery = new Gallery(table, pager, tiles, views);
  new SelectionBar(document.getElementById("selection"));
}
