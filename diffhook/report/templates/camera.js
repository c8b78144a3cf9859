// How the map is looked at. The map is the unit square; at zoom 1 it fills the view but for a margin.
class Camera {
  static margin = 18; // pixels, at zoom 1
  static most = 4000; // zoom

  constructor() {
    this.width = this.height = 1;
    this.home();
  }

  home() {
    Object.assign(this, { zoom: 1, x: 0.5, y: 0.5 }); // x, y: what is in the middle
  }

  get scaleX() { return (this.width - 2 * Camera.margin) * this.zoom; }
  get scaleY() { return (this.height - 2 * Camera.margin) * this.zoom; }

  toView(x, y) {
    return [(x - this.x) * this.scaleX + this.width / 2, (y - this.y) * this.scaleY + this.height / 2];
  }

  toMap(left, top) {
    return [(left - this.width / 2) / this.scaleX + this.x, (top - this.height / 2) / this.scaleY + this.y];
  }

  pan(right, down) {
    this.x = Math.min(Math.max(this.x - right / this.scaleX, 0), 1);
    this.y = Math.min(Math.max(this.y - down / this.scaleY, 0), 1);
  }

  // What lies at (left, top) stays there.
  zoomAt(factor, left, top) {
    const [x, y] = this.toMap(left, top);
    this.zoom = Math.min(Math.max(this.zoom * factor, 1), Camera.most);
    const [nowLeft, nowTop] = this.toView(x, y);
    this.pan(left - nowLeft, top - nowTop);
    if (this.zoom === 1) this.home();
  }
}
