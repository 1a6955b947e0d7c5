// Show a new key once: it is in the answer to its creation and nowhere else.
"use strict";
document.addEventListener("headrace:answer", (event) => {
  if (event.target.id !== "new-key") return;
  const secret = document.getElementById("made-secret");
  secret.textContent = event.detail.key;
  document.getElementById("made-key").hidden = false;
  event.target.reset();
  secret.focus();
});
