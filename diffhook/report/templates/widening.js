// Says above the gallery what else than the reason narrows it down, and lets go of it.
class Widening {
  constructor(button) {
    this.button = button;
    button.addEventListener("click", () => this.others.forEach((facet) => facet.choose(() => false)));
    filters.watch(() => this.tell());
  }

  get others() {
    return [...facets.values()].filter(({ name, chosen }) => name !== "reason" && chosen.length);
  }

  tell() {
    const names = this.others.map(({ frame }) => frame.dataset.title.toLowerCase());
    this.button.hidden = names.length === 0;
    this.button.textContent = `Filtered by ${names.join(" and ")}: show all`;
  }
}
if (table) new Widening(document.getElementById("widen"));
