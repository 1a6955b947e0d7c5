// Charts over time, by uPlot: <figure data-chart='[["jobs_in_per_s", "Jobs in"], ...]' data-format="rate">
// inside an element with data-history='{"at": [unix s, ...], "jobs_in_per_s": [...], ...}' (macro
// `chart`). A series may name where the feed has it as its third part; else that is
// overview.<key>. Each new overview.at of the feed appends a point, and MAX_POINTS are kept.
//
// The canvas is for eyes only; the figures stand in a table below it, made when it is opened.
"use strict";
(() => {
  const MAX_POINTS = 1500;
  const HEIGHT = 180;
  const drawn = new Map(); // figure -> its chart

  // A canvas needs computed colours: they are read from elements of the classes in style.css.
  const colour = (name) => {
    const probe = document.createElement("span");
    probe.className = name;
    probe.hidden = true;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };

  const optionsOf = (figure, series, width) => {
    const format = figure.dataset.format;
    const written = (value) => headrace.written(value, format);
    const clock = (_, splits, __, ___, step_s) => splits.map((at) =>
      new Date(1000 * at).toLocaleTimeString("en-GB", { timeStyle: step_s < 60 ? "medium" : "short" }));
    const axis = { stroke: colour("c-text"), grid: { stroke: colour("c-line"), width: 1 }, ticks: { show: false } };
    const line = ([, label], number) => ({
      label,
      stroke: colour(`c${(number % 4) + 1}`),
      width: 2,
      dash: number >= 4 ? [6, 4] : undefined,
      points: { show: false },
      value: (_, value) => written(value),
    });
    return {
      width,
      height: HEIGHT,
      series: [{ label: "Time", value: "{HH}:{mm}:{ss}" }, ...series.map(line)],
      axes: [{ ...axis, space: 70, size: 30, values: clock }, { ...axis, size: 64, values: (_, splits) => splits.map(written) }],
      scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
      cursor: { y: false, drag: { x: true, y: false } },
    };
  };

  const dataOf = (figure, series) => {
    const text = figure.closest("[data-history]")?.dataset.history;
    const history = text ? JSON.parse(text) : {};
    const at = history.at ?? [];
    return [at, ...series.map(([key]) => history[key] ?? at.map(() => null))].map((one) => [...one]);
  };

  const draw = (figure) => {
    const series = JSON.parse(figure.dataset.chart);
    const known = drawn.get(figure);
    const data = known?.data ?? dataOf(figure, series);
    known?.plot.destroy();
    const place = figure.querySelector(".plot");
    const plot = new uPlot(optionsOf(figure, series, place.clientWidth || 300), data, place);
    drawn.set(figure, { plot, data, series });
  };

  const writeTable = (figure) => {
    const details = figure.querySelector("details.chart-table");
    if (!details.open) return;
    const { data, series } = drawn.get(figure);
    const rows = [["Time", ...series.map(([, label]) => label)]];
    const num = data[0].length;
    for (let back = 1; back <= Math.min(num, 60); back++) {
      const time = new Date(1000 * data[0][num - back]).toLocaleTimeString("en-GB");
      rows.push([time, ...data.slice(1).map((one) => headrace.written(one[num - back], figure.dataset.format))]);
    }
    const table = document.createElement("table");
    rows.forEach((cells, number) => {
      const row = table.insertRow();
      for (const text of cells) {
        const cell = document.createElement(number === 0 ? "th" : "td");
        if (number === 0) cell.scope = "col";
        cell.textContent = text;
        row.append(cell);
      }
    });
    details.querySelector(".table-box").replaceChildren(table);
  };

  const append = (state) => {
    const at = headrace.lookup(state, "overview.at");
    const second = at === undefined ? NaN : typeof at === "number" ? at : Date.parse(at) / 1000;
    if (Number.isNaN(second)) return;
    for (const [figure, { plot, data, series }] of drawn) {
      if (!figure.isConnected) {
        plot.destroy();
        drawn.delete(figure);
        continue;
      }
      if (data[0].length && second <= data[0].at(-1)) continue;
      data[0].push(second);
      series.forEach(([key, , path], number) => {
        data[number + 1].push(headrace.lookup(state, path ?? `overview.${key}`) ?? null);
      });
      if (data[0].length > MAX_POINTS) for (const one of data) one.shift();
      plot.setData(data);
      writeTable(figure);
    }
  };

  const drawAll = () => {
    for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);
  };

  document.addEventListener("DOMContentLoaded", () => {
    drawAll();
    const sizes = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) {
        const chart = drawn.get(target.closest("figure"));
        if (chart && contentRect.width > 0 && Math.abs(chart.plot.width - contentRect.width) > 1) {
          chart.plot.setSize({ width: Math.floor(contentRect.width), height: HEIGHT });
        }
      }
    });
    for (const place of document.querySelectorAll("figure[data-chart] .plot")) sizes.observe(place);
    for (const details of document.querySelectorAll("details.chart-table")) {
      details.addEventListener("toggle", () => writeTable(details.closest("figure")));
    }
    headrace.feed.subscribe(append);
  });
  document.addEventListener("headrace:theme", () => drawn.size && drawAll());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.size && drawAll());
})();
