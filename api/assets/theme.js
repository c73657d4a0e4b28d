// Before anything is drawn: dark or light as chosen here, else as the system has it.
"use strict";
(() => {
  const chosen = localStorage.getItem("shoal-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
