// The bar that counts what is selected and hands it out.
class SelectionBar {
  constructor(bar) {
    this.bar = bar;
    this.copyLabel = this.find("copy").textContent;
    const on = (name, act) => this.find(name).addEventListener("click", act);
    on("undo", () => excluded.undo());
    on("select-none", () => excluded.clear());
    on("copy", () => this.copy());
    on("download", () => this.download());
    excluded.watch(() => this.tell());
    bar.hidden = false;
  }

  find(name) {
    return document.getElementById(name);
  }

  tell() {
    const many = excluded.names().length;
    const told = `${many.toLocaleString("en")} ${many === 1 ? "sample" : "samples"} selected`;
    this.find("selection-count").textContent = many ? told : "Nothing selected";
    for (const name of ["select-none", "copy", "download"]) this.find(name).disabled = !many;
    this.find("undo").disabled = !excluded.past.length;
    this.bar.classList.toggle("active", many > 0);
    this.find("next-run").hidden = !many;
  }

  async copy() {
    const button = this.find("copy");
    try {
      await navigator.clipboard.writeText(excluded.list());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here: download";
    }
    setTimeout(() => { button.textContent = this.copyLabel; }, 2000);
  }

  download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([excluded.list()], { type: "text/plain" }));
    link.download = "exclude.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
