// The theme that was chosen, set before the first paint: this script blocks, and is all that does.
// No choice: the system's (style.css follows prefers-color-scheme by `color-scheme`).
"use strict";
try {
  const theme = localStorage.getItem("headrace-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden: the system's theme it is.
}
