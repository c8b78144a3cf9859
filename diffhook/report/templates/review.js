// Walks through the reasons in the order in which one acts on them, and counts what is selected for each.
class Review {
  constructor(facet) {
    Object.assign(this, { facet, done: facet.rows.map((row) => row.querySelector(".done")) });
    this.next = document.getElementById("next-reason");
    this.next.hidden = false;
    this.next.addEventListener("click", () => this.turn(1));
    facet.frame.addEventListener("narrowed", () => this.tell());
    facet.frame.addEventListener("click", (event) => event.target.closest(".value") && this.face());
    excluded.watch(() => this.count());
    this.tell();
  }

  // The value before or after those that are chosen.
  beside(by) {
    const { chosen, values } = this.facet;
    const at = (by > 0 ? chosen.at(-1) : chosen[0]) ?? (by > 0 ? -1 : values.length);
    const to = at + by;
    return values[to] && values[to].textContent !== "none" ? to : -1;
  }

  turn(by) {
    const to = this.beside(by);
    if (to < 0) return;
    this.facet.pick(to);
    this.face();
  }

  face() {
    document.getElementById("gallery-controls").scrollIntoView({ block: "start" });
  }

  tell() {
    const to = this.beside(1);
    this.next.disabled = to < 0;
    this.next.textContent = to < 0 ? "No further reason" : `${this.facet.chosen.length ? "Next" : "Begin"}: ${this.facet.values[to].textContent} ›`;
  }

  count() {
    const found = new Array(this.done.length).fill(0);
    for (const i of excluded.ranks) for (const value of this.facet.of[i]) found[value]++;
    this.done.forEach((mark, value) => { mark.textContent = found[value] ? `${found[value].toLocaleString("en")} selected` : ""; });
  }
}
const review = facets.has("reason") ? new Review(facets.get("reason")) : null;
