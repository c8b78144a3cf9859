// Which samples have room for a picture at which zoom. Pictures never cover each other: where two would, the one
// of higher rank is shown, and the other stays a dot until one comes nearer.
class Crowd {
  static perDoubling = 2; // levels of zoom
  static last = Math.ceil(Math.log2(Camera.most) * Crowd.perDoubling); // there everyone has a picture

  constructor(x, y) {
    this.x = x;
    this.y = y;
    this.level = new Uint8Array(x.length); // from which on a sample has a picture
  }

  static levelAt(zoom) {
    return Math.floor(Math.log2(zoom) * Crowd.perDoubling + 1e-9);
  }

  // size(zoom): a picture's side in pixels; the larger of a map's sides is so many times that at zoom 1.
  arrange(members, camera, size) {
    this.level.fill(Crowd.last);
    const shown = [];
    let waiting = members;
    for (let level = 0; level < Crowd.last && waiting.length; level++) {
      const zoom = 2 ** (level / Crowd.perDoubling);
      const apartX = size(zoom) / (camera.scaleX / camera.zoom * zoom);
      const apartY = size(zoom) / (camera.scaleY / camera.zoom * zoom);
      const taken = new Map(); // cells of that size hold one picture each
      for (const i of shown) taken.set(this.cell(i, apartX, apartY), i);
      const left = [];
      for (const i of waiting) {
        if (this.hasRoom(i, taken, apartX, apartY)) {
          taken.set(this.cell(i, apartX, apartY), i);
          this.level[i] = level;
          shown.push(i);
        } else left.push(i);
      }
      waiting = left;
    }
  }

  cell(i, apartX, apartY, right = 0, down = 0) {
    return (Math.floor(this.y[i] / apartY) + down) * 1e7 + Math.floor(this.x[i] / apartX) + right;
  }

  hasRoom(i, taken, apartX, apartY) {
    for (let down = -1; down <= 1; down++) {
      for (let right = -1; right <= 1; right++) {
        const other = taken.get(this.cell(i, apartX, apartY, right, down));
        if (other === undefined) continue;
        if (Math.abs(this.x[other] - this.x[i]) < apartX && Math.abs(this.y[other] - this.y[i]) < apartY) return false;
      }
    }
    return true;
  }
}
