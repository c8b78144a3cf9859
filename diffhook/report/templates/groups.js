// Copies of one picture, side by side. Of two a click keeps either; of more the first that is left, and the others go.
class Groups {
  static most = 12; // that are shown of one

  constructor(data, tiles, blank) {
    Object.assign(this, { tiles, blank, all: data.groups, noun: "groups", kinds: new Set(data.copies), made: new Map() });
    this.closeness = new Map(data.groups.map((members, n) => [members, data.closeness[n]]));
    this.variants = new Set(data.groups.filter((_, n) => data.variants[n]));
    this.group = new Map(data.groups.flatMap((members) => members.map((i) => [i, members])));
    excluded.watch((changed) => {
      for (const members of new Set(changed.map((i) => this.group.get(i)))) this.tell(members);
    });
  }

  items() {
    return this.all.filter((members) => members.some((i) => filters.fits(i)));
  }

  ranks(members) {
    return members;
  }

  left(members) {
    return members.filter((i) => !excluded.has(i));
  }

  decided(members) {
    return this.left(members).length < 2;
  }

  worth(members) {
    return !this.variants.has(members);
  }

  told(shown, others) {
    return others ? `${others} more groups differ in one place only, as variants of a motif do.` : "";
  }

  of(members) {
    const made = this.made.get(members) ?? this.make(members);
    made.querySelector("ol").replaceChildren(...members.slice(0, Groups.most).map((i) => this.tiles.of(i)));
    this.tell(members);
    return made;
  }

  make(members) {
    const made = this.blank.content.firstElementChild.cloneNode(true);
    made.classList.toggle("two", members.length === 2);
    made.querySelector(".closeness").textContent = this.closeness.get(members);
    made.querySelector(".keep").addEventListener("click", () => this.keep(members, this.left(members)[0]));
    made.querySelector(".keep-right").addEventListener("click", () => this.keep(members, members[1]));
    made.querySelector(".restore").addEventListener("click", () => excluded.set(members, false));
    this.made.set(members, made);
    return made;
  }

  tell(members) {
    const made = this.made.get(members);
    if (!made) return;
    const left = this.left(members), two = members.length === 2, decided = left.length < 2;
    const button = (where, hidden, text) => Object.assign(made.querySelector(where), { hidden, textContent: text });
    button(".keep", decided, two ? "Keep left" : left[0] === members[0] ? `Keep the first of ${members.length.toLocaleString("en")}` : `Keep one of the ${left.length} left`);
    button(".keep-right", decided || !two, "Keep right");
    button(".restore", !decided, left.length ? "Keep all" : `${two ? "Both" : "All"} excluded · restore`);
  }

  keep(members, kept) {
    excluded.set(members.filter((i) => i !== kept), true);
  }

  // What is still to be selected so that one of each is left.
  spare(groups) {
    return groups.flatMap((members) => this.left(members).slice(1));
  }
}
