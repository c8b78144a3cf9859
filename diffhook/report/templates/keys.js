// Keys of whoever is in the list of samples or its filters, or has lost the focus to a new list; elsewhere letters mean nothing.
class Keys {
  constructor(frame) {
    this.sheet = gallery.sheet;
    this.pointed = null;
    this.sheet.addEventListener("pointermove", (event) => { this.pointed = event.target.closest("li.tile"); });
    this.sheet.addEventListener("pointerleave", () => { this.pointed = null; });
    document.addEventListener("keydown", (event) => {
      if (event.target === document.body || frame.contains(event.target)) this.press(event);
    });
    this.help = document.getElementById("keyboard");
    this.help.hidden = false;
  }

  press(event) {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (target.matches("select, input:not([type=checkbox])") || target.closest("dialog, #stage")) return;
    const tile = target.closest("#gallery li.tile");
    const acts = {
      n: () => review?.turn(1),
      p: () => review?.turn(-1),
      u: () => excluded.undo(),
      x: () => this.toggle(this.pointed?.isConnected ? this.pointed : tile), // the mouse first, until an arrow key is used
      "?": () => { this.help.open = !this.help.open; },
      ...(tile && {
        ArrowLeft: () => this.move(tile, -1),
        ArrowRight: () => this.move(tile, 1),
        ArrowUp: () => this.move(tile, -this.across()),
        ArrowDown: () => this.move(tile, this.across()),
        ...(target.matches("input") && { Enter: () => gallery.open(tile) }),
      }),
    };
    if (!(key in acts)) return;
    event.preventDefault();
    acts[key]();
  }

  toggle(tile) {
    tile?.querySelector("input").click();
  }

  get tiles() {
    return [...this.sheet.querySelectorAll("li.tile")];
  }

  // Tiles of a row.
  across() {
    const top = (tile) => tile.getBoundingClientRect().top, [first, ...others] = this.tiles;
    const next = others.findIndex((tile) => top(tile) > top(first) + 8);
    return next < 0 ? 1 : next + 1;
  }

  move(tile, by) {
    const { tiles } = this;
    this.pointed = null;
    tiles[tiles.indexOf(tile) + by]?.querySelector("input").focus();
  }
}
if (gallery) new Keys(document.getElementById("review"));
