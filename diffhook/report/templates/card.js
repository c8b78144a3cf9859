// What the map tells of the sample under the pointer.
class Card {
  constructor(frame) {
    this.frame = frame;
    this.sample = -1;
  }

  show(i, [left, top], { width, height }) {
    if (i !== this.sample) this.fill(i);
    this.frame.hidden = false;
    const gap = 16, { offsetWidth: wide, offsetHeight: high } = this.frame;
    const right = left + gap;
    this.frame.style.left = `${right + wide > width ? Math.max(left - gap - wide, 4) : right}px`;
    this.frame.style.top = `${Math.min(Math.max(top - high / 2, 4), Math.max(height - high - 4, 4))}px`;
  }

  hide() {
    this.frame.hidden = true;
  }

  fill(i) {
    const make = (tag, className, textContent = "") => Object.assign(document.createElement(tag), { className, textContent });
    const picture = make("canvas", "picture");
    const chips = (table.reasons[i] ?? []).map(([brief]) => make("span", "chip", brief));
    this.sample = i;
    this.frame.replaceChildren(picture, make("b", "", tiles.title(i)), make("span", "", `score ${table.scores[i]}`), ...chips);
    tiles.draw(i, picture);
  }
}
