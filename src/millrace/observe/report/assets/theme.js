"use strict";
// Light, dark or as the system says; remembered where the browser lets a local file remember anything.
(() => {
  const modes = ["auto", "light", "dark"];
  const signs = { auto: "◐ auto", light: "○ light", dark: "● dark" };
  const remembered = () => { try { return localStorage.getItem("millrace-theme"); } catch { return null; } };
  const remember = (mode) => { try { localStorage.setItem("millrace-theme", mode); } catch { /* not allowed here */ } };
  const apply = (mode) => { document.documentElement.dataset.theme = mode; };
  let mode = modes.includes(remembered()) ? remembered() : "auto";
  apply(mode);
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      button.textContent = signs[mode];
      button.setAttribute("aria-label", `Colours: ${mode === "auto" ? "as the system" : mode}`);
    };
    button.addEventListener("click", () => {
      mode = modes[(modes.indexOf(mode) + 1) % modes.length];
      remember(mode);
      apply(mode);
      name();
    });
    name();
  });
})();
