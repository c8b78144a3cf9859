// One method's answers, or all side by side.
for (const choice of document.querySelectorAll("[data-switch]")) {
  const section = choice.closest("section");
  const apply = () => { section.dataset.method = choice.querySelector("input:checked").value; };
  choice.addEventListener("change", apply);
  choice.hidden = false;
  apply();
}
