// The pages of dead letters: a replay of many, counted first, and the progress of those that run.
//
// What is replayed is the search of the page, or the letters that are ticked. The count is sent back
// with the order, so that nobody replays more than was counted.
"use strict";

(() => {
  const PAGE = "/dashboard/dead-letters";
  //: Milliseconds between looks at replays that run.
  const LOOK_MS = 2000;

  const ticked = () => [...document.querySelectorAll("[data-tick]:checked")].map((one) => one.dataset.tick);

  const replay = (panel) => {
    const find = (name) => document.getElementById(`replay-${name}`);
    const [which, rate, count, run, result] = ["which", "rate", "count", "run", "result"].map(find);
    let expect = null;
    let body = null;
    const forget = () => {
      expect = body = null;
      run.hidden = true;
      result.textContent = "";
    };
    const chosen = () => {
      if (which.value === "selection") return { filter: { job_ids: ticked() } };
      return { filter: JSON.parse(panel.dataset.filter), all: "all" in panel.dataset };
    };
    const send = async (more) => {
      const answer = await headrace.send("POST", "/v1/admin/replays", { ...body, ...more });
      if (!answer.ok) headrace.toast(answer.data.detail ?? `Refused (${answer.status}).`, true);
      return answer;
    };
    for (const one of [which, rate]) one.addEventListener("change", forget);
    document.addEventListener("change", (event) => {
      if (event.target.matches("[data-tick]")) forget();
    });
    count.addEventListener("click", async () => {
      forget();
      if (!rate.reportValidity()) return;
      body = { ...chosen(), rate_per_min: Number(rate.value) };
      if (body.filter.job_ids?.length === 0) {
        result.textContent = "Tick letters in the list first.";
        return;
      }
      const answer = await send({ dry_run: true });
      if (!answer.ok) return;
      expect = answer.data.num_matched;
      result.textContent = `${expect} ${expect === 1 ? "letter" : "letters"} to replay.`;
      run.textContent = `Replay: ${expect}`;
      run.hidden = expect === 0;
    });
    run.addEventListener("click", async () => {
      const question = `Make ${expect} new jobs, ${body.rate_per_min} a minute? What is still poison kills engines again.`;
      if (!(await headrace.ask(question, { yes: run.textContent, typed: String(expect) }))) return;
      run.disabled = true;
      const answer = await send({ expect });
      run.disabled = false;
      forget();
      if (!answer.ok) return;
      if (location.pathname === PAGE && !location.search) return headrace.refresh();
      location.assign(`${PAGE}#replays`);
    });
    forget();
  };

  // Not while something in the list has the focus or a question is open: it would be lost.
  const look = () => {
    const list = document.getElementById("replays");
    const isBusy = document.querySelector("dialog[open]") || list?.contains(document.activeElement);
    if (list && "running" in list.dataset && !isBusy && !document.hidden) headrace.refresh();
  };

  document.addEventListener("DOMContentLoaded", () => {
    const panel = document.getElementById("replay");
    if (panel) replay(panel);
    if (document.getElementById("replays")) setInterval(look, LOOK_MS);
  });
})();
