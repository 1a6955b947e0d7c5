// Live numbers: one stream of the fleet's state (/v1/admin/feed) fills every element that asks.
//
// The feed begins with `state` (everything) and goes on with `delta`s (RFC 7396: objects merge, null
// deletes). One tab of a browser holds the stream and passes it on to the others, because a browser
// opens six connections to a host and no more. A hidden tab that nobody listens to still counts: what
// it shows when it is looked at again is current.
//
//   <b data-live="overview.tokens_per_s" data-format="rate">   a path; names in it may hold dots
//   <tbody data-live-rows="workers"><template>...              one row a key of that section:
//     <tr data-live-row="KEY"><td data-field="kv_used" data-format="percent">   a path inside the row
//     in the template KEY is empty; in its attributes {key} becomes the key, {=NAME} the row's value,
//     and an element with data-key says the key
//   <div data-live-list="overview.alarms"><template>...        one child an item of that list
//   <p data-live-empty="workers">                              shown while there is none
//   <time data-ago datetime="...">                             counted on every second
//
// Formats: rate, count, bytes, seconds, ms, percent, watts, celsius, time, text, state (a badge), bar (<progress>),
// shown/absent (the element is hidden while the value is false / true). Values are
// only ever set as textContent or as the attributes named here. After MAX_SILENCE_MS without an event
// the figures are marked stale.
"use strict";
(() => {
  const URL = "/v1/admin/feed";
  const MAX_SILENCE_MS = 5000;
  const GRACE_MS = 8000;
  const RETRY_MS = [1000, 2000, 5000, 10000, 30000];
  const NOTHING = "–";

  const feed = (headrace.feed = { state: null, listeners: new Set() });
  feed.subscribe = (listener) => {
    feed.listeners.add(listener);
    if (feed.state) listener(feed.state);
  };

  // -- figures: the same rules as frame.py -----------------------------------------------------

  const fixed = (value, digits, useGrouping = false) =>
    value.toLocaleString("en-US", {
      minimumFractionDigits: digits,
      maximumFractionDigits: digits,
      roundingMode: "halfEven", // as Python does
      useGrouping,
    });
  const seconds = (value) => {
    if (value < 1) return `${fixed(1000 * value, 0)} ms`;
    if (value < 60) return `${fixed(value, 1)} s`;
    const whole = Math.floor(value);
    const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
    const [size, name, small, smallName] = units.find(([unit]) => whole >= unit);
    return `${Math.floor(whole / size)} ${name} ${Math.floor((whole % size) / small)} ${smallName}`;
  };
  const bytes = (value) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    while (Math.abs(value) >= 1024 && units.length > 1) {
      value /= 1024;
      units.shift();
    }
    return units[0] === "B" ? `${fixed(value, 0)} B` : `${fixed(value, 1)} ${units[0]}`;
  };
  const formats = (headrace.formats = {
    rate: (value) => fixed(value, Math.abs(value) < 100 ? 1 : 0, true),
    count: (value) => fixed(value, 0, true),
    percent: (value) => `${fixed(100 * value, 0)} %`,
    ms: (value) => {
      if (value >= 1000) return seconds(value / 1000);
      return `${fixed(value, value < 10 ? 1 : 0)} ms`;
    },
    seconds,
    bytes,
    watts: (value) => `${fixed(value, 0)} W`,
    celsius: (value) => `${fixed(value, 0)} °C`,
    text: (value) => String(value),
    state: (value) => String(value),
    time: (value) => ago(value),
  });

  const ago = (text) => {
    const age = Math.trunc((Date.now() - Date.parse(text)) / 1000);
    if (Number.isNaN(age)) return NOTHING;
    if (age === 0) return "now";
    const written = Math.abs(age) < 60 ? `${Math.abs(age)} s` : seconds(Math.abs(age));
    return age < 0 ? `in ${written}` : `${written} ago`;
  };

  headrace.written = (value, format) => {
    if (value === null || value === undefined || value === "") return NOTHING;
    const isNumber = typeof value === "number";
    const wantsNumber = !["text", "state", "time"].includes(format ?? "text");
    if (wantsNumber && !isNumber) return String(value);
    return (formats[format] ?? formats.text)(value);
  };

  // -- paths and patches -----------------------------------------------------------------------

  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const has = (object, name) => Object.prototype.hasOwnProperty.call(object, name);

  // Find a path whose names may hold dots themselves (hosts do): the longest name that is there.
  headrace.lookup = (value, path) => {
    if (path === "") return value;
    if (!isObject(value)) return undefined;
    if (has(value, path)) return value[path];
    for (let end = path.lastIndexOf("."); end > 0; end = path.lastIndexOf(".", end - 1)) {
      const name = path.slice(0, end);
      if (has(value, name)) return headrace.lookup(value[name], path.slice(end + 1));
    }
    return undefined;
  };

  const merged = (old, patch) => {
    if (!isObject(patch)) return patch;
    const result = isObject(old) ? { ...old } : {};
    for (const [name, value] of Object.entries(patch)) {
      if (name === "__proto__") continue;
      if (value === null) delete result[name];
      else result[name] = merged(result[name], value);
    }
    return result;
  };

  // -- showing ---------------------------------------------------------------------------------

  const put = (element, value) => {
    const format = element.dataset.format ?? "text";
    if (format === "bar") element.value = typeof value === "number" ? value : 0;
    else if (format === "shown") element.hidden = !value;
    else if (format === "absent") element.hidden = Boolean(value);
    else {
      const text = headrace.written(value, format);
      if (element.textContent !== text) element.textContent = text;
      if (format === "state") element.dataset.state = value ?? "";
      if (format === "time" && value) element.dateTime = value;
    }
  };

  const fill = (root, value) => {
    if (root.dataset.field !== undefined) put(root, headrace.lookup(value, root.dataset.field));
    for (const element of root.querySelectorAll("[data-field]")) {
      put(element, headrace.lookup(value, element.dataset.field));
    }
  };

  // Copy the template's element and put the row's key and values into its attributes, each once: in
  // an address they are encoded, in data-body they are parts of JSON texts, elsewhere they are text.
  const ADDRESSES = ["href", "action", "data-post", "data-go"];
  const written = (attribute, value) => {
    if (ADDRESSES.includes(attribute)) return encodeURIComponent(value);
    return attribute === "data-body" ? JSON.stringify(value).slice(1, -1) : value;
  };
  const copyOf = (template, key, item) => {
    const root = template.content.firstElementChild.cloneNode(true);
    for (const element of [root, ...root.querySelectorAll("*")]) {
      if (element.dataset.key !== undefined) element.textContent = key;
      for (const { name, value } of [...element.attributes]) {
        const filled = value.replace(/\{(?:key|=(\w+))\}/g, (_, field) =>
          written(name, String(field ? item[field] ?? "" : key)));
        if (filled !== value) element.setAttribute(name, filled);
      }
    }
    return root;
  };

  // A row that the server wrote may be newer than the feed's state: it has GRACE_MS to appear there.
  const known = new WeakMap(); // row -> ms until which it may be missing in the feed
  const isGone = (row) => {
    if (!known.has(row)) known.set(row, performance.now() + GRACE_MS);
    return performance.now() > known.get(row);
  };

  const showRows = (place, section) => {
    const template = place.querySelector("template");
    const rows = new Map();
    for (const row of place.querySelectorAll("[data-live-row]")) rows.set(row.dataset.liveRow, row);
    const keys = Object.keys(section).sort();
    for (const [key, row] of rows) {
      if (has(section, key)) known.set(row, 0);
      else if (isGone(row)) row.remove();
    }
    let last = null;
    for (const key of keys) {
      let row = rows.get(key);
      if (!row && template) {
        row = copyOf(template, key, section[key]);
        row.dataset.liveRow = key;
        known.set(row, 0);
        if (last) last.after(row);
        else place.prepend(row);
      }
      if (!row) continue;
      fill(row, section[key]);
      last = row;
    }
  };

  const showList = (place, items) => {
    const template = place.querySelector("template");
    const text = JSON.stringify(items);
    if (!template || place.dataset.shown === text) return;
    place.dataset.shown = text;
    for (const old of [...place.children]) if (old !== template) old.remove();
    for (const item of items) {
      const child = copyOf(template, "", item);
      fill(child, item);
      if (item.severity) child.dataset.severity = item.severity;
      place.append(child);
    }
  };

  const showAlarms = (alarms) => {
    const badge = document.getElementById("alarm-badge");
    if (!badge) return;
    badge.hidden = alarms.length === 0;
    badge.dataset.severity = alarms.some((alarm) => alarm.severity === "page") ? "page" : "warn";
    const text = `${alarms.length} ${alarms.length === 1 ? "alarm" : "alarms"}`;
    if (badge.textContent !== text) badge.textContent = text;
  };

  const show = (state) => {
    for (const element of document.querySelectorAll("[data-live]")) {
      put(element, headrace.lookup(state, element.dataset.live));
    }
    for (const place of document.querySelectorAll("[data-live-rows]")) {
      const section = headrace.lookup(state, place.dataset.liveRows);
      if (isObject(section)) showRows(place, section);
    }
    for (const place of document.querySelectorAll("[data-live-list]")) {
      showList(place, headrace.lookup(state, place.dataset.liveList) ?? []);
    }
    for (const element of document.querySelectorAll("[data-live-empty]")) {
      const found = headrace.lookup(state, element.dataset.liveEmpty) ?? {};
      element.hidden = Object.keys(found).length > 0;
    }
    showAlarms(headrace.lookup(state, "overview.alarms") ?? []);
  };

  let lastMs = 0;
  const say = (condition) => {
    const sign = document.getElementById("feed");
    document.body.classList.toggle("stale", condition !== "live");
    if (!sign || sign.dataset.feed === condition) return;
    sign.dataset.feed = condition;
    sign.textContent = { live: "live", stale: "figures are old", lost: "connection lost", connecting: "connecting" }[condition];
  };

  const take = (state) => {
    feed.state = state;
    lastMs = performance.now();
    say("live");
    show(state);
    for (const listener of feed.listeners) listener(state);
  };

  // -- the stream ------------------------------------------------------------------------------

  let channel = null; // to the other tabs; null: this tab has a stream of its own
  let source = null;
  let numFailures = 0;

  const pass = (state) => {
    take(state);
    channel?.postMessage({ state });
  };

  const open = () => {
    source = new EventSource(URL);
    source.addEventListener("state", (event) => {
      numFailures = 0;
      pass(JSON.parse(event.data));
    });
    source.addEventListener("delta", (event) => pass(merged(feed.state, JSON.parse(event.data))));
    source.onerror = () => {
      say("lost");
      if (source.readyState !== EventSource.CLOSED) return; // it connects again by itself
      const wait = RETRY_MS[Math.min(numFailures++, RETRY_MS.length - 1)];
      setTimeout(open, wait);
    };
  };

  const begin = () => {
    setInterval(() => {
      for (const time of document.querySelectorAll("time[data-ago]")) {
        const text = ago(time.dateTime);
        if (time.textContent !== text) time.textContent = text;
      }
      if (lastMs && performance.now() - lastMs > MAX_SILENCE_MS && source?.readyState !== EventSource.CONNECTING) say("stale");
    }, 1000);
    if (!navigator.locks || !window.BroadcastChannel) return open();
    channel = new BroadcastChannel("headrace-feed");
    channel.onmessage = ({ data }) => {
      if (data.state) take(data.state);
      else if (data.ask && source && feed.state) channel.postMessage({ state: feed.state });
    };
    channel.postMessage({ ask: true });
    // Held as long as the tab lives; the next tab in line takes over when it is gone.
    navigator.locks.request("headrace-feed", () => {
      open();
      return new Promise(() => {});
    });
  };

  // Parts that htmx brings are filled at once, not with the next event.
  document.addEventListener("htmx:after:swap", () => feed.state && show(feed.state));
  document.addEventListener("DOMContentLoaded", begin);
})();
