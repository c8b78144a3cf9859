// Samples that another label may fit better, each beside typical members of its own and of the other.
class Doubts {
  constructor(data, tiles, blank) {
    Object.assign(this, { tiles, blank, ...data, noun: "samples", kinds: new Set([data.title]), made: new Map() });
    this.place = new Map(data.positions.map((i, n) => [i, n]));
  }

  // Strongest first; what is selected already needs no second look.
  items() {
    const found = this.positions.filter((i) => filters.fits(i));
    return [...found.filter((i) => !excluded.has(i)), ...found.filter((i) => excluded.has(i))];
  }

  ranks(i) {
    return [i];
  }

  of(i) {
    const made = this.made.get(i) ?? this.make(i);
    made.querySelector("ol").replaceChildren(this.tiles.of(i));
    return made;
  }

  make(i) {
    const made = this.blank.content.firstElementChild.cloneNode(true), n = this.place.get(i);
    this.compare(made.querySelector(".own"), this.own[n], "");
    this.compare(made.querySelector(".better"), this.better[n], "?");
    this.made.set(i, made);
    return made;
  }

  compare(frame, label, after) {
    frame.querySelector("b").append(...breakable(this.labels[label] + after));
    const pictures = this.typical[label].map((i) => {
      const picture = Object.assign(document.createElement("canvas"), { className: "picture", title: this.tiles.title(i) });
      this.tiles.draw(i, picture);
      return picture;
    });
    frame.querySelector("span").replaceChildren(...pictures);
  }
}
