// Keeps one page of a list in the document and the rest out of it, so that thousands of items cost nothing.
class Pager {
  constructor(list, frames) {
    const [{ dataset }] = frames;
    Object.assign(this, { list, frames, noun: dataset.noun, size: Number(dataset.size) });
    this.items = [...this.list.children];
    this.shown = this.items;
    this.element = (item) => item;
    this.page = 0;
    for (const frame of frames) {
      frame.querySelector(".previous").addEventListener("click", () => this.turn(-1));
      frame.querySelector(".next").addEventListener("click", () => this.turn(1));
      frame.hidden = false;
    }
    this.render();
    if (dataset.print === "all") {
      addEventListener("beforeprint", () => this.list.replaceChildren(...this.shown.map(this.element)));
      addEventListener("afterprint", () => this.render());
    }
  }

  // Items may be made when they are shown: element is what makes one.
  show(items, element = (item) => item, noun = this.frames[0].dataset.noun) {
    Object.assign(this, { shown: items, element, noun });
    this.page = 0;
    this.render();
  }

  resize(size) {
    this.size = size;
    this.page = 0;
    this.render();
  }

  turn(by) {
    this.page += by;
    this.render();
    if (this.list.getBoundingClientRect().top < 0) this.frames[0].scrollIntoView({ block: "start" });
  }

  render() {
    const from = this.page * this.size, total = this.shown.length;
    const part = this.shown.slice(from, from + this.size).map(this.element);
    this.list.replaceChildren(...part);
    const range = part.length < total ? `${from + 1}–${from + part.length} of ${total.toLocaleString("en")}` : `${total}`;
    for (const frame of this.frames) {
      const find = (where) => frame.querySelector(where);
      find(".where").textContent = `${range} ${total === 1 ? this.noun.replace(/s$/, "") : this.noun}`;
      find(".previous").disabled = this.page === 0;
      find(".next").disabled = from + this.size >= total;
      frame.classList.toggle("single", total <= this.size);
    }
  }
}
const pagers = new Map();
for (const list of new Set([...document.querySelectorAll(".pager")].map((frame) => frame.dataset.list))) {
  pagers.set(list, new Pager(document.getElementById(list), [...document.querySelectorAll(`.pager[data-list="${list}"]`)]));
}
