// Samples that another label may fit better, each beside those members of its own and of the other that look like it.
class Doubts {
  constructor(data, tiles, blank) {
    Object.assign(this, { tiles, blank, ...data, noun: "samples", kinds: new Set([data.title]), made: new Map() });
    this.place = new Map(data.positions.map((i, n) => [i, n]));
  }

  // Strongest first.
  items() {
    return this.positions.filter((i) => filters.fits(i));
  }

  ranks(i) {
    return [i];
  }

  decided(i) {
    return excluded.has(i);
  }

  worth(i) {
    return this.place.get(i) < this.first;
  }

  told(shown, others) {
    return others ? `The strongest ${this.share} of all samples; the other ${others} are rarely wrong.` : "";
  }

  of(i) {
    const made = this.made.get(i) ?? this.make(i);
    made.querySelector("ol").replaceChildren(this.tiles.of(i));
    return made;
  }

  make(i) {
    const made = this.blank.content.firstElementChild.cloneNode(true), n = this.place.get(i), [own, better] = this.members[n];
    this.compare(made.querySelector(".own"), this.labels[this.own[n]], own);
    this.compare(made.querySelector(".better"), `${this.labels[this.better[n]]}?`, better);
    made.querySelector(".strength").textContent = `${this.strengths[n]} by chance`;
    this.made.set(i, made);
    return made;
  }

  compare(frame, label, members) {
    frame.querySelector("b").append(...breakable(label));
    const pictures = members.map((i) => {
      const picture = Object.assign(document.createElement("canvas"), { className: "picture", title: this.tiles.title(i) });
      this.tiles.draw(i, picture);
      return picture;
    });
    frame.querySelector("span").replaceChildren(...pictures);
  }
}
