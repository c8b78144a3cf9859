// Narrows the samples down: of one facet any value, of several all. A value's name chooses it alone, its checkbox adds
// it to the others. Counts are of what the other facets leave.
class Facet {
  constructor({ name, of }) {
    Object.assign(this, { name, of, frame: document.getElementById(`facet-${name}`) });
    this.rows = [...this.frame.querySelectorAll("li")];
    const each = (where) => this.rows.map((row) => row.querySelector(where));
    Object.assign(this, { boxes: each("input"), values: each(".value"), counts: each(".number") });
    this.frame.addEventListener("change", () => this.narrow());
    this.frame.addEventListener("click", (event) => {
      const value = this.values.indexOf(event.target.closest(".value"));
      if (value < 0) return;
      if (event.shiftKey || event.ctrlKey || event.metaKey) this.choose((other) => this.boxes[other].checked !== (other === value));
      else this.pick(value);
    });
    this.invert = this.frame.querySelector(".invert");
    this.invert.addEventListener("click", () => this.choose((value) => !this.boxes[value].checked));
    filters.watch(() => this.count());
    this.narrow(); // a browser keeps ticks over a reload
  }

  get chosen() {
    return this.boxes.flatMap((box, value) => (box.checked ? [value] : []));
  }

  // It alone; what alone is chosen already is let go.
  pick(value) {
    const only = this.chosen.length === 1 && this.boxes[value].checked;
    this.choose((other) => other === value && !only);
  }

  choose(keep) {
    this.boxes.forEach((box, value) => { box.checked = keep(value); });
    this.narrow();
  }

  narrow() {
    const chosen = this.boxes.map((box) => box.checked);
    this.values.forEach((value, n) => value.setAttribute("aria-pressed", chosen[n]));
    this.invert.hidden = !chosen.some(Boolean);
    const keep = (values) => (values.some((value) => chosen[value]) ? 1 : 0);
    filters.set(this.name, chosen.some(Boolean) ? Uint8Array.from(this.of, keep) : null);
    this.frame.dispatchEvent(new CustomEvent("narrowed", { bubbles: true }));
  }

  count() {
    const found = new Array(this.rows.length).fill(0);
    for (let i = 0; i < this.of.length; i++) {
      if (filters.fitsBut(i, this.name)) for (const value of this.of[i]) found[value]++;
    }
    found.forEach((count, value) => {
      this.counts[value].textContent = count.toLocaleString("en");
      this.rows[value].classList.toggle("empty", count === 0);
    });
  }
}
const facets = new Map((table?.facets ?? []).map((facet) => [facet.name, new Facet(facet)]));

const facetList = document.getElementById("facets");
if (facetList) {
  facetList.hidden = false;
  facetList.open = matchMedia("(min-width: 60rem)").matches;
}
