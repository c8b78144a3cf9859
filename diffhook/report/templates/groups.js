// Copies of one picture, side by side. Of a group its first member is kept, the others are to spare.
class Groups {
  static most = 12; // that are shown of one

  constructor(data, tiles, blank) {
    Object.assign(this, { tiles, blank, all: data.groups, noun: "groups", kinds: new Set(data.copies), made: new Map() });
    this.closeness = new Map(data.groups.map((members, n) => [members, data.closeness[n]]));
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

  of(members) {
    const made = this.made.get(members) ?? this.make(members);
    made.querySelector("ol").replaceChildren(...members.slice(0, Groups.most).map((i) => this.tiles.of(i)));
    this.tell(members);
    return made;
  }

  make(members) {
    const made = this.blank.content.firstElementChild.cloneNode(true);
    made.querySelector(".closeness").textContent = this.closeness.get(members);
    made.querySelector(".keep").addEventListener("click", () => this.keep(members));
    this.made.set(members, made);
    return made;
  }

  tell(members) {
    const button = this.made.get(members)?.querySelector(".keep");
    if (!button) return;
    button.textContent = this.done(members) ? "Keep all" : members.length > 2 ? `Keep the first of ${members.length.toLocaleString("en")}` : "Keep the first";
  }

  done(members) {
    return members.slice(1).every((i) => excluded.has(i));
  }

  // The first alone; then, at a second click, all.
  keep(members) {
    if (this.done(members)) excluded.set(members, false);
    else excluded.set(members.slice(1), true);
  }

  spare(groups) {
    return groups.flatMap((members) => members.slice(1));
  }
}
