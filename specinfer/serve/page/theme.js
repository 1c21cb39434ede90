// Light, dark or as the system has it; set before the first paint, so that nothing flashes.
(() => {
  const stored = localStorage.getItem("specinfer.theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
