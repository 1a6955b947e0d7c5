// What every page does besides showing: buttons that act, forms that send JSON, questions, toasts,
// copying, the theme switch. Everything is found by attribute, also in what htmx or live.js add later.
//
//   <button data-post="/v1/admin/..." data-body='{"priority": "low"}'   POST JSON with the CSRF token
//           data-confirm="Drain w1?" data-typed="w1"                    ask first; a word to type
//           data-done="Draining" data-go="/dashboard/jobs/{id}">        toast; where to go ({id}: of the answer)
//   <form data-json action="/v1/admin/keys">        the same for a form: names with dots nest, numbers and
//                                                   checkboxes keep their type, empty fields are left out
//                                                   (data-json="changes": also those left as they were).
//                                                   Event `headrace:answer` (detail: the answer) follows.
//   <section id="x" data-refresh>                   read again (htmx, this page's URL) after each action
//   <button data-copy="#id">                        copy that element's text
//
// A problem (RFC 9457) is shown beside the field it begins with, else in the form's [data-problem],
// else as a toast. Texts are only ever set as textContent.
"use strict";
var headrace = window.headrace ?? {};

headrace.csrf = () => document.querySelector("meta[name=csrf-token]").content;

headrace.toast = (text, isBad = false) => {
  const toast = document.createElement("div");
  toast.className = isBad ? "toast bad" : "toast";
  if (isBad) toast.setAttribute("role", "alert");
  const words = document.createElement("span");
  words.textContent = text;
  const close = document.createElement("button");
  close.type = "button";
  close.className = "quiet";
  close.textContent = "Close";
  close.addEventListener("click", () => toast.remove());
  toast.append(words, close);
  document.getElementById("toasts").append(toast);
  if (!isBad) setTimeout(() => toast.remove(), 8000);
};

// Send JSON; return {ok, status, data}. A session that ended leads to the login page.
headrace.send = async (method, url, body) => {
  const options = { method, headers: { "X-CSRF-Token": headrace.csrf(), Accept: "application/json" } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    const detail = "The gateway did not answer: look whether it runs, then try again.";
    return { ok: false, status: 0, data: { detail } };
  }
  const data = await response.json().catch(() => ({}));
  if (response.status === 401) location.assign("/dashboard/login");
  return { ok: response.ok, status: response.status, data };
};

// Read every [data-refresh] part again: one request a part at a time, so that an older answer never
// comes after a newer one. What is asked while one is under way is read once more after it.
const reading = new Map();
const read = async (id) => {
  do {
    reading.set(id, false);
    const part = document.getElementById(id);
    if (!part) break;
    const here = part.dataset.refresh || location.pathname + location.search;
    const swap = { source: part, target: part, select: `#${id}`, swap: "outerHTML" };
    try {
      await htmx.ajax("GET", here, swap);
    } catch {
      // htmx has said it (htmx:error); the part stays as it is.
    }
  } while (reading.get(id));
  reading.delete(id);
};

headrace.refresh = () => {
  for (const { id } of document.querySelectorAll("[data-refresh][id]")) {
    if (reading.has(id)) reading.set(id, true);
    else read(id);
  }
};

// Ask in the dialog of the layout; true when it was answered with yes.
headrace.ask = (text, { yes = "Yes", typed = "", danger = true } = {}) => {
  const find = (name) => document.getElementById(`confirm${name}`);
  const [dialog, input, button] = [find(""), find("-input"), find("-yes")];
  find("-text").textContent = text;
  find("-word").textContent = typed;
  find("-typing").hidden = !typed;
  button.textContent = yes;
  button.className = danger ? "danger" : "";
  input.value = "";
  const allow = () => { button.disabled = typed !== "" && input.value !== typed; };
  allow();
  input.oninput = allow;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
};

headrace.act = async (button) => {
  const { post, confirm, typed, body, done, go, method } = button.dataset;
  const label = button.textContent.trim();
  const danger = button.classList.contains("danger");
  if (confirm && !(await headrace.ask(confirm, { yes: label, typed, danger }))) return;
  button.disabled = true;
  const answer = await headrace.send(method ?? "POST", post, body ? JSON.parse(body) : {});
  button.disabled = false;
  if (!answer.ok) return headrace.toast(answer.data.detail ?? `${label}: refused (${answer.status}).`, true);
  if (go) return location.assign(go.replace("{id}", encodeURIComponent(answer.data.id ?? "")));
  headrace.toast(done ?? `${label}: done.`);
  headrace.refresh();
};

// A script's numbers are exact up to 2^53: one beyond would become another, without a word.
headrace.exact = (name, number) => {
  if (Number.isInteger(number) && !Number.isSafeInteger(number)) {
    throw new RangeError(`${name}: larger than a browser can send exactly; use the API for it.`);
  }
  return number;
};

headrace.valueOf = (field) => {
  const { name, value } = field;
  switch (field.dataset.type ?? field.type) {
    case "checkbox":
      return field.checked;
    case "number":
      return headrace.exact(name, Number(value));
    case "lines":
      return value.split("\n").filter((line) => line !== "");
    case "json":
      try {
        return JSON.parse(value, (_, part) => headrace.exact(name, part));
      } catch (error) {
        throw error instanceof RangeError ? error : new RangeError(`${name}: must hold JSON; correct it.`);
      }
    default:
      return value;
  }
};

