// Keeps one page of a list in the document and the rest out of it, so that thousands of items cost nothing.
class Pager {
  constructor(frame) {
    this.frame = frame;
    this.list = document.getElementById(frame.dataset.list);
    this.size = Number(frame.dataset.size);
    this.items = [...this.list.children];
    this.shown = this.items;
    this.element = (item) => item;
    this.page = 0;
    this.where = frame.querySelector(".where");
    this.previous = frame.querySelector(".previous");
    this.next = frame.querySelector(".next");
    this.previous.addEventListener("click", () => this.turn(-1));
    this.next.addEventListener("click", () => this.turn(1));
    frame.hidden = false;
    this.render();
    if (frame.dataset.print === "all") {
      addEventListener("beforeprint", () => this.list.replaceChildren(...this.shown.map(this.element)));
      addEventListener("afterprint", () => this.render());
    }
  }

  // Items may be made when they are shown: element is what makes one.
  show(items, element = (item) => item) {
    Object.assign(this, { shown: items, element });
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
    if (this.list.getBoundingClientRect().top < 0) this.frame.scrollIntoView({ block: "start" });
  }

  render() {
    const from = this.page * this.size, total = this.shown.length;
    const part = this.shown.slice(from, from + this.size).map(this.element);
    this.list.replaceChildren(...part);
    const range = part.length < total ? `${from + 1}–${from + part.length} of ${total.toLocaleString("en")}` : `${total}`;
    this.where.textContent = `${range} ${total === 1 ? this.frame.dataset.noun.replace(/s$/, "") : this.frame.dataset.noun}`;
    this.previous.disabled = this.page === 0;
    this.next.disabled = from + this.size >= total;
    this.frame.classList.toggle("single", total <= this.size);
  }
}
const pagers = new Map([...document.querySelectorAll(".pager")].map((frame) => [frame.dataset.list, new Pager(frame)]));
