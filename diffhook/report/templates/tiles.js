// A name with places to break it after separators, before words are cut.
const breakable = (text) => text.split(/(?<=[/_-])(?=[^/_-])/).flatMap((piece, n) => (n ? [document.createElement("wbr"), piece] : [piece]));

// A name of a thousand letters would fill the screen: its middle is left out. The whole one is its tile's title and the opened sample's.
const shortened = (name) => (name.length > 100 ? `${name.slice(0, 49)}…${name.slice(-49)}` : name);

// A sample's tile in the gallery. The page has those of the first samples; the others are made when they are shown.
class Tiles {
  constructor(data, first, blank, atlas) {
    Object.assign(this, { data, blank, atlas, made: new Map(), ranks: new WeakMap() });
    first.forEach((tile, i) => this.keep(i, tile));
    excluded.watch((changed) => changed.forEach((i) => this.refresh(i)));
  }

  of(i) {
    return this.made.get(i) ?? this.keep(i, this.make(i));
  }

  // What a small tile has no room for.
  hint(i) {
    return [this.title(i), ...(this.data.reasons[i] ?? []).map(([brief]) => brief)].join(" · ");
  }

  keep(i, tile) {
    tile.querySelector("label").title = this.hint(i);
    tile.querySelector(".look").hidden = false;
    this.made.set(i, tile);
    this.ranks.set(tile, i);
    return tile;
  }

  // The rank of the sample whose tile an element is in; undefined outside.
  rank(element) {
    return this.ranks.get(element.closest("li.tile"));
  }

  // As the exclude list has it.
  refresh(i, tile = this.made.get(i)) {
    if (!tile) return;
    tile.querySelector("input").checked = excluded.has(i);
    tile.classList.toggle("chosen", excluded.has(i));
  }

  title(i) {
    return this.data.named ? this.data.names[i] : `#${this.data.names[i]}`;
  }

  make(i) {
    const { data } = this, tile = this.blank.content.firstElementChild.cloneNode(true);
    const say = (where, words) => {
      const place = tile.querySelector(where);
      if (place) place.textContent = words;
    };
    tile.dataset.sample = data.ids[i];
    say(".id", this.title(i));
    tile.querySelector(".name")?.append(...breakable(shortened(data.names[i])));
    say(".number", data.scores[i]);
    tile.querySelector("input").setAttribute("aria-label", `Select sample ${data.names[i]}`);
    tile.querySelector(".look").setAttribute("aria-label", `Open sample ${data.names[i]}`);
    this.draw(i, tile.querySelector("canvas"));
    const reasons = data.reasons[i]?.slice(0, data.chips[i]), list = tile.querySelector(".reasons");
    if (!reasons) list.remove();
    for (const [brief, sentence] of reasons ?? []) {
      const [item, fold, chip] = ["li", "details", "summary"].map((tag) => document.createElement(tag));
      chip.className = "chip";
      chip.append(...breakable(shortened(brief)));
      fold.append(chip, ...breakable(sentence));
      item.append(fold);
      list.append(item);
    }
    this.refresh(i, tile);
    return tile;
  }

  // The sample's picture out of the sheet; a canvas without one is taken away.
  async draw(i, canvas) {
    const cell = this.data.cells[i] ?? -1, sheet = await this.atlas;
    if (cell < 0 || !sheet) return canvas.remove();
    const { cell: size, columns } = this.data.atlas;
    canvas.width = canvas.height = size;
    canvas.classList.toggle("tiny", size <= 32);
    canvas.getContext("2d").drawImage(sheet, -(cell % columns) * size, -Math.floor(cell / columns) * size);
  }
}