headrace.isUnchanged = (field) => {
  if (field.type === "checkbox") return field.checked === field.defaultChecked;
  if (field.options) return [...field.options].every((one) => one.selected === one.defaultSelected);
  return field.value === field.defaultValue;
};

// The form's fields as JSON. data-type: number, json (parsed), lines (a list), or nothing. Throws a
// RangeError that begins with the field's name for what cannot be sent.
headrace.formData = (form) => {
  const body = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled || field.name === "csrf_token") continue;
    if (field.type === "radio" && !field.checked) continue;
    if (field.value === "" && field.type !== "checkbox") continue;
    if (form.dataset.json === "changes" && headrace.isUnchanged(field)) continue;
    const value = headrace.valueOf(field);
    const path = field.name.split(".");
    const last = path.pop();
    const place = path.reduce((inside, name) => (inside[name] ??= {}), body);
    place[last] = value;
  }
  return body;
};

headrace.clearProblems = (form) => {
  for (const text of form.querySelectorAll(".field-problem")) text.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  const place = form.querySelector("[data-problem]");
  if (place) place.hidden = true;
};

// Our problems begin with the field's path ("sampling.top_p: must be ..."), or name it first; a form
// whose fields have other names says which by `nameOf(path)`.
headrace.showProblem = (form, detail, nameOf = (path) => path) => {
  const path = /^\w+([.[]\w+\]?)*/.exec(detail)?.[0] ?? "";
  const field = [...form.elements].find((one) => one.name && one.name === nameOf(path));
  if (field) {
    const text = document.createElement("span");
    text.className = "field-problem";
    text.id = `problem-of-${field.name}`;
    text.textContent = detail;
    field.after(text);
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", text.id);
    field.focus();
    return;
  }
  const place = form.querySelector("[data-problem]");
  if (!place) return headrace.toast(detail, true);
  place.textContent = detail;
  place.hidden = false;
};

headrace.submit = async (form, button) => {
  headrace.clearProblems(form);
  const { confirm, typed, done, go, method } = form.dataset;
  const label = button?.textContent.trim() ?? "Send";
  let body;
  try {
    body = headrace.formData(form);
  } catch (error) {
    return headrace.showProblem(form, error.message);
  }
  if (confirm && !(await headrace.ask(confirm, { yes: label, typed }))) return;
  if (button) button.disabled = true;
  const answer = await headrace.send(method ?? "POST", form.action, body);
  if (button) button.disabled = false;
  if (!answer.ok) return headrace.showProblem(form, answer.data.detail ?? `Refused (${answer.status}).`);
  if (go) return location.assign(go.replace("{id}", encodeURIComponent(answer.data.id ?? "")));
  form.dispatchEvent(new CustomEvent("headrace:answer", { detail: answer.data, bubbles: true }));
  headrace.toast(done ?? `${label}: done.`);
  headrace.refresh();
};

headrace.copy = async (button) => {
  const source = document.querySelector(button.dataset.copy);
  const text = "value" in source ? source.value : source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    headrace.toast("Copied.");
  } catch {
    source.focus();
    source.select?.();
    headrace.toast("The browser did not allow it: the text is selected, copy it by hand.", true);
  }
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-post], button[data-copy]");
  if (!button) return;
  event.preventDefault();
  if (button.dataset.post) headrace.act(button);
  else headrace.copy(button);
});

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-json]")) return;
  event.preventDefault();
  headrace.submit(event.target, event.submitter);
});

// What htmx sends carries the token; what is refused is said and not put into the page.
document.addEventListener("htmx:config:request", (event) => {
  event.detail.ctx.request.headers["X-CSRF-Token"] = headrace.csrf();
});
document.addEventListener("htmx:before:response", (event) => {
  const { response } = event.detail.ctx;
  if (response.status < 400) return;
  event.preventDefault();
  if (response.status === 401) return location.assign("/dashboard/login");
  response.raw.clone().text().then((text) => {
    let detail;
    try {
      detail = JSON.parse(text).detail;
    } catch {
      const page = new DOMParser().parseFromString(text, "text/html");
      detail = page.querySelector("[data-problem], [role=alert]")?.textContent;
    }
    headrace.toast(detail ?? `Refused (${response.status}).`, true);
  });
});
document.addEventListener("htmx:error", () => {
  headrace.toast("The gateway did not answer: look whether it runs, then try again.", true);
});

document.addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme-switch");
  const root = document.documentElement;
  const show = () => {
    const theme = root.dataset.theme ?? "auto";
    button.textContent = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}. Change it`);
    document.dispatchEvent(new CustomEvent("headrace:theme"));
  };
  button.addEventListener("click", () => {
    const next = { auto: "dark", dark: "light", light: "auto" }[root.dataset.theme ?? "auto"];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("headrace-theme", next);
    } catch {
      // Storage may be forbidden: the choice lasts as long as the page.
    }
    show();
  });
  show();
});
