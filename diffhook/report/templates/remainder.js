// Of what the gallery found: what is worth judging, with what is decided already at the end, and what waits for a click and
// is then before all that was shown.
class Remainder {
  constructor(frame, rest, changed) {
    Object.assign(this, { frame, rest, whole: false });
    rest.addEventListener("click", () => { this.whole = true; changed(); });
  }

  // For another list.
  forget() {
    this.whole = false;
  }

  // Decided before: nothing moves while one decides.
  arrange(items, decided, view) {
    const asked = ["find", "chosen", "marked"].some((name) => filters.masks.has(name)); // for these very samples
    const parted = view && !asked, worth = parted ? items.filter((item) => view.worth(item)) : items;
    const others = this.whole && parted ? items.filter((item) => !view.worth(item)) : [];
    const shown = worth.length ? [...others, ...worth] : items, waiting = items.length - shown.length;
    this.found = shown;
    this.said = view?.told(shown.length, waiting) ?? "";
    this.rest.hidden = !waiting;
    this.rest.textContent = `Show the other ${waiting.toLocaleString("en")}`;
    return [...shown.filter((item) => !decided(item)), ...shown.filter(decided)];
  }

  tell(decided) {
    const done = this.found.filter(decided).length, left = (this.found.length - done).toLocaleString("en");
    this.frame.textContent = [done ? `${left} left.` : "", this.said].filter(Boolean).join(" ");
  }
}
