// Copies of one picture, side by side. Of a group its first member is kept, the others are to spare.
class Groups {
  static most = 12; // that are shown of one

  constructor(data, tiles, excluded, blank) {
    Object.assign(this, { tiles, excluded, blank, all: data.groups, shown: data.groups, made: new Map(), asked: false });
    this.group = new Map(data.groups.flatMap((members) => members.map((i) => [i, members])));
    this.reason = data.facets.find(({ name }) => name === "reason");
    this.copies = new Set(data.copies);
  }

  of(members) {
    const made = this.made.get(members) ?? this.make(members);
    made.querySelector("ol").replaceChildren(...members.slice(0, Groups.most).map((i) => this.tiles.of(i)));
    this.tell(members, made);
    return made;
  }

  make(members) {
    const made = this.blank.content.firstElementChild.cloneNode(true);
    this.made.set(members, made);
    return made;
  }

  members(element) {
    const frame = element.closest(".group");
    return [...this.made].find(([, made]) => made === frame)?.[0];
  }

  refresh(i) {
    const members = this.group.get(i), made = this.made.get(members);
    if (made) this.tell(members, made);
  }

  tell(members, made) {
    const done = members.slice(1).every((i) => this.excluded.has(i));
    made.querySelector(".keep").textContent = done ? "Keep all" : members.length > 2 ? `Keep the first of ${members.length.toLocaleString("en")}` : "Keep the first";
  }

  spare() {
    return this.shown.flatMap((members) => members.slice(1));
  }

  // The order of the gallery follows the reasons that are asked for, when these change.
  follow(order) {
    const boxes = [...document.querySelectorAll("#facet-reason input")];
    const chosen = this.reason ? this.reason.values.filter((_, n) => boxes[n]?.checked) : [];
    const asked = chosen.length > 0 && chosen.every((kind) => this.copies.has(kind));
    if (asked !== this.asked) order.value = asked ? "groups" : "0";
    this.asked = asked;
  }
}
